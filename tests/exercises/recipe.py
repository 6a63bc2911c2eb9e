"""Checkers of chapter recipe, "The recipe"."""

import copy
import math

import torch
from torch import nn

from deformable_detr import Batch, DeformableDETR, DeformableDETRConfig
from deformable_detr.exercises import checks, expect
from deformable_detr.losses.criterion import SetCriterion
from deformable_detr.structures import Target
from deformable_detr.training.config import TrainConfig
from deformable_detr.training.optimiser import averaged, parameter_groups


def _detector():
    """A detector of a few thousand parameters beside its backbone, its first layers frozen."""
    torch.manual_seed(0)
    config = DeformableDETRConfig(
        num_classes=3,
        num_queries=20,
        backbone="small",
        num_levels=3,
        embed_dim=32,
        num_heads=2,
        encoder_layers=1,
        decoder_layers=1,
        ffn_dim=16,
        dropout=0.0,
    )
    return DeformableDETR(config)


EXPECTED = 2 * 0.25 * 0.99**2 * math.log(100)


class _Sampling(nn.Module):
    """A backbone that samples: its offsets are the backbone's."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleDict({"sampling_offsets": nn.Linear(3, 2)})
        self.sampling_offsets = nn.Linear(2, 5)
        self.head = nn.Linear(4, 1)


@checks("recipe.1")
def check_group_sizes(group_sizes):
    model = _detector()
    yield "a detector, all of it trainable"
    groups = parameter_groups(model, TrainConfig())
    wanted = [sum(p.numel() for p in group["params"]) for group in groups]
    given = group_sizes(model)
    for kind, number in zip(("rest", "backbone", "sampling"), wanted, strict=True):
        expect(given[kind], number, kind)
    yield "frozen parameters do not count"
    for parameter in model.backbone.parameters():
        parameter.requires_grad_(False)
    expect(group_sizes(model)["backbone"], 0, "the backbone is frozen")
    yield "what samples in the backbone is the backbone's"
    given = group_sizes(_Sampling())
    expect(given["backbone"], 8, "ask for the backbone first")
    expect(given["sampling"], 15)
    expect(given["rest"], 5)


def _network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def _train(network):
    """Other weights, and other running means."""
    for parameter in network.parameters():
        parameter.data += torch.randn_like(parameter)
    network(torch.randn(8, 3) + 2)


def _averages(update_average, decay, rounds):
    """The answer's average and the library's, after the same updates."""
    network = _network()
    library = averaged(network, decay)
    library.update_parameters(network)  # a copy
    own = copy.deepcopy(network)
    for updates in range(1, rounds + 1):
        _train(network)
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        library.update_parameters(network)
        update_average(own, network, decay, updates)
        for name, tensor in network.state_dict().items():
            expect(tensor, before[name], f"{name} of the model itself was changed")
    return own, library.module


@checks("recipe.2")
def check_update_average(update_average):
    yield "parameters, late"
    own, library = _averages(update_average, 0.15, 6)  # always below (1 + n) / (10 + n)
    for name, parameter in library.named_parameters():
        expect(dict(own.named_parameters())[name], parameter, f"{name}: keep d, take 1 - d")
    yield "buffers, and the count of batches"
    for name, buffer in library.named_buffers():
        expect(dict(own.named_buffers())[name], buffer, f"the buffer {name}")
    yield "the first updates remember little"
    own, library = _averages(update_average, 0.999, 3)
    for name, tensor in library.state_dict().items():
        expect(own.state_dict()[name], tensor, f"{name}: keep min(d, (1 + n) / (10 + n))")


def _batch():
    """Two images with three objects."""
    images = [torch.randn(3, 64, 96), torch.randn(3, 64, 64)]
    boxes = [torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.7, 0.5, 0.3, 0.2]]), torch.tensor([[0.5] * 4])]
    targets = [Target(i, torch.arange(len(b)), b, (64, 96)) for i, b in enumerate(boxes)]
    return Batch.from_images(images, targets)


@checks("recipe.3")
def check_before_training(before_training):
    model, batch, criterion = _detector(), _batch(), SetCriterion()
    model.zero_grad()
    sum(criterion(model.train()(batch), batch.targets).values()).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    yield "a sound model"
    given = before_training(model, criterion, batch)
    expect(given["class_loss"], 1.0, "divide by the expected loss, 2.26", rtol=0.1)
    expect(given["gradient_norm"], norm.item(), "of all parameters together", rtol=1e-3)
    expect(given["silent"], [])
    yield "a second time: old gradients do not count"
    given = before_training(model, criterion, batch)
    expect(given["gradient_norm"], norm.item(), "old gradients away first", rtol=1e-3)
    yield "a layer that nobody calls, and one that is frozen"
    model = _detector()
    model.spare = nn.Linear(2, 3)
    model.neck.level_embed.requires_grad_(False)
    given = before_training(model, criterion, batch)
    expect(sorted(given["silent"]), ["spare.bias", "spare.weight"], "trainable, and no gradient")
    yield "a lost prior, and a model that was left in evaluation mode"
    model.eval()
    with torch.no_grad():
        for head in model.class_heads:
            head.bias.zero_()
    given = before_training(model, criterion, batch)
    expect(given["class_loss"] > 2, True, "every score starts at one half")
    expect(model.training, True, "training mode")


def _average(buffers=True, warm=True, swapped=False):
    def update_average(average, model, decay, updates):
        keep = min(decay, (1 + updates) / (10 + updates)) if warm else decay
        keep = 1 - keep if swapped else keep
        named = "state_dict" if buffers else "named_parameters"
        old, new = dict(getattr(average, named)()), dict(getattr(model, named)())
        with torch.no_grad():
            for name, mean in old.items():
                share = 1 - keep if mean.is_floating_point() else 1
                mean.copy_((1 - share) * mean + share * new[name])

    return update_average


def _copied_buffers(average, model, decay, updates):
    _average(buffers=False)(average, model, decay, updates)
    for mean, new in zip(average.buffers(), model.buffers(), strict=True):
        mean.copy_(new)


def _groups(frozen=False, backbone_first=True):
    def group_sizes(model):
        sizes = {"rest": 0, "backbone": 0, "sampling": 0}
        for name, parameter in model.named_parameters():
            slow = "sampling_offsets" in name or "reference_points" in name
            inside = name.startswith("backbone.")
            kinds = [(inside, "backbone"), (slow, "sampling")]
            kinds = kinds if backbone_first else kinds[::-1]
            kind = next((kind for found, kind in kinds if found), "rest")
            sizes[kind] += parameter.numel() if frozen or parameter.requires_grad else 0
        return sizes

    return group_sizes


def _before(old=False, frozen=False, mode=True, expected=EXPECTED):
    def before_training(model, criterion, batch):
        if mode:
            model.train()
        if not old:
            model.zero_grad()
        losses = criterion(model(batch), batch.targets)
        sum(losses.values()).backward()
        found = model.named_parameters()
        silent = [n for n, p in found if p.grad is None and (frozen or p.requires_grad)]
        norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf).item()
        share = losses["loss_class"].item() / expected
        return {"class_loss": share, "gradient_norm": norm, "silent": silent}

    return before_training


WRONG = {
    "recipe.1": [
        ("frozen parameters count", _groups(frozen=True)),
        ("sampling before backbone", _groups(backbone_first=False)),
    ],
    "recipe.2": [
        ("parameters only", _average(buffers=False)),
        ("buffers copied", _copied_buffers),
        ("no short memory at first", _average(warm=False)),
        ("old and new swapped", _average(swapped=True)),
    ],
    "recipe.3": [
        ("old gradients count", _before(old=True)),
        ("frozen parameters are listed", _before(frozen=True)),
        ("left in evaluation mode", _before(mode=False)),
        ("the loss without its weight", _before(expected=EXPECTED / 2)),
    ],
}
