"""DAT's weights as its authors published them (v1): their names, ours, and the way between them.

Chapter published_weights reads such tables; what the model is, the chapter on DAT says.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from deformable_detr.backbones.dat import CONFIGS, DAT, DATBackbone, DATConfig, Patches
from deformable_detr.layers.dat_attention import DAttention
from deformable_detr.layers.window_attention import WindowAttention
from deformable_detr.weights.reading import (
    State,
    read_pickle,
    read_safetensors,
    shown,
    tensors_of,
    unwrapped,
)
from deformable_detr.weights.renaming import replace_start, require_same, to_ours

WHOLE = [  # (ours, theirs)
    ("body.stem.linear.", "patch_proj.0."),
    ("body.stem.norm.", "patch_proj.1.norm."),
    ("norm.", "cls_norm.norm."),
    ("head.", "cls_head."),
]
BLOCK = [  # {i}: the block's number; {n} and {m}: 2 i and 2 i + 1
    ("norm1.", "layer_norms.{n}.norm."),
    ("norm2.", "layer_norms.{m}.norm."),
    ("linear1.", "mlps.{i}.chunk.linear1."),
    ("linear2.", "mlps.{i}.chunk.linear2."),
    ("attention.qkv.", "attns.{i}.proj_qkv."),
    ("attention.bias_table", "attns.{i}.relative_position_bias_table"),
    ("attention.query.", "attns.{i}.proj_q."),
    ("attention.key.", "attns.{i}.proj_k."),
    ("attention.value.", "attns.{i}.proj_v."),
    ("attention.out.", "attns.{i}.proj_out."),
    ("attention.bias.table", "attns.{i}.rpe_table"),
    ("attention.places.convolution.", "attns.{i}.conv_offset.0."),
    ("attention.places.norm.", "attns.{i}.conv_offset.1.norm."),
    ("attention.places.linear.", "attns.{i}.conv_offset.3."),
]
DOWN = [("linear.", "0."), ("norm.", "1.norm.")]
STRANGERS = [  # a part of a name that other checkpoints have, and whose they are
    ("local_perception_units.", "DAT++, the authors' second model"),
    ("patch_proj.3.", "DAT++, the authors' second model"),
    (".attn.relative_position_bias_table", "Swin"),  # its authors', timm's, torchvision's
    (".w_msa.relative_position_bias_table", "Swin"),  # OpenMMLab's
    (".attention.self.relative_position_bias_table", "Swin"),  # transformers'
    ("blocks.0.attention.relative_position_bias.", "Swin"),
    (".cpb_mlp.", "Swin V2"),
    (".continuous_position_bias_mlp.", "Swin V2"),
]


def load_dat(path: Path | str, config: DATConfig | None = None) -> DAT:
    """The classifier in a file of the authors' v1, in evaluation mode.

    config: of the model, where it is none of CONFIGS, which are told apart by their shapes. Strict:
    ValueError, in one line, names a tensor that is missing, left over or of another shape, and says
    what a file of DAT++ or Swin is. Nothing in the file is executed.
    """
    state = _read(path)
    model = DAT(config or _recognise(state, path), _length(state, "cls_head.bias"))
    model.load_state_dict(_to_ours(state, model, path))
    return model.eval()


def load_backbone(backbone: DATBackbone, path: Path | str) -> None:
    """Have a detector's backbone start from a file of the authors' v1:
    `load_backbone(model.backbone, "dat_tiny.pth")`.

    The classifier's head is left out. The norms of the maps stay as they are: a classifier does not
    have them. ValueError as in `load_dat`.
    """
    state = _read(path)
    with torch.device("meta"):
        model = DAT(backbone.config, _length(state, "cls_head.bias"))
    found = _to_ours(state, model, path)
    start = "body."
    body = {name.removeprefix(start): x for name, x in found.items() if name.startswith(start)}
    backbone.body.load_state_dict(body)


def to_authors(model: DAT) -> State:
    """The state dict under the authors' names, with their constants, as their v1 model loads it."""
    learned = {their_name(name): tensor for name, tensor in _as_theirs(model).items()}
    return learned | _constants(model)


def their_name(name: str) -> str:
    """The authors' name of one of our tensors."""
    place = re.fullmatch(r"body\.stage(\d)\.(down|blocks\.(\d+))\.(.+)", name)
    if not place:
        return replace_start(name, WHOLE)
    stage, part, number, rest = place.groups()
    if part == "down":
        return f"down_projs.{int(stage) - 2}.{replace_start(rest, DOWN)}"
    i = int(number)
    theirs = replace_start(rest, BLOCK).format(i=i, n=2 * i, m=2 * i + 1)
    return f"stages.{int(stage) - 1}.{theirs}"


