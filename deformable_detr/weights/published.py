"""Weights by name or path: those that others published, and ours, read and written in each format.

The names of tensors are mapped strictly: one that is missing, left over or of another shape is an
error that names it. Files are read with safetensors or torch's weights_only loader, so nothing in
them can run. Chapter published_weights teaches it.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import torch
from safetensors.torch import save_file

from deformable_detr.data.names import counted
from deformable_detr.files import first_line, write_atomically
from deformable_detr.models import BaseDetector
from deformable_detr.weights.classes import Adaptation, plain_categories, with_classes
from deformable_detr.weights.formats import (
    FILES,
    from_huggingface,
    from_official,
    image_processor,
    official_arguments,
    to_huggingface,
    to_official,
)
from deformable_detr.weights.images import PREPROCESSOR, read_preparation, write_preparation
from deformable_detr.weights.ours import Saved, parse_checkpoint, parse_file, rebuild, save_model
from deformable_detr.weights.reading import read_pickle, read_safetensors, tensors_of, unwrapped

logger = logging.getLogger(__name__)
FORMATS = ("ours", "huggingface", "official")
OURS = ("model.safetensors", "best.safetensors", "last.safetensors", "checkpoint.pt")  # of a folder
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass
class Pretrained:
    """A loaded model in evaluation mode, the categories of its labels, what was kept of the file,
    and its card, where it has one."""

    model: BaseDetector
    categories: list[dict]
    report: Adaptation = field(default_factory=Adaptation)
    card: dict = field(default_factory=dict)


def load_pretrained(
    name_or_path: Path | str,
    num_classes: int | None = None,
    num_queries: int | None = None,
    categories: list[dict] | None = None,
    **changes: object,
) -> Pretrained:
    """A published detector, or one of ours.

    name_or_path: a name on the Hugging Face hub ("SenseTime/deformable-detr",
    "facebook/detr-resnet-50"), a folder written by transformers' or our `save_pretrained`, an
    official .pth file, a .safetensors file of ours, a run's folder or checkpoint.pt.
    categories: of the classes that the model shall have, found in the file by their names: see
    `classes.with_classes`. num_classes: how many, where their names are not known: then class heads
    start anew, unless the file has as many. num_queries: of learned queries as many are kept as
    there are in both. The report says what was kept; a log message too, where not all was.
    changes: other fields of the config, such as dropout; dilation and num_heads cannot be seen in
    an official file without its "args", so give them then.
    Raises FileNotFoundError with what to download where there is no such file or no network, and
    ValueError with one line on a file that is damaged, hostile or of another model.
    """
    loaded = _read(_resolve(str(name_or_path)), changes)
    model, known = loaded.model, loaded.categories
    wanted = categories or known
    if num_classes is not None and num_classes != len(wanted):
        if categories:
            raise ValueError(
                f"got num_classes={num_classes} and {counted(len(categories), 'category')}"
            )
        known, wanted = None, plain_categories(num_classes)
    model, report = with_classes(model, known, wanted, num_queries)
    if report.fresh:
        logger.warning("%s: %s", name_or_path, report)
    return Pretrained(model.eval(), wanted, report, loaded.card)


def _resolve(name: str) -> Path:
    """The path itself, or where the hub's files of that name are on this machine."""
    if Path(name).exists():
        return Path(name)
    if not HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"no file or folder {name}, and it is no name on the hub either")
    try:
        config = Path(huggingface_hub.hf_hub_download(name, "config.json"))
        with suppress(huggingface_hub.errors.EntryNotFoundError):
            huggingface_hub.hf_hub_download(name, PREPROCESSOR)
        try:
            huggingface_hub.hf_hub_download(name, FILES[0])
        except huggingface_hub.errors.EntryNotFoundError:
            huggingface_hub.hf_hub_download(name, FILES[1])
    except Exception as error:  # of the network, the hub, the cache: many kinds
        raise FileNotFoundError(
            f"{name} is no path here, and the Hugging Face hub did not give it "
            f"({first_line(error)}): download config.json and model.safetensors from "
            f"https://huggingface.co/{name} into a folder, and give the folder"
        ) from None
    return config.parent


