"""What was found in one image, as people ask for it: names, COCO results, pictures.
Chapter your_own_data."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from deformable_detr.data.images import read_image
from deformable_detr.inference.postprocess import as_results
from deformable_detr.look.pictures import draw_detections
from deformable_detr.structures import Detections


@dataclass
class Prediction:
    """What was found in one image, best first.

    boxes: (N, 4) xyxy in pixels of the image as it is shown, that is, turned as its EXIF says, and
    cut at its border, as evaluation by the official code does not. scores: (N,) in [0, 1]. labels:
    (N,) int64, positions among the model's classes. queries: (N,) int64, the index of the query
    that found each, as `look` asks for it. names and category_ids: N each, of those classes in the
    data that the model was trained on. size: the image's (H, W). path: its file, if it came from
    one. image_id: what this file is called in COCO results. highest: the best score of all, also
    below the threshold, from which on detections are kept. picture: where there is no file.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    queries: Tensor
    names: list[str]
    category_ids: list[int]
    size: tuple[int, int]
    path: Path | None = None
    image_id: int | str | None = None
    highest: float = 0.0
    picture: Image.Image | None = field(default=None, repr=False)  # where there is no file

    @classmethod
    def of(
        cls,
        found: Detections,
        highest: float,
        categories: list[dict],
        image: Image.Image,
        path: Path | None = None,
        image_id: int | str | None = None,
    ) -> "Prediction":
        """Detections in an image with the names of their classes; all else as above."""
        classes = [categories[label] for label in found.labels.tolist()]
        return cls(
            clip_boxes_to_image(found.boxes, (image.height, image.width)),
            found.scores,
            found.labels,
            found.queries,
            [category["name"] for category in classes],
            [category["id"] for category in classes],
            (image.height, image.width),
            path,
            image_id,
            highest,
            None if path else image,
        )

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def image(self) -> Image.Image:
        """The RGB picture, read again where it came from a file."""
        return read_image(self.path) if self.picture is None else self.picture

    def to_coco(self, image_id: int | str | None = None) -> list[dict]:
        """COCO results, with the data's own category ids.

        image_id: where it should not be `self.image_id`. ValueError where there is none either.
        """
        image_id = self.image_id if image_id is None else image_id
        if image_id is None:
            raise ValueError("an image that came from no file needs an image_id")
        return as_results(self._detections(), image_id, self.category_ids)

    def to_supervision(self) -> object:
        """The same as supervision.Detections, the names in data["class_name"].

        ImportError, in one line, where that package is not installed.
        """
        try:
            import supervision
        except ImportError:
            raise ImportError(
                "to_supervision needs the package supervision: pip install supervision"
            ) from None
        return supervision.Detections(
            xyxy=self.boxes.numpy(),
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy(),
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def draw(self) -> Image.Image:
        """The picture with boxes, names and scores on it."""
        names = dict(zip(self.labels.tolist(), self.names, strict=True))
        return draw_detections(self.image, self._detections(), names)

    def _detections(self) -> Detections:
        return Detections(self.scores, self.labels, self.boxes, self.queries)
