"""The model that a training starts from: of a recipe and what the command line changes in it, or of
published weights."""

import argparse
import dataclasses
from pathlib import Path

import torchvision

from deformable_detr.data.coco import CocoDataset
from deformable_detr.data.names import counted
from deformable_detr.data.preparation import PREPARATIONS
from deformable_detr.models import BaseDetector, build_model, model_name
from deformable_detr.models.base import SAME_TENSORS
from deformable_detr.options import checked, parse_settings, types_of
from deformable_detr.training.recipe import TABLES, Recipe, load_recipe
from deformable_detr.weights.classes import with_classes
from deformable_detr.weights.published import Pretrained, load_pretrained
from deformable_detr.weights.reading import as_weights, read_safetensors


def chosen_recipe(args: argparse.Namespace) -> Recipe:
    """--recipe, with --set and --short-side."""
    recipe = load_recipe(args.recipe).changed(args.set)
    return recipe if args.short_side is None else recipe.at_short_side(args.short_side)


def new_model(
    args: argparse.Namespace, recipe: Recipe, dataset: CocoDataset
) -> tuple[BaseDetector, Recipe, list[str]]:
    """The weights that --init or the recipe name, with what they know of the data's classes; or
    else a new model of the recipe. Beside it the recipe, with images in the size that the weights
    have seen, if --short-side asks for no other, and what is to be said of all that."""
    weights = args.init or recipe.weights
    if weights in (None, "none"):
        config = recipe.model_config(len(dataset.categories))
        return with_backbone(config, args.backbone_weights), recipe, []
    given = parse_settings(args.set, TABLES)["model"]
    queries = given.pop("num_queries", None)
    same = {name: given.pop(name) for name in SAME_TENSORS if name in given}
    names = [f"model.{name}" for name in given]
    names += ["--backbone-weights"] * bool(args.backbone_weights)
    if names:
        raise ValueError(f"{weights} decides the model: leave out {', '.join(names)}")
    loaded = load_weights(weights, recipe)
    model = with_options(loaded.model, same) if same else loaded.model
    model, report = with_classes(model, loaded.categories, dataset.categories, queries)
    recipe, said = prepared_alike(recipe, loaded.card, args.short_side is None)
    lines = [
        f"{weights}: kept {counted(len(report.kept), 'tensor')}",
        *report.classes().splitlines(),
    ]
    return model, recipe, [*lines, *(f"{weights}: {text}" for text in said)]


def load_weights(name: str, recipe: Recipe) -> Pretrained:
    """Published weights; where those that a recipe names did not come, what to do instead."""
    try:
        return load_pretrained(name)
    except FileNotFoundError as error:
        if name != recipe.weights:
            raise
        raise FileNotFoundError(
            f"{error} (--init FOLDER). Without weights and network: --recipe photos"
        ) from None


def with_options(model: BaseDetector, options: dict[str, object]) -> BaseDetector:
    """The same tensors in a model with other options of SAME_TENSORS."""
    options = checked(options, types_of(type(model.config)), f"model {model_name(model.config)}")
    other = build_model(dataclasses.replace(model.config, **options))
    other.load_state_dict(model.state_dict())
    return other


def prepared_alike(recipe: Recipe, card: dict, may_change: bool) -> tuple[Recipe, list[str]]:
    """The recipe with images in the size that weights with this card have seen, if it may change,
    and what is to be said of differences."""
    name, short = card.get("transforms"), card.get("short_side")
    if not isinstance(name, str) or name not in PREPARATIONS:  # nothing is known of them
        return recipe, []
    theirs, ours = PREPARATIONS[name], PREPARATIONS[recipe.transforms]
    if theirs.resizes != ours.resizes or theirs.mirrors != ours.mirrors:
        text = f"trained on images prepared as {name!r}, and goes on with {recipe.transforms!r}"
        return recipe, [text]
    if not ours.resizes or short == recipe.short_side or type(short) is not int:
        return recipe, []
    if may_change:
        text = f"trained at a short side of {short} pixels, which is kept; the recipe would have "
        return recipe.at_short_side(short), [f"{text}{recipe.short_side} (--short-side)"]
    text = f"trained at a short side of {short} pixels, and goes on at {recipe.short_side}"
    return recipe, [text]


def with_backbone(config: object, weights: str | None) -> BaseDetector:
    """A new model, its backbone with weights from a file, "imagenet" or "none"; by default with
    ImageNet's, if torchvision has them."""
    if weights is None and config.backbone in torchvision.models.list_models():
        weights = "imagenet"
    try:
        model = build_model(config, pretrained_backbone=weights == "imagenet")
    except OSError as error:
        raise ValueError(
            f"torchvision's ImageNet weights of {config.backbone} did not come ({error}): give "
            "--backbone-weights FILE, or none for a backbone that has learned nothing"
        ) from None
    if weights not in (None, "imagenet", "none"):
        load_backbone(model, Path(weights))
    return model


def load_backbone(model: BaseDetector, path: Path) -> None:
    """Strictly, from a safetensors file; deformable convolutions may keep their first offsets."""
    state, _ = read_safetensors(path)
    known = model.backbone.state_dict()
    state = {name: as_weights(x, known.get(name, x), name, path) for name, x in state.items()}
    try:
        missing, unexpected = model.backbone.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} does not fit the backbone: {reason}") from None
    missing = [name for name in missing if ".conv2.offset." not in name]
    for problem, names in (("lacks", missing), ("has left over", unexpected)):
        if names:
            raise ValueError(
                f"{path} does not fit the backbone: it {problem} {counted(len(names), 'tensor')}, "
                f"such as {names[0]}"
            )
