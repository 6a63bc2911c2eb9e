"""Where attention looked: what every module that samples used, recorded by name.
Chapter looking."""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps

from torch import Tensor, nn

from deformable_detr.layers.attention import MSDeformAttn, Sampling
from deformable_detr.ops import check_spatial_shapes
from deformable_detr.ops.uneven import even_points

LOCATIONS = "sampling_locations"  # what everyone who samples calls them


class SamplingRecord(dict[str, Sampling]):
    """The Sampling of each module, by its name in the model, in the order of the forward pass.

    The last call of a module counts: after two forward passes the record is that of the second. So
    what gradient checkpointing computes again, in the backward pass, stands here once.
    """

    @property
    def encoder(self) -> list[Sampling]:
        """Those with the part "encoder" in their names, first layer to last."""
        return [sampling for name, sampling in self.items() if "encoder" in name.split(".")]

    @property
    def decoder(self) -> list[Sampling]:
        """Those with the part "decoder" in their names, first layer to last."""
        return [sampling for name, sampling in self.items() if "decoder" in name.split(".")]


@contextmanager
def record_sampling(model: nn.Module) -> Iterator[SamplingRecord]:
    """While open, a forward pass leaves in the record where the model's attention looked.

    with record_sampling(model) as record:
        model(batch)
    record["decoder.layers.5.cross_attention"].locations  # (B, Q, M, L, K, 2)
    record.decoder[-1].locations  # the same

    For every MSDeformAttn, and for the modules of Hugging Face transformers and others that hand
    their sampling_locations and attention_weights to a function or a submodule. Nothing is computed
    for it: what a module used is kept, detached. ValueError where nothing in the model samples.
    """
    record, running = SamplingRecord(), []  # the names of modules that sample, the innermost last
    samplers = set()
    with ExitStack() as undo:
        for name, module in model.named_modules():
            if sampler := _sampler(module):
                samplers.add(sampler)
                forward = _naming(module.forward, name, running)
                undo.enter_context(replaced(module, "forward", forward))
        if not samplers:
            raise ValueError(f"no module of {type(model).__name__} samples: nothing to record")
        for owner, name in samplers:
            function = _keeping(getattr(owner, name), record, running)
            undo.enter_context(replaced(owner, name, function))
        yield record


def _sampler(module: nn.Module) -> tuple[object, str] | None:
    """What shows where a module samples, as an object and the name of its function, or None.

    It is a method that returns a Sampling, or whatever takes the sampling locations: a submodule, a
    function among the module's attributes, or one in the file of its class.
    """
    if isinstance(module, MSDeformAttn):
        return module, "sampling"
    if not hasattr(module, "sampling_offsets"):  # the name that all of them have
        return None
    for child in module.children():
        if LOCATIONS in inspect.signature(child.forward).parameters:
            return child, "forward"
    files = [kind.__module__ for kind in type(module).__mro__]
    for owner in (module, *(sys.modules[file] for file in files if file in sys.modules)):
        for name, value in vars(owner).items():
            if inspect.isfunction(value) and LOCATIONS in inspect.signature(value).parameters:
                return owner, name
    return None


def _naming(forward: Callable, name: str, running: list[str]) -> Callable:
    """A module's forward, whose name is among those that run while it does."""

    @wraps(forward)
    def call(*args: object, **kwargs: object) -> object:
        running.append(name)
        try:
            return forward(*args, **kwargs)
        finally:
            running.pop()

    return call


def _keeping(function: Callable, record: SamplingRecord, running: list[str]) -> Callable:
    """The function, which puts into the record what the module that runs has sampled."""

    @wraps(function)
    def call(*args: object, **kwargs: object) -> object:
        result = function(*args, **kwargs)
        if running:  # not in a call from elsewhere, of a function that others share
            sampling = result
            if not isinstance(result, Sampling):
                arguments = inspect.signature(function).bind(*args, **kwargs).arguments
                sampling = _from_arguments(**arguments)
            record[running[-1]] = Sampling(
                sampling.locations.detach(), sampling.weights.detach(), sampling.spatial_shapes
            )
        return result

    return call


def _from_arguments(
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: list[int] | None = None,
    **others: object,
) -> Sampling:
    """What a function sampled; num_points_list: where levels have different numbers of points."""
    names = ("value_spatial_shapes_list", "value_spatial_shapes", "spatial_shapes")
    shapes = next(others[name] for name in names if name in others)
    if num_points_list is not None:
        points = sampling_locations, attention_weights
        sampling_locations, attention_weights = even_points(*points, num_points_list)
    return Sampling(sampling_locations, attention_weights, check_spatial_shapes(shapes))


@contextmanager
def replaced(owner: object, name: str, new: object) -> Iterator[None]:
    """An attribute that is another while open; one that was inherited is so again."""
    own = vars(owner).get(name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
