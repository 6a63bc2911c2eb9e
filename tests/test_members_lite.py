"""Lite DETR: which tokens each layer updates, by which feed-forward, and what that costs."""

import dataclasses

import pytest
import torch
from torch import nn

from deformable_detr.evaluation.complexity import complexity
from deformable_detr.export.program import example, make_graph, to_program
from deformable_detr.layers.attention import MSDeformAttn
from deformable_detr.layers.key_aware_attention import KeyAwareAttention
from deformable_detr.losses import SetCriterion
from deformable_detr.models.lite_detr import LiteDETR, LiteDETRConfig
from deformable_detr.models.lite_dino import LiteDINO, LiteDINOConfig
from deformable_detr.models.lite_encoder import WholeLayer
from deformable_detr.models.proposed_anchors import ProposedAnchors
from deformable_detr.models.tokens import token_centres
from deformable_detr.models.two_stage import TwoStage
from deformable_detr.structures import Queries
from tests.members import build, make_batch, output_of, tiny

MEMBERS = {"lite_detr": (LiteDETR, TwoStage), "lite_dino": (LiteDINO, ProposedAnchors)}
FOUR = {"encoder_layers": 4}  # two blocks
PLAIN = {"key_aware": False, "small_ffn": False}
each_member = pytest.mark.parametrize("name", MEMBERS)


def built(name, **changes):
    return build(tiny(name, **FOUR, **changes)).eval()


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        ({}, 47_684_222),
        ({"block_layers": 6}, 47_420_030),
        ({"small_ffn": False}, 47_287_934),
        ({"key_aware": False}, 48_078_974 - 12 * 256 * 257),  # theirs keep an unused projection
    ],
)
def test_the_full_size_has_as_many_parameters_as_the_published_models(changes, parameters):
    with torch.device("meta"):
        model = LiteDINO(LiteDINOConfig(**changes))
    assert sum(p.numel() for p in model.parameters()) == parameters


# Which tokens


@each_member
def test_blocks_of_one_layer_are_the_dense_encoder(name):
    """With linear weights and one feed-forward: the same detector, number by number."""
    _, base = MEMBERS[name]
    lite = built(name, block_layers=1, **PLAIN)
    dense, batch = build(lite.config, base).eval(), make_batch(1, 1)
    missing, left = dense.load_state_dict(lite.state_dict(), strict=False)
    assert not missing and set(left) <= {"label_embed.weight"}
    output, expected = lite(batch), dense(batch)
    assert torch.equal(output.boxes, expected.boxes) and torch.equal(output.logits, expected.logits)


@each_member
@pytest.mark.parametrize("fine_levels", [1, 2])
def test_fine_tokens_are_touched_by_the_last_layer_of_a_block_alone(name, fine_levels):
    model = built(name, fine_levels=fine_levels)
    tokens = model.tokens(make_batch(1, 1))
    fine = sum(h * w for h, w in tokens.spatial_shapes[:fine_levels])
    seen, memory = [], model.encode(tokens)[0].features
    for layer in model.encoder.layers:
        layer.register_forward_hook(lambda _, given, made: seen.append((given, made)))
    model.encode(tokens)
    counts = [made.shape[1] for _, made in seen]
    S = tokens.features.shape[1]
    assert counts == [S - fine, S, S - fine, S]
    inputs = [given[1].features for given, _ in seen]  # all tokens, as each layer may attend to
    for before, after, changes in zip(inputs, [*inputs[1:], memory], (0, 1, 0, 1), strict=True):
        same = (before == after).all(-1)
        assert not same[:, fine:].any()
        assert (not same[:, :fine].any()) if changes else same[:, :fine].all()


