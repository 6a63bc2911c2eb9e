"""The two formats in which others publish: the official one and Hugging Face's. Chapter
published_weights.

Which model a file is of is seen from what is in it. What a model is called there stands in a file
of its own, and reaches this one through FOREIGN.
"""

import argparse
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from deformable_detr.backbones import build_backbone
from deformable_detr.files import first_line
from deformable_detr.models import MODELS, BaseDetector, model_name
from deformable_detr.models.base import DetectorConfig
from deformable_detr.options import checked, types_of
from deformable_detr.weights.classes import plain_categories
from deformable_detr.weights.deformable_detr import ForeignDeformableDETR
from deformable_detr.weights.detr import ForeignDETR
from deformable_detr.weights.dino import ForeignDINO
from deformable_detr.weights.dn_detr import ForeignDNDETR
from deformable_detr.weights.foreign import Foreign
from deformable_detr.weights.lite_dino import ForeignLiteDINO
from deformable_detr.weights.ours import on_meta, require_names, require_tensors
from deformable_detr.weights.reading import (
    State,
    read_json,
    read_pickle,
    read_safetensors,
    require_regular,
    shown,
    tensors_of,
)
from deformable_detr.weights.renaming import (
    Layout,
    to_our_options,
    to_ours,
    to_their_options,
    to_theirs,
)
from deformable_detr.weights.sparse_detr import ForeignSparseDETR

FOREIGN: dict[str, Foreign] = {  # by our name of a model, which is also transformers' model_type
    "lite_dino": ForeignLiteDINO(),  # has all that the next one has
    "dino": ForeignDINO(),
    "dn_detr": ForeignDNDETR(),
    "sparse_detr": ForeignSparseDETR(),
    "deformable_detr": ForeignDeformableDETR(),  # as all before it
    "detr": ForeignDETR(),
}
RESNETS = (  # that both formats can have
    *("resnet50", "resnet101", "resnext101_32x8d", "resnet18", "resnet34", "resnet152"),
    *("resnext50_32x4d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"),
)
FILES = ("model.safetensors", "pytorch_model.bin")  # in a folder of Hugging Face's
IN_MEMORY = [  # other names than in today's files: in transformers 5's memory, in 4's files
    (r"^model\.backbone\.model\.", "model.backbone.conv_encoder.model."),
    (r"^model\.backbone\.position_embedding\.", "model.position_embedding."),
    (r"\.o_proj\.", ".out_proj."),
    (r"\.mlp\.fc", ".fc"),
]

# Out


def to_official(model: BaseDetector) -> State:
    """The official code's state dict, which its strict `load_state_dict` takes.

    The tensors are the model's own, not copies. ValueError where the official code has no such
    model: another backbone than a plain ResNet, options that it does not know.
    """
    foreign = _foreign(model)
    foreign.refuse_official(model.config)
    return _renamed(model, foreign, foreign.official)


def official_arguments(config: DetectorConfig) -> dict[str, object]:
    """The options of the official code's command line that make this model."""
    foreign = FOREIGN.get(model_name(config), Foreign())
    return to_their_options(config, "official") | foreign.official_entries(config)


def to_huggingface(model: BaseDetector, categories: list[dict] | None = None) -> tuple[State, dict]:
    """What Hugging Face's save_pretrained would write: the state dict and the content of
    config.json. ValueError where transformers has no such model."""
    config, foreign = model.config, _in_transformers(model)
    state = _renamed(model, foreign, foreign.huggingface)
    names = {i: c["name"] for i, c in enumerate(categories or plain_categories(config.num_classes))}
    backbone = {
        "model_type": "timm_backbone",
        "backbone": config.backbone,
        "features_only": True,
        "use_pretrained_backbone": False,
        "out_indices": foreign.backbone_maps(config),
        **({"output_stride": 16} if config.dilation else {}),
    }
    content = {
        "model_type": model_name(config),
        "architectures": [foreign.architecture],
        "backbone_config": backbone,
        "id2label": names,
        "label2id": {name: i for i, name in names.items()},
        **foreign.entries(config),
        **to_their_options(config, "huggingface"),
    }
    return state, content


