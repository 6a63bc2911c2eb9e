"""What chapters pixels_to_boxes, matching_and_loss and refinement say of the detector, where a
sentence of theirs was once wrong."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torchvision.ops import generalized_box_iou

from deformable_detr import DeformableDETR, DeformableDETRConfig
from deformable_detr.boxes import cxcywh_to_xyxy
from deformable_detr.losses.criterion import SetCriterion
from deformable_detr.losses.matcher import HungarianMatcher
from deformable_detr.models.heads import move
from deformable_detr.structures import Batch, Output, Target

RESULTS = Path(__file__).parents[1] / "data" / "results"
SMALL = {
    "num_classes": 10,
    "num_queries": 7,
    "backbone": "small",
    "num_levels": 3,
    "embed_dim": 32,
    "num_heads": 4,
    "num_points": 2,
    "encoder_layers": 1,
    "decoder_layers": 3,
    "ffn_dim": 48,
    "dropout": 0.0,
}


def detector(**changes) -> DeformableDETR:
    """A small one in which nothing starts from zero weights."""
    torch.manual_seed(0)
    model = DeformableDETR(DeformableDETRConfig(**SMALL | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def batch_of_two() -> Batch:
    """Two images of unlike sizes with two and one objects."""
    boxes = torch.tensor([[0.4, 0.5, 0.3, 0.4], [0.7, 0.3, 0.2, 0.3]])
    targets = [
        Target(0, torch.tensor([3, 5]), boxes, (64, 80)),
        Target(1, torch.tensor([7]), boxes[1:], (48, 96)),
    ]
    return Batch.from_images([torch.randn(3, 64, 80), torch.randn(3, 48, 96)], targets)


def test_a_reference_point_can_lie_on_the_padding_of_a_coarse_level():
    """72 of 88 rows are all three rows of a map of 3 x 4, whose last one begins below row 58."""
    images = [torch.zeros(3, 88, 104), torch.zeros(3, 72, 120)]
    model = detector(num_levels=4)
    ratios = model.tokens(Batch.from_images(images)).valid_ratios[1, :, 1]
    lowest = 0.95 * ratios  # of a query near the lower edge of the image
    assert (lowest > 72 / 88).tolist() == [False, False, False, True]


def test_centres_stay_inside_and_edges_need_not():
    boxes = move(torch.rand(500, 4), 8 * torch.randn(500, 4))
    corners = cxcywh_to_xyxy(boxes)
    assert boxes.min() >= 0 and boxes.max() <= 1
    assert corners.min() < -0.1 and corners.max() > 1.1


def test_each_class_starts_at_no_and_a_query_with_many_classes_does_not():
    head = DeformableDETR(DeformableDETRConfig(**SMALL | {"num_classes": 91})).class_heads[0]
    no = 1 - head.bias.sigmoid()
    torch.testing.assert_close(no, torch.full((91,), 0.99))
    assert math.isclose(no.prod().item(), 0.40, abs_tol=0.005)


def test_l1_is_the_same_for_all_sizes_and_giou_is_not():
    small, large = (torch.tensor([[0.5, 0.5, size, size]]) for size in (0.1, 0.5))
    shift = torch.tensor([0.05, 0.0, 0.0, 0.0])
    l1 = [(box + shift - box).abs().sum().item() for box in (small, large)]
    giou = [
        generalized_box_iou(cxcywh_to_xyxy(box + shift), cxcywh_to_xyxy(box)).item()
        for box in (small, large)
    ]
    assert math.isclose(*l1, rel_tol=1e-5)
    assert giou[0] < giou[1] - 0.3


def test_a_plain_detector_predicts_in_every_layer_from_the_same_point():
    output = detector()(batch_of_two())
    layers = [*output.auxiliary, output]
    assert len(layers) == SMALL["decoder_layers"]
    assert len({layer.boxes.sum().item() for layer in layers}) == len(layers)
    for layer in layers:
        assert torch.equal(layer.references, layers[0].references)


def test_the_cut_spares_earlier_layers_and_not_their_heads():
    model, batch = detector(refine=True), batch_of_two()
    SetCriterion()(model(batch), batch.targets)["loss_giou"].backward()

    def reached(part):
        return any(p.grad is not None and bool(p.grad.any()) for p in part.parameters())

    assert [reached(head) for head in model.box_heads] == [False, False, True]
    assert [reached(layer) for layer in model.decoder.layers] == [True, True, True]


def test_the_decoders_losses_do_not_reach_the_first_stages_heads():
    model, batch = detector(refine=True, two_stage=True), batch_of_two()
    losses = SetCriterion()(model(batch), batch.targets)
    decoder = [term for name, term in losses.items() if not name.endswith("_first")]
    sum(decoder).backward(retain_graph=True)
    stage = model.first_stage
    own = [stage.output, stage.output_norm, stage.class_head, stage.box_head]
    assert all(p.grad is None for part in own for p in part.parameters())
    assert stage.query.weight.grad.any()
    sum(losses[f"loss_{name}_first"] for name in ("class", "box", "giou")).backward()
    assert all(p.grad.any() for part in own for p in part.parameters())
    assert model.encoder.layers[0].attention.value_proj.weight.grad.any()


def test_the_first_stage_is_matched_by_itself_over_all_tokens_as_class_0():
    model, batch = detector(refine=True, two_stage=True), batch_of_two()
    output = model(batch)
    first = output.others["first"]
    assert first.logits.shape[1] == 16 * 24 + 8 * 12 + 4 * 6
    targets = [dataclasses.replace(t, labels=torch.zeros_like(t.labels)) for t in batch.targets]
    alone = SetCriterion()(Output(first.logits, first.boxes), targets)
    losses = SetCriterion()(output, batch.targets)
    for name, term in alone.items():
        torch.testing.assert_close(losses[f"{name}_first"], term)
    matches = HungarianMatcher()(first, targets)
    assert [len(queries) for queries, _ in matches] == [2, 1]


def test_tokens_that_may_not_propose_are_blank():
    model, batch = detector(refine=True, two_stage=True), batch_of_two()
    tokens = model.tokens(batch)
    proposals = model.first_stage.propose(tokens)
    padded = tokens.padding_mask
    assert padded.any()
    assert torch.equal(proposals.boxes[padded], torch.ones_like(proposals.boxes[padded]))
    features = model.first_stage.output_norm(model.first_stage.output.bias)
    expected = model.first_stage.class_head(features).expand_as(proposals.logits[padded])
    torch.testing.assert_close(proposals.logits[padded], expected)


def runs(name: str) -> list[dict]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))["runs"]


def test_the_plain_detector_of_the_study_is_hardly_trained():
    aps = {}
    for run in runs("refinement.json"):
        aps.setdefault(run["variant"], []).append(run["val"]["ap"])
    assert max(aps["plain"]) < 0.02
    assert max(aps["plain"]) < min(aps["refinement"])
    assert max(aps["refinement"]) < min(aps["refinement, two stages"])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_without_the_cut_gradients_are_larger_and_a_short_run_learns_no_worse(seed):
    of = {run["variant"]: run for run in runs("gradient_cut.json") if run["seed"] == seed}
    norms = {name: sum(run["curves"]["gradient_norm"]) for name, run in of.items()}
    assert norms["open"] > 2.5 * norms["cut"]
    assert of["open"]["val"]["loss_giou"] < of["cut"]["val"]["loss_giou"]
