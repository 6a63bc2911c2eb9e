"""The two formats in which others publish Deformable DETR: the official one and Hugging Face's.

Here are their names of tensors and of options, in both directions; `pretrained` reads and writes
the files. Chapter 11 reads the table as a map of the model.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from deformable_detr.backbones import build_backbone
from deformable_detr.models.deformable_detr import DeformableDETR, DeformableDETRConfig

State = dict[str, Tensor]
Renaming = list[tuple[str, str]]  # (ours, theirs); the first that fits a name's start is applied
Place = tuple[str, int | None]  # our name of a tensor, and which third of it, or None for all
RESNETS = (  # that both formats can have
    *("resnet50", "resnet101", "resnext101_32x8d", "resnet18", "resnet34", "resnet152"),
    *("resnext50_32x4d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"),
)

# Names

OFFICIAL: dict[str, Renaming] = {
    "": [
        ("backbone.", "backbone.0."),
        ("neck.position.", "backbone.1."),
        ("neck.input_proj.", "input_proj."),
        ("neck.", "transformer."),
        ("query_embed.", "query_embed."),
        ("first_stage.output_norm.", "transformer.enc_output_norm."),
        ("first_stage.output.", "transformer.enc_output."),
        ("first_stage.query_norm.", "transformer.pos_trans_norm."),
        ("first_stage.query.", "transformer.pos_trans."),
        ("class_heads.", "class_embed."),
        ("box_heads.", "bbox_embed."),
        ("", "transformer."),
    ],
    "encoder": [
        ("attention.", "self_attn."),
        ("norm.", "norm1."),
        ("ffn.norm.", "norm2."),
        ("ffn.", ""),
    ],
    "decoder": [
        ("cross_attention.", "cross_attn."),
        ("cross_norm.", "norm1."),
        ("self_attention.", "self_attn."),
        ("self_norm.", "norm2."),
        ("ffn.norm.", "norm3."),
        ("ffn.", ""),
    ],
}
HUGGINGFACE: dict[str, Renaming] = {  # as in its files, which all versions of transformers read
    "": [
        ("backbone.body.", "model.backbone.conv_encoder.model."),
        ("neck.position.row_embed.", "model.position_embedding.row_embeddings."),
        ("neck.position.col_embed.", "model.position_embedding.column_embeddings."),
        ("neck.", "model."),
        ("query_embed.", "model.query_position_embeddings."),
        ("first_stage.output_norm.", "model.enc_output_norm."),
        ("first_stage.output.", "model.enc_output."),
        ("first_stage.query_norm.", "model.pos_trans_norm."),
        ("first_stage.query.", "model.pos_trans."),
        ("class_heads.", "class_embed."),
        ("box_heads.", "bbox_embed."),
        ("", "model."),
    ],
    "encoder": [
        ("attention.", "self_attn."),
        ("norm.", "self_attn_layer_norm."),
        ("ffn.linear", "fc"),
        ("ffn.norm.", "final_layer_norm."),
    ],
    "decoder": [
        ("cross_attention.", "encoder_attn."),
        ("cross_norm.", "encoder_attn_layer_norm."),
        ("self_norm.", "self_attn_layer_norm."),
        ("self_attention.", "self_attn."),
        ("ffn.linear", "fc"),
        ("ffn.norm.", "final_layer_norm."),
    ],
}
IN_MEMORY = [  # how transformers 5 calls in memory what its files call otherwise
    (r"^model\.backbone\.model\.", "model.backbone.conv_encoder.model."),
    (r"\.self_attn\.o_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.fc", ".fc"),
]


def foreign_names(
    names: Iterable[str], config: DeformableDETRConfig, layout: dict[str, Renaming]
) -> dict[str, Place]:
    """Every name of a foreign state dict, and the place of its tensor in ours.

    names: those of our state dict. Both formats store a head that layers share, or that the decoder
    uses too, under several names.
    """
    table: dict[str, Place] = {}
    for name in names:
        # they keep the first stage's heads behind the decoder's
        shared = re.sub(r"^first_stage\.(\w+_head)\.", rf"\1s.{config.decoder_layers}.", name)
        for theirs, part in _foreign(shared, layout):
            for alias in _aliases(theirs, config, layout):
                table[alias] = (name, part)
    return table


def _foreign(name: str, layout: dict[str, Renaming]) -> list[Place]:
    layer = re.fullmatch(r"(encoder|decoder)\.(layers\.\d+)\.(.+)", name)
    if not layer:
        return [(_replace_start(name, layout[""]), None)]
    kind, index, rest = layer.groups()
    prefix = _replace_start(f"{kind}.{index}.", layout[""])
    theirs = prefix + _replace_start(rest, layout[kind])
    if layout is HUGGINGFACE and "in_proj_" in theirs:  # three projections, not one of thrice rows
        return [(theirs.replace("in_proj_", f"{x}_proj."), i) for i, x in enumerate("qkv")]
    return [(theirs, None)]


def _aliases(name: str, config: DeformableDETRConfig, layout: dict[str, Renaming]) -> list[str]:
    head = re.fullmatch(r"(class_embed|bbox_embed)\.\d+\.(.+)", name)
    if not head:
        return [name]
    kind, rest = head.groups()
    if not config.refine:
        return [f"{kind}.{layer}.{rest}" for layer in range(config.decoder_layers)]
    decoder_has_it = config.two_stage or kind == "bbox_embed"
    return [name, _replace_start(f"decoder.{name}", layout[""])] if decoder_has_it else [name]


def _replace_start(name: str, table: Renaming) -> str:
    ours, theirs = next(pair for pair in table if name.startswith(pair[0]))
    return theirs + name[len(ours) :]


def file_name(name: str) -> str:
    """The name in Hugging Face's files of a tensor that a model in memory calls `name`."""
    for pattern, replacement in IN_MEMORY:
        name = re.sub(pattern, replacement, name)
    return name


