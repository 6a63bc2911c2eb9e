"""Which backend runs the operator: the one that is asked for, or else the best that works here.

Asked for by the call's argument, by `use_backend` around it, or by the environment variable
DEFORMABLE_DETR_BACKEND, in this order. Chapter making_it_fast compares the backends.
"""

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import ParamSpec, TypeVar

import torch

from deformable_detr.ops import cpu, cuda
from deformable_detr.ops.errors import BackendError
from deformable_detr.ops.transforms import is_transformed, refuse_transform

P, R = ParamSpec("P"), TypeVar("R")
KERNELS = {"cuda": cuda, "cpu": cpu}  # by the tensors' device
BACKENDS = ("cuda", "cpu", "reference", "gather")
VARIABLE = "DEFORMABLE_DETR_BACKEND"


def backends() -> dict[str, str]:
    """Each backend's name with "available", or with what it lacks here."""
    reasons = {name: module.why_not() for name, module in KERNELS.items()}
    return {name: reasons.get(name) or "available" for name in BACKENDS}


# Asking for one.


class _Traced(threading.local):
    """The name in _block, where torch.compile can read it and notice when it changes: it cannot
    trace context variables before torch 2.14."""

    def __init__(self) -> None:  # in every thread; an attribute of the class would not be noticed
        self.name: str | None = None


_block: ContextVar[str | None] = ContextVar("deformable_detr_backend", default=None)
_traced = _Traced()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend of every `ms_deform_attn` inside the block, of a whole model for example:

        with use_backend("gather"):
            output = model(batch)

    name: as the operator's argument `backend`, which is stronger than the block; the block is
        stronger than the environment variable. Blocks nest. It holds in this thread and context
        (contextvars) alone: threads that are started inside do not inherit it.
    Backward passes use what the forward pass used, wherever they run. Gradient checkpointing, which
    runs the forward pass again, does so for the layers of this library; other code passes it
    `ops.keep_backend(function)` for the function.
    torch.compile traces what the block names: a function that was compiled outside is compiled
    again when it is called inside, and each then runs its own. Enter the block around a compiled
    function, not in it, where it breaks the graph, which fullgraph=True refuses.
    torch.onnx.export writes "gather" as gathers and "reference" as GridSample.
    On entering, raises ValueError where there is no such backend, and BackendError where it cannot
    run here; the operator raises BackendError where it cannot run on its tensors.
    """
    _check_name(name, "use_backend")
    with _in_block(name):
        yield


def keep_backend(function: Callable[P, R]) -> Callable[P, R]:
    """`function` with the backend that `use_backend` names now, wherever it is called: for gradient
    checkpointing, which calls it again after the block, on a GPU in a thread of its own."""
    if torch.compiler.is_compiling():  # which traces both calls at once
        return function
    name = _block.get()

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with _in_block(name):
            return function(*args, **kwargs)

    return run


@contextmanager
def _in_block(name: str | None) -> Iterator[None]:
    token = _block.set(name)
    _traced.name = name
    try:
        yield
    finally:
        _block.reset(token)
        _traced.name = _block.get()


def name_of_block() -> str | None:
    """The name that `use_backend` gives here, None outside of its blocks."""
    return _traced.name if torch.compiler.is_compiling() else _block.get()


def asked(backend: str | None, block: str | None, device: str) -> tuple[str, str] | None:
    """The name that is asked for, and by what; None where nothing asks.

    On the meta device, where shapes are all that there is, only the argument counts.
    """
    if backend:
        return backend, "backend"
    if block and device != "meta":
        return block, "use_backend"
    variable = os.environ.get(VARIABLE)
    return (variable, VARIABLE) if variable and device != "meta" else None


# Choosing.


def choose(backend: str | None, block: str | None, device: str) -> str:
    """The backend for tensors on this device; backend: the argument, block: `name_of_block()`."""
    forced = asked(backend, block, device)
    if forced:
        return _forced(*forced, device)
    if is_transformed():
        return "gather"
    if device == "meta" or torch.onnx.is_in_onnx_export():
        return "reference"
    reason = KERNELS[device].why_not() if device in KERNELS else f"no kernel for {device}"
    if reason:
        _say_once(f"ms_deform_attn runs in plain PyTorch, which is slow: {reason}")
        return "reference"
    return device


# what torch.compiler.assume_constant_result sets, without the two seconds that importing it takes
choose._dynamo_marked_constant = True


def _forced(name: str, origin: str, device: str) -> str:
    """This backend, or an error where it cannot run: never another in its place."""
    if name in KERNELS and device != name:
        raise BackendError(f"{origin} {name!r} needs tensors on {name}, got {device}")
    _check_name(name, origin)
    if name in KERNELS and is_transformed():
        refuse_transform(name, origin)
    return name


def _check_name(name: str, origin: str) -> None:
    """ValueError where there is no such backend, BackendError where it does not work here."""
    if name not in BACKENDS:
        raise ValueError(f"{origin} must be one of {', '.join(BACKENDS)}, got {name!r}")
    reason = KERNELS[name].why_not() if name in KERNELS else None
    if reason:
        raise BackendError(f"{origin} {name!r} is not available: {reason}")


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)
