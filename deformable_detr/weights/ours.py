"""A trained detector as one safetensors file: weights, configuration and category names.

Chapter 11.
"""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from deformable_detr.files import write_atomically
from deformable_detr.models import DEFAULT, MODELS, BaseDetector, model_name

MOVED = [  # names of tensors in files that name no model, which are of version 0.1, and ours
    ("input_proj.", "neck.input_proj."),
    ("level_embed", "neck.level_embed"),
    ("position.", "neck.position."),
]


def save_model(
    model: BaseDetector, path: Path | str, categories: list[dict], card: dict | None = None
) -> None:
    """Write a detector, atomically.

    categories: {"id": int, "name": str} for every class, in the order of the labels. card: whatever
    else should be known of the model, as JSON. Raises OSError where it cannot be written, and
    leaves what was there.
    """
    if len(categories) != model.config.num_classes:
        raise ValueError(
            f"the model has {model.config.num_classes} classes, got {len(categories)} categories"
        )
    metadata = {
        "model": model_name(model.config),
        "config": json.dumps(dataclasses.asdict(model.config)),
        "categories": json.dumps([{"id": c["id"], "name": c["name"]} for c in categories]),
        "card": json.dumps(card or {}),
    }
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def load_model(path: Path | str) -> tuple[BaseDetector, list[dict]]:
    """The detector in a file of `save_model`, in evaluation mode, and its categories.

    Strict: ValueError names the tensors that are missing, left over or of another shape, and says
    in one line where the file is no such file. Nothing in the file is executed.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no model at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
    if not {"config", "categories"} <= metadata.keys():
        raise ValueError(f"{path} was not written by deformable_detr: it has no configuration")
    try:
        config_class, model_class = MODELS[metadata.get("model", DEFAULT)]
        config = config_class(**json.loads(metadata["config"]))
        categories = json.loads(metadata["categories"])
        if not all({"id", "name"} <= category.keys() for category in categories):
            raise ValueError("its categories need an id and a name each")
        if "model" not in metadata:
            tensors = {upgrade_name(name, config): x for name, x in tensors.items()}
        with torch.device("meta"):  # whose sizes cost nothing, whatever they are
            expected = model_class(config).state_dict()
    except KeyError:
        known = ", ".join(MODELS)
        raise ValueError(f"{path} is of the model {metadata['model']!r}; known: {known}") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{path} holds a configuration that is none of ours: {error}") from None
    _check(expected, tensors, path)
    if len(categories) != config.num_classes:
        raise ValueError(f"{path} names {len(categories)} of its {config.num_classes} classes")
    model = model_class(config)
    model.load_state_dict(tensors)
    return model.eval(), categories


def upgrade_name(name: str, config: object) -> str:
    """What a tensor of version 0.1 is called now; other names stay as they are.

    The first stage had the last of the decoder's heads.
    """
    for kind in ("class_head", "box_head") if config.two_stage else ():
        old = f"{kind}s.{config.decoder_layers}."
        if name.startswith(old):
            return f"first_stage.{kind}.{name.removeprefix(old)}"
    for old, new in MOVED:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _check(expected: dict, given: dict, path: Path | str) -> None:
    for problem, names in (
        ("lacks", expected.keys() - given.keys()),
        ("has left over", given.keys() - expected.keys()),
    ):
        if names:
            raise ValueError(f"{path} {problem} {len(names)} tensors, such as {min(names)}")
    for name, tensor in expected.items():
        if given[name].shape != tensor.shape:
            shapes = f"{tuple(given[name].shape)}, expected {tuple(tensor.shape)}"
            raise ValueError(f"{path}: tensor {name} has shape {shapes}")