# State dicts, out and in


def to_official(model: DeformableDETR) -> State:
    """The official code's state dict, which its strict `load_state_dict` takes.

    The tensors are the model's own, not copies. ValueError where the official code has no such
    model: another backbone than a plain ResNet, other anchors.
    """
    if model.config.num_levels == 2:
        raise ValueError("a model of 2 levels cannot be exported: the official code has none")
    return _to_foreign(model, OFFICIAL)


def to_huggingface(
    model: DeformableDETR, categories: list[dict] | None = None
) -> tuple[State, dict]:
    """What Hugging Face's save_pretrained would write: the state dict and the content of
    config.json. ValueError where transformers has no such model."""
    config = model.config
    state = _to_foreign(model, HUGGINGFACE)
    names = {i: c["name"] for i, c in enumerate(categories or plain_categories(config.num_classes))}
    backbone = {
        "model_type": "timm_backbone",
        "backbone": config.backbone,
        "features_only": True,
        "use_pretrained_backbone": False,
        "out_indices": list(range(max(2, 5 - config.num_levels), 5)),  # the last maps
        **({"output_stride": 16} if config.dilation else {}),
    }
    content = {
        "model_type": "deformable_detr",
        "architectures": ["DeformableDetrForObjectDetection"],
        "backbone_config": backbone,
        "id2label": names,
        "label2id": {name: i for i, name in names.items()},
        "two_stage_num_proposals": config.num_queries,
        "auxiliary_loss": True,
        "tie_word_embeddings": not config.refine,
        **{theirs: getattr(config, ours) for theirs, ours in HUGGINGFACE_CONFIG.items()},
    }
    return state, content


def _to_foreign(model: DeformableDETR, layout: dict[str, Renaming]) -> State:
    config, ours = model.config, model.state_dict()
    if config.backbone not in RESNETS:
        raise ValueError(f"backbone {config.backbone!r} exists only here: it cannot be exported")
    constants = {"deformable_stages": True, "anchor_size": config.two_stage}
    constants["position_size"] = config.position == "learned"
    for name in (name for name, counts in constants.items() if counts):
        value, only = getattr(config, name), getattr(DeformableDETRConfig, name)
        if value != only:
            raise ValueError(f"{name} must be {only} to be exported, as it is there, got {value}")
    return {
        theirs: ours[name] if part is None else ours[name].chunk(3)[part]
        for theirs, (name, part) in foreign_names(ours, config, layout).items()
    }


def to_ours(state: State, expected: State, table: dict[str, Place], source: object) -> State:
    """A state dict under our names, in float32, every tensor accounted for.

    expected: our state dict, for its shapes. table: of `foreign_names`. source: what the error
    names. Raises ValueError on a tensor that is missing, left over, of another shape, or that
    differs between two names that stand for one.
    """
    found: dict[Place, Tensor] = {}
    for theirs, place in table.items():
        if theirs not in state:
            continue
        tensor, shape = state[theirs], list(expected[place[0]].shape)
        if place[1] is not None:
            shape[0] //= 3
        if list(tensor.shape) != shape:
            given = f"{tuple(tensor.shape)}, expected {tuple(shape)}"
            raise ValueError(f"{source}: tensor {theirs} has shape {given}")
        first = found.setdefault(place, tensor)
        if first is not tensor and not torch.equal(first, tensor):
            raise ValueError(f"{source}: {theirs} differs from another name of the same tensor")
    first_names = {place: theirs for theirs, place in reversed(table.items())}
    missing = sorted(theirs for place, theirs in first_names.items() if place not in found)
    for problem, names in (("lacks", missing), ("has left over", sorted(state.keys() - table))):
        if names:
            raise ValueError(f"{source} {problem} {len(names)} tensors, such as {names[0]}")
    parts: dict[str, list[Tensor]] = {}
    for (name, _), tensor in found.items():  # in the order of q, k, v
        parts.setdefault(name, []).append(tensor.detach().float())
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def plain_categories(num_classes: int) -> list[dict]:
    """Categories for labels whose names are not known: COCO's where there are 91, else numbers."""
    names = [f"class {i}" for i in range(num_classes)]
    if num_classes == DeformableDETRConfig.num_classes:
        names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return [{"id": i, "name": name} for i, name in enumerate(names)]


# Configurations

