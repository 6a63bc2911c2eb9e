"""DAT: equal to loops over the paper's formulas and to the authors' model; at any size; memory; the
authors' weights; compiled and exported. In detectors: test_dat_detectors."""

import dataclasses

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deformable_detr.backbones import build_backbone
from deformable_detr.backbones.dat import CONFIGS, DAT, DATBackbone, DATConfig
from deformable_detr.backbones.dat_fpn import dat_fpn
from deformable_detr.evaluation.complexity import PER_SAMPLE, LiveTensors, count
from deformable_detr.layers import dat_attention
from deformable_detr.layers.dat_attention import DAttention, PositionBias
from deformable_detr.layers.dense_attention import DenseAttention
from deformable_detr.layers.key_aware_attention import KeyAwareAttention
from deformable_detr.layers.window_attention import WindowAttention
from deformable_detr.weights.dat import _recognise, load_backbone, load_dat, to_authors
from tests import dat_oracle

# windows of 2 pixels, and tables for an image of 64, whose stages have 16, 8, 4 and 2
SMALL = DATConfig(8, ("WS", "WS", "WD", "WD"), (1, 2, 4, 8), (1, 1, 2, 4), 2, 64)
SHALLOW = dataclasses.replace(SMALL, blocks=("S", "W", "D", "D"))
ZERO = torch.zeros(1)
PUBLISHED = {  # parameters; entries of the state dict; millions of multiply-adds
    "dat_tiny": (28_319_138, 219, 4_563),
    "dat_small": (49_700_402, 435, 8_959),
    "dat_base": (87_881_632, 435, 15_721),
    "dat_base_384": (88_178_272, 435, 49_450),
}


def randomised(module, std=0.3):
    """A module whose weights are all random, those that start as zero or one too."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module.eval()


def attention_tensors(layer):
    """A layer's tensors by the authors' names."""
    names = {"query": "proj_q", "key": "proj_k", "value": "proj_v", "out": "proj_out"}
    names |= {"places.convolution": "conv_offset.0", "places.norm": "conv_offset.1.norm"}
    names |= {"places.linear": "conv_offset.3", "bias.table": "rpe_table", "qkv": "proj_qkv"}
    names |= {"bias_table": "relative_position_bias_table"}
    found = {}
    for name, tensor in layer.state_dict().items():
        ours = next(n for n in names if name.startswith(n))
        found[names[ours] + name.removeprefix(ours)] = tensor
    return found


# Equal to the paper's formulas


@pytest.mark.parametrize(
    ("size", "table", "stride", "offset_range", "kernel"),
    [((3, 5), (3, 5), 1, 2.0, 5), ((5, 4), (3, 2), 2, 6.0, 3), ((2, 3), (4, 5), 1, 0.0, 1)],
)
def test_deformable_attention_is_what_loops_give(size, table, stride, offset_range, kernel):
    """The second and third also at another size than the table's; the second has keys that lie
    off the map, and pairs off the table."""
    layer = randomised(DAttention(8, 4, 2, table, kernel, stride, offset_range).double(), 1.0)
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    rest = attention_tensors(layer), 4, 2, stride, offset_range
    with torch.no_grad():
        torch.testing.assert_close(layer(x), dat_oracle.attention(x, *rest), atol=1e-12, rtol=1e-9)
        places = layer.places(layer.query(x))
    assert ((places < -0.3) | (places > 1.3)).any() == (offset_range == 6)


@pytest.mark.parametrize("shift", [0, 4])
def test_windows_are_torchvisions(shift):
    layer = randomised(WindowAttention(6, 3, 7, shift).double())
    tensors = attention_tensors(layer)
    place = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    row, column = (place[:, None] - place + 6).unbind(-1)
    tensors["relative_position_index"] = 13 * row + column
    x = torch.randn(2, 14, 21, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = dat_oracle.swin(x, tensors, 3, 7, shift > 0)
        torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("size", [(5, 7), (3, 4), (2, 5), (6, 3), (1, 1)])
def test_padding_of_windows_is_no_key(size, shift):
    layer = randomised(WindowAttention(4, 2, 3, shift).double())
    x = torch.randn(2, *size, 4, dtype=torch.float64)
    with torch.no_grad():
        expected = dat_oracle.windows(x, attention_tensors(layer), 2, 3, shift)
        torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=1e-9)


@pytest.fixture(scope="module")
def tiny():
    """DAT-T with random weights, under which the third stage's keys move, and heads differ."""
    return randomised(DAT(CONFIGS["dat_tiny"], num_classes=10), 0.05)


