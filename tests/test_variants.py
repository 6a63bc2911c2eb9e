"""Every variant that a config can ask for learns; deformable stages start as the plain ones."""

import copy

import pytest
import torch
import torchvision
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops.misc import FrozenBatchNorm2d

from deformable_detr import Batch, DeformableDETR, DeformableDETRConfig, Target
from deformable_detr.backbones import build_backbone
from deformable_detr.backbones.deformable_convolution import ModulatedDeformConv2d
from deformable_detr.losses.criterion import SetCriterion

SMALL = dict(
    num_classes=3, backbone="small", embed_dim=32, encoder_layers=1, decoder_layers=2, ffn_dim=16
)
ODD = [  # levels, points, heads, queries, and what else
    (1, 1, 1, 1, {}),
    (1, 3, 2, 5, {"refine": True}),
    (2, 5, 4, 3, {"refine": True, "two_stage": True}),
    (3, 2, 8, 11, {"position": "learned"}),
    (4, 1, 16, 7, {"refine": True, "decoder_layers": 1}),
    (5, 7, 2, 13, {"refine": True, "two_stage": True, "encoder_layers": 3}),
    (6, 3, 32, 2, {"position": "learned", "refine": True, "embed_dim": 96}),
]


def make_batch():
    torch.manual_seed(0)
    targets = [
        Target(0, torch.tensor([2, 0]), torch.rand(2, 4) * 0.2 + 0.4, (70, 98)),
        Target(1, torch.tensor([], dtype=torch.int64), torch.zeros(0, 4), (50, 130)),
    ]
    return Batch.from_images([torch.randn(3, 70, 98), torch.randn(3, 50, 130)], targets)