def _read(path: Path, changes: Mapping) -> Pretrained:
    """What a file or folder holds, whatever wrote it."""
    if path.is_dir():
        if (path / "config.json").exists():
            model, categories = from_huggingface(path, changes)
            card, differences = read_preparation(path)
            for text in differences:
                logger.warning("%s prepares images otherwise: %s", path, text)
            return Pretrained(model, categories, card=card)
        path = _file_in(path)
    if path.suffix == ".safetensors":
        state, metadata = read_safetensors(path)
        if "config" in metadata:
            return _ours(parse_file(state, metadata, path), changes, path)
        return Pretrained(*from_official(unwrapped(state), {}, path, changes))
    content = read_pickle(path)
    if "identity" in content:
        return _ours(parse_checkpoint(content, path), changes, path)
    state = content.get("model", content.get("state_dict", content))
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: 'model' and 'args' must be dicts")
    arguments, card = content.get("args", {}), content.get("card", {})
    if not isinstance(card, dict):
        raise ValueError(f"{path}: 'card' must be a dict")
    model, categories = from_official(tensors_of(state, path), arguments, path, changes)
    return Pretrained(model, categories, card=card)


def _file_in(folder: Path) -> Path:
    """The best model in a folder of ours: one that was saved there, or what a run left."""
    found = [folder / name for name in OURS if (folder / name).exists()]
    if not found:
        raise FileNotFoundError(
            f"no model at {folder}: it has none of config.json, {', '.join(OURS)}"
        )
    return found[0]


def _ours(saved: Saved, changes: Mapping, path: Path) -> Pretrained:
    model = rebuild(saved, path)
    if changes:
        other = dataclasses.replace(saved, config=dataclasses.replace(saved.config, **changes))
        try:
            model = rebuild(other, path)
        except ValueError:
            raise ValueError(f"{path}: its tensors do not fit a model with {changes}") from None
    return Pretrained(model, saved.categories, card=saved.card)


def save_pretrained(
    model: BaseDetector,
    path: Path | str,
    categories: list[dict] | None = None,
    format: str = "ours",
    card: dict | None = None,
) -> None:
    """Write a model, atomically, in one of three formats.

    "ours": the safetensors file `path`, or model.safetensors in the folder `path`. "huggingface":
    config.json, model.safetensors, preprocessor_config.json and card.json in the folder `path`.
    "official": the file `path`, with the entries "model", "args" and "card". categories: {"id":
    int, "name": str} of every class. card: what else is known of it, such as {"short_side": 480} of
    how it sees images; `Detector.save_pretrained` knows all of these. Raises ValueError where the
    format has no such model, and OSError where it cannot be written.
    """
    path, card = Path(path), card or {}
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format == "ours":
        file = path if path.suffix == ".safetensors" else path / OURS[0]
        save_model(model, file, categories or plain_categories(model.config.num_classes), card)
    elif format == "official":
        arguments = official_arguments(model.config)
        content = {"model": to_official(model), "args": arguments, "card": card}
        write_atomically(path, lambda temporary: _save_pickle(content, temporary))
    else:
        state, content = to_huggingface(model, categories)
        copies = {name: tensor.clone() for name, tensor in state.items()}  # they share memory
        write_atomically(path / FILES[0], lambda t: save_file(copies, t, {"format": "pt"}))
        text = json.dumps(content, indent=2) + "\n"
        write_atomically(path / "config.json", lambda t: Path(t).write_text(text))
        write_preparation(path, model, card, image_processor(model))


def _save_pickle(content: dict, path: str) -> None:
    with open(path, "wb") as file:  # from a name, torch.save would make the archive's own
        torch.save(content, file)
