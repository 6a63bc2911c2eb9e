"""Our operator in other people's models.

Hugging Face transformers: `use_in_transformers(model)`.
Code that imports the official extension: `install_official_names()`, before it does.
Each project's few lines are in book/recipes.md.
Modules of mmcv and of the official code have the parameter names of `MSDeformAttn`, so that
`MSDeformAttn(C, L, M, K).load_state_dict(theirs.state_dict())` takes their weights. mmcv's module
also adds the query's position before, and dropout and the identity after: that is the caller's.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.machinery import ModuleSpec
from itertools import accumulate
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor, nn

from deformable_detr.ops import SpatialShapes, check_spatial_shapes, ms_deform_attn
from deformable_detr.ops.sizes import Shapes, are_known
from deformable_detr.ops.uneven import even_points

OFFICIAL_NAME = "MultiScaleDeformableAttention"


# Hugging Face transformers, from 5.0


class Replacement:
    """What `use_in_transformers` replaced: `count` places; `undo()` puts the old things back; a
    function that several calls share, when the last of them is undone.

    Also a context manager, which does so at the end of the block.
    """

    # of every function that is replaced now: how many share it, and the old one
    _users: ClassVar[Counter[tuple[ModuleType, str]]] = Counter()
    _old: ClassVar[dict[tuple[ModuleType, str], object]] = {}

    def __init__(self) -> None:
        self._before: list[tuple[object, str, object]] = []
        self._functions: set[tuple[ModuleType, str]] = set()

    @property
    def count(self) -> int:
        """The number of modules and functions that are replaced now."""
        return len(self._before) + len(self._functions)

    def replace(self, owner: object, name: str, new: object) -> None:
        """Set an attribute, and remember the owner's own one, if it had any."""
        self._before.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, new)

    def replace_function(self, file: ModuleType, name: str, new: object) -> None:
        """Set a function of a file, unless it is set already."""
        function = file, name
        if function in self._functions:
            return
        if not self._users[function]:
            self._old[function] = getattr(file, name)
            setattr(file, name, new)
        self._users[function] += 1
        self._functions.add(function)

    def undo(self) -> None:
        """Put everything back as it was; a second call does nothing."""
        while self._functions:
            function = self._functions.pop()
            self._users[function] -= 1
            if not self._users[function]:
                setattr(*function, self._old.pop(function))
        while self._before:
            owner, name, old = self._before.pop()
            if old is None:
                delattr(owner, name)
            else:
                setattr(owner, name, old)

    def __enter__(self) -> Replacement:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


def use_in_transformers(model: nn.Module) -> Replacement:
    """Have a model of Hugging Face transformers run our operator: `use_in_transformers(model)`.

    For every model there that has multi-scale deformable attention: Deformable DETR, Grounding
    DINO, MM Grounding DINO, OmDet-Turbo, RT-DETR, RT-DETRv2, D-FINE, DEIMv2, LW-DETR, RF-DETR,
    PP-DocLayout, Mask2Former and OneFormer. Weights and results stay as they are. Returns what was
    replaced, whose `undo()` takes it back. Mask2Former, OneFormer and RT-DETRv2 call a function of
    their file, so there the function is replaced, for all models of that kind in this process.
    Raises ValueError where the model has nothing to replace, and where it samples by the
    "discrete" method (RT-DETRv2, D-FINE, DEIMv2), which is another operator.
    """
    modules = [m for m in model.modules() if _attention(m)]
    for module in modules:
        method = getattr(module, "method", getattr(module, "decoder_method", "default"))
        if method != "default":
            raise ValueError(
                f"{type(module).__name__} samples by the {method!r} method, but ours is the "
                "'default' one, bilinear"
            )
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no multi-scale deformable attention of transformers"
        )
    done = Replacement()
    try:
        for module in modules:
            _replace(module, done)
    except ValueError:
        done.undo()
        raise
    return done


def _attention(module: nn.Module) -> type | None:
    """The class of transformers' that the module is of, itself or by inheritance."""
    for kind in type(module).__mro__:
        in_transformers = kind.__module__.startswith("transformers.models.")
        if in_transformers and kind.__name__.endswith("MultiscaleDeformableAttention"):
            return kind
    return None


def _replace(module: nn.Module, done: Replacement) -> None:
    """Ours for the part of one attention module that samples, unless it is there already."""
    file = sys.modules[_attention(module).__module__]
    if isinstance(getattr(module, "attn", None), nn.Module):  # a submodule without parameters
        if vars(module.attn).get("forward") is not _module_forward:
            done.replace(module.attn, "forward", _module_forward)
    elif hasattr(module, "ms_deformable_attn_core"):
        if module.ms_deformable_attn_core is not ms_deform_attn_uneven:
            done.replace(module, "ms_deformable_attn_core", ms_deform_attn_uneven)
    elif hasattr(file, "multi_scale_deformable_attention_v2"):
        name = "multi_scale_deformable_attention_v2"
        done.replace_function(file, name, _or_discrete(getattr(file, name)))
    elif hasattr(file, "multi_scale_deformable_attention"):
        name = "multi_scale_deformable_attention"
        done.replace_function(file, name, ms_deform_attn)
    else:
        raise ValueError(
            f"{type(module).__name__} is not laid out as in transformers 5, so nothing was replaced"
        )


