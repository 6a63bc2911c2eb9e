"""Where dense attention looked: every query's weight for every key, by module. Chapter looking."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps

import torch
from torch import Tensor, nn

from deformable_detr.evaluation_mode import evaluating
from deformable_detr.layers.dense_attention import DenseAttention
from deformable_detr.look.sampling import replaced
from deformable_detr.structures import Queries, Tokens


@dataclass
class Attention:
    """How much each query of a dense attention module looked at each key, before dropout.

    weights: (B, M, Q, S), non-negative, summing to one over the keys. spatial_shapes: where the
    keys are tokens, the sizes (H, W) of their maps; None where they are queries.
    """

    weights: Tensor
    spatial_shapes: list[tuple[int, int]] | None = None


@contextmanager
def record_attention(model: nn.Module) -> Iterator[dict[str, Attention]]:
    """While open, a forward pass leaves the weights of the model's dense attention, by name.

    with record_attention(model) as record:
        model(batch)
    record["encoder.layers.5.attention"].weights  # (B, M, S, S)
    record["decoder.layers.5.cross_attention"].weights  # (B, M, Q, S)

    For every nn.MultiheadAttention. They run as always, without weights; those are computed beside,
    and of two calls of a module the last counts. A part of a model, such as its last layer, will do
    and needs less memory. ValueError where there is no dense attention.
    """
    record: dict[str, Attention] = {}
    dense = {n: m for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    if not dense:
        raise ValueError(f"no module of {type(model).__name__} is dense attention")
    with ExitStack() as undo:
        for name, module in dense.items():
            hook = module.register_forward_hook(_weighing(name, record), with_kwargs=True)
            undo.callback(hook.remove)
            if isinstance(module, DenseAttention):
                attend = _with_shapes(module.attend, name, record)
                undo.enter_context(replaced(module, "attend", attend))
        yield record


def _weighing(name: str, record: dict[str, Attention]) -> Callable:
    """A hook that computes the weights of a call that has just been made without them."""

    def hook(module: nn.MultiheadAttention, args: tuple, kwargs: dict, _: object) -> None:
        arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        arguments |= {"need_weights": True, "average_attn_weights": False}
        with torch.no_grad(), evaluating(module):
            _, weights = module.forward(**arguments)
        record[name] = Attention(weights)

    return hook


def _with_shapes(attend: Callable, name: str, record: dict[str, Attention]) -> Callable:
    """`DenseAttention.attend`, after which the record knows of which maps the tokens were."""

    @wraps(attend)
    def call(queries: Queries, memory: Tokens) -> Tensor:
        update = attend(queries, memory)
        record[name].spatial_shapes = memory.spatial_shapes
        return update

    return call