def test_the_authors_model_of_224_pixels(tiny):
    """Logits and the four stages' maps, of real size, in float32 here and float64 there."""
    for block in tiny.body.stage3.blocks[1::2]:
        nn.init.normal_(block.attention.places.linear.weight)
        nn.init.normal_(block.attention.bias.table)
    images = torch.randn(1, 3, 224, 224)
    state = {
        name: x.double() if x.is_floating_point() else x for name, x in to_authors(tiny).items()
    }
    config = tiny.config
    with torch.no_grad():
        rest = config.blocks, config.heads, config.groups, config.window
        logits, maps = dat_oracle.authors_model(state, images.double(), *rest)
        assert logits.std() > 0.1 and all(x.std() > 0.1 for x in maps)
        torch.testing.assert_close(tiny(images).double(), logits, atol=1e-4, rtol=0)
        for ours, theirs in zip(tiny.body(images), maps, strict=True):
            torch.testing.assert_close(ours.permute(0, 3, 1, 2).double(), theirs, atol=1e-4, rtol=0)


# Counts


@pytest.mark.parametrize("name", CONFIGS)
def test_counts(name):
    parameters, entries, multiply_adds = PUBLISHED[name]
    with torch.device("meta"):
        model = DAT(CONFIGS[name])
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(to_authors(model)) == entries
    config, sampled = CONFIGS[name], 0
    for stage, blocks in enumerate(config.blocks):
        keys = (config.image_size // 2 ** (stage + 2)) ** 2
        width = config.embed_dim * 2**stage
        sampled += blocks.count("D") * keys * (width + config.heads[stage] * keys)
    total, _ = count(OfBatch(model), (config.image_size, config.image_size))
    # the paper's are of products alone; features and bias, read between cells, are 0.2 to 0.5 %
    assert round((total - PER_SAMPLE * sampled) / 1e6) == multiply_adds


class OfBatch(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model(batch.images)


# Any size


@pytest.mark.parametrize("size", [(28, 28), (30, 77), (97, 64)])
def test_maps_of_any_size(size):
    model = DATBackbone(dataclasses.replace(SMALL, window=7)).train()
    images = torch.randn(2, 3, *size, requires_grad=True)
    maps = model(images)
    assert model.channels == [16, 32, 64] and model.strides == [8, 16, 32]
    for x, channels, stride in zip(maps, model.channels, model.strides, strict=True):
        assert x.shape == (2, channels, *(-(-n // stride) for n in size))
    sum(x.square().sum() for x in maps).backward()
    assert images.grad[:, :, -1].any() and images.grad[:, :, :, -1].any()  # every pixel counts
    if min(size) > 32:  # one key alone is attended to whatever it is
        assert all(p.grad.any() for p in model.parameters())


def resized(bias, size, mode, corners):
    """The authors' way to another size: a table made from the table, then read as always."""
    other = PositionBias(bias.table.shape[0], size).double()
    cells = tuple(2 * n - 1 for n in size)
    table = F.interpolate(bias.table[None], cells, mode=mode, align_corners=corners)[0]
    other.load_state_dict({"table": table})
    return other


@pytest.mark.parametrize(
    ("size", "errors"),
    [
        ((14, 14), (0, 0, 0)),
        ((27, 40), (0, 0.11, 0.16)),  # 13 steps from row to row have become 26, or 39
        ((20, 31), (0.06, 0.11, 0.15)),
        ((50, 67), (0.015, 0.14, 0.22)),
    ],
)
def test_a_table_read_at_relative_places_is_nearly_one_that_was_resized(size, errors):
    """Errors are root mean squares in standard deviations of a table whose cells are like their
    neighbours (a Gaussian of one cell), as they become in training; the most is told above."""
    torch.manual_seed(0)
    bell = torch.exp(-(torch.arange(-4, 5).double() ** 2) / 2)
    noise = torch.randn(12, 1, 35, 35, dtype=torch.float64)
    bias = PositionBias(12, (14, 14)).double()
    bias.load_state_dict({"table": F.conv2d(noise, torch.outer(bell, bell)[None, None])[:, 0]})
    places, rows = torch.rand(1, 3, 100, 2, dtype=torch.float64), (0, size[0], *size)
    ways = ("bilinear", True), ("bicubic", True), ("bicubic", False)
    with torch.no_grad():
        ours = bias(places, rows)
        for way, most in zip(ways, errors, strict=True):
            theirs = resized(bias, size, *way)(places, rows)
            error = (ours - theirs).square().mean().sqrt() / bias.table.std()
            assert error <= most + 1e-12 and error >= most / 2, way


# Memory


@pytest.mark.parametrize("attention", [DAttention(8, 4, 2, (4, 4)), WindowAttention(8, 4, 3, 1)])
def test_a_batch_without_images(attention):
    assert attention(torch.zeros(0, 5, 4, 8)).shape == (0, 5, 4, 8)


def test_queries_that_take_turns_change_nothing(monkeypatch):
    layer = randomised(DAttention(8, 4, 2, (5, 3), 3, 1).double())
    x = torch.randn(2, 5, 4, 8, dtype=torch.float64, requires_grad=True)
    found = []
    for limit in (1 << 20, 2 * 2 * 4 * 4 * 20, 1):  # all at once, two rows, a row
        monkeypatch.setattr(dat_attention, "PAIRS_AT_ONCE", limit)
        x.grad = None
        layer.zero_grad()
        layer(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in layer.parameters())])
    for other in found[1:]:
        torch.testing.assert_close(found[0], other)


@pytest.mark.parametrize("training", [False, True])
def test_memory_does_not_grow_with_pairs(monkeypatch, training):
    """Bias and weights of all queries would be 4 heads x 600 x 600 numbers, 5.5 MiB each."""
    layer = DAttention(8, 4, 2, (14, 14))
    x = torch.randn(1, 20, 30, 8)
    peaks = []
    for limit in (1 << 30, 1 << 16):
        monkeypatch.setattr(dat_attention, "PAIRS_AT_ONCE", limit)
        with torch.set_grad_enabled(training), LiveTensors([x, *layer.parameters()]) as live:
            y = layer(x)
            if training:
                y.sum().backward()
            del y
        layer.zero_grad()
        peaks.append(live.peak / 2**20)
    assert peaks[0] > 11 and peaks[1] < peaks[0] / 4


# Refused, in one line


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DAttention(8, 4, 3, (4, 4)), "num_heads must be divisible by num_groups, got 4 a"),
        (lambda: DAttention(8, 4, 0, (4, 4)), "num_heads must be divisible by num_groups, got 4 a"),
        (lambda: DAttention(8, 4, -2, (4, 4)), "must be divisible by num_groups, got 4 and -2"),
        (lambda: DAttention(8, 0, 1, (4, 4)), "embed_dim must be divisible by num_heads, got 8 an"),
        (lambda: WindowAttention(8, -2), "embed_dim must be divisible by num_heads, got 8 and -2"),
        (lambda: KeyAwareAttention(8, 1, 0), "must be divisible by num_heads, got 8 and 0"),
        (lambda: DenseAttention(8, 0), "embed_dim must be divisible by num_heads, got 8 and 0"),
        (lambda: DAttention(8, 4, 2, (0, 4)), "size must be at least 1 x 1, got 0 x 4"),
        (
            lambda: DAttention(8, 4, 2, (4, 4), stride=0),
            "stride must be at least 1 and kernel_size odd, got stride 0 and kernel_size 5",
        ),
        (lambda: DAttention(8, 4, 2, (4, 4), 4), "kernel_size odd, got stride 1 and kernel_size 4"),
        (lambda: WindowAttention(8, 4, 0), "window_size must be at least 1, got 0"),
        (lambda: DATConfig(window=0), "window must be at least 1, and image_size 32"),
        (lambda: DATConfig(image_size=31), "one pixel of the last stage, got 7 and 31"),
        (lambda: DATBackbone(SMALL, 0), "stages must be from 1 to 4, got 0"),
        (lambda: dat_fpn(SMALL, 5), "stages must be from 1 to 4, got 5"),
        (
            lambda: DAT(dataclasses.replace(SMALL, groups=(1, 1, 3, 4))),
            "num_heads must be divisible by num_groups, got 4 and 3",
        ),
        (
            lambda: DAT(dataclasses.replace(SMALL, stride=8))(torch.zeros(1, 3, 64, 64)),
            r"stride must be at most the map's size \(4, 4\), got 8",
        ),
        (lambda: DAttention(9, 4, 2, (4, 4)), "embed_dim must be divisible by num_heads, got 9 an"),
        (lambda: WindowAttention(9, 4), "embed_dim must be divisible by num_heads, got 9 and 4"),
        (lambda: WindowAttention(8, 4, 7, 7), "shift must be from 0 to 6, got 7"),
        (
            lambda: DAttention(8, 4, 2, (4, 4), stride=4)(torch.zeros(1, 3, 5, 8)),
            r"stride must be at most the map's size \(3, 5\), got 4",
        ),
        (
            lambda: DAT()(torch.zeros(1, 3, 27, 100)),
            "images must be at least 28 x 28 pixels, which is one window of the first stage, got 2",
        ),
        (lambda: DATConfig(blocks=("WS",)), "must be of 4 stages"),
        (
            lambda: DATConfig(blocks=("WS", "WS", "WX", "WD")),
            "blocks must be W, S, D or P, got 'X'",
        ),
        (lambda: DATConfig(drop_path=1.0), "drop_path must be in"),
        (lambda: dat_fpn("dat_huge"), "dat must be one of dat_tiny, dat_small"),
        (
            lambda: build_backbone("dat_tiny", dilation=True),
            "dat_tiny has neither dilation nor",
        ),
        (lambda: build_backbone("dat_tiny", deformable_stages=1), "dat_tiny has neither dilation"),
        (
            lambda: build_backbone("dat_base", pretrained=True),
            "dat_base has no weights to download: get the authors' file.*weights.dat.load_backbone",
        ),
        (lambda: build_backbone("dat_huge"), "backbone must be one of small, .*dat_tiny"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


# The authors' files


@pytest.fixture
def published(tmp_path):
    """A small model, and its file as the authors write it."""
    model = randomised(DAT(SMALL, num_classes=5))
    path = tmp_path / "dat.pth"
    torch.save({"model": to_authors(model), "epoch": 299}, path)
    return model, path


def test_a_file_of_the_authors_is_read(published):
    model, path = published
    images = torch.randn(1, 3, 64, 64)
    loaded = load_dat(path, SMALL)
    assert not loaded.training
    torch.testing.assert_close(loaded(images), model(images), atol=0, rtol=0)
    backbone = DATBackbone(SMALL)
    load_backbone(backbone, path)
    expected = model.body(images)[-1].permute(0, 3, 1, 2)
    torch.testing.assert_close(backbone.eval().body(images)[-1].permute(0, 3, 1, 2), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_models_are_told_apart(name):
    with torch.device("meta"):
        state = to_authors(DAT(CONFIGS[name]))
    assert _recognise(state, "file") == CONFIGS[name]


def without(part):
    return lambda state: {name: x for name, x in state.items() if part not in name}


def changed(**tensors):
    return lambda state: state | {name.replace("__", "."): x for name, x in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: {n: x for n, x in state.items() if n != "cls_head.weight"},
            "lacks 1 tensor",
        ),
        (lambda state: {n: x for n, x in state.items() if "attn_mask" not in n}, "lacks 2 tensors"),
        (changed(extra=torch.zeros(1)), "has left over 1 tensor, such as extra"),
        (changed(cls_norm__norm__bias=torch.zeros(3)), r"cls_norm.norm.bias has shape \(3,\)"),
        (
            changed(stages__2__attns__1__proj_q__weight=torch.zeros(32, 32)),
            r"proj_q.weight has shape \(32, 32\), expected \(32, 32, 1, 1\)",
        ),
        (
            changed(stages__0__attns__1__attn_mask=torch.zeros(64, 4, 4)),
            "stages.0.attns.1.attn_mask is not what windows of this model have",
        ),
        (
            changed(stages__0__local_perception_units__0__weight=torch.zeros(8)),
            r"is a checkpoint of DAT\+\+, the authors' second model; only DAT's first version",
        ),
        (changed(patch_proj__3__weight=torch.zeros(8)), r"is a checkpoint of DAT\+\+"),
        (
            lambda state: {
                "layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(9, 1)
            },
            "is a checkpoint of Swin",
        ),
        (
            lambda state: {"features.1.0.attn.relative_position_bias_table": torch.zeros(9, 1)},
            "is a checkpoint of Swin",
        ),
        (
            lambda state: {"encoder.layers.0.blocks.0.attention.relative_position_bias.t": ZERO},
            "is a checkpoint of Swin;",
        ),
        (
            lambda state: {
                "swin.layers.0.blocks.0.attention.self.relative_position_bias_table": ZERO
            },
            "is a checkpoint of Swin;",
        ),
        (
            lambda state: {"layers.0.blocks.0.attn.cpb_mlp.0.weight": ZERO},
            "is a checkpoint of Swin V2",
        ),
        (lambda state: {"conv1.weight": torch.zeros(1)}, "tensors are called conv1"),
    ],
)
def test_files_of_other_models_are_refused(published, tmp_path, change, message):
    model, _ = published
    path = tmp_path / "other.pth"
    torch.save({"model": change(to_authors(model))}, path)
    for load in (lambda: load_dat(path, SMALL), lambda: load_backbone(DATBackbone(SMALL), path)):
        with pytest.raises(ValueError, match=message) as error:
            load()
        assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("backbone.stages.0.local_perception_units.0.weight", r"DAT\+\+"),
        ("backbone.stages.0.blocks.0.attn.w_msa.relative_position_bias_table", "Swin"),
    ],
)
def test_detectors_of_other_models_are_refused(tmp_path, name, model):
    """OpenMMLab's files, in which DAT++ and Swin come as backbones."""
    path = tmp_path / "detector.pth"
    torch.save({"meta": {"epoch": 12}, "state_dict": {name: ZERO}}, path)
    with pytest.raises(ValueError, match=f"is a checkpoint of {model}[,;]") as error:
        load_dat(path)
    assert "\n" not in str(error.value)