def by_the_authors_loop(model, tokens):
    """The encoder as their code has it: fine tokens stand aside until a block ends."""
    c, S = model.config, tokens.features.shape[1]
    fine = sum(h * w for h, w in tokens.spatial_shapes[: c.fine_levels])
    centres = token_centres(tokens.spatial_shapes, tokens.valid_ratios)
    source = tokens.features
    for i, layer in enumerate(model.encoder.layers):
        whole = (i + 1) % (c.encoder_layers / (c.encoder_layers // c.block_layers)) == 0
        part = slice(0 if whole else fine, S)
        memory = dataclasses.replace(tokens, features=source)
        asking = Queries(source[:, part], tokens.position[:, part], centres[:, part])
        x = layer.norm(source[:, part] + layer.attention.attend(asking, memory))
        if whole:
            small, large = layer.small_ffn, layer.ffn
            pieces = []
            for ffn, piece in ((small, x[:, :fine]), (large, x[:, fine:])):
                inner = torch.relu(ffn.linear1(piece))
                pieces.append(ffn.norm(piece + ffn.linear2(inner)))
            source = torch.cat(pieces, 1)
        else:
            source = torch.cat([source[:, :fine], layer.ffn(x)], 1)
    return source


@each_member
@pytest.mark.parametrize("key_aware", [True, False])
def test_the_encoder_is_the_authors_loop(name, key_aware):
    model = built(name, key_aware=key_aware)
    tokens = model.tokens(make_batch(1, 1))
    found = model.encode(tokens)[0].features
    torch.testing.assert_close(found, by_the_authors_loop(model, tokens), rtol=1e-4, atol=1e-5)


def test_a_last_block_that_is_shorter_ends_with_all_tokens():
    model = build(tiny("lite_detr", encoder_layers=3))
    assert [model.updates_all(i) for i in range(3)] == [False, True, True]
    assert [isinstance(layer, WholeLayer) for layer in model.encoder.layers] == [False, True, True]


# What attends


@each_member
def test_all_that_samples_looks_at_keys_or_nothing_does(name):
    for key_aware, kind in ((True, KeyAwareAttention), (False, MSDeformAttn)):
        model = build(tiny(name, key_aware=key_aware))
        layers = [x.attention for x in model.encoder.layers]
        layers += [x.cross_attention for x in model.decoder.layers]
        assert all(type(x) is kind for x in layers)


@each_member
def test_a_new_model_samples_stars(name):
    """The initialisation of all matrices must not reach the offsets."""
    torch.manual_seed(0)
    model = MEMBERS[name][0](tiny(name))
    for layer in model.encoder.layers:
        assert not layer.attention.sampling_offsets.weight.any()
        assert layer.attention.query_proj.weight.std() > 0.05


@each_member
def test_it_takes_a_step_with_layers_computed_again(name):
    model, batch = build(tiny(name, **FOUR)).train(), make_batch(3, 1)
    model.set_gradient_checkpointing(True)
    losses = SetCriterion()(output_of(model, batch), batch.targets)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_its_program_gives_the_same_numbers_at_another_size():
    """Written down in plain operations, which every runtime has."""
    small = {"num_levels": 2, "num_points": 1, "decoder_layers": 1}
    graph = make_graph(build(tiny("lite_detr", **small)))
    program = to_program(graph, (64, 96))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("sampled_products" in name for name in called)
    inputs = example(3, 80, 72)
    for found, expected in zip(program.module()(*inputs), graph(*inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# What it costs


def test_the_encoder_costs_half_of_the_dense_ones():
    """For each token a partial layer has 31 % of a dense one's multiply-adds, a whole one 62 %."""
    parts = []
    for changes in ({}, {"block_layers": 1, "small_ffn": False}):
        with torch.device("meta"):
            model = LiteDETR(LiteDETRConfig(key_aware=False, **changes))
        parts.append(complexity(model, (800, 1066), repeats=0).parts["encoder"])
    assert 0.44 < parts[0] / parts[1] < 0.48


def test_key_awareness_is_counted():
    """Of a layer: the projection of queries for that of weights, and products with what is sampled,
    as many as the sum over them."""
    C, M, L, K, Q = 32, 2, 3, 2, 7
    counts = []

    class Alone(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.attention = kind(C, L, M, K)

        def forward(self, batch):
            x = torch.zeros(1, 30, C)
            shapes = [(4, 5), (3, 3), (1, 1)]
            return self.attention(x[:, :Q], torch.rand(1, Q, 1, 2), x, shapes)

    for kind in (KeyAwareAttention, MSDeformAttn):
        counts.append(complexity(Alone(kind), (8, 8), repeats=0).multiply_adds)
    more = Q * C * (C - M * L * K) + 5 * Q * M * L * K * (C // M)
    assert counts[0] - counts[1] == more


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"fine_levels": 3},
            r"at least one level must be coarse, got fine_levels=3 of num_levels=3",
        ),
        ({"fine_levels": 0}, r"these must be at least 1: {'fine_levels': 0}"),
        ({"block_layers": 0}, r"these must be at least 1: {'block_layers': 0}"),
    ],
)
def test_options_out_of_range_are_refused(changes, message):
    for name in MEMBERS:
        with pytest.raises(ValueError, match=f"^{message}$"):
            tiny(name, **changes)
