"""A trained detector as one safetensors file: weights, configuration and category names.

Also a run's checkpoint, as far as it holds a model. Chapter published_weights.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from deformable_detr.data.names import counted
from deformable_detr.files import first_line, write_atomically
from deformable_detr.models import DEFAULT, MODELS, BaseDetector, build_model, model_name
from deformable_detr.models.base import DetectorConfig
from deformable_detr.options import checked, types_of
from deformable_detr.weights.reading import (
    State,
    as_weights,
    open_safetensors,
    read_json,
    read_safetensors,
    tensors_of,
)
from deformable_detr.weights.renaming import require_same

MOVED = [  # names of tensors in files that name no model, which are of version 0.1, and ours
    ("input_proj.", "neck.input_proj."),
    ("level_embed", "neck.level_embed"),
    ("position.", "neck.position."),
]


@dataclass
class Saved:
    """What a file of ours holds: tensors, and what they are of.

    categories: {"id": int or str, "name": str} of every class. card: whatever else is known.
    """

    config: DetectorConfig
    state: State
    categories: list[dict]
    card: dict = field(default_factory=dict)


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
            f"the model has {counted(model.config.num_classes, 'class')}, got "
            f"{counted(len(categories), 'category')}"
        )
    require_names(categories)
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
    tensors, metadata = read_safetensors(path)
    saved = parse_file(tensors, metadata, path)
    return rebuild(saved, path), saved.categories


def read_card(path: Path | str) -> dict:
    """The card in a file of `save_model`; ValueError, in one line, on other files."""
    with open_safetensors(path) as file:
        return _parse_card(file.metadata() or {}, path)


def parse_file(tensors: State, metadata: Mapping[str, str], path: Path | str) -> Saved:
    """What the tensors and the metadata of a file of `save_model` say."""
    if not {"config", "categories"} <= metadata.keys():
        raise ValueError(f"{path} was not written by deformable_detr: it has no configuration")
    options = read_json(metadata["config"], f"{path}: its configuration")
    categories = read_json(metadata["categories"], f"{path}: its list of categories")
    config = _make_config(options, metadata.get("model"), path)
    state = _upgraded(tensors, config, metadata.get("model"))
    return Saved(config, state, _named(categories, path), _parse_card(metadata, path))


def parse_checkpoint(content: Mapping, path: Path | str) -> Saved:
    """What a run's checkpoint.pt holds; of a run that averages its weights, the average."""
    identity = content["identity"]
    if not isinstance(identity, Mapping) or not isinstance(content.get("model"), Mapping):
        raise ValueError(f"{path} is no checkpoint of ours: it has no model")
    average = dict(content.get("average") or content["model"])
    average.pop("n_averaged", None)
    name = identity.get("model")
    config = _make_config(_beginning(identity, "model "), name, path)
    pairs = identity.get("categories")
    if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
        raise ValueError(f"{path} is no checkpoint of ours: it has no categories")
    categories = [{"id": key, "name": text} for key, text in pairs]
    state = _upgraded(tensors_of(average, path), config, name)
    return Saved(config, state, _named(categories, path), _beginning(identity, "data "))


def rebuild(saved: Saved, path: Path | str) -> BaseDetector:
    """The model in a file, strictly, in evaluation mode."""
    config, state = saved.config, saved.state
    expected = on_meta(config, len(state), path).state_dict()
    require_same(expected.keys() - state.keys(), state.keys() - expected.keys(), path)
    for name, like in expected.items():
        if state[name].shape != like.shape:
            shapes = f"{tuple(state[name].shape)}, expected {tuple(like.shape)}"
            raise ValueError(f"{path}: tensor {name} has shape {shapes}")
    state = {name: as_weights(state[name], like, name, path) for name, like in expected.items()}
    if len(saved.categories) != config.num_classes:
        given = f"{len(saved.categories)} of its {config.num_classes}"
        raise ValueError(f"{path} names {given} classes")
    model = build_model(config)
    model.load_state_dict(state)
    return model.eval()


def on_meta(config: DetectorConfig, tensors: int, path: Path | str) -> BaseDetector:
    """A model without memory, for names and shapes, whatever sizes its configuration claims.

    tensors: how many there are for it. ValueError where they are too few, or where no such model
    can be built.
    """
    require_tensors(config, tensors, path)
    try:
        with torch.device("meta"):
            return build_model(config)
    except Exception as error:  # torch's modules raise many kinds, AssertionError among them
        raise ValueError(f"{path}: no such model can be built: {first_line(error)}") from None


def require_tensors(config: DetectorConfig, tensors: int, path: Path | str) -> None:
    """ValueError where there are fewer tensors than layers, each of which takes time to build."""
    depth = max(x for n, x in vars(config).items() if n.endswith(("_layers", "_levels")))
    if depth > tensors:
        raise ValueError(f"{path}: {tensors} tensors are too few for {depth} layers")


def require_names(categories: object) -> None:
    """ValueError where these are no categories: a list of dicts with an id, and a text as name."""
    if not isinstance(categories, list) or not all(isinstance(c, dict) for c in categories):
        raise ValueError("categories must be a list of objects")
    for category in categories:
        if not {"id", "name"} <= category.keys():
            raise ValueError("categories need an id and a name each")
        if not isinstance(category["name"], str):
            raise ValueError(f"the name of a category must be a text, got {category['name']!r:.80}")


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


def _upgraded(state: State, config: DetectorConfig, model: str | None) -> State:
    """Tensors under today's names; those of version 0.1 name no model."""
    return state if model else {upgrade_name(name, config): x for name, x in state.items()}


def _make_config(options: object, model: object, path: Path | str) -> DetectorConfig:
    model = DEFAULT if model is None else model
    if not isinstance(model, str) or model not in MODELS:
        raise ValueError(f"{path} is of the model {model!r:.80}; known: {', '.join(MODELS)}")
    kind, _ = MODELS[model]
    try:
        return kind(**checked(options, types_of(kind), kind.__name__))
    except (ArithmeticError, AttributeError, RecursionError, TypeError, ValueError) as error:
        reason = first_line(error)
        raise ValueError(f"{path} holds a configuration that is none of ours: {reason}") from None


def _named(categories: object, path: Path | str) -> list[dict]:
    try:
        require_names(categories)
    except ValueError as error:
        raise ValueError(f"{path} holds classes that are none of ours: {error}") from None
    return categories


def _parse_card(metadata: Mapping[str, str], path: Path | str) -> dict:
    card = read_json(metadata.get("card", "{}"), f"{path}: its card")
    if not isinstance(card, dict):
        raise ValueError(f"{path}: its card must be a JSON object, got {card!r:.80}")
    return card


def _beginning(identity: Mapping, start: str) -> dict:
    """The entries of a run's identity whose names begin so, without that."""
    keys = [key for key in identity if isinstance(key, str) and key.startswith(start)]
    return {key.removeprefix(start): identity[key] for key in keys}
