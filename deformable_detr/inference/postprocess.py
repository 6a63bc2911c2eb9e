"""From the model's output to detections in pixels. Chapter matching_and_loss."""

import torch
from torchvision.ops import box_convert

from deformable_detr.boxes import cxcywh_to_xyxy
from deformable_detr.losses.scoring import scoring_of
from deformable_detr.structures import Detections, Output


@torch.no_grad()
def postprocess(
    output: Output,
    original_sizes: list[tuple[int, int]],
    top_k: int = 100,
    threshold: float = 0.0,
) -> list[Detections]:
    """The top_k best detections of each image, best first.

    As the output's scoring has them: with focal scoring the highest scores over all queries and
    classes, where a query may appear with several classes; with softmax each query's best class.
    original_sizes: B pairs (H, W) in pixels, in which the boxes are returned. threshold: least
    score kept, in [0, 1].
    """
    B = len(output.logits)
    if len(original_sizes) != B:
        raise ValueError(f"expected {B} original sizes, got {len(original_sizes)}")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if output.groups > 1:
        raise ValueError(
            f"detections are those of one group of queries, got {output.groups}, which a model has "
            "in training: call model.eval() first"
        )
    scores, query, label = scoring_of(output).best(output.logits, top_k)
    detections = []
    for i, (height, width) in enumerate(original_sizes):
        scale = output.boxes.new_tensor([width, height, width, height])
        boxes = cxcywh_to_xyxy(output.boxes[i, query[i]]) * scale
        found = Detections(scores[i], label[i], boxes, query[i])
        detections.append(found[scores[i] >= threshold])
    return detections


def as_results(found: Detections, image_id: int | str, category_ids: list) -> list[dict]:
    """COCO results of one image: boxes as x, y, width, height in pixels.

    category_ids: the data's own, of each detection.
    """
    boxes = box_convert(found.boxes, "xyxy", "xywh").tolist()
    return [
        {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
        for category_id, box, score in zip(category_ids, boxes, found.scores.tolist(), strict=True)
    ]
