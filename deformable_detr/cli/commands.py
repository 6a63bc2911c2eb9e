"""What the commands of `cli` do. Each takes the parsed arguments and returns an exit code."""

import argparse
import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from deformable_detr.data.checks import (
    Fault,
    check_annotations,
    check_dataset,
    check_splits,
    label_histogram,
    read_annotations,
    summary,
)
from deformable_detr.data.coco import CocoDataset, find_split
from deformable_detr.data.images import find_images
from deformable_detr.evaluation.complexity import complexity
from deformable_detr.evaluation.report import Report, analyse, analyse_results
from deformable_detr.files import write_atomically
from deformable_detr.inference.predict import (
    Detector,
    Prediction,
    detect,
    file_id,
    load_detector,
    predict_each,
    update_card,
)
from deformable_detr.inference.views import View, make_views
from deformable_detr.look.pictures import picture_sheet
from deformable_detr.models.deformable_detr import DeformableDETR, DeformableDETRConfig
from deformable_detr.training import doctor as diagnosing
from deformable_detr.training import loop as training
from deformable_detr.training.recipes import Recipe, load_recipe, make_transform
from deformable_detr.weights.published import load_pretrained

# options of the command line that change the model, and those that change how it is trained
MODEL_OPTIONS = (
    "backbone",
    "num_levels",
    "dilation",
    "deformable_stages",
    "refine",
    "two_stage",
)
TRAIN_OPTIONS = (
    "epochs",
    "batch_size",
    "accumulate",
    "lr",
    "ema_decay",
    "patience",
    "num_workers",
    "seed",
    "mixed_precision",
    "gradient_checkpointing",
)
TTA_SCALES = (0.8, 1.0, 1.25)


def check(args: argparse.Namespace) -> int:
    """Print all faults of a data set, what it holds, and the boxes of each category."""
    splits = args.split or [s for s in ("train", "val", "test") if has_split(args.data, s)]
    if not splits:
        find_split(args.data, "train")  # says what was expected
    places = {split: find_split(args.data, split) for split in splits}
    fatal = 0
    for split, place in places.items():
        faults = check_dataset(*place)
        for fault in faults:
            print(f"{split}: {fault}")
        fatal += sum(fault.fatal for fault in faults)
        print(f"{split}: {len(faults)} faults, {sum(f.fatal for f in faults)} of them fatal")
        content = read_annotations(place[1])
        print(f"{split}: {summary(place[0], content)}")
        counts = label_histogram(content)
        print(f"{split}: boxes: {', '.join(f'{count} {name}' for name, count in counts.items())}")
    for fault in check_splits(places):
        print(fault)
    return 1 if fatal else 0


