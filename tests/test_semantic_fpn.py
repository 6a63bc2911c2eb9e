"""Semantic FPN on any backbone: shapes, the paper's steps, its number of parameters."""

import pytest
import torch
from torch import nn

from deformable_detr.backbones import build_backbone
from deformable_detr.backbones.dat import CONFIGS, DATBackbone, DATConfig
from deformable_detr.models.semantic_fpn import SemanticFPN

SMALL = DATConfig(8, ("W", "S", "D", "D"), (1, 2, 4, 8), (1, 1, 2, 4), 2, 64)


def backbone(name):
    return DATBackbone(SMALL, 4) if name == "dat" else build_backbone(name)


@pytest.mark.parametrize("size", [(64, 96), (53, 71)])
@pytest.mark.parametrize("name", ["dat", "small", "resnet18"])
def test_logits_for_every_pixel(name, size):
    torch.manual_seed(0)
    model = SemanticFPN(backbone(name), 5, width=32, pyramid_width=24)
    assert model.pyramid.layer_blocks[0][0].out_channels == 24
    images = torch.randn(2, 3, *size)
    logits = model(images)
    assert logits.shape == (2, 5, *size)
    nn.functional.cross_entropy(logits, torch.randint(5, (2, *size))).backward()
    unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused


def test_steps_of_each_map():
    """Fig. 3: one convolution for strides 4 and 8, two for 16, three for 32; the size doubles."""
    model = SemanticFPN(DATBackbone(SMALL, 4), 3, width=32).eval()
    assert [len(branch) for branch in model.branches] == [1, 1, 2, 3]
    seen = {}
    for level, branch in enumerate(model.branches):
        for module in branch:
            module.register_forward_hook(
                lambda _, x, y, level=level: seen.setdefault(level, []).append(tuple(y.shape[2:]))
            )
    model(torch.randn(1, 3, 64, 128))
    assert seen == {0: [(16, 32)], 1: [(8, 16)], 2: [(4, 8), (8, 16)], 3: [(2, 4), (4, 8), (8, 16)]}


def test_maps_are_summed():
    """With all branches but one silenced, logits are of that one; of two, their sum."""
    torch.manual_seed(0)
    model = SemanticFPN(DATBackbone(SMALL, 4), 3, width=32).eval().double()
    nn.init.zeros_(model.classify.bias)
    images = torch.randn(1, 3, 32, 64, dtype=torch.float64)

    def alone(*levels):
        hooks = [
            branch[-1].register_forward_hook(lambda _, x, y: 0 * y)
            for level, branch in enumerate(model.branches)
            if level not in levels
        ]
        logits = model(images)
        for hook in hooks:
            hook.remove()
        return logits

    with torch.no_grad():
        parts = [alone(level) for level in range(4)]
        assert all(part.abs().max() > 0.01 for part in parts)
        torch.testing.assert_close(sum(parts), model(images))


@pytest.mark.parametrize(("name", "millions"), [("dat_tiny", 32), ("dat_small", 53)])
def test_parameters_of_table_5(name, millions):
    with torch.device("meta"):
        model = SemanticFPN(DATBackbone(CONFIGS[name], 4), 150)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes and pyramid_width must be at least 1, got 0 and 256"),
        ({"num_classes": 3, "pyramid_width": 0}, "pyramid_width must be at least 1, got 3 and 0"),
        ({"num_classes": 3, "width": 48}, "width must be a multiple of 32, the norm's groups, got"),
        ({"num_classes": 3, "width": 0}, "width must be a multiple of 32"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message) as error:
        SemanticFPN(build_backbone("small"), **options)
    assert "\n" not in str(error.value)
