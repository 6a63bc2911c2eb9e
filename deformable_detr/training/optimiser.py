"""What a recipe asks of the optimiser: rates, frozen parts, averaged weights.
Chapters training, recipe."""

import math

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from deformable_detr.training.config import TrainConfig

GROUPS = ("rest", "backbone", "sampling")  # in the optimiser's order


def group_of(name: str) -> str:
    """Which of GROUPS a parameter belongs to: what decides where to sample learns slowly."""
    if name.startswith("backbone."):
        return "backbone"
    slow = ("reference_points", "sampling_offsets")
    return "sampling" if any(word in name for word in slow) else "rest"


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """Trainable parameters by learning rate, for a torch optimiser (the official code's rates)."""
    rates = {
        "rest": config.lr,
        "backbone": config.backbone_lr,
        "sampling": config.lr * config.sampling_lr_factor,
    }
    groups: dict[str, list[Tensor]] = {name: [] for name in GROUPS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[group_of(name)].append(parameter)
    return [
        {"params": parameters, "lr": rates[name], "initial_lr": rates[name]}
        for name, parameters in groups.items()
        if parameters
    ]


def lr_factor(step: int, total_steps: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """What every learning rate is multiplied by at a step, counted from 0."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "step":
        return warmup * (1.0 if step // steps_per_epoch < config.drop_epoch else 0.1)
    return warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / total_steps)))


def state_by_name(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, dict]:
    """What an optimiser remembers of each parameter, by its name in the model: unlike torch's own
    `state_dict`, which counts parameters, it survives a change of their order."""
    return {
        name: optimizer.state[parameter]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


def load_state_by_name(
    optimizer: torch.optim.Optimizer, model: nn.Module, state: dict[str, dict]
) -> None:
    """Give an optimiser back what `state_by_name` took; ValueError for what it does not train."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[p] for group in optimizer.param_groups for p in group["params"]]
    if unknown := state.keys() - set(order):
        raise ValueError(f"the optimiser has no parameter {min(unknown)}")
    numbered = {number: state[name] for number, name in enumerate(order) if name in state}
    groups = optimizer.state_dict()["param_groups"]  # the rates are the recipe's
    optimizer.load_state_dict({"state": numbered, "param_groups": groups})


def freeze(backbone: nn.Module, parts: tuple[str, ...]) -> None:
    """Have a backbone's parts learn, but for those named, such as "conv1" or "layer1" of a ResNet,
    "stem" or "stage1" of a DAT.

    Raises ValueError for a part that the backbone does not have.
    """
    children = [name for name, _ in getattr(backbone, "body", backbone).named_children()]
    unknown = set(parts) - set(children)
    if unknown:
        raise ValueError(f"the backbone has no {sorted(unknown)} to freeze; it has {children}")
    for name, parameter in getattr(backbone, "body", backbone).named_parameters():
        parameter.requires_grad_(name.split(".")[0] not in parts)


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of a model for the exponential moving average of its weights and buffers.

    After n updates it keeps min(decay, (1 + n) / (10 + n)) of itself, as TensorFlow's does, so that
    it does not hold on to the first, random weights.
    """

    def average(mean: Tensor, new: Tensor, updates: Tensor) -> Tensor:
        if not mean.is_floating_point():  # batch norm's count of batches
            return new
        return mean.lerp(new, (9 / (10 + updates)).clamp(min=1 - decay).to(mean))

    return AveragedModel(model, avg_fn=average, use_buffers=True)