def sheet(args: argparse.Namespace) -> int:
    """Save a sheet of annotated images."""
    dataset = CocoDataset(*find_split(args.data, args.split))
    picture = picture_sheet(dataset, args.count, args.seed)
    kinds = (".png", ".jpg", ".jpeg", ".webp")
    if args.output.suffix.lower() not in kinds:
        raise ValueError(f"--output must end in one of {', '.join(kinds)}, got {args.output}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    picture.save(args.output)
    print(
        f"{min(args.count, len(dataset))} of {len(dataset)} images of {args.split}: {args.output}"
    )
    return 0


def doctor(args: argparse.Namespace) -> int:
    """Print a diagnosis of data and model."""
    recipe = chosen_recipe(args)
    dataset = CocoDataset(*find_split(args.data, args.split), recipe.train_transform())
    model = new_model(args, recipe, dataset).to(choose_device(args.device))
    diagnosis = diagnosing.doctor(model, dataset, args.steps)
    print(diagnosis.table())
    return 0 if diagnosis.healthy else 1


def train(args: argparse.Namespace) -> int:
    """Train, then store the best threshold on val with the models."""
    has_val = has_split(args.data, "val")
    accelerator = training.make_accelerator()
    refuse_faults(args.data, ("train", "val") if has_val else ("train",), accelerator)
    recipe = chosen_recipe(args)
    train_set = CocoDataset(*find_split(args.data, "train"), recipe.train_transform())
    val_set = None
    if has_val:
        val_set = CocoDataset(*find_split(args.data, "val"), recipe.eval_transform())
    config = train_config(args, recipe)
    torch.manual_seed(config.seed)
    model = new_model(args, recipe, train_set)
    card = {"transforms": recipe.transforms, "short_side": recipe.short_side}
    metrics = training.train(
        model, train_set, val_set, args.output, config, not args.fresh, card=card
    )
    if accelerator.is_main_process:
        if metrics:
            print(metrics)
        finish(args.output, val_set, config)
    return 0


def chosen_recipe(args: argparse.Namespace) -> Recipe:
    """--recipe, with --short-side."""
    recipe = load_recipe(args.recipe)
    if args.short_side is None:
        return recipe
    return dataclasses.replace(recipe, short_side=args.short_side)


def finish(run: Path, val_set: CocoDataset | None, config: training.TrainConfig) -> None:
    """Store with the models of a run the best threshold on val."""
    for path in (run / "last.safetensors", run / "best.safetensors"):
        if not path.exists():
            continue
        text = "no val split to choose the best weights and a threshold on"
        if val_set:
            detector = load_detector(path)
            model = detector.model.to(choose_device(None))
            found = analyse(model, val_set, config.batch_size, threshold=None, top_k=config.top_k)
            update_card(path, threshold=found.threshold)
            text = f"best threshold on val {found.threshold:.3f}"
        print(f"model: {path}, {text}")


def refuse_faults(data: Path, splits: tuple[str, ...], accelerator: Accelerator) -> None:
    """Print the fatal faults of these splits, and raise ValueError if there are any.

    The main process looks; the others wait, and raise with it.
    """
    places = {split: find_split(data, split) for split in splits}
    found = 0
    for split, place in places.items() if accelerator.is_main_process else ():
        found += print_fatal(split, check_dataset(*place))
    count = torch.tensor(float(found), device=accelerator.device)
    refuse_any(int(accelerator.reduce(count, "sum")), data)


def print_fatal(split: str, faults: list[Fault]) -> int:
    """How many of the faults are fatal; the first of those are printed."""
    fatal = [fault for fault in faults if fault.fatal]
    for fault in fatal[:20]:
        print(f"{split}: {fault}", file=sys.stderr)
    return len(fatal)


def refuse_any(count: int, data: Path) -> None:
    """ValueError if there are fatal faults."""
    if count:
        raise ValueError(
            f"{count} fatal faults in the data; all of them: deformable-detr check {data}"
        )


def chosen(args: argparse.Namespace, names: tuple[str, ...]) -> dict:
    """Those options that the command line gave: neither left out nor flags that are not set."""
    values = {name: getattr(args, name) for name in names}
    return {k: value for k, value in values.items() if value is not None and value is not False}


def train_config(args: argparse.Namespace, recipe: Recipe) -> training.TrainConfig:
    """The recipe's settings with what the command line changes in them."""
    given = chosen(args, TRAIN_OPTIONS)
    if args.lr is not None:
        given["backbone_lr"] = args.lr * recipe.train.backbone_lr / recipe.train.lr
    return dataclasses.replace(recipe.train, **given)


def new_model(args: argparse.Namespace, recipe: Recipe, dataset: CocoDataset) -> DeformableDETR:
    """The model that training starts from: published weights, or the recipe's with the command
    line's changes."""
    classes = len(dataset.categories)
    given = chosen(args, MODEL_OPTIONS)
    weights = args.init or recipe.weights
    if weights and weights != "none":
        names = [*given] + ["backbone_weights"] * bool(args.backbone_weights)
        if names:
            options = [f"--{name.removeprefix('num_').replace('_', '-')}" for name in names]
            raise ValueError(f"{weights} decides the model: leave out {', '.join(options)}")
        loaded = load_pretrained(weights, classes, args.queries)
        print(f"{weights}: kept {len(loaded.report.kept)} tensors", file=sys.stderr)
        return loaded.model
    if args.two_stage:
        given["refine"] = True
    if args.queries is not None:
        given["num_queries"] = args.queries
    return with_backbone(recipe.model_config(classes, **given), args.backbone_weights)


def with_backbone(config: DeformableDETRConfig, weights: str | None) -> DeformableDETR:
    """A new model, its ResNet with weights from a file, "imagenet" (the default) or "none"."""
    from_torchvision = weights == "imagenet" or (weights is None and config.backbone != "small")
    try:
        model = DeformableDETR(config, pretrained_backbone=from_torchvision)
    except OSError as error:
        raise ValueError(
            f"torchvision's ImageNet weights of {config.backbone} did not come ({error}): give "
            "--backbone-weights FILE, or none for a backbone that has learned nothing"
        ) from None
    if weights not in (None, "imagenet", "none"):
        load_backbone(model, Path(weights))
    return model


def load_backbone(model: DeformableDETR, path: Path) -> None:
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


def evaluate(args: argparse.Namespace) -> int:
    """Print a report, and write it where asked."""
    refuse_targets(args.json, args.report)
    if args.keep_threshold and Path(args.model).suffix != ".safetensors":
        raise ValueError(
            f"--keep-threshold needs a .safetensors file that train wrote: {args.model}"
        )
    detector = load_detector(args.model)
    transform = make_transform(detector.transforms, detector.short_side)
    dataset = CocoDataset(*find_split(args.data, args.split), transform)
    faults = check_annotations(dataset.coco.dataset)
    refuse_any(print_fatal(args.split, faults), args.data)
    detector = detector.for_categories(dataset.categories)
    detector.model.to(choose_device(args.device))
    threshold = detector.threshold if args.threshold is None else args.threshold
    threshold = None if args.keep_threshold else threshold
    views = choose_views(args, detector)
    if views:
        results = detect_all(detector, dataset, views, args)
        found = analyse_results(results, dataset, threshold)
    else:
        found = analyse(
            detector.model, dataset, args.batch_size, threshold=threshold, top_k=args.top_k
        )
    print(found.table())
    write_report(found, args)
    if args.keep_threshold:
        update_card(args.model, threshold=found.threshold)
        print(f"{args.model} now has the threshold {found.threshold:.3f}")
    return 0


def refuse_targets(*paths: Path | None) -> None:
    """ValueError where one of these files could not be written, before hours are spent on it."""
    for path in filter(None, paths):
        if path.is_dir():
            raise ValueError(f"{path} is a folder, expected the name of a file")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise ValueError(f"cannot write {path}: {folder} is no folder that can be written")


def write_report(found: Report, args: argparse.Namespace) -> None:
    """--json and --report."""
    if args.json:
        found.write_json(args.json)
    if args.report:
        found.write_html(args.report)
        print(f"report: {args.report}")


def detect_all(
    detector: Detector, dataset: CocoDataset, views: list[View], args: argparse.Namespace
) -> list[dict]:
    """COCO results of a data set, in several views of each image."""
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    results = []
    ids = iter(tqdm(dataset.image_ids, "evaluate", unit="image", leave=False))
    while batch := list(islice(ids, args.batch_size)):
        images = [dataset.load_image(image_id) for image_id in batch]
        all_found = detect(detector.model, images, views, args.merge or "fusion", args.top_k)
        for image_id, image, found in zip(batch, images, all_found, strict=True):
            results += Prediction.of(found, detector.categories, image).to_coco(image_id)
    return results


def choose_views(args: argparse.Namespace, detector: Detector) -> list[View] | None:
    """For --tta. What was trained without mirroring, as digits are, is not mirrored."""
    if not args.tta:
        for option in ("tta_scales", "merge"):
            if getattr(args, option):
                raise ValueError(f"--{option.replace('_', '-')} needs --tta")
        return None
    return make_views(
        detector.transforms,
        tuple(args.tta_scales or TTA_SCALES),
        flip=detector.transforms != "digits",
        short_side=detector.short_side,
    )


def predict(args: argparse.Namespace) -> int:
    """Print what is found, and save pictures and COCO results of it; also of what there is when it
    ends early. The exit code is 1 where a file was passed over."""
    pictures = args.pictures or (None if args.json else Path("found"))
    refuse_same_names(args.images, pictures, args.json)
    refuse_targets(args.json)
    detector = load_detector(args.model)
    results, seen, passed_over = [], 0, []

    def pass_over(line: str) -> None:
        passed_over.append(line)
        tqdm.write(f"passed over: {line}", sys.stderr)

    try:
        for found in predict_each(
            detector,
            args.images,
            args.threshold,
            args.batch_size,
            choose_device(args.device),
            top_k=args.top_k,
            views=choose_views(args, detector),
            merge=args.merge or "fusion",
            nms=args.nms,
            on_skip=pass_over,
            progress=len(args.images) >= 5,
            skip_named=True,
        ):
            results += found.to_coco()
            seen += 1
            for line in describe(found, pictures):
                tqdm.write(line)
    finally:
        if args.json and (seen or passed_over):  # what was there stays where nothing was done
            write_results(results, args.json)
    return 1 if passed_over else 0


def write_results(results: list[dict], path: Path) -> None:
    """--json of predict."""
    text = json.dumps(results) + "\n"
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, "utf-8"))
    print(f"{len(results)} detections: {path}")