@pytest.mark.parametrize(("levels", "points", "heads", "queries", "other"), ODD)
def test_any_numbers_forward_and_backward(levels, points, heads, queries, other):
    config = DeformableDETRConfig(
        **SMALL
        | {"num_levels": levels, "num_points": points, "num_heads": heads, "num_queries": queries}
        | other
    )
    model, batch = DeformableDETR(config), make_batch()
    with torch.no_grad():  # zeros at initialisation would hide what lies behind them
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    output = model(batch)
    assert output.logits.shape == (2, queries, 3) and output.boxes.shape == (2, queries, 4)
    sum(SetCriterion()(output, batch.targets).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert model.encoder.layers[0].attention.sampling_offsets.weight.grad.any()


@pytest.mark.parametrize(
    ("name", "stages", "dilation"),
    [("resnet18", 3, False), ("resnet50", 2, True), ("resnext50_32x4d", 3, False)],
)
def test_deformable_stages_start_as_the_plain_ones(name, stages, dilation):
    torch.manual_seed(0)
    plain = build_backbone(name, dilation).eval()
    deformable = build_backbone(name, dilation, deformable_stages=stages).eval()
    missing, unexpected = deformable.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(".conv2.offset." in key for key in missing)
    images = torch.randn(2, 3, 65, 94)
    with torch.no_grad():
        for one, other in zip(plain(images), deformable(images), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * one.abs().max().item())


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_folded_norms_are_torchvisions(name):
    """Same names, same maps with and without gradients, same gradients, also of a copy.

    In float64: in float32 rounding, which differs between processors, decides on which side of zero
    some numbers before a ReLU lie, and with that whole gradients.
    """
    torch.manual_seed(0)
    plain = torchvision.models.get_model(name, norm_layer=FrozenBatchNorm2d).double()
    for module in plain.modules():
        if isinstance(module, FrozenBatchNorm2d):
            for buffer in module.buffers():
                buffer.uniform_(0.4, 0.8)
    state = {k: v for k, v in plain.state_dict().items() if not k.startswith("fc.")}
    original = build_backbone(name).double()
    original.body.load_state_dict(state)
    assert list(original.body.state_dict()) == list(state)
    backbone = copy.deepcopy(original)
    for buffer in original.buffers():
        buffer.zero_()
    getter = IntermediateLayerGetter(plain, {f"layer{i}": str(i) for i in (2, 3, 4)})
    images = torch.randn(2, 3, 97, 65, dtype=torch.float64)
    expected, maps = list(getter(images).values()), backbone(images)
    with torch.no_grad():
        without = backbone(images)
    for wanted, *found in zip(expected, maps, without, strict=True):
        for each in found:
            torch.testing.assert_close(each, wanted, rtol=0, atol=1e-12 * wanted.abs().max().item())
    sum(x.square().mean() for x in maps).backward()
    sum(x.square().mean() for x in expected).backward()
    names = dict(plain.named_parameters())
    for key, parameter in backbone.body.named_parameters():
        if parameter.requires_grad:
            scale = names[key].grad.abs().max().item()
            torch.testing.assert_close(parameter.grad, names[key].grad, rtol=0, atol=1e-9 * scale)


def test_only_the_last_stages_are_deformable():
    body = build_backbone("resnet50", deformable_stages=2).body
    counts = {
        stage: sum(isinstance(m, ModulatedDeformConv2d) for m in body[stage].modules())
        for stage in ("layer1", "layer2", "layer3", "layer4")
    }
    assert counts == {"layer1": 0, "layer2": 0, "layer3": 6, "layer4": 3}


def test_the_tables_largest_backbone():
    """ResNeXt-101 with deformable convolution in C3 to C5: each of 30 blocks gets 27 outputs."""
    sizes = {}
    for stages in (0, 3):
        with torch.device("meta"):
            model = build_backbone("resnext101_32x8d", deformable_stages=stages)
        sizes[stages] = sum(p.numel() for p in model.parameters())
    # inputs of the 3x3 convolutions: 4, 23 and 3 blocks of width 512, 1024 and 2048
    added = sum(
        blocks * 27 * (width * 9 + 1) for blocks, width in ((4, 512), (23, 1024), (3, 2048))
    )
    assert sizes[3] - sizes[0] == added
    assert build_with_meta("resnext101_64x4d").channels == [512, 1024, 2048]


def build_with_meta(name):
    with torch.device("meta"):
        return build_backbone(name, deformable_stages=3)


def test_modulated_convolution_by_hand():
    """Each sample of the kernel, read by hand at its offset and multiplied by its modulation."""
    torch.manual_seed(0)
    module = ModulatedDeformConv2d(2, 1, 3, padding=1, bias=False)
    with torch.no_grad():
        module.offset.bias[:18] = torch.randint(-1, 2, (18,)).float()  # whole pixels, (y, x)
        module.offset.bias[18:] = torch.randn(9)
        x = torch.randn(1, 2, 5, 7)
        found = module(x)[0, 0]
        padded = torch.nn.functional.pad(x[0], (3, 3, 3, 3))
        for row in range(5):
            for column in range(7):
                expected = 0.0
                for k in range(9):
                    dy, dx = module.offset.bias[2 * k : 2 * k + 2].int().tolist()
                    here = padded[:, row + k // 3 - 1 + dy + 3, column + k % 3 - 1 + dx + 3]
                    weight = module.weight[0, :, k // 3, k % 3]
                    scale = 2 * module.offset.bias[18 + k].sigmoid()
                    expected = expected + scale * (weight * here).sum()
                torch.testing.assert_close(found[row, column], expected, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_offsets_in_a_detector():
    torch.manual_seed(0)
    config = DeformableDETRConfig(
        **SMALL | {"backbone": "resnet18", "num_levels": 3, "num_heads": 2},
        num_queries=4,
        deformable_stages=1,
    )
    model, batch = DeformableDETR(config), make_batch()
    sum(SetCriterion()(model(batch), batch.targets).values()).backward()
    offsets = [p for name, p in model.named_parameters() if ".conv2.offset." in name]
    assert len(offsets) == 4 and all(p.grad.isfinite().all() and p.grad.any() for p in offsets)


def test_imagenet_weights_carry_over(monkeypatch):
    """pretrained loads before the convolutions are replaced, and asks for the first weights."""
    torch.manual_seed(0)
    source, asked = torchvision.models.resnet18(), []

    def get_model(name, weights=None, **options):
        asked.append(weights)
        model = original(name, weights=None, **options)
        model.load_state_dict(
            {k: v for k, v in source.state_dict().items() if "num_batches" not in k}
        )
        return model

    original = torchvision.models.get_model
    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    backbone = build_backbone("resnet18", pretrained=True, deformable_stages=3)
    assert asked == ["IMAGENET1K_V1"]
    assert torch.equal(backbone.body["layer3"][1].conv2.weight, source.layer3[1].conv2.weight)


def test_what_is_refused():
    with pytest.raises(ValueError, match="deformable_stages must be from 0 to 3, got 4"):
        build_backbone("resnet50", deformable_stages=4)
    with pytest.raises(ValueError, match="small backbone has neither"):
        build_backbone("small", deformable_stages=1)
    config = DeformableDETRConfig(**SMALL, num_heads=2, position="learned", position_size=8)
    with pytest.raises(ValueError, match=r"map of 18 x 33; use position_size=33 or more"):
        DeformableDETR(config)(make_batch())
