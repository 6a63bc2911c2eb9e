"""Matching, losses and post-processing against values worked out by hand."""

import dataclasses
import math

import pytest
import torch

from deformable_detr import Output, Target
from deformable_detr.boxes import cxcywh_to_xyxy, inverse_sigmoid
from deformable_detr.inference.postprocess import postprocess
from deformable_detr.losses.criterion import SetCriterion
from deformable_detr.losses.matcher import HungarianMatcher
from deformable_detr.losses.scoring import focal_cost
from deformable_detr.structures import Predictions


def logit(p):
    return math.log(p / (1 - p))


def target(boxes, labels, image_id=1):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Target(image_id, torch.tensor(labels, dtype=torch.long), boxes, (100, 200))


def focal(p, positive):
    """Lin et al. (2017), Eq. 5, alpha 0.25 and gamma 2, for one probability."""
    return -0.25 * (1 - p) ** 2 * math.log(p) if positive else -0.75 * p**2 * math.log(1 - p)


def giou(a, b):
    """Rezatofighi et al. (2019) for two boxes xyxy."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return inter / union - (hull - union) / hull


def test_box_forms():
    boxes = torch.tensor([[0.5, 0.4, 0.2, 0.6]])
    torch.testing.assert_close(cxcywh_to_xyxy(boxes), torch.tensor([[0.4, 0.1, 0.6, 0.7]]))


def test_inverse_sigmoid_is_the_logit_and_finite_at_the_ends():
    x = torch.tensor([0.0, 0.25, 1.0, -3.0, 7.0])
    end = -math.log(1e-5)
    expected = torch.tensor([-end, math.log(1 / 3), end, -end, end])
    torch.testing.assert_close(inverse_sigmoid(x), expected)


def test_focal_cost():
    p = 0.3
    expected = focal(p, True) - focal(p, False)
    assert focal_cost(torch.tensor(logit(p))).item() == pytest.approx(expected, rel=1e-5)


def test_cost_by_hand():
    predicted, wanted = [0.5, 0.5, 0.2, 0.4], [0.4, 0.5, 0.4, 0.4]
    logits = torch.tensor([[logit(0.1), logit(0.7)]])
    cost = HungarianMatcher().cost(logits, torch.tensor([predicted]), target([wanted], [1]))
    expected = 2 * (focal(0.7, True) - focal(0.7, False)) + 5 * (0.1 + 0.2)
    expected -= 2 * giou([0.4, 0.3, 0.6, 0.7], [0.2, 0.3, 0.6, 0.7])
    assert cost.item() == pytest.approx(expected, rel=1e-5)


def test_the_matching_is_of_least_total_cost_not_greedy():
    """Query 0 is the best for both objects; the least sum gives it to the second."""

    class Given(HungarianMatcher):
        def cost(self, logits, boxes, target, scoring):
            return torch.tensor([[1.0, 2.0], [2.0, 9.0], [8.0, 9.0]])

    output = Output(torch.zeros(1, 3, 2), torch.rand(1, 3, 4))
    queries, objects = Given()(output, [target([[0.5] * 4] * 2, [0, 1])])[0]
    assert dict(zip(queries.tolist(), objects.tolist(), strict=True)) == {0: 1, 1: 0}


def test_predictions_that_are_not_finite_are_refused_by_image():
    output = Output(torch.full((1, 3, 2), torch.nan), torch.rand(1, 3, 4))
    with pytest.raises(ValueError, match=r"image 77: .* not finite"):
        HungarianMatcher()(output, [target([[0.5] * 4], [0], image_id=77)])


def test_losses_by_hand():
    """Two images, three queries, two classes; the second image has no object."""
    p = torch.tensor([[[0.6, 0.2], [0.1, 0.3], [0.05, 0.1]], [[0.2, 0.1], [0.3, 0.1], [0.1, 0.1]]])
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1]])
    output = Output(p.logit(), boxes.expand(2, -1, -1))
    wanted = [[0.4, 0.5, 0.4, 0.4], [0.25, 0.2, 0.1, 0.2]]
    losses = SetCriterion()(output, [target(wanted, [0, 1]), target([], [])])

    positive = {(0, 0, 0), (0, 1, 1)}
    indices = [(b, q, c) for b in range(2) for q in range(3) for c in range(2)]
    class_loss = sum(focal(p[i].item(), i in positive) for i in indices)
    l1 = (0.1 + 0.2) + (0.05 + 0.1)
    overlap = giou([0.4, 0.3, 0.6, 0.7], [0.2, 0.3, 0.6, 0.7])
    overlap += giou([0.15, 0.15, 0.25, 0.25], [0.2, 0.1, 0.3, 0.3])
    assert losses["loss_class"].item() == pytest.approx(2 * class_loss / 2, rel=1e-5)
    assert losses["loss_box"].item() == pytest.approx(5 * l1 / 2, rel=1e-5)
    assert losses["loss_giou"].item() == pytest.approx(2 * (2 - overlap) / 2, rel=1e-5)


def test_every_layer_is_matched_anew_and_the_first_stage_knows_no_classes():
    box = [0.5, 0.5, 0.2, 0.4]
    far = [0.1, 0.1, 0.1, 0.1]
    swapped = Predictions(torch.zeros(1, 2, 3), torch.tensor([[far, box]]))
    first = dataclasses.replace(
        swapped, logits=torch.zeros(1, 2, 3, requires_grad=True), class_agnostic=True
    )
    output = Output(
        torch.zeros(1, 2, 3),
        torch.tensor([[box, far]]),
        auxiliary=[swapped],
        others={"first": first},
    )
    losses = SetCriterion()(output, [target([box], [2])])
    assert set(losses) == {
        f"loss_{term}{layer}" for term in ("class", "box", "giou") for layer in ("", "_0", "_first")
    }
    assert all(losses[name] == 0 for name in losses if "box" in name)
    losses["loss_class_first"].backward()
    assert (first.logits.grad < 0).nonzero().tolist() == [[0, 1, 0]]  # class 0, not class 2


def test_a_batch_without_boxes_has_a_finite_loss_and_gradient():
    logits = torch.zeros(2, 3, 4, requires_grad=True)
    boxes = torch.rand(2, 3, 4, requires_grad=True)
    losses = SetCriterion()(Output(logits, boxes), [target([], []), target([], [])])
    sum(losses.values()).backward()
    assert losses["loss_class"].item() == pytest.approx(2 * 24 * focal(0.5, False), rel=1e-5)
    assert losses["loss_box"] == losses["loss_giou"] == 0
    assert (logits.grad > 0).all() and (boxes.grad == 0).all()


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_out_of_range_are_named(label):
    output = Output(torch.zeros(1, 2, 3), torch.rand(1, 2, 4))
    with pytest.raises(ValueError, match=rf"image 5: labels must be in \[0, 3\), got \[{label}\]"):
        SetCriterion()(output, [target([[0.5] * 4], [label], image_id=5)])
    with pytest.raises(ValueError, match="expected 1 targets, one for each image, got 2"):
        SetCriterion()(output, 2 * [target([], [])])


def test_the_terms_are_divided_by_the_number_of_boxes_that_is_given():
    output = Output(torch.randn(1, 2, 3), torch.rand(1, 2, 4))
    targets = [target([[0.5] * 4] * 2, [0, 1])]
    own, given = SetCriterion()(output, targets), SetCriterion()(output, targets, num_boxes=5.0)
    assert all(given[name].item() == pytest.approx(own[name].item() * 2 / 5) for name in own)


def test_postprocess_takes_the_best_over_queries_and_classes():
    p = torch.tensor([[[0.9, 0.8], [0.1, 0.3], [0.2, 0.7]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.2, 0.2, 0.1, 0.1], [0.25, 0.5, 0.5, 1.0]]])
    found = postprocess(Output(p.logit(), boxes), [(100, 200)], top_k=3)[0]
    torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.8, 0.7]))
    assert found.labels.tolist() == [0, 1, 1] and found.queries.tolist() == [0, 0, 2]
    expected = torch.tensor([[80.0, 30, 120, 70], [80, 30, 120, 70], [0, 0, 100, 100]])
    torch.testing.assert_close(found.boxes, expected)
    assert len(postprocess(Output(p.logit(), boxes), [(100, 200)], threshold=0.75)[0]) == 2
    with pytest.raises(ValueError, match="expected 1 original sizes, got 2"):
        postprocess(Output(p.logit(), boxes), [(1, 1)] * 2)
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        postprocess(Output(p.logit(), boxes), [(100, 200)], top_k=0)
