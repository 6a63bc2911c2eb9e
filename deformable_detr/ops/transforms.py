"""torch.func's transforms and forward-mode derivatives, which plain operations have and the kernels
have not. Chapter many_scales says what the operator does then."""

from typing import NoReturn

import torch
from torch import Tensor

from deformable_detr.ops.errors import BackendError


def is_transformed() -> bool:
    """Whether one of torch.func's transforms is at work."""
    functorch = torch._C._functorch
    stack = functorch.get_interpreter_stack() or ()
    return any(level.key() != functorch.TransformType.Functionalize for level in stack)


def has_tangent(*tensors: Tensor) -> bool:
    """Whether a forward-mode derivative of one of these is under way."""
    forward_ad = torch.autograd.forward_ad
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def refuse_transform(name: str, origin: str = "backend") -> NoReturn:
    """BackendError for this kernel, which `origin` asked for."""
    raise BackendError(
        f"{origin} {name!r} has neither forward-mode derivatives nor torch.func's transforms; "
        "'gather' has"
    )
