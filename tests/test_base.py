"""Every seam of the base carries a member of the family: toys of about thirty lines each."""

import dataclasses

import pytest
import torch
from torch import nn

from deformable_detr import Batch, Target
from deformable_detr.layers.dense_attention import DenseAttention
from deformable_detr.losses import SetCriterion
from deformable_detr.models import (
    DETR,
    MODELS,
    DeformableDETR,
    DeformableDETRConfig,
    DETRConfig,
    model_name,
)
from deformable_detr.models.decoder import Decoder, RefiningDecoder
from deformable_detr.models.heads import move
from deformable_detr.ops.reference import sample_levels
from deformable_detr.structures import Denoising, Output, Queries

TINY = DeformableDETRConfig(
    num_classes=5,
    num_queries=6,
    backbone="small",
    num_levels=2,
    embed_dim=32,
    num_heads=2,
    num_points=3,
    encoder_layers=2,
    decoder_layers=3,
    ffn_dim=40,
    dropout=0.0,
    refine=True,
    two_stage=True,
)


def make_batch(*counts):
    """Images of unlike sizes with so many objects each."""
    torch.manual_seed(1)
    sizes = [(64, 80), (48, 96), (56, 40)]
    images = [torch.randn(3, *size) for size in sizes[: len(counts)]]
    targets = [
        Target(i, torch.randint(5, (n,)), torch.rand(n, 4) * 0.4 + 0.2, sizes[i])
        for i, n in enumerate(counts)
    ]
    return Batch.from_images(images, targets)


