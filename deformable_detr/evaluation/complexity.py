"""What a detector costs: parameters, multiply-adds, seconds and memory (Table 1, Appendix A.1).

Chapter training_at_every_size measures memory with it.
"""

import dataclasses
import math
import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from deformable_detr import ops  # noqa: F401  registers the operators that are counted below
from deformable_detr.evaluation_mode import evaluating
from deformable_detr.structures import Batch

# 800 pixels on the short side; at this size the base model needs the paper's 173 GFLOPs
PAPER_SIZE = (800, 1110)
PER_SAMPLE = 5  # multiply-adds per sample and channel: bilinear interpolation and weight (A.1)


@dataclass
class Complexity:
    """What one model costs at one image size.

    parameters counts all, trainable those that ask for gradients. multiply_adds: of one image,
    forward, a multiply-add as one, which the paper calls a FLOP. parts: the same for each part of
    the model; they sum to the whole. seconds: of one image. peak_memory: bytes of the parameters,
    images and all other tensors at the worst moment of a batch. Both are None if not measured.
    """

    parameters: int
    trainable: int
    multiply_adds: int
    parts: dict[str, int]
    seconds: float | None
    peak_memory: int | None
    image_size: tuple[int, int]
    batch_size: int
    device: str

    def to_dict(self) -> dict:
        """For a JSON file."""
        return dataclasses.asdict(self)

    def table(self) -> str:
        """As text for a terminal."""
        height, width = self.image_size
        rows = {
            "parameters": f"{self.parameters / 1e6:.2f} M",
            "trainable": f"{self.trainable / 1e6:.2f} M",
            "GFLOPs per image": f"{self.multiply_adds / 1e9:.4g}",
        }
        rows |= {f"  {name}": f"{count / 1e9:.4g}" for name, count in self.parts.items()}
        if self.seconds is not None:
            rows["seconds per image"] = f"{self.seconds:.3g}"
        if self.peak_memory is not None:
            rows["peak memory"] = f"{self.peak_memory / 2**20:.0f} MiB"
        title = f"{height} x {width} pixels, batch {self.batch_size}, {self.device}"
        note = "a FLOP is a multiply-add, as in the paper"
        return "\n".join([title, *(f"{name:20}{text:>14}" for name, text in rows.items()), note])


def complexity(
    model: nn.Module,
    image_size: tuple[int, int] = (800, 1066),
    batch_size: int = 1,
    repeats: int = 5,
) -> Complexity:
    """Count and time a detector on images of one size (Table 1 of "Deformable DETR").

    Counted are the multiply-adds of convolutions, matrix products and attention, and five for each
    sample and channel of deformable attention (A.1); sums, norms and activations are not. This is
    done on tensors without data, so it needs neither time nor memory. The paper does not name the
    size behind its 173 GFLOPs; DETR's, which it stands beside, are the mean of 100 images of COCO
    with a short side of 800 pixels. We count 173 at PAPER_SIZE, and 166 at 800 x 1066.

    model: takes a Batch, on any device. image_size: (H, W) in pixels, without padding. repeats:
    timed runs after one to warm up, of which the median counts; 0 counts only. ValueError where a
    number is out of range, or a model on the meta device is to be timed.
    """
    device = _device(model)
    if min(*image_size, batch_size) < 1 or repeats < 0:
        raise ValueError(
            "image_size and batch_size must be at least 1 and repeats at least 0, got "
            f"{tuple(image_size)}, {batch_size} and {repeats}"
        )
    if repeats and device.type == "meta":
        raise ValueError("a model on the meta device cannot be timed: pass repeats=0")
    with evaluating(model):
        total, parts = count(model, image_size)
        seconds = memory = None
        if repeats:
            batch = make_batch(image_size, batch_size, device, next(model.parameters()).dtype)
            seconds = _seconds(model, batch, repeats) / batch_size
            memory = _peak_memory(model, batch)
    parameters = list(model.parameters())
    return Complexity(
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        multiply_adds=total,
        parts=parts,
        seconds=seconds,
        peak_memory=memory,
        image_size=tuple(image_size),
        batch_size=batch_size,
        device=_device_name(device),
    )


