"""The detector: sizes as published, initialisation, gradients, padding, and what it refuses."""

import dataclasses

import pytest
import torch

from deformable_detr import Batch, DeformableDETR, DeformableDETRConfig, Target
from deformable_detr.layers.feed_forward import ROWS, Dropout, FeedForward
from deformable_detr.layers.position import LearnedPositionEncoding, SinePositionEncoding
from deformable_detr.losses.criterion import SetCriterion
from deformable_detr.structures import Queries

SMALL = dict(
    num_classes=5,
    num_queries=7,
    backbone="small",
    num_levels=3,
    embed_dim=32,
    num_heads=4,
    num_points=2,
    encoder_layers=2,
    decoder_layers=3,
    ffn_dim=48,
    dropout=0.0,
)
PUBLISHED = [  # config, all and trainable parameters: the official models, 91 outputs
    ({}, 40_069_665, 39_847_265),
    ({"refine": True}, 40_849_660, 40_627_260),
    ({"refine": True, "two_stage": True}, 41_181_529, 40_959_129),
    ({"num_levels": 1}, 34_066_593, 33_844_193),
    ({"num_levels": 1, "dilation": True}, 34_066_593, 33_844_193),
    ({"backbone": "resnet101"}, 59_009_569, 58_787_169),
    ({"backbone": "resnext101_32x8d"}, 103_154_209, 102_729_057),
]


def make_batch(*sizes, boxes=2):
    torch.manual_seed(0)
    targets = [
        Target(i, torch.arange(boxes) % 5, torch.rand(boxes, 4) * 0.3 + 0.3, size)
        for i, size in enumerate(sizes)
    ]
    return Batch.from_images([torch.randn(3, *size) for size in sizes], targets)


@pytest.mark.parametrize(("variant", "parameters", "trainable"), PUBLISHED)
def test_parameter_counts_as_published(variant, parameters, trainable):
    with torch.device("meta"):
        model = DeformableDETR(DeformableDETRConfig(**variant))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable


def test_sampling_parameters_of_the_base_model_as_published():
    with torch.device("meta"):
        model = DeformableDETR(DeformableDETRConfig())
    slow = ("reference_points", "sampling_offsets")
    count = sum(p.numel() for n, p in model.named_parameters() if any(s in n for s in slow))
    assert count == 790_018