def image_processor(model: BaseDetector) -> str:
    """The class in transformers that prepares its images."""
    return _in_transformers(model).image_processor


def _foreign(model: BaseDetector) -> Foreign:
    name = model_name(model.config)
    if name not in FOREIGN:
        raise ValueError(f"nobody else publishes {name}: it cannot be exported")
    return FOREIGN[name]


def _in_transformers(model: BaseDetector) -> Foreign:
    foreign = _foreign(model)
    if foreign.huggingface is None:
        name = model_name(model.config)
        raise ValueError(f"transformers has no {name}: export it as official")
    return foreign


def _renamed(model: BaseDetector, foreign: Foreign, layout: Layout) -> State:
    config, state = model.config, model.state_dict()
    if config.backbone not in RESNETS:
        raise ValueError(f"backbone {config.backbone!r} exists only here: it cannot be exported")
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in foreign.constants(config):
        value, only = getattr(config, name), (defaults | foreign.as_there)[name]
        if value != only:
            raise ValueError(f"{name} must be {only} to be exported, as it is there, got {value}")
    return to_theirs(state, layout.table(state, lambda name: foreign.copies(name, config)))


# In


def file_name(name: str) -> str:
    """The name in Hugging Face's files of a tensor that a model in memory calls `name`."""
    for pattern, replacement in IN_MEMORY:
        name = re.sub(pattern, replacement, name)
    return name


def from_huggingface(folder: Path, changes: Mapping) -> tuple[BaseDetector, list[dict]]:
    """The model in a folder of `save_pretrained`, with other options where there are changes, and
    its categories."""
    file = next((folder / name for name in FILES if (folder / name).exists()), None)
    if file is None:
        raise FileNotFoundError(f"{folder} has config.json, but none of {', '.join(FILES)}")
    require_regular(folder / "config.json")
    try:
        content = read_json((folder / "config.json").read_text("utf-8"), "it")
        foreign, config, categories = _huggingface_config(content)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        reason = first_line(error)
        raise ValueError(f"{folder / 'config.json'} is not one we can use: {reason}") from None
    if file.suffix == ".safetensors":
        state, _ = read_safetensors(file)
    else:
        state = tensors_of(read_pickle(file), file)
    state = {file_name(name): tensor for name, tensor in state.items()}
    config = dataclasses.replace(config, **changes)
    require_tensors(config, len(state), file)
    state = foreign.complete(state, content, config)
    return _build(foreign, config, state, foreign.huggingface, file), categories


def _huggingface_config(content: dict) -> tuple[Foreign, DetectorConfig, list[dict]]:
    """Ours from the content of a config.json; ValueError where it is of another model."""
    name = content.get("model_type")
    known = [each for each, foreign in FOREIGN.items() if foreign.huggingface]
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"its model_type is {name!r:.80}; known are {', '.join(known)}")
    if content.get("activation_function", "relu") != "relu":
        raise ValueError("its activation_function is not 'relu'")
    foreign, kind = FOREIGN[name], MODELS[name][0]
    options = to_our_options(content, kind, "huggingface")
    more = foreign.options(content, options) | _huggingface_backbone(content)
    options |= checked(more, types_of(kind), kind.__name__)
    labels = content.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})  # transformers' default
    categories = [{"id": i, "name": labels[str(i)]} for i in range(len(labels))]
    require_names(categories)
    return foreign, kind(num_classes=len(labels), **options), categories


