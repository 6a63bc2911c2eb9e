"""Published weights: read and written in our format, Hugging Face's and the official one.

The names of tensors are mapped strictly: one that is missing, left over or of another shape is an
error that names it. Files are read with safetensors or torch's weights_only loader, so nothing in
them can run. Chapter 11 teaches it.
"""

import argparse
import dataclasses
import json
import logging
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deformable_detr.files import first_line, write_atomically
from deformable_detr.models.deformable_detr import DeformableDETR, DeformableDETRConfig
from deformable_detr.weights.formats import (
    HUGGINGFACE,
    OFFICIAL,
    Renaming,
    State,
    file_name,
    foreign_names,
    huggingface_config,
    official_arguments,
    official_config,
    plain_categories,
    to_huggingface,
    to_official,
    to_ours,
)
from deformable_detr.weights.ours import load_model, save_model

logger = logging.getLogger(__name__)
FORMATS = ("ours", "huggingface", "official")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in a folder of Hugging Face's
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass
class Report:
    """What became of every tensor: those kept from the file, and those made anew, with reasons."""

    kept: list[str] = field(default_factory=list)
    fresh: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        total = len(self.kept) + len(self.fresh)
        lines = [f"kept {len(self.kept)} of {total} tensors as published"]
        return "\n".join(lines + [f"  {name}: {why}" for name, why in self.fresh.items()])


@dataclass
class Pretrained:
    """A loaded model in evaluation mode, the categories of its labels, and what was kept."""

    model: DeformableDETR
    categories: list[dict]
    report: Report


def load_pretrained(
    name_or_path: Path | str,
    num_classes: int | None = None,
    num_queries: int | None = None,
    **changes: object,
) -> Pretrained:
    """A published detector, or one of ours.

    name_or_path: a name on the Hugging Face hub ("SenseTime/deformable-detr"), a folder written by
    transformers' or our `save_pretrained`, an official .pth file, or a .safetensors file of ours.
    num_classes, num_queries: where they differ from the file's, every tensor that fits is kept,
    the others start afresh with the prior of training, and the report says so, also as a log
    message; of learned queries as many are kept as there are in both. changes: other fields of the
    config, such as dropout; dilation and num_heads cannot be seen in an official file without its
    "args", so give them then.
    Raises FileNotFoundError with what to download where there is no such file or no network, and
    ValueError with one line on a file that is damaged, hostile or of another model.
    """
    path = _resolve(str(name_or_path))
    read = _reader(path)
    model, categories = read(path, changes)
    model, report = resized(model, num_classes, num_queries)
    if report.fresh:
        logger.warning("%s: %s", name_or_path, report)
    if model.config.num_classes != len(categories):
        categories = plain_categories(model.config.num_classes)
    return Pretrained(model.eval(), categories, report)


def resized(
    model: DeformableDETR, num_classes: int | None = None, num_queries: int | None = None
) -> tuple[DeformableDETR, Report]:
    """The model with other numbers of classes or queries, and what became of its tensors.

    The first stage of a two-stage model scores tokens by channel 0 of its class head, whatever the
    classes are: that one row is kept.
    """
    wanted = {"num_classes": num_classes, "num_queries": num_queries}
    wanted = {name: number for name, number in wanted.items() if number is not None}
    config = dataclasses.replace(model.config, **wanted)
    old = model.state_dict()
    if config == model.config:
        return model, Report(list(old))
    new = DeformableDETR(config)
    report, state = Report(), new.state_dict()
    objectness = "first_stage.class_head."
    for name, tensor in state.items():
        if old[name].shape == tensor.shape:
            tensor.copy_(old[name])
            report.kept.append(name)
            continue
        sizes = f"{tuple(old[name].shape)} in the file, {tuple(tensor.shape)} here"
        report.fresh[name] = f"made anew: {sizes}"
        if name.startswith(objectness):
            tensor[0] = old[name][0]
            report.fresh[name] = f"made anew but for row 0, the objectness: {sizes}"
        elif name == "query_embed.weight":
            rows = min(len(tensor), len(old[name]))
            tensor[:rows] = old[name][:rows]
            report.fresh[name] = f"the first {rows} rows kept: {sizes}"
    return new, report


def _resolve(name: str) -> Path:
    """The path itself, or where the hub's files of that name are on this machine."""
    if Path(name).exists():
        return Path(name)
    if not HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"no file or folder {name}, and it is no name on the hub either")
    try:
        config = Path(huggingface_hub.hf_hub_download(name, "config.json"))
        try:
            huggingface_hub.hf_hub_download(name, WEIGHTS[0])
        except huggingface_hub.errors.EntryNotFoundError:
            huggingface_hub.hf_hub_download(name, WEIGHTS[1])
    except Exception as error:  # of the network, the hub, the cache: many kinds
        raise FileNotFoundError(
            f"{name} is no path here, and the Hugging Face hub did not give it "
            f"({first_line(error)}): download config.json and model.safetensors from "
            f"https://huggingface.co/{name} into a folder, and give the folder"
        ) from None
    return config.parent


Reader = Callable[[Path, dict], tuple[DeformableDETR, list[dict]]]


def _reader(path: Path) -> Reader:
    """What reads this file or folder."""
    if path.is_dir():
        if (path / "config.json").is_file():
            return _read_huggingface
        return _read_ours
    return _read_ours if path.suffix == ".safetensors" else _read_official