def test_a_file_of_unknown_size_is_refused(published):
    _, path = published
    with pytest.raises(ValueError, match=r"none of dat_tiny, .*: its width is 8, with 2 blocks"):
        load_dat(path)


# Stochastic depth


def test_stochastic_depth_is_of_training_alone():
    model = DAT(dataclasses.replace(SMALL, drop_path=0.5), 3)
    rates = [block.drop_path.p for block in model.modules() if hasattr(block, "drop_path")]
    assert rates == [0.5 * i / 7 for i in range(8)]
    images = torch.randn(1, 3, 64, 64)
    assert not torch.equal(model.train()(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


# Other dtypes, compiled, exported


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16(autocast):
    model = randomised(DAT(SMALL, 3), 0.1)
    images = torch.randn(2, 3, 64, 80)
    expected = model(images)
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            given = model(images)
    else:
        given = model.bfloat16()(images.bfloat16())
    assert given.dtype == torch.bfloat16
    # 8 bits for each number, over some twenty layers
    torch.testing.assert_close(given.float(), expected, atol=0.1 * expected.std().item(), rtol=0)


def test_compiled():
    """In float64: in float32 rounding, which differs between processors, decides near a pixel's
    edge whose neighbours a point reads, and with that its gradient."""
    model = randomised(DAT(SHALLOW, 3)).double()
    images = torch.randn(2, 3, 72, 64, dtype=torch.float64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))
    compiled(images).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(images).sum().backward()
    torch.testing.assert_close(gradients, [p.grad for p in model.parameters()])


@pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export")
@pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:Constant folding - Only steps=1")
@pytest.mark.parametrize("dynamo", [True, False])
def test_exported(tmp_path, dynamo):
    model, images = randomised(DAT(SHALLOW, 3)), torch.randn(1, 3, 72, 64)
    path = tmp_path / "dat.onnx"
    torch.onnx.export(model, (images,), path, dynamo=dynamo, opset_version=18)
    session = onnxruntime.InferenceSession(path)
    (given,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(
        torch.from_numpy(given), model(images).detach(), atol=1e-4, rtol=1e-4
    )
