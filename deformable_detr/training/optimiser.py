"""What a recipe asks of the optimiser: rates, frozen parts and averaged weights."""

import math

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from deformable_detr.training.config import TrainConfig


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """Trainable parameters by learning rate: the backbone's, those that decide where to sample,
    and the rest."""
    slow = ("reference_points", "sampling_offsets")
    rates = {
        "rest": config.lr,
        "backbone": config.backbone_lr,
        "sampling": config.lr * config.sampling_lr_factor,
    }
    groups: dict[str, list[Tensor]] = {name: [] for name in rates}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = "sampling" if any(word in name for word in slow) else "rest"
        groups["backbone" if name.startswith("backbone.") else kind].append(parameter)
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


def freeze(backbone: nn.Module, parts: tuple[str, ...]) -> None:
    """Have a ResNet's parts learn, but for those named, such as "conv1" or "layer1"."""
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