@pytest.mark.parametrize("variant", [{}, {"refine": True}, {"refine": True, "two_stage": True}])
def test_initialisation(variant):
    torch.manual_seed(0)
    model = DeformableDETR(DeformableDETRConfig(**SMALL | variant))
    for head in model.class_heads:
        torch.testing.assert_close(head.bias, torch.full((5,), -4.59512))
    for i, head in enumerate(model.box_heads):
        assert not head.layers[-1].weight.any()
        points = i == 0 and not model.config.two_stage
        assert head.layers[-1].bias.tolist() == ([0, 0, -2, -2] if points else [0] * 4)
    with torch.no_grad():
        output = model.eval()(make_batch((64, 80)))
    expected = output.references
    if expected.shape[-1] == 2:
        size = torch.full_like(expected, 0.1192)
        expected = torch.cat([expected, size], -1)
    torch.testing.assert_close(output.boxes, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
def test_any_number_of_levels(levels):
    model = DeformableDETR(DeformableDETRConfig(**SMALL | {"num_levels": levels})).eval()
    tokens = model.tokens(make_batch((48, 65)))
    sizes = [(12, 17), (6, 9), (3, 5), (2, 3), (1, 2)]
    first = max(0, 3 - levels)
    assert tokens.spatial_shapes == sizes[first : first + levels]
    assert tokens.features.shape == tokens.position.shape
    assert tokens.features.shape[1] == sum(h * w for h, w in tokens.spatial_shapes)


def test_output_of_every_layer():
    config = DeformableDETRConfig(**SMALL, refine=True, two_stage=True)
    output = DeformableDETR(config)(make_batch((64, 80), (48, 96)))
    assert output.logits.shape == (2, 7, 5) and output.boxes.shape == (2, 7, 4)
    assert len(output.auxiliary) == 2
    tokens = 16 * 24 + 8 * 12 + 4 * 6
    assert output.others["first"].logits.shape == (2, tokens, 5)
    assert output.others["first"].boxes.shape == (2, tokens, 4)


def test_refinement_passes_boxes_but_no_gradient_between_layers():
    model = DeformableDETR(DeformableDETRConfig(**SMALL, refine=True))
    output = model(make_batch((64, 80)))
    torch.testing.assert_close(output.references, output.auxiliary[-1].boxes)
    assert not output.references.requires_grad
    assert output.auxiliary[0].references.requires_grad  # learned, by the first layer


@pytest.mark.parametrize("variant", [{}, {"refine": True}, {"refine": True, "two_stage": True}])
@pytest.mark.parametrize("boxes", [2, 0])
def test_gradient_reaches_every_parameter(variant, boxes):
    torch.manual_seed(0)
    model = DeformableDETR(DeformableDETRConfig(**SMALL | variant))
    with torch.no_grad():  # zeros at initialisation would hide what lies behind them
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    batch = make_batch((64, 80), (48, 96), boxes=boxes)
    losses = SetCriterion()(model(batch), batch.targets)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # without an object no box is wrong
        assert boxes == 0 or parameter.grad.any(), name
    if variant.get("two_stage"):
        assert model.first_stage.class_head.weight.grad.any()
        assert boxes == 0 or model.first_stage.box_head.layers[-1].weight.grad.any()


def test_padded_tokens_are_not_sampled():
    """What stands where the mask is True must not change what encoder and decoder find."""
    torch.manual_seed(0)
    config = DeformableDETRConfig(**SMALL | {"num_levels": 1, "encoder_layers": 1})
    model = DeformableDETR(config).eval()
    batch = make_batch((64, 64), (64, 128))
    tokens = model.tokens(batch)
    memory = model.encoder(tokens).features
    changed = tokens.features.clone()
    changed[tokens.padding_mask] = 100.0
    again = model.encoder(dataclasses.replace(tokens, features=changed)).features
    inside = ~tokens.padding_mask
    assert not inside.all()
    torch.testing.assert_close(again[inside], memory[inside])
    torch.testing.assert_close(tokens.valid_ratios, torch.tensor([[[0.5, 1.0]], [[1.0, 1.0]]]))
    query = torch.randn(2, 7, 32)
    queries = Queries(query, query, torch.rand(2, 7, 2))
    spoilt = memory.masked_fill(tokens.padding_mask.unsqueeze(-1), 100.0)
    given = [
        model.decoder.layers[0](queries, dataclasses.replace(tokens, features=x))
        for x in (memory, spoilt)
    ]
    torch.testing.assert_close(given[1], given[0])


@pytest.mark.parametrize("variant", [{}, {"refine": True, "two_stage": True}])
def test_in_bfloat16_throughout(variant):
    model = DeformableDETR(DeformableDETRConfig(**SMALL | variant)).eval().bfloat16()
    batch = make_batch((64, 96))
    batch.images = batch.images.bfloat16()
    output = model(batch)
    assert output.logits.isfinite().all() and output.boxes.isfinite().all()


def test_dropout_drops_and_scales_and_keeps_bytes():
    torch.manual_seed(0)
    x, dropout = torch.rand(100, 200).add_(1).requires_grad_(), Dropout(0.25)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = dropout(x)
    y.sum().backward()
    dropped = y == 0
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(y, (x / 0.75).masked_fill(dropped, 0))
    torch.testing.assert_close(x.grad, torch.full_like(x, 1 / 0.75).masked_fill(dropped, 0))
    assert sum(t.nbytes for t in kept) == x.numel()
    assert dropout.eval()(x) is x and Dropout(0.0)(x) is x


def test_sine_position_by_formula():
    mask = torch.ones(1, 4, 6, dtype=torch.bool)
    mask[:, :3, :5] = False  # a 3 x 5 image on a 4 x 6 map
    code = SinePositionEncoding(num_features=8)(mask)
    assert code.shape == (1, 16, 4, 6) and code.isfinite().all()
    y, x = 2, 1
    for axis, angle in enumerate([(y + 0.5) / 3, (x + 0.5) / 5]):
        for i in range(8):
            phase = torch.tensor(angle * 2 * torch.pi / 10_000 ** (2 * (i // 2) / 8))
            expected = phase.cos() if i % 2 else phase.sin()
            torch.testing.assert_close(
                code[0, 8 * axis + i, y, x], expected.float(), atol=1e-5, rtol=1e-5
            )


def test_learned_position_says_how_far_it_reaches():
    encoding = LearnedPositionEncoding(num_features=4, size=5)
    code = encoding(torch.zeros(2, 3, 5, dtype=torch.bool))
    assert code.shape == (2, 8, 3, 5)
    torch.testing.assert_close(code[1, :4, 2, 3], encoding.col_embed.weight[3])
    torch.testing.assert_close(code[1, 4:, 2, 3], encoding.row_embed.weight[2])
    with pytest.raises(ValueError, match="cover 5 x 5 cells, got a map of 6 x 4"):
        encoding(torch.zeros(1, 6, 4, dtype=torch.bool))


def test_batch_pads_right_and_bottom():
    batch = Batch.from_images([torch.ones(3, 4, 6), torch.ones(3, 5, 3)])
    assert batch.images.shape == (2, 3, 5, 6) and batch.sizes.tolist() == [[4, 6], [5, 3]]
    assert batch.mask.sum(dim=(1, 2)).tolist() == [6, 15]
    assert torch.equal(batch.images[:, 0] == 1, ~batch.mask)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"two_stage": True}, "two_stage needs refine"),
        ({"decoder_layers": 0}, "decoder_layers"),
        ({"backbone": "vgg16"}, "backbone must be .* got 'vgg16'"),
        ({"position": "cosine"}, "position must be one of"),
        ({"embed_dim": 30}, "divisible|multiple"),
    ],
)
def test_configurations_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        DeformableDETR(DeformableDETRConfig(**SMALL | changed))