def _read_ours(path: Path, changes: dict) -> tuple[DeformableDETR, list[dict]]:
    model, categories = load_model(path / WEIGHTS[0] if path.is_dir() else path)
    if not changes:
        return model, categories
    other = DeformableDETR(dataclasses.replace(model.config, **changes))
    try:
        other.load_state_dict(model.state_dict())
    except RuntimeError:
        raise ValueError(f"{path}: its tensors do not fit a model with {changes}") from None
    return other, categories


def _read_huggingface(folder: Path, changes: dict) -> tuple[DeformableDETR, list[dict]]:
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{folder} has config.json, but none of {', '.join(WEIGHTS)}")
    try:
        content = json.loads((folder / "config.json").read_text("utf-8"))
        config = huggingface_config(content)
        labels = content.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})
        categories = [{"id": i, "name": str(labels[str(i)])} for i in range(len(labels))]
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        reason = first_line(error)
        raise ValueError(f"{folder / 'config.json'} is not one we can use: {reason}") from None
    config = dataclasses.replace(config, **changes)
    state = _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)[0]
    state = {file_name(name): tensor for name, tensor in state.items()}
    if content.get("tie_word_embeddings", True) and config.refine and not config.two_stage:
        _untie(state, config.decoder_layers)
    return _build(config, state, HUGGINGFACE, file), categories


def _untie(state: State, layers: int) -> None:
    """Give each layer its class head where transformers has saved one for all."""
    for kind in ("weight", "bias"):
        names = [f"class_embed.{layer}.{kind}" for layer in range(layers)]
        if names[0] in state and not any(name in state for name in names[1:]):
            state.update(dict.fromkeys(names, state[names[0]]))


def _read_official(path: Path, changes: dict) -> tuple[DeformableDETR, list[dict]]:
    state, arguments = _read_pickle(path)
    try:
        config = official_config(state, arguments)
    except KeyError as error:
        raise ValueError(f"{path} is no Deformable DETR: it lacks {error}") from None
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not one we can use: {first_line(error)}") from None
    config = dataclasses.replace(config, **changes)
    return _build(config, state, OFFICIAL, path), plain_categories(config.num_classes)


def _read_safetensors(path: Path) -> State:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None


def _read_pickle(path: Path) -> tuple[State, Mapping]:
    """The state dict and the arguments in a file of torch.save; nothing in it is executed.

    argparse.Namespace, which official files hold, is the one class allowed beyond torch's own.
    """
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # what they say of odd files, the error says
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the loader raise anything
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = "it is damaged, or not written by torch.save"
        if refused:
            reason = f"it asks to call {refused[1]}, which was not done"
        raise ValueError(f"{path} is not a readable file of weights: {reason}") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a dict of tensors, got {type(content).__name__}")
    arguments = content.get("args", {})
    if isinstance(arguments, argparse.Namespace):
        arguments = vars(arguments)
    state = content.get("model", content)
    if not isinstance(state, Mapping) or not isinstance(arguments, Mapping):
        raise ValueError(f"{path}: 'model' and 'args' must be dicts")
    return dict(state), arguments


def _build(
    config: DeformableDETRConfig,
    state: State,
    layout: dict[str, Renaming],
    path: Path,
) -> DeformableDETR:
    """The model of these foreign tensors, once every name and shape is known to fit."""
    strange = [n for n, x in state.items() if not isinstance(n, str) or not _is_weight(x)]
    if strange:
        raise ValueError(f"{path}: {strange[0]!r} is not a dense tensor of real numbers")
    state = {n: x for n, x in state.items() if not n.endswith("num_batches_tracked")}
    depth = max(config.encoder_layers, config.decoder_layers, config.num_levels)
    if depth > len(state):
        raise ValueError(f"{path}: {len(state)} tensors are too few for {depth} layers")
    try:
        with torch.device("meta"):  # names and shapes only, whatever size they claim
            model = DeformableDETR(config)
    except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no such model can be built: {first_line(error)}") from None
    expected = model.state_dict()
    table = foreign_names(expected, config, layout)
    model.load_state_dict(to_ours(state, expected, table, path), assign=True)
    return model


def _is_weight(value: object) -> bool:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
        return False
    return value.device.type == "cpu" and not value.is_complex()


def save_pretrained(
    model: DeformableDETR,
    path: Path | str,
    categories: list[dict] | None = None,
    format: str = "ours",
) -> None:
    """Write a model, atomically, in one of three formats.

    "ours": the safetensors file `path`, or model.safetensors in the folder `path`. "huggingface":
    config.json and model.safetensors in the folder `path`. "official": the file `path`, with the
    entries "model" and "args". categories: {"id": int, "name": str} of every class. Raises
    ValueError where the format has no such model, and OSError where it cannot be written.
    """
    path = Path(path)
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format == "ours":
        file = path if path.suffix == ".safetensors" else path / WEIGHTS[0]
        save_model(model, file, categories or plain_categories(model.config.num_classes))
    elif format == "official":
        content = {"model": to_official(model), "args": official_arguments(model.config)}
        write_atomically(path, lambda temporary: _save_pickle(content, temporary))
    else:
        state, content = to_huggingface(model, categories)
        copies = {name: tensor.clone() for name, tensor in state.items()}  # they share memory
        write_atomically(path / WEIGHTS[0], lambda t: save_file(copies, t, {"format": "pt"}))
        text = json.dumps(content, indent=2) + "\n"
        write_atomically(path / "config.json", lambda t: Path(t).write_text(text))


def _save_pickle(content: dict, path: str) -> None:
    with open(path, "wb") as file:  # from a name, torch.save would make the archive's own
        torch.save(content, file)
