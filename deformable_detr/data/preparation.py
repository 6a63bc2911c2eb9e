"""How images become what a model sees, by name: what a recipe names, and a file of weights keeps.
Chapters training and your_own_data."""

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image
from torchvision.transforms import v2

from deformable_detr.data.transforms import (
    SHORT_SIDE,
    coco_eval_transform,
    coco_train_transform,
    digits_eval_transform,
    digits_train_transform,
    strong_train_transform,
)


@dataclass(frozen=True)
class Preparation:
    """One way of preparing images.

    make_train, make_eval: make the transform of training and that of evaluation; of a short side in
    pixels, if it resizes. resizes: whether images get that short side, rather than keep their size.
    mirrors: whether training mirrors them, so that the model knows mirrored ones. backbones: those
    whose models see images so where nothing else is known of them. resized: the name of the one
    that does the same and resizes, if this one does not, and usual_side the short side, in pixels,
    of the images that it is meant for.
    """

    make_train: Callable[..., v2.Transform]
    make_eval: Callable[..., v2.Transform]
    resizes: bool = True
    mirrors: bool = True
    backbones: tuple[str, ...] = ()
    resized: str = ""
    usual_side: int = SHORT_SIDE

    def train_transform(self, short_side: int = SHORT_SIDE) -> v2.Transform:
        """The random transform of training images. short_side: of an evaluated one, in pixels."""
        return self.make_train(short_side) if self.resizes else self.make_train()

    def eval_transform(self, short_side: int = SHORT_SIDE, scale: float = 1.0) -> v2.Transform:
        """The transform of the images that a model is measured on, or of scale times their size."""
        if self.resizes:
            return self.make_eval(round(short_side * scale))
        if scale == 1:
            return self.make_eval()

        def resize(image: Image.Image) -> Image.Image:
            width, height = (max(1, round(side * scale)) for side in image.size)
            return image.resize((width, height), Image.Resampling.BILINEAR)

        return v2.Compose([resize, self.make_eval()])


DEFAULT = "coco"
PREPARATIONS = {
    "coco": Preparation(coco_train_transform, coco_eval_transform),
    "strong": Preparation(strong_train_transform, coco_eval_transform),
    "digits": Preparation(
        digits_train_transform,
        digits_eval_transform,
        resizes=False,
        mirrors=False,
        backbones=("small",),
        resized="digits-resized",
        usual_side=128,
    ),
    "digits-resized": Preparation(digits_train_transform, coco_eval_transform, mirrors=False),
}


def preparation_of(backbone: str) -> str:
    """The name in PREPARATIONS of what suits a model of this backbone that does not say."""
    names = (name for name, each in PREPARATIONS.items() if backbone in each.backbones)
    return next(names, DEFAULT)
