"""A detector whose right answer is known, and pictures for it."""

import torch
from PIL import Image

from deformable_detr import DeformableDETR, Output
from deformable_detr.inference.detector import Detector
from tests.conftest import TINY

CATEGORIES = [{"id": 3, "name": "red"}, {"id": 7, "name": "green"}, {"id": 20, "name": "blue"}]


class Finder(DeformableDETR):
    """Finds the rectangle whose pixels are all one bright colour: the right answer is known."""

    def forward(self, batch):
        logits = torch.full((len(batch), 2, 3), -9.0)
        boxes = torch.full((len(batch), 2, 4), 0.5)
        for i, (image, (height, width)) in enumerate(zip(batch.images, batch.sizes, strict=True)):
            image = image[:, :height, :width]
            label = (image - image.mean(0)).amax((1, 2)).argmax()
            bright = image[label] - image.sum(0) / 3 > 0.5
            if not bright.any():
                continue
            y, x = bright.nonzero(as_tuple=True)
            x0, x1, y0, y1 = x.min(), x.max() + 1, y.min(), y.max() + 1
            size = torch.tensor([width, height, width, height])
            box = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])
            boxes[i, 1], logits[i, 1, label] = box / size, 2.0
        return Output(logits, boxes)


def picture(box=(6, 10, 30, 22), colour=1, size=(64, 48)):
    """A coloured rectangle on grey."""
    image = Image.new("RGB", size, (90, 90, 90))
    colours = [0, 0, 0]
    colours[colour] = 255
    image.paste(tuple(colours), box)
    return image


def make_finder():
    return Detector(Finder(TINY), CATEGORIES, transforms="digits")
