"""Data in COCO format as PyTorch has it: samples, and batches of them.
Chapters training and your_own_data."""

from collections.abc import Hashable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms import v2

from deformable_detr.data.annotations import read_annotations
from deformable_detr.data.checks import refuse_unreadable
from deformable_detr.data.images import read_image
from deformable_detr.data.names import id_order
from deformable_detr.data.places import Pictures, find_split, has_split
from deformable_detr.data.transforms import TO_TENSOR
from deformable_detr.structures import Batch, Target

__all__ = ["CocoDataset", "collate", "find_split", "has_split"]


class CocoDataset(Dataset):
    """Images and boxes in COCO format, with any ids.

    Labels are positions in `categories`, the data's own list sorted by id; no id enters an array.
    Crowd boxes are left out, boxes are cut at the image's border, and what has no size then is
    dropped; images without boxes stay. ValueError, FileNotFoundError: in one line, with the file
    and what is wrong in it.
    """

    def __init__(
        self,
        images_dir: Path | str,
        annotation_file: Path | str,
        transform: v2.Transform = TO_TENSOR,
    ) -> None:
        self.images_dir, self.transform = Path(images_dir), transform
        content = read_annotations(Path(annotation_file))
        refuse_unreadable(content, annotation_file)
        for annotation in content["annotations"]:  # both are often left out, and COCO metrics ask
            annotation["iscrowd"] = int(bool(annotation.get("iscrowd")))
            if annotation.get("area") is None:
                annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        self.coco = COCO()
        self.coco.dataset = content
        with redirect_stdout(StringIO()):
            self.coco.createIndex()
        info = content.get("info")
        self.info = info if isinstance(info, dict) else {}
        self.pictures = Pictures(images_dir, content["images"])
        self.categories = sorted(content["categories"], key=lambda each: id_order(each["id"]))
        self.label_of = {category["id"]: i for i, category in enumerate(self.categories)}
        self.image_ids = sorted(self.coco.imgs, key=id_order)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """The transformed image, (3, h, w), and its target."""
        image_id = self.image_ids[index]
        image = self.load_image(image_id)
        width, height = image.size
        boxes, labels = self._objects(image_id)
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))
        image, boxes, labels = self.transform(
            image, v2.functional.clamp_bounding_boxes(boxes), labels
        )
        boxes = boxes.as_subclass(Tensor)
        keep = (boxes[:, 2:] > boxes[:, :2]).all(-1)
        h, w = image.shape[-2:]
        boxes = box_convert(boxes[keep], "xyxy", "cxcywh") / boxes.new_tensor([w, h, w, h])
        image = image.as_subclass(Tensor)
        return image, Target(image_id, labels[keep], boxes, (height, width))

    def load_image(self, image_id: Hashable) -> Image.Image:
        """The picture itself, RGB. ValueError or FileNotFoundError names it where that fails."""
        return read_image(self.pictures.path(self.coco.imgs[image_id]["file_name"]))

    def _objects(self, image_id: Hashable) -> tuple[Tensor, Tensor]:
        found = [a for a in self.coco.imgToAnns[image_id] if not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in found], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]  # xywh to xyxy
        return boxes, torch.tensor([self.label_of[a["category_id"]] for a in found]).long()


def collate(samples: list[tuple[Tensor, Target]]) -> Batch:
    """A padded batch of what `CocoDataset` returns."""
    images, targets = zip(*samples, strict=True)
    return Batch.from_images(list(images), list(targets))
