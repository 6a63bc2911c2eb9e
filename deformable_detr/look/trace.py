"""One forward pass, and where its deformable attention looked, in pixels. Chapter looking."""

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert

from deformable_detr.look.sampling import SamplingRecord, record_sampling
from deformable_detr.models.tokens import level_mask, valid_ratio
from deformable_detr.structures import Batch, Output, Tokens

REFERENCES = "reference_points"  # what everyone who samples calls them
CHOSEN = "chosen"  # of an encoder: which tokens it updates


@dataclass
class Looks:
    """What one query or token asked for, layer by layer, in pixels of the picture.

    points: (N, M, L, K, 2) as (x, y), of N layers. weights: (N, M, L, K), summing to one over the
    last two axes together. references: (N, 4) xyxy; a point is a box without a size.
    """

    points: Tensor
    weights: Tensor
    references: Tensor


@dataclass
class Trace:
    """A forward pass of one image.

    record: where each module sampled, by name. references: what it looked around, (1, Q, L, 2 or
    4), relative to the padded maps. shapes: (H, W) of each map. ratios: (L, 2), the part of each
    that is image, as the model reckons it. chosen: the tokens that the encoder asked for, (N,);
    None is all.
    """

    output: Output
    record: SamplingRecord
    references: dict[str, Tensor]
    shapes: list[tuple[int, int]]
    ratios: Tensor
    chosen: Tensor | None

    def looks(self, part: str, row: int, size: tuple[int, int]) -> Looks:
        """What a row of each layer of a part, "encoder" or "decoder", asked for.

        size: (W, H) of the picture, in whose pixels the answer is. A location is relative to a
        padded map. Divided by the part of the map that is image, it is relative to the image, as
        boxes are: this undoes what the model did to the references.
        """
        names = [name for name in self.record if part in name.split(".")]
        samplings = [self.record[name] for name in names]
        scale = torch.tensor(size) / self.ratios  # (L, 2)
        points = torch.stack([_exact(s.locations[0, row]) for s in samplings]) * scale[:, None]
        weights = torch.stack([_exact(s.weights[0, row]) for s in samplings])
        references = [_exact(self.references[name][0, row, 0]) for name in names]
        boxes = torch.stack([F.pad(x, (0, 4 - len(x))) for x in references])  # a point has no size
        return Looks(points, weights, box_convert(boxes * scale[0].repeat(2), "cxcywh", "xyxy"))


def trace(model: nn.Module, batch: Batch) -> Trace:
    """Run a model on a batch of one image, and keep where it looked. ValueError where nothing in
    its decoder samples."""
    kept: dict[str, object] = {}
    with ExitStack() as undo:
        record = undo.enter_context(record_sampling(model))
        for name, module in model.named_modules():
            arguments = inspect.signature(module.forward).parameters
            if hasattr(module, "sampling_offsets") and REFERENCES in arguments:
                hook = _keeping(REFERENCES, kept, name)
            elif name == "encoder" and CHOSEN in arguments:
                hook = _keeping(CHOSEN, kept, CHOSEN)
            else:
                continue
            undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        if (neck := getattr(model, "neck", None)) is not None:
            keep = neck.register_forward_hook(lambda *call: kept.update(neck=call[-1]))
            undo.callback(keep.remove)
        output = model(batch)
    if not record.decoder:
        raise ValueError(
            f"the decoder of {type(model).__name__} samples nothing: nothing to look at"
        )
    shapes = [tuple(int(n) for n in shape) for shape in record.decoder[0].spatial_shapes]
    if isinstance(tokens := kept.pop("neck", None), Tokens):
        ratios = tokens.valid_ratios[0]
    else:
        ratios = torch.cat([valid_ratio(level_mask(batch.mask, shape)) for shape in shapes])
    chosen = kept.pop(CHOSEN, None)
    chosen = None if chosen is None else chosen[0][0]
    return Trace(output, record, kept, shapes, _exact(ratios), chosen)


def _keeping(argument: str, kept: dict[str, object], name: str) -> Callable:
    """A hook that keeps an argument of each call under a name."""

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        kept[name] = arguments.get(argument)

    return hook


def _exact(x: Tensor) -> Tensor:
    """In float64 on the CPU, without its graph."""
    return x.detach().double().cpu()
