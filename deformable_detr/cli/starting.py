"""The model that a training starts from: of a recipe and what the command line changes in it, or of
published weights."""

import argparse
import dataclasses
import sys
from pathlib import Path

import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file

from deformable_detr.data.coco import CocoDataset
from deformable_detr.models import BaseDetector, build_model
from deformable_detr.options import parse_settings
from deformable_detr.training.recipe import TABLES, Recipe, load_recipe
from deformable_detr.weights.published import load_pretrained


def chosen_recipe(args: argparse.Namespace) -> Recipe:
    """--recipe, with --set and --short-side."""
    recipe = load_recipe(args.recipe).changed(args.set)
    if args.short_side is None:
        return recipe
    return dataclasses.replace(recipe, short_side=args.short_side)


def new_model(args: argparse.Namespace, recipe: Recipe, dataset: CocoDataset) -> BaseDetector:
    """The weights that --init or the recipe name, with what they know of the data's classes; or
    else a new model of the recipe."""
    weights = args.init or recipe.weights
    if weights in (None, "none"):
        config = recipe.model_config(len(dataset.categories))
        return with_backbone(config, args.backbone_weights)
    given = parse_settings(args.set, TABLES)["model"]
    queries = given.pop("num_queries", None)
    names = [f"model.{name}" for name in given]
    names += ["--backbone-weights"] * bool(args.backbone_weights)
    if names:
        raise ValueError(f"{weights} decides the model: leave out {', '.join(names)}")
    loaded = load_pretrained(weights, num_queries=queries, categories=dataset.categories)
    print(f"{weights}: kept {len(loaded.report.kept)} tensors", file=sys.stderr)
    print(loaded.report.classes(), file=sys.stderr)
    return loaded.model


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
    try:
        missing, unexpected = model.backbone.load_state_dict(load_file(path), strict=False)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} does not fit the backbone: {reason}") from None
    missing = [name for name in missing if ".conv2.offset." not in name]
    for problem, names in (("lacks", missing), ("has left over", unexpected)):
        if names:
            raise ValueError(
                f"{path} does not fit the backbone: it {problem} {len(names)} tensors, "
                f"such as {names[0]}"
            )