def _huggingface_backbone(content: dict) -> dict[str, object]:
    """Options of the backbone, which is named in one of three ways."""
    backbone = content.get("backbone_config") or {
        "model_type": "timm_backbone" if content.get("use_timm_backbone", True) else "resnet",
        "backbone": content.get("backbone") or "resnet50",
    }
    if backbone.get("model_type") != "timm_backbone":
        raise ValueError(
            f"its backbone is transformers' own {backbone.get('model_type')!r:.80}; only timm's "
            "ResNets, which the published weights have, are read"
        )
    name = backbone["backbone"].split(".")[0]  # without timm's tag of the weights
    dilated = {"dilation": True} if backbone.get("output_stride") == 16 else {}
    return {"backbone": name} | dilated


def from_official(
    state: State, arguments: object, path: Path, changes: Mapping
) -> tuple[BaseDetector, list[dict]]:
    """The model of official tensors, and its categories.

    arguments: what is kept beside them, for what they do not show. changes: other options.
    """
    if isinstance(arguments, argparse.Namespace):
        arguments = vars(arguments)
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{path}: 'model' and 'args' must be dicts")
    name = next((name for name, foreign in FOREIGN.items() if foreign.sign in state), None)
    if name is None:
        raise ValueError(f"{path} is of none of {', '.join(FOREIGN)}: {_look(state)}")
    foreign, kind = FOREIGN[name], MODELS[name][0]
    try:
        options = to_our_options(arguments, kind, "official") | foreign.as_there | _shown_by(state)
        options |= foreign.shown_by(state, options)
        options |= foreign.official_options(arguments, options)
        if "backbone" not in arguments:
            options["backbone"] = _recognise_backbone(state)
        config = kind(**options)
    except KeyError as error:
        raise ValueError(f"{path} is no {kind.__name__}: it lacks {error}") from None
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not one we can use: {first_line(error)}") from None
    config = dataclasses.replace(config, **changes)
    model = _build(foreign, config, state, foreign.official, path)
    return model, plain_categories(config.num_classes)


def _look(state: State) -> str:
    """What a state dict of no known model looks like, in a few words."""
    if any("conv_encoder" in file_name(name) for name in state):
        return "it looks like one of Hugging Face's: give its folder, with config.json"
    starts = sorted({shown(name.split(".")[0]) for name in state})
    return f"its tensors are called {', '.join(starts[:6])}..."


def _shown_by(state: State) -> dict[str, object]:
    """Options that official tensors of every model show; KeyError where one is not there."""

    def layers(kind: str) -> int:
        pattern = rf"transformer\.{kind}\.layers\.\d+\."
        return len({m[0] for name in state if (m := re.match(pattern, name))})

    layer = "transformer.encoder.layers.0."
    options = {
        "embed_dim": len(state[layer + "linear2.bias"]),
        "ffn_dim": len(state[layer + "linear1.bias"]),
        "encoder_layers": layers("encoder"),
        "decoder_layers": layers("decoder"),
        "position": "learned" if "backbone.1.row_embed.weight" in state else "sine",
    }
    if "query_embed.weight" in state:
        options["num_queries"] = len(state["query_embed.weight"])
    return options


def _recognise_backbone(state: State) -> str:
    start = "backbone.0."
    shapes = {n.removeprefix(start): x.shape for n, x in state.items() if n.startswith(start)}
    for name in RESNETS:
        with torch.device("meta"):
            candidate = build_backbone(name).state_dict()
        if {n: tensor.shape for n, tensor in candidate.items()} == shapes:
            return name
    raise ValueError("its backbone is none of torchvision's ResNets")


def _build(
    foreign: Foreign, config: DetectorConfig, state: State, layout: Layout, path: Path
) -> BaseDetector:
    """The model of these foreign tensors, once every name and shape is known to fit."""
    state = {n: x for n, x in state.items() if not n.endswith("num_batches_tracked")}
    model = on_meta(config, len(state), path)
    expected = model.state_dict()
    table = layout.table(expected, lambda name: foreign.copies(name, config))
    model.load_state_dict(to_ours(state, expected, table, path), assign=True)
    return model