HUGGINGFACE_CONFIG = {  # theirs: ours; both have the same defaults
    "d_model": "embed_dim",
    "num_queries": "num_queries",
    "num_feature_levels": "num_levels",
    "encoder_attention_heads": "num_heads",
    "decoder_attention_heads": "num_heads",
    "encoder_n_points": "num_points",
    "decoder_n_points": "num_points",
    "encoder_layers": "encoder_layers",
    "decoder_layers": "decoder_layers",
    "encoder_ffn_dim": "ffn_dim",
    "decoder_ffn_dim": "ffn_dim",
    "dropout": "dropout",
    "position_embedding_type": "position",
    "dilation": "dilation",
    "with_box_refine": "refine",
    "two_stage": "two_stage",
}
OFFICIAL_ARGUMENTS = {
    "backbone": "backbone",
    "dilation": "dilation",
    "num_queries": "num_queries",
    "hidden_dim": "embed_dim",
    "num_feature_levels": "num_levels",
    "nheads": "num_heads",
    "enc_n_points": "num_points",
    "dec_n_points": "num_points",
    "enc_layers": "encoder_layers",
    "dec_layers": "decoder_layers",
    "dim_feedforward": "ffn_dim",
    "dropout": "dropout",
    "position_embedding": "position",
    "with_box_refine": "refine",
    "two_stage": "two_stage",
}


def official_arguments(config: DeformableDETRConfig) -> dict:
    """The options of the official code's command line that make this model."""
    return {theirs: getattr(config, ours) for theirs, ours in OFFICIAL_ARGUMENTS.items()}


def _fields(content: Mapping, names: dict[str, str]) -> dict:
    """Our fields from theirs; ValueError where two of theirs, one of ours, differ."""
    fields = {}
    for theirs, ours in names.items():
        value = content.get(theirs, getattr(DeformableDETRConfig, ours))
        if fields.setdefault(ours, value) != value:
            raise ValueError(f"it has {ours} {fields[ours]!r} and, as {theirs}, {value!r}")
    return fields


def huggingface_config(content: dict) -> DeformableDETRConfig:
    """Ours from the content of a config.json; ValueError where it is of another model."""
    if content.get("model_type") != "deformable_detr":
        raise ValueError(f"its model_type is {content.get('model_type')!r}, not 'deformable_detr'")
    fields = _fields(content, HUGGINGFACE_CONFIG)
    backbone = content.get("backbone_config") or {
        "model_type": "timm_backbone" if content.get("use_timm_backbone", True) else "resnet",
        "backbone": content.get("backbone") or "resnet50",
    }
    if backbone.get("model_type") != "timm_backbone":
        raise ValueError(
            f"its backbone is transformers' own {backbone.get('model_type')!r}; only timm's "
            "ResNets, which the published weights have, are read"
        )
    if backbone.get("output_stride") == 16:
        fields["dilation"] = True
    if fields["two_stage"]:
        fields["num_queries"] = content.get("two_stage_num_proposals", fields["num_queries"])
    classes = len(content.get("id2label", (0, 1)))  # two is the default of transformers
    name = backbone["backbone"].split(".")[0]  # without timm's tag of the weights
    return DeformableDETRConfig(backbone=name, num_classes=classes, **fields)


def official_config(state: State, arguments: Mapping) -> DeformableDETRConfig:
    """Ours from the tensors, and from the arguments kept beside them for what those do not show.

    Raises KeyError with the first tensor that is not there, ValueError on a strange backbone.
    """

    def count(pattern: str) -> int:
        return len({m[0] for name in state if (m := re.match(pattern, name))})

    levels, width = state["transformer.level_embed"].shape
    layer = "transformer.encoder.layers.0."
    samples = len(state[layer + "self_attn.attention_weights.bias"])  # M * L * K
    seen = {
        "embed_dim": width,
        "num_levels": levels,
        "ffn_dim": len(state[layer + "linear1.bias"]),
        "encoder_layers": count(r"transformer\.encoder\.layers\.\d+\."),
        "decoder_layers": count(r"transformer\.decoder\.layers\.\d+\."),
        "position": "learned" if "backbone.1.row_embed.weight" in state else "sine",
        "refine": count(r"transformer\.decoder\.bbox_embed\.\d+\.") > 0,
        "two_stage": "transformer.enc_output.weight" in state,
    }
    fields = _fields(arguments, OFFICIAL_ARGUMENTS) | seen
    fields["num_points"] = samples // (levels * fields["num_heads"])
    if "query_embed.weight" in state:
        fields["num_queries"] = len(state["query_embed.weight"])
    if "backbone" not in arguments:
        fields["backbone"] = _recognise_backbone(state)
    return DeformableDETRConfig(num_classes=len(state["class_embed.0.bias"]), **fields)


def _recognise_backbone(state: State) -> str:
    shapes = {
        n.removeprefix("backbone.0."): tensor.shape
        for n, tensor in state.items()
        if n.startswith("backbone.0.")
    }
    for name in RESNETS:
        with torch.device("meta"):
            candidate = build_backbone(name).state_dict()
        if {n: tensor.shape for n, tensor in candidate.items()} == shapes:
            return name
    raise ValueError("its backbone is none of torchvision's ResNets")