def _convolutions(model: DAT) -> dict[str, int]:
    """The weights of linear layers here that are of convolutions there, and their kernels' side."""
    sides = {}
    for name, module in model.named_modules():
        if isinstance(module, Patches):
            sides[f"{name}.linear.weight"] = module.side
        elif isinstance(module, DAttention):
            layers = "query", "key", "value", "out", "places.linear"
            sides |= {f"{name}.{layer}.weight": 1 for layer in layers}
    return sides


def _as_theirs(model: DAT) -> State:
    """The state dict under our names, in their shapes."""
    state = dict(model.state_dict())
    for name, side in _convolutions(model).items():
        kernel = state[name].unflatten(1, (side, side, -1))  # (C_out, rows, columns, C_in)
        state[name] = kernel.permute(0, 3, 1, 2)
    return state


def _constants(model: DAT) -> State:
    """What the authors' model stores beside what it learns: indices and masks of its windows."""
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, WindowAttention):
            continue
        w = module.window_size
        place = torch.cartesian_prod(torch.arange(w), torch.arange(w))
        row, column = (place[:, None] - place + w - 1).unbind(-1)
        start = their_name(name + ".bias_table").removesuffix("bias_table")
        found[start + "index"] = row * (2 * w - 1) + column
        if module.shift:
            stage = int(name.split(".")[1].removeprefix("stage"))
            side = model.config.image_size // 2 ** (stage + 1)
            allowed = module.allowed(side, side, torch.device("cpu"))
            mask = torch.where(allowed, 0.0, -100.0)
            found[start.removesuffix("relative_position_") + "attn_mask"] = mask
    return found


def _to_ours(state: State, model: DAT, path: Path | str) -> State:
    """The authors' tensors under our names, strictly."""
    constants = _constants(model)
    require_same(constants.keys() - state.keys(), (), path)
    for name, expected in constants.items():
        if not torch.equal(state[name], expected.to(state[name].dtype)):
            raise ValueError(f"{path}: {name} is not what windows of this model have")
    state = {name: tensor for name, tensor in state.items() if name not in constants}
    table = {their_name(name): (name, None) for name in model.state_dict()}
    found = to_ours(state, _as_theirs(model), table, path)
    for name in _convolutions(model):
        found[name] = found[name].permute(0, 2, 3, 1).flatten(1)
    return found


def _read(path: Path | str) -> State:
    """The tensors in a file; ValueError where they are of another model."""
    if Path(path).suffix == ".safetensors":
        state = unwrapped(read_safetensors(path)[0])
    else:
        content = read_pickle(path)
        key = next((key for key in ("model", "state_dict") if key in content), None)
        tensors = content if key is None else content[key]
        if not isinstance(tensors, Mapping):
            raise ValueError(f"{path}: {key!r} must be a dict of tensors")
        state = tensors_of(tensors, path)
    for part, model in STRANGERS:
        if any(part in name for name in state):
            raise ValueError(f"{path} is a checkpoint of {model}; only DAT's first version is read")
    if not {"patch_proj.0.weight", "stages.0.layer_norms.0.norm.weight"} <= state.keys():
        starts = ", ".join(sorted({shown(name.split(".")[0]) for name in state})[:6])
        raise ValueError(f"{path} is no checkpoint of DAT: its tensors are called {starts}...")
    return state


def _recognise(state: State, path: Path | str) -> DATConfig:
    """The one of CONFIGS that a file is of."""
    table = "stages.0.attns.0.relative_position_bias_table"
    width, cells = _length(state, "patch_proj.0.bias"), _length(state, table)
    third = re.compile(r"stages\.2\.mlps\.\d+\.chunk\.linear1\.bias")
    depth = sum(third.fullmatch(name) is not None for name in state)
    for config in CONFIGS.values():
        sizes = config.embed_dim, len(config.blocks[2]), (2 * config.window - 1) ** 2
        if sizes == (width, depth, cells):
            return config
    found = f"its width is {width}, with {depth} blocks in stage 3 and {cells} cells for windows"
    raise ValueError(f"{path} is none of {', '.join(CONFIGS)}: {found}")


def _length(state: State, name: str) -> int:
    """The rows of a tensor, 0 where there is none."""
    return (*state[name].shape, 0)[0] if name in state else 0