def test_images_are_refused():
    model = DeformableDETR(DeformableDETRConfig(**SMALL))
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), got \(1, 1, 8, 8\)"):
        image = torch.zeros(1, 1, 8, 8)
        model(Batch(image, torch.zeros(1, 8, 8).bool(), torch.tensor([[8, 8]])))


def test_a_small_image_has_as_many_queries_as_tokens():
    config = DeformableDETRConfig(**SMALL | {"num_queries": 30}, refine=True, two_stage=True)
    output = DeformableDETR(config)(make_batch((9, 5), (7, 8)))
    assert output.logits.shape == (2, 9, 5)  # 3 x 2, 2 x 1 and 1 x 1 tokens
    output.logits.sum().backward()


@pytest.mark.parametrize("shape", [(2, ROWS, 8), (ROWS + 3, 8), (1, 5, 8), (3, 0, 8), (8,)])
def test_the_feed_forward_half_in_parts_is_the_whole(shape):
    """Without gradients a CPU takes ROWS tokens at a time; float64, since products of other sizes
    may be summed in another order."""
    torch.manual_seed(0)
    half, x = FeedForward(8, 16, 0.0).double(), torch.randn(shape, dtype=torch.float64)
    seen = []
    half.linear1.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    whole = half(x)
    with torch.no_grad():
        parts = half(x)
    torch.testing.assert_close(parts, whole.detach())
    tokens = x.numel() // 8
    assert len(seen) == 1 + max(1, -(-tokens // ROWS))
