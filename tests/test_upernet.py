"""UPerNet on any backbone: equal to the head of transformers, its parameters, any size."""

import pytest
import torch
from torch import nn
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

from deformable_detr.backbones import build_backbone
from deformable_detr.backbones.dat import CONFIGS, DATBackbone, DATConfig
from deformable_detr.models.semantic_fpn import resize
from deformable_detr.models.upernet import POOLED, UPerNet

SMALL = DATConfig(8, ("W", "S", "D", "D"), (1, 2, 4, 8), (1, 1, 2, 4), 2, 64)


def backbone(name):
    return DATBackbone(SMALL, 4) if name == "dat" else build_backbone(name)


def theirs(width, classes):
    return UperNetConfig(
        backbone_config={"model_type": "resnet"}, hidden_size=width, num_labels=classes
    )


def as_theirs(model):
    """The head's tensors by the names of transformers."""
    names = {"pooled": "psp_modules", "whole": "bottleneck", "lateral": "lateral_convs"}
    names |= {"smooth": "fpn_convs", "fuse": "fpn_bottleneck", "classify": "classifier"}
    found = {}
    for name, tensor in model.state_dict().items():
        part, *rest = name.split(".")
        if part == "backbone":
            continue
        if part == "pooled":
            rest.insert(1, "1")  # after the pooling
        if part != "classify":
            rest[-2] = {"0": "conv", "1": "batch_norm"}[rest[-2]]
        found[".".join([names[part], *rest])] = tensor
    return found


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [(64, 96), (53, 71), (28, 28)])
@pytest.mark.parametrize("name", ["dat", "small"])
def test_it_is_the_head_of_transformers(name, size, training):
    """At sizes that strides do not divide, and of maps with fewer pixels than pooled cells."""
    torch.manual_seed(0)
    model = UPerNet(backbone(name), 5, width=12).double().train(training)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.running_mean)
    head = UperNetHead(theirs(12, 5), model.backbone.channels).double().train(training)
    head.load_state_dict(as_theirs(model))
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        model.backbone.eval()
        expected = head(model.backbone(images))
        logits = model(images)
    assert logits.shape == (2, 5, *size)
    torch.testing.assert_close(logits, resize(expected, size), atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("name", ["dat", "small", "resnet18"])
def test_everything_learns(name):
    torch.manual_seed(0)
    model = UPerNet(backbone(name), 5, width=8).train()
    logits = model(torch.randn(2, 3, 53, 71))
    nn.functional.cross_entropy(logits, torch.randint(5, (2, 53, 71))).backward()
    unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused


def test_what_is_pooled_reaches_every_pixel():
    """By the map pooled to one cell, an image's last pixels count for the first one's class."""
    torch.manual_seed(0)
    model = UPerNet(build_backbone("small"), 2, width=8).eval().double()
    for convolve in model.pooled[1:]:
        nn.init.zeros_(convolve[0].weight)
    images = torch.randn(1, 3, 256, 256, dtype=torch.float64, requires_grad=True)
    model(images)[0, 0, 0, 0].backward()
    assert images.grad[0, :, -16:, -16:].abs().max() > 0
    assert POOLED[0] == 1


@pytest.mark.parametrize(
    ("name", "millions"), [("dat_tiny", 60), ("dat_small", 81), ("dat_base", 121)]
)
def test_parameters_of_table_5(name, millions):
    """With the auxiliary head that the paper's models have in training."""
    with torch.device("meta"):
        model = UPerNet(DATBackbone(CONFIGS[name], 4), 150)
        head = UperNetHead(theirs(512, 150), model.backbone.channels)
        auxiliary = UperNetFCNHead(theirs(512, 150), model.backbone.channels)

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(model) - count(model.backbone) == count(head)
    assert round((count(model) + count(auxiliary)) / 1e6) == millions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes and width must be at least 1, got 0 and 512"),
        ({"num_classes": 3, "width": 0}, "num_classes and width must be at least 1, got 3 and 0"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message) as error:
        UPerNet(build_backbone("small"), **options)
    assert "\n" not in str(error.value)


def test_a_training_batch_of_one_image_is_refused():
    model = UPerNet(build_backbone("small"), 2, width=8).train()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as error:
        model(torch.randn(1, 3, 64, 64))
    assert "\n" not in str(error.value)
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 2, 64, 64)