def build(kind, **changes):
    """A model whose numbers are not the special ones of an untrained one."""
    torch.manual_seed(0)
    model = kind(dataclasses.replace(TINY, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    # without batch statistics, which the denoising part does not change, but a toy's eval does
    model.backbone.eval()
    return model


# Denoising: extra queries, a mask, known matches


class Denoised(DeformableDETR):
    """In training, `groups` copies of each object, which must find it again."""

    groups = 2

    def build_queries(self):
        super().build_queries()
        self.labels = nn.Embedding(self.config.num_classes, self.config.embed_dim)

    def queries(self, memory, targets):
        queries, sets = super().queries(memory, targets)
        if targets is None or not any(len(target.labels) for target in targets):
            return queries, sets
        B, Q, C = queries.content.shape
        most = max(len(target.labels) for target in targets)
        size = self.groups * most
        content, boxes = queries.content.new_zeros(B, size, C), torch.full((B, size, 4), 0.5)
        counted, matches = torch.zeros(B, size, dtype=torch.bool), []
        for i, target in enumerate(targets):
            objects = torch.arange(len(target.labels)).repeat(self.groups)
            places = torch.cat([g * most + torch.arange(len(target.labels)) for g in range(2)])
            content[i, places] = self.labels(target.labels[objects])
            boxes[i, places] = (target.boxes[objects] * 1.1).clamp(0, 1)
            counted[i, places] = True
            matches.append((places, objects))
        mask = torch.zeros(size + Q, size + Q, dtype=torch.bool)
        mask[size:, :size] = True  # queries must not see what they are to find
        for g in range(self.groups):
            own = slice(g * most, (g + 1) * most)
            mask[own, :size] = True
            mask[own, own] = False
        noised = Queries(content, torch.zeros_like(content), boxes)
        joined = [
            torch.cat([getattr(part, name) for part in (noised, queries)], 1)
            for name in ("content", "position", "references")
        ]
        return Queries(*joined, mask, 1, Denoising(size, matches, self.groups, counted)), sets


def test_denoising_queries_are_supervised_by_known_matches_and_not_seen_by_the_others():
    model, batch = build(Denoised).train(), make_batch(3, 1)
    model.backbone.eval()
    output = model(batch)
    plain = model(Batch(batch.images, batch.mask, batch.sizes))
    assert not any("denoising" in name for name in plain.others)
    torch.testing.assert_close(output.logits, plain.logits)
    torch.testing.assert_close(output.boxes, plain.boxes)
    assert {name for name in output.others if "denoising" in name} == {
        "denoising",
        "denoising_0",
        "denoising_1",
    }
    losses = SetCriterion()(output, batch.targets)
    noised = output.others["denoising"]
    pairs = [
        (noised.boxes[i, q], batch.targets[i].boxes[o])
        for i, match in enumerate(noised.matches)
        for q, o in zip(*match, strict=True)
    ]
    assert len(pairs) == 2 * (3 + 1)
    distance = sum((a - b).abs().sum() for a, b in pairs)
    # divided by the boxes of all groups
    assert losses["loss_box_denoising"].item() == pytest.approx(5 * distance.item() / 8, rel=1e-5)
    sum(value for name, value in losses.items() if "denoising" in name).backward()
    assert model.labels.weight.grad.any()


def test_empty_places_are_not_judged():
    """The second image has one object where the first has three: its two empty places may say
    anything."""
    model, batch = build(Denoised).train(), make_batch(3, 1)
    model.backbone.eval()
    output = model(batch)
    noised = output.others["denoising"]
    spoilt = noised.logits.clone()
    spoilt[1, [1, 2, 4, 5]] += 100.0
    others = output.others | {"denoising": dataclasses.replace(noised, logits=spoilt)}
    before, after = (
        SetCriterion()(each, batch.targets)
        for each in (output, dataclasses.replace(output, others=others))
    )
    assert before == after


def test_denoising_is_left_out_without_objects_and_in_evaluation():
    model = build(Denoised)
    for training, counts in ((True, (0, 0)), (False, (3, 1))):
        output = model.train(training)(make_batch(*counts))
        assert output.logits.shape[1] == 6 and set(output.others) == {"first"}


# An encoder that updates some of the tokens


class Third(DeformableDETR):
    """Only the third of all tokens with the longest vectors is updated, and predicts too."""

    share = 1 / 3

    def encode(self, tokens):
        length = tokens.features.norm(dim=-1).masked_fill(tokens.padding_mask, -1.0)
        chosen = length.topk(round(self.share * length.shape[1]), dim=1).indices
        memory = self.encoder(tokens, [chosen] * len(self.encoder.layers))
        self.chosen = chosen
        return memory, {"encoder": self.first_stage.propose(memory)}


def test_an_encoder_updates_the_chosen_tokens_alone():
    model, batch = build(Third).eval(), make_batch(1, 1)
    tokens = model.tokens(batch)
    memory, _ = model.encode(tokens)
    changed = (memory.features != tokens.features).any(-1)
    chosen = torch.zeros_like(changed).scatter(1, model.chosen, True)
    assert torch.equal(changed, chosen) and 0.3 < changed.float().mean() < 0.35
    losses = SetCriterion()(model(batch), batch.targets)
    assert {"loss_class_encoder", "loss_box_encoder", "loss_giou_encoder"} <= losses.keys()


def test_an_encoder_that_updates_all_chosen_tokens_is_the_dense_one():
    model, tokens = build(Third).eval(), None
    model.share = 1.0
    tokens = model.tokens(make_batch(1, 1))
    memory, _ = model.encode(tokens)
    torch.testing.assert_close(memory.features, model.encoder(tokens).features)


def test_each_layer_may_choose_other_tokens():
    """As in an encoder that updates coarse tokens, and all of them in its last layer."""
    model = build(DeformableDETR).eval()
    tokens = model.tokens(make_batch(1, 1))
    fine = tokens.spatial_shapes[0][0] * tokens.spatial_shapes[0][1]
    total = tokens.features.shape[1]
    coarse = torch.arange(fine, total).expand(2, -1)
    partly = model.encoder(tokens, [coarse, coarse])
    assert torch.equal(partly.features[:, :fine], tokens.features[:, :fine])
    last = model.encoder(tokens, [coarse, None])
    assert (last.features[:, :fine] != tokens.features[:, :fine]).any(-1).all()


# A decoder whose next reference keeps its gradient


class Following(RefiningDecoder):
    """As iterative refinement, but gradients pass from layer to layer."""

    def next_references(self, queries, delta, boxes, box_head):
        return boxes, boxes


class LookingForwardTwice(RefiningDecoder):
    """A layer's boxes start from what the last one said, with its gradient; it looks elsewhere:
    around the same boxes, cut off."""

    def next_references(self, queries, delta, boxes, box_head):
        moved = move(queries.references, delta)
        return moved.detach(), moved


def reached(decoder_class):
    """Which layers' box heads get a gradient from the last layer's boxes alone."""

    class Member(DeformableDETR):
        def make_decoder(self, layers):
            return decoder_class(layers)

    model, batch = build(Member), make_batch(2)
    output = model(batch)
    output.boxes.sum().backward()
    return [
        head.layers[-1].weight.grad is not None and bool(head.layers[-1].weight.grad.any())
        for head in model.box_heads
    ], output


def test_a_member_decides_how_far_gradients_follow_references():
    cut, before = reached(RefiningDecoder)
    follow, after = reached(Following)
    twice, _ = reached(LookingForwardTwice)
    assert cut == [False, False, True]
    assert follow == [True, True, True]
    assert twice == [False, True, True]
    torch.testing.assert_close(after.boxes, before.boxes)  # the numbers are the same


class PlacedByReference(Decoder):
    """Position is made from the references, layer by layer."""

    def __init__(self, layers):
        super().__init__(layers)
        self.place = nn.Linear(4, 32)
        self.seen = []

    def position(self, queries, memory, layer):
        self.seen.append(layer)
        return self.place(queries.references)


def test_a_member_makes_positions_from_references():
    class Member(DeformableDETR):
        def make_decoder(self, layers):
            return PlacedByReference(layers)

    model = build(Member)
    model(make_batch(1)).logits.sum().backward()
    assert model.decoder.seen == [0, 1, 2] and model.decoder.place.weight.grad.any()


# Groups of queries


class GroupedSelfAttention(DenseAttention):
    """Each group of queries attends to itself: groups are folded into the batch."""

    def mix(self, queries):
        B, Q, C = queries.content.shape
        size = Q // queries.groups
        fold = (queries.content + queries.position).reshape(B * queries.groups, size, C)
        values = queries.content.reshape(B * queries.groups, size, C)
        return self(fold, fold, values, need_weights=False)[0].reshape(B, Q, C)


class Grouped(DeformableDETR):
    """Three groups of learned queries in training, the first alone otherwise."""

    groups = 3

    def self_attention(self):
        return GroupedSelfAttention(self.config.embed_dim, self.config.num_heads)

    def queries(self, memory, targets):
        queries, sets = super().queries(memory, targets)
        groups = 1 if targets is None else self.groups
        rows = queries.content.shape[1] // self.groups * groups
        parts = (x[:, :rows] for x in (queries.content, queries.position, queries.references))
        return Queries(*parts, groups=groups), sets


def test_groups_are_matched_each_by_itself_and_the_first_is_the_model():
    model = build(Grouped, two_stage=False, refine=False, num_queries=12)
    batch = make_batch(2, 3)
    output, alone = model.train()(batch), None
    assert output.logits.shape[1] == 12 and output.groups == 3
    model.backbone.eval()
    output = model(batch)
    alone = model.eval()(batch)
    assert alone.logits.shape[1] == 4 and alone.groups == 1
    torch.testing.assert_close(output.logits[:, :4], alone.logits)
    criterion = SetCriterion()
    whole = criterion(output, batch.targets)
    parts = [
        criterion(
            Output(
                output.logits[:, i : i + 4],
                output.boxes[:, i : i + 4],
                auxiliary=[layer.queries(i, i + 4) for layer in ungrouped(output.auxiliary)],
            ),
            batch.targets,
        )
        for i in (0, 4, 8)
    ]
    for name, value in whole.items():  # the mean of the groups' losses
        mean = sum(part[name] for part in parts) / 3
        torch.testing.assert_close(value, mean, msg=name)


def ungrouped(layers):
    return [dataclasses.replace(layer, groups=1) for layer in layers]


# Key-aware attention


class KeyAware(nn.Module):
    """Weights from dot products of the query with the keys that it samples."""

    def __init__(self, config):
        super().__init__()
        self.shape = config.num_heads, config.num_levels, config.num_points
        C = config.embed_dim
        self.offsets = nn.Linear(C, 2 * config.num_heads * config.num_levels * config.num_points)
        self.query, self.value, self.out = (nn.Linear(C, C) for _ in range(3))

    def attend(self, queries, memory):
        (M, L, K), (B, Q, C) = self.shape, queries.content.shape
        asked = queries.content + queries.position
        size = torch.tensor([(w, h) for h, w in memory.spatial_shapes]).float()
        centres = queries.references[..., :2][:, :, None] * memory.valid_ratios[:, None]
        locations = self.offsets(asked).view(B, Q, M, L, K, 2) / size[:, None]
        locations = locations + centres[:, :, None, :, None]
        value = self.value(memory.features).masked_fill(memory.padding_mask[..., None], 0)
        keys = sample_levels(value.view(B, -1, M, C // M), memory.spatial_shapes, locations)
        scores = torch.einsum("bqmd,bqmlkd->bqmlk", self.query(asked).view(B, Q, M, -1), keys)
        weights = (scores / (C // M) ** 0.5).flatten(3).softmax(-1).view_as(scores)
        return self.out(torch.einsum("bqmlk,bqmlkd->bqmd", weights, keys).flatten(2))


def test_layers_take_whatever_attends():
    class Member(DeformableDETR):
        def attention(self):
            return KeyAware(self.config)

    model, batch = build(Member), make_batch(2, 1)
    losses = SetCriterion()(model(batch), batch.targets)
    sum(losses.values()).backward()
    for layer in model.encoder.layers:
        assert layer.attention.query.weight.grad.any()
    for layer in model.decoder.layers:
        assert layer.cross_attention.query.weight.grad.any()


# What a member may not have to know


@pytest.mark.parametrize("member", [Denoised, Third, Grouped, DETR])
def test_gradient_checkpointing_changes_no_gradient(member):
    """A layer is computed again from what it was given, whatever has happened to that since."""
    config = TINY if issubclass(member, DeformableDETR) else small_detr()
    gradients = []
    for on in (False, True):
        torch.manual_seed(0)
        model, batch = member(config).train(), make_batch(3, 1)
        model.set_gradient_checkpointing(on)
        sum(SetCriterion()(model(batch), batch.targets).values()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def small_detr():
    return DETRConfig(
        num_classes=5, num_queries=6, backbone="small", embed_dim=32, num_heads=2,
        encoder_layers=2, decoder_layers=3, ffn_dim=40, dropout=0.0,
    )  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_built_from_its_configuration_alone(name):
    config, kind = MODELS[name]
    few = {"num_queries": 10, "num_classes": 3, "encoder_layers": 1, "decoder_layers": 1}
    model = kind(config(backbone="small", **few))
    assert type(model.config) is config
    output = model.eval()(make_batch(1, 2))
    assert output.boxes.shape[:2] == output.logits.shape[:2] == (2, 10)


def test_a_configuration_of_no_model_is_refused():
    with pytest.raises(TypeError, match="str is the configuration of no model in MODELS: deform"):
        model_name("deformable_detr")
