"""Recipes: how to train which model, as small files with a reason beside each value."""

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from torchvision.transforms import v2

from deformable_detr.data.transforms import (
    SHORT_SIDE,
    coco_eval_transform,
    coco_train_transform,
    digits_eval_transform,
    digits_train_transform,
)
from deformable_detr.models.deformable_detr import DeformableDETRConfig
from deformable_detr.training.config import TrainConfig

FOLDER = Path(__file__).parent
NAMES = ("paper", "modern", "small-data", "digits")


def strong_train_transform(short: int = SHORT_SIDE) -> v2.Transform:
    """COCO's, after other colours and, in three of ten cases, a picture set on a larger black one:
    with few images each must look different every time."""
    zoom_out = v2.RandomZoomOut(side_range=(1.0, 2.0), p=0.3)
    return v2.Compose([v2.RandomPhotometricDistort(), zoom_out, coco_train_transform(short)])


TRANSFORMS = {  # by name, for training and for evaluation
    "coco": (coco_train_transform, coco_eval_transform),
    "strong": (strong_train_transform, coco_eval_transform),
    "digits": (digits_train_transform, digits_eval_transform),
}


def make_transform(name: str, short_side: int = SHORT_SIDE, train: bool = False) -> v2.Transform:
    """The transform of that name in TRANSFORMS, for training or for evaluation.

    short_side: in pixels, as `coco_eval_transform` has it; "digits" leaves images as they are.
    """
    make = TRANSFORMS[name][0 if train else 1]
    return make() if name == "digits" else make(short_side)


@dataclass(frozen=True)
class Recipe:
    """How to train which model from where.

    train: the loop's settings. model: options of `DeformableDETRConfig` that differ from the
    paper's. transforms: a key of TRANSFORMS. short_side: of an evaluated image, in pixels, at least
    32; the sizes of training are in proportion. weights: what `DeformableDETR.from_pretrained`
    starts from, or None for a new model.
    """

    name: str
    about: str
    train: TrainConfig = field(default_factory=TrainConfig)
    model: dict[str, object] = field(default_factory=dict)
    transforms: str = "coco"
    short_side: int = SHORT_SIDE
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.transforms not in TRANSFORMS:
            raise ValueError(
                f"transforms must be one of {tuple(TRANSFORMS)}, got {self.transforms!r}"
            )
        if self.short_side < 32:
            raise ValueError(f"short_side must be at least 32 pixels, got {self.short_side}")
        if self.transforms == "digits" and self.short_side != SHORT_SIDE:
            raise ValueError("transforms 'digits' leave images as they are: no short_side")

    def model_config(self, num_classes: int, **changes: object) -> DeformableDETRConfig:
        """The recipe's model for so many classes, with changes to its options."""
        return DeformableDETRConfig(**self.model | changes | {"num_classes": num_classes})

    def train_transform(self) -> v2.Transform:
        """The random transform of training images."""
        return make_transform(self.transforms, self.short_side, train=True)

    def eval_transform(self) -> v2.Transform:
        """The transform of the images that the model is measured on."""
        return make_transform(self.transforms, self.short_side)


def load_recipe(name: Path | str) -> Recipe:
    """A recipe by its name in NAMES, or from a .toml file of the same form.

    FileNotFoundError or ValueError, in one line, name the file and what in it is unknown.
    """
    path = FOLDER / f"{name}.toml" if name in NAMES else Path(name)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no recipe {name}: give a file or one of {NAMES}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} is no recipe: {error}") from None
    try:
        return _recipe(path.stem, content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _recipe(name: str, content: dict) -> Recipe:
    known = {"about": str, "transforms": str, "short_side": int, "weights": str}
    known |= {"train": dict, "model": dict}
    _check_types("a recipe", content, known)
    if "about" not in content:
        raise ValueError("a recipe needs a line 'about'")
    train = _values(TrainConfig(), content.pop("train", {}), "train")
    model = _values(DeformableDETRConfig(), content.pop("model", {}), "model")
    DeformableDETRConfig(**model)  # refuses what makes no model
    return Recipe(name, train=TrainConfig(**train), model=model, **content)


def _values(defaults: object, given: dict, table: str) -> dict:
    """Values for a dataclass, checked by the types of its defaults."""
    types = {key: type(value) for key, value in dataclasses.asdict(defaults).items()}
    if "frozen" in types:
        types["frozen"] = list
    given = {
        k: float(v) if types.get(k) is float and type(v) is int else v for k, v in given.items()
    }
    _check_types(f"[{table}]", given, types)
    return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}


def _check_types(what: str, given: dict, types: dict[str, type]) -> None:
    for key, value in given.items():
        if key not in types:
            raise ValueError(f"{what} has no {key!r}; it has {', '.join(types)}")
        if type(value) is not types[key]:
            raise ValueError(f"{key} must be of type {types[key].__name__}, got {value!r}")