def describe(found: Prediction, pictures: Path | None) -> Iterator[str]:
    """Lines on one image; its picture is saved."""
    if pictures:
        pictures.mkdir(parents=True, exist_ok=True)
        saved = pictures / f"{found.path.stem}.png"
        found.draw().save(saved)
    yield f"{found.path}: {len(found)} found" + (f", picture in {saved}" if pictures else "")
    for name, score, box in zip(
        found.names, found.scores.tolist(), found.boxes.tolist(), strict=True
    ):
        corners = "  ".join(f"{axis} {x:6.1f}" for axis, x in zip("xyxy", box, strict=True))
        yield f"  {name:12} {score:.2f}  {corners}"


def refuse_same_names(images: list[Path], pictures: Path | None, results: Path | None) -> None:
    """ValueError where a picture would be saved over another or over an image, or where the results
    would have one id for two images."""
    paths = [Path(path) for path, _ in find_images(images)]
    for path in paths if pictures else ():
        if (pictures / f"{path.stem}.png").resolve() == path.resolve():
            raise ValueError(f"the picture of {path} would replace it: give another --pictures")
    pictures_of, ids = (f"{path.stem}.png" for path in paths), map(file_id, paths)
    for where, names in ((pictures, pictures_of), (results, ids)):
        name, count = Counter(names).most_common(1)[0]
        if where and count > 1:
            raise ValueError(
                f"{count} images would be {name} in {where}; give them in separate runs"
            )


def info(args: argparse.Namespace) -> int:
    """Print a model's classes, options and costs."""
    detector = load_detector(args.model)
    names = ", ".join(category["name"] for category in detector.categories)
    rows = {"model": args.model, "classes": f"{len(detector.categories)}: {names}"}
    rows |= {"threshold": detector.threshold, "prepares images as": detector.transforms}
    if detector.transforms != "digits":  # those leave sizes as they are
        rows |= {"short side": detector.short_side}
    rows |= dataclasses.asdict(detector.model.config)
    for name, value in rows.items():
        print(f"{name:20}{value}")
    model = detector.model.to(choose_device(args.device))
    print()
    print(complexity(model, tuple(args.size), args.batch_size, args.repeats).table())
    return 0


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or a GPU if there is one; ValueError in one line on another."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {name}: {str(error).splitlines()[0]}") from None
    return device


def has_split(data: Path, split: str) -> bool:
    """Whether a data set has annotations for a split."""
    try:
        find_split(data, split)
    except FileNotFoundError:
        return False
    return True
