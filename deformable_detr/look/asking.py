"""What does it look at? Ask a detector by one call. Chapter looking."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from deformable_detr.boxes import cxcywh_to_xyxy
from deformable_detr.data.crowding import TOP_K
from deformable_detr.data.images import Picture, read_image
from deformable_detr.evaluation_mode import evaluating
from deformable_detr.look.explanation import Explanation
from deformable_detr.look.gradients import ITEMS, FollowReferences, item_gradients
from deformable_detr.look.subject import Transform, as_subject
from deformable_detr.look.trace import Trace, trace
from deformable_detr.losses.scoring import scoring_of
from deformable_detr.structures import Batch

COPIES = 16  # noisy ones, of which gradients are the mean
SAME = 0.5  # IoU from which a box in a noisy copy is of the same object


def explain(
    detector: Any,
    image: Picture,
    detection: int = 0,
    query: int | None = None,
    token: tuple[float, float] | None = None,
    level: int = 0,
    gradients: bool = True,
    noise: float = 0.0,
    threshold: float | None = None,
    transform: Transform | None = None,
    padded_size: tuple[int, int] | None = None,
) -> Explanation:
    """What a detector looked at for one detection: sampling points and gradient norms (A.5, A.6).

        seen = explain(load_detector("best.safetensors"), "photo.jpg")
        seen.points, seen.weights, seen.gradients["score"]
        seen.draw().savefig("seen.png")

    detector: of `load_detector`, a bare model of ours, or one of Hugging Face's. image: a file, an
    array or a picture, as `read_image` takes it. detection: its number, best first, as `predict`
    counts them; or instead a query of the decoder, or the encoder's token whose cell on a level
    holds a point, (x, y) in pixels. gradients: whether they are computed, which takes longer than
    all the rest. noise: of how many standard deviations of colour; above 0 the gradients are means
    over COPIES noisy copies (SmoothGrad, Smilkov et al., 2017). threshold, transform: instead of
    the detector's own. padded_size: (H, W) to which the prepared image is padded, as beside larger
    ones in a batch. ValueError in one line on what is not there.
    """
    if query is not None and token is not None:
        raise ValueError("explain a query or a token, not both")
    look = Look(detector, image, threshold, transform, padded_size, gradients and token is None)
    if token is not None:
        return look.at_token(token, level)
    return look.at_query(query, noise) if query is not None else look.at_detection(detection, noise)


class NotAskedError(ValueError):
    """The encoder does not ask for this token."""


class Look:
    """One image, seen once, of which several things can be explained; arguments as of `explain`.

    queries, labels, scores: of its detections, best first.
    """

    def __init__(
        self,
        detector: Any,
        image: Picture,
        threshold: float | None = None,
        transform: Transform | None = None,
        padded_size: tuple[int, int] | None = None,
        gradients: bool = True,
    ) -> None:
        self.subject = as_subject(detector, transform, threshold)
        self.image = read_image(image)
        self.batch = _padded(self.subject.transform(self.image), padded_size)
        self.batch = self.batch.to(next(self.subject.model.parameters()).device)
        self.images = self.batch.images.requires_grad_(gradients)
        self.trace = self._run(self.images)
        output = self.trace.output
        found = scoring_of(output).best(output.logits.detach(), TOP_K)
        scores, queries, labels = (x[0] for x in found)
        keep = scores >= self.subject.threshold
        self.best_score = float(scores.max())
        self.scores, self.queries, self.labels = scores[keep], queries[keep], labels[keep]

    def __len__(self) -> int:
        return len(self.scores)

    def at_detection(self, detection: int = 0, noise: float = 0.0) -> Explanation:
        """`explain` for a detection."""
        if not len(self):
            raise ValueError(
                f"nothing is detected with a score of {self.subject.threshold:.3g} or more; the "
                f"best score is {self.best_score:.3g}: give a lower threshold (--threshold)"
            )
        if not 0 <= detection < len(self):
            raise ValueError(f"detection must be 0 to {len(self) - 1}, got {detection}")
        query, label = int(self.queries[detection]), int(self.labels[detection])
        return self._explain(query, label, noise)

    def at_query(self, query: int, noise: float = 0.0) -> Explanation:
        """`explain` for a query, with its best class."""
        Q = self.trace.output.logits.shape[1]
        if not 0 <= query < Q:
            raise ValueError(f"query must be 0 to {Q - 1}, got {query}")
        scores = scoring_of(self.trace.output).scores(self.trace.output.logits[0, query])
        return self._explain(query, int(scores.argmax()), noise)

    def at_token(self, point: tuple[float, float], level: int = 0) -> Explanation:
        """`explain` for the encoder's token in whose cell a point of the picture lies."""
        shapes = self.trace.shapes
        if not 0 <= level < len(shapes):
            raise ValueError(f"level must be 0 to {len(shapes) - 1}, got {level}")
        size = np.array(self.image.size)
        if not all(0 <= n < side for n, side in zip(point, size, strict=True)):
            raise ValueError(f"token must lie in the picture of {size[0]} x {size[1]}, got {point}")
        if not self.trace.record.encoder:
            raise NotAskedError(
                f"the encoder of {type(self.subject.model).__name__} samples nothing"
            )
        height, width = shapes[level]
        place = np.array(point) / size * self.trace.ratios[level].numpy() * (width, height)
        column, row = place.astype(int).tolist()
        index = sum(h * w for h, w in shapes[:level]) + row * width + column
        looks = self._looks("encoder", self._row(index))
        return Explanation(self.image, **looks, token=(level, row, column))

    def at_middle_of(self, seen: Explanation, level: int = 0) -> Explanation | None:
        """The encoder's token under the middle of a box; None where the encoder asked for none."""
        middle = seen.box.reshape(2, 2).mean(0)
        last = np.array(self.image.size) - 0.5  # a middle on the border is of the last cell
        try:
            return self.at_token(tuple(np.minimum(middle, last).tolist()), level)
        except NotAskedError:
            return None

    def _run(self, images: Tensor) -> Trace:
        model = self.subject.model
        batch = Batch(images, self.batch.mask, self.batch.sizes)
        if not images.requires_grad:
            with evaluating(model), torch.no_grad():
                return trace(model, batch)
        with evaluating(model), FollowReferences():
            return trace(model, batch)

    def _row(self, index: int) -> int:
        """Of a token among those that the encoder asked for."""
        if self.trace.chosen is None:
            return index
        found = (self.trace.chosen == index).nonzero()
        if not len(found):
            raise NotAskedError(
                f"the encoder updated {len(self.trace.chosen)} tokens, and this is none of them: "
                "give a point on an object"
            )
        return int(found[0])

    def _explain(self, query: int, label: int, noise: float) -> Explanation:
        output, (width, height) = self.trace.output, self.image.size
        box = cxcywh_to_xyxy(output.boxes[0, query].detach().double().cpu())
        scores = scoring_of(output).scores(output.logits[0, query].detach())
        return Explanation(
            self.image,
            **self._looks("decoder", query),
            gradients=self._norms(query, label, noise) if self.images.requires_grad else {},
            query=query,
            name=self.subject.names[label],
            score=float(scores[label]),
            box=box.numpy() * (width, height, width, height),
        )

    def _looks(self, part: str, row: int) -> dict[str, Any]:
        looks = self.trace.looks(part, row, self.image.size)
        arrays = {name: tensor.numpy() for name, tensor in vars(looks).items()}
        return arrays | {"map_shapes": self.trace.shapes}

    def _norms(self, query: int, label: int, noise: float) -> dict[str, np.ndarray]:
        """Of the image without its padding, those of places in pixels of the picture."""
        if noise < 0:
            raise ValueError(f"noise must be at least 0, got {noise}")
        copies = self._noisy(query, label, noise) if noise else [(self.trace, self.images, query)]
        sums, count = dict.fromkeys(ITEMS, 0), 0
        for each, images, row in copies:
            gradients = item_gradients(each.output, images, row, label)
            sums, count = {name: sums[name] + gradients[name] for name in ITEMS}, count + 1
        height, width = self.batch.sizes[0].tolist()
        units = dict(zip(ITEMS, (*self.image.size, *self.image.size, 1), strict=True))
        norms = {name: (x / count).norm(dim=0)[:height, :width] for name, x in sums.items()}
        return {name: x.double().cpu().numpy() * units[name] for name, x in norms.items()}

    def _noisy(self, query: int, label: int, noise: float) -> Iterator[tuple[Trace, Tensor, int]]:
        """Traces of noisy copies, their images, and the query that finds the object in each: in a
        two-stage model it may be another. A copy in which none does is left out; ValueError where
        all are."""
        generator = torch.Generator().manual_seed(0)
        box, found = self.trace.output.boxes[0, query].detach(), 0
        for _ in range(COPIES):
            random = torch.randn(self.images.shape, generator=generator).to(self.images)
            random = random.masked_fill(self.batch.mask[:, None], 0)
            images = (self.images.detach() + noise * random).requires_grad_(True)
            each = self._run(images)
            boxes = each.output.boxes[0].detach()
            overlap = box_iou(*(cxcywh_to_xyxy(x) for x in (box[None], boxes)))[0]
            scores = scoring_of(each.output).scores(each.output.logits[0].detach())[:, label]
            row = int((scores * (overlap >= SAME)).argmax())
            if overlap[row] >= SAME:
                found += 1
                yield each, images, row
        if not found:
            raise ValueError(f"with noise {noise} the object is not found any more: give less")


def _padded(image: Tensor, padded_size: tuple[int, int] | None) -> Batch:
    """One image, (3, h, w), with zeros to the right and below. ValueError where it does not fit."""
    batch = Batch.from_images([image])
    if padded_size is None:
        return batch
    below, right = (n - have for n, have in zip(padded_size, image.shape[1:], strict=True))
    if min(below, right) < 0:
        height, width = image.shape[1:]
        raise ValueError(
            f"padded_size must be at least ({height}, {width}), which the model sees, got "
            f"{padded_size}"
        )
    images = F.pad(batch.images, (0, right, 0, below))
    return Batch(images, F.pad(batch.mask, (0, right, 0, below), value=True), batch.sizes)
