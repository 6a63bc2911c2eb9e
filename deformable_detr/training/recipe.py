"""Reading a recipe: how to train which model, from which weights, on images prepared in which way.
Chapter recipe."""

import dataclasses
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torchvision.transforms import v2

from deformable_detr.data.preparation import DEFAULT as PREPARATION
from deformable_detr.data.preparation import PREPARATIONS
from deformable_detr.data.transforms import SHORT_SIDE, SMALLEST_SIDE
from deformable_detr.models import DEFAULT, MODELS
from deformable_detr.options import checked, meant, parse_settings, types_of
from deformable_detr.training.config import TrainConfig
from deformable_detr.training.recipes import FOLDER, NAMES

TABLES = ("train", "model")


@dataclass(frozen=True)
class Recipe:
    """How to train which model from where.

    train: the loop's settings. model: a key of MODELS as "name", if it is not the default, and the
    options of its configuration that differ from their defaults; all but num_classes, which is the
    data's. transforms: a key of PREPARATIONS. short_side: of an evaluated image, in pixels, at
    least 32; the sizes of training are in proportion. weights: what `load_pretrained` starts from,
    or None for a new model. ValueError names what does not exist, with what does.
    """

    name: str
    about: str
    train: TrainConfig = field(default_factory=TrainConfig)
    model: dict[str, object] = field(default_factory=dict)
    transforms: str = PREPARATION
    short_side: int = SHORT_SIDE
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.transforms not in PREPARATIONS:
            known = ", ".join(PREPARATIONS)
            raise ValueError(f"transforms must be one of {known}, got {self.transforms!r}")
        if self.short_side < SMALLEST_SIDE:
            raise ValueError(
                f"short_side must be at least {SMALLEST_SIDE} pixels, got {self.short_side}"
            )
        if not PREPARATIONS[self.transforms].resizes and self.short_side != SHORT_SIDE:
            other = PREPARATIONS[self.transforms].resized
            raise ValueError(
                f"transforms {self.transforms!r} leave images as they are: no short_side; "
                f"{other!r} resize them"
            )
        if "num_classes" in self.model:
            raise ValueError("num_classes is the data's: leave it out")
        self.model_config(1)  # refuses what makes no model

    def model_config(self, num_classes: int, **changes: object) -> object:
        """The configuration of the recipe's model for so many classes, with other options."""
        options = self.model | changes
        name = options.pop("name", DEFAULT)
        if name not in MODELS:
            hint = meant(str(name), MODELS)
            raise ValueError(f"there is no model {name!r}{hint}; there are {', '.join(MODELS)}")
        kind, _ = MODELS[name]
        types = types_of(kind)
        del types["num_classes"]
        return kind(num_classes=num_classes, **checked(options, types, f"model {name}"))

    def changed(self, settings: Iterable[str]) -> "Recipe":
        """With what `--set` says: "train.NAME=VALUE" and "model.NAME=VALUE".

        Where lr is changed and backbone_lr is not, that keeps its ratio to lr.
        """
        tables = parse_settings(settings, TABLES)
        train = checked(tables["train"], types_of(TrainConfig), "train")
        if "lr" in train:
            ratio = self.train.backbone_lr / self.train.lr
            train = {"backbone_lr": train["lr"] * ratio} | train
        return dataclasses.replace(
            self,
            train=dataclasses.replace(self.train, **train),
            model=self.model | tables["model"],
        )

    def at_short_side(self, pixels: int) -> "Recipe":
        """With that short side of evaluated images, also where the recipe leaves them as they
        are."""
        name = PREPARATIONS[self.transforms].resized or self.transforms
        return dataclasses.replace(self, transforms=name, short_side=pixels)

    def train_transform(self) -> v2.Transform:
        """The random transform of training images."""
        return PREPARATIONS[self.transforms].train_transform(self.short_side)

    def eval_transform(self) -> v2.Transform:
        """The transform of the images that the model is measured on."""
        return PREPARATIONS[self.transforms].eval_transform(self.short_side)


def load_recipe(name: Path | str) -> Recipe:
    """A recipe by its name in NAMES, or from a .toml file of the same form.

    FileNotFoundError or ValueError, in one line, name the file and what in it is unknown.
    """
    path = FOLDER / f"{name}.toml" if name in NAMES else Path(name)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows' editors mark it
    except FileNotFoundError:
        known = f"{meant(str(name), NAMES)}: give a file or one of {', '.join(NAMES)}"
        raise FileNotFoundError(f"no recipe {name}{known}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} is no recipe: {error}") from None
    try:
        return _recipe(path.stem, content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _recipe(name: str, content: dict) -> Recipe:
    types = types_of(Recipe) | dict.fromkeys(TABLES, dict)
    del types["name"]  # it is the file's
    content = checked(content, types, "a recipe")
    if "about" not in content:
        raise ValueError("a recipe needs a line 'about'")
    train = checked(content.pop("train", {}), types_of(TrainConfig), "[train]")
    return Recipe(name, train=TrainConfig(**train), **content)