def make_batch(
    image_size: tuple[int, int],
    batch_size: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Black images of one size, (H, W), without padding."""
    height, width = image_size
    return Batch(
        torch.zeros(batch_size, 3, height, width, device=device, dtype=dtype),
        torch.zeros(batch_size, height, width, dtype=torch.bool, device=device),
        torch.tensor([image_size] * batch_size, device=device),
    )


@torch.no_grad()
def count(model: nn.Module, image_size: tuple[int, int]) -> tuple[int, dict[str, int]]:
    """The multiply-adds of one image, and of each of the model's parts: see `complexity`.

    A part's count has in it what it calls: the decoder's, the heads for its boxes. Parts below a
    thousandth of the whole are among "other".
    """
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.grid_sampler_2d: _grid_sample_flops}
    )
    with FakeTensorMode():
        state = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype)
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        }
        with sdpa_kernel(SDPBackend.MATH), counter:  # as two products, which are always counted
            batch = make_batch(image_size, dtype=next(model.parameters()).dtype)
            functional_call(model, state, (batch,))
    flops = {name: sum(each.values()) // 2 for name, each in counter.get_flop_counts().items()}
    total = counter.get_total_flops() // 2
    names = {name: f"{type(model).__name__}.{name}" for name, _ in model.named_children()}
    parts = {name: flops[key] for name, key in names.items() if flops.get(key, 0) > total / 1000}
    return total, parts | {"other": total - sum(parts.values())}


# PyTorch's counter has a multiply-add as two.


@register_flop_formula(torch.ops.deformable_detr.ms_deform_attn)
def _forward_flops(
    value: tuple, spatial_shapes: object, locations: tuple, weights: tuple, **_: object
) -> int:
    return 2 * PER_SAMPLE * math.prod(weights) * value[-1]  # weights: (B, Q, M, L, K)


@register_flop_formula(torch.ops.deformable_detr.ms_deform_attn_backward)
def _backward_flops(value: tuple, spatial_shapes: object, *others: tuple, **_: object) -> int:
    """Twice the forward's, as for a product: once for the values, once for how they are weighed."""
    return 2 * _forward_flops(value, spatial_shapes, *others[:2])


@register_flop_formula(torch.ops.deformable_detr.sampled_products)
def _products_flops(
    query: tuple, keys: tuple, spatial_shapes: object, places: tuple, **_: object
) -> int:
    """As many as the sum over the same samples has."""
    return _forward_flops(keys, spatial_shapes, places, places[:-1])


def _grid_sample_flops(*_: object, out_shape: tuple, **__: object) -> int:
    """The same operator in plain PyTorch: grid_sample, and the weight for each of its samples."""
    return 2 * PER_SAMPLE * math.prod(out_shape)


@torch.no_grad()
def _seconds(model: nn.Module, batch: Batch, repeats: int) -> float:
    """The median of a batch's seconds, after a run that warms up."""
    times = []
    for _ in range(repeats + 1):
        _wait(batch.images.device)
        start = time.perf_counter()
        model(batch)
        _wait(batch.images.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


@torch.no_grad()
def _peak_memory(model: nn.Module, batch: Batch) -> int:
    """Bytes of all tensors at the worst moment: a GPU's allocator tells, elsewhere we add up."""
    device = batch.images.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        model(batch)
        return torch.cuda.max_memory_allocated(device)
    with LiveTensors([*model.parameters(), *model.buffers(), batch.images, batch.mask]) as live:
        model(batch)
    return live.peak


class LiveTensors(TorchDispatchMode):
    """While open, adds up the bytes of all tensors alive; what an operator uses inside is unseen.

    tensors: those alive before. peak: the most bytes so far.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.bytes: dict[int, int] = {}  # by storage, which views share
        self.now = self.peak = 0
        for tensor in tensors:
            self._add(tensor)

    def __torch_dispatch__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        """Run an operator and add what it made."""
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) not in self.bytes:
            self.bytes[id(storage)] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, id(storage))

    def _remove(self, key: int) -> None:
        self.now -= self.bytes.pop(key)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s' * (threads != 1)}" if device.type == "cpu" else device.type