def _module_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_spatial_shapes_list: list[tuple[int, int]],
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """The forward of transformers' MultiScaleDeformableAttention modules."""
    return ms_deform_attn(value, value_spatial_shapes_list, sampling_locations, attention_weights)


def ms_deform_attn_uneven(
    value: Tensor,
    value_spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: Sequence[int],
    method: str = "default",
) -> Tensor:
    """`ms_deform_attn` with K_l points on level l: RT-DETRv2's function, and transformers'
    multi_scale_deformable_attention_v2.

    value, value_spatial_shapes: as in `ms_deform_attn`. sampling_locations: (B, Q, M, sum(K_l), 2).
    attention_weights: (B, Q, M, sum(K_l)). num_points_list: the L numbers K_l. Levels with fewer
    points than others get points of weight zero outside the map. Returns (B, Q, M * D). Raises
    ValueError where the method is not "default", bilinear.
    """
    if method != "default":
        raise ValueError(f"method must be 'default', got {method!r}")
    points = even_points(sampling_locations, attention_weights, num_points_list)
    return ms_deform_attn(value, value_spatial_shapes, *points)


def _or_discrete(old: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Our form of a file's function, which leaves that file's discrete models to the old one."""

    @wraps(old)  # whose arguments' names record_sampling reads
    def ours_or_old(
        value: Tensor,
        shapes: SpatialShapes,
        locations: Tensor,
        weights: Tensor,
        num_points_list: Sequence[int],
        method: str = "default",
    ) -> Tensor:
        run = ms_deform_attn_uneven if method == "default" else old
        return run(value, shapes, locations, weights, num_points_list, method)

    return ours_or_old


# The official extension and the function around it


def install_official_names(name: str = OFFICIAL_NAME) -> ModuleType:
    """After this, `import MultiScaleDeformableAttention as MSDA` gives our operator.

    The module has the official extension's two functions, `ms_deform_attn_forward` and
    `ms_deform_attn_backward`, so that code written for it runs unchanged and unbuilt, on CPU too.
    name: where that code looks for them: "detrex._C", "groundingdino._C". Call it once, before that
    code is imported. Raises RuntimeError where the extension itself has been imported already.
    """
    module = sys.modules.get(name)
    if module is None:
        module = ModuleType(name, "The official extension's names on deformable_detr.")
        module.__spec__ = ModuleSpec(name, None)  # find_spec looks for it
        module.ms_deform_attn_forward = ms_deform_attn_forward
        module.ms_deform_attn_backward = ms_deform_attn_backward
        sys.modules[name] = module
    elif getattr(module, "ms_deform_attn_forward", None) is not ms_deform_attn_forward:
        raise RuntimeError(f"another {name} has been imported before ours")
    return module


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    im2col_step: int,
) -> Tensor:
    """The official extension's forward; arguments as in `ms_deform_attn`.

    level_start_index: (L,), where each level starts in value: nothing but the running sum of H_l *
    W_l is accepted, ValueError otherwise; a traced program, whose numbers come later, ignores it.
    im2col_step: of any value, and without effect. Returns (B, Q, M * D).
    """
    shapes = _checked_levels(spatial_shapes, level_start_index)
    return ms_deform_attn(value, shapes, sampling_loc, attn_weight)


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    grad_output: Tensor,
    im2col_step: int,
) -> list[Tensor]:
    """The official extension's backward: the gradients of value, sampling_loc and attn_weight.

    grad_output: (B, Q, M * D). It runs the forward once more, which `MSDeformAttnFunction` spares.
    """
    shapes = _checked_levels(spatial_shapes, level_start_index)
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (value, sampling_loc, attn_weight)]
        output = ms_deform_attn(inputs[0], shapes, *inputs[1:])
    return list(torch.autograd.grad(output, inputs, grad_output))


def _checked_levels(spatial_shapes: Tensor, level_start_index: Tensor) -> Shapes:
    shapes = check_spatial_shapes(spatial_shapes)
    if not are_known(shapes):  # a traced program reads them when it runs
        return shapes
    starts = list(accumulate((h * w for h, w in shapes[:-1]), initial=0))
    if level_start_index.tolist() != starts:
        raise ValueError(
            f"level_start_index must be {starts} for spatial_shapes {shapes}, "
            f"got {level_start_index.tolist()}"
        )
    return shapes


class MSDeformAttnFunction:
    """The official code's autograd function, to be imported in its place.

    Only `apply` is there: gradients, second ones too, come from our operator's own.
    """

    apply = staticmethod(ms_deform_attn_forward)
