"""How to train: every setting of the loop, with the paper's as defaults. Chapter recipe."""

import math
from dataclasses import dataclass

from deformable_detr.options import option

SCHEDULES = ("step", "cosine")
PRECISIONS = ("no", "bf16", "fp16")


@dataclass(frozen=True)
class TrainConfig:
    """How to train; the defaults are the paper's (section 5 and the official code).

    Each option's line of help stands beside it. ValueError names one that is out of range.
    """

    epochs: int = option(50, "times that all images are seen")
    batch_size: int = option(2, "images that one process holds at once")
    accumulate: int = option(
        1, "batches of a process that make one step, where memory is short of large ones"
    )
    lr: float = option(2e-4, "learning rate")
    backbone_lr: float = option(
        2e-5, "learning rate of the backbone; keeps its ratio to lr where only that is changed"
    )
    sampling_lr_factor: float = option(
        0.1, "what lr is multiplied by for sampling offsets and reference points"
    )
    weight_decay: float = option(1e-4, "of AdamW, for all parameters")
    clip_norm: float = option(0.1, "largest norm of the gradient; a longer one is shortened to it")
    schedule: str = option(
        "step", "step: all rates x 0.1 after drop_epoch; cosine: they fall to 1 % at the end"
    )
    drop_epoch: int = option(40, "epochs until the rates drop, with schedule step")
    giou_weight: float = option(
        2.0, "of the boxes' GIoU in the loss, where their L1 distance has 5; the matching keeps 2"
    )
    warmup_steps: int = option(0, "first steps, over which the rates rise linearly")
    frozen: tuple[str, ...] | None = option(
        None,
        "parts of the backbone that do not learn, such as conv1 layer1 of a ResNet, stem stage1 of "
        "a DAT; without it, the model's",
    )
    ema_decay: float = option(
        0.0, "of the average of weights that is evaluated and saved, in [0, 1); 0 is no average"
    )
    seed: int = option(42, "of weights, data order and augmentation")
    evaluate_every: int = option(1, "epochs from one evaluation to the next")
    top_k: int = option(100, "detections of an image in an evaluation")
    patience: int = option(0, "evaluations without a better AP, then stop; 0 is never")
    num_workers: int = option(0, "processes that load images")
    checkpoint_minutes: float = option(5.0, "from one checkpoint to the next within an epoch")
    mixed_precision: str = option(
        "no", "no, bf16 or fp16; the latter two are faster and need less memory on a GPU"
    )
    gradient_checkpointing: bool = option(
        False,
        "compute the backbone's stages and the layers of encoder and decoder again in the backward "
        "pass instead of keeping them: less memory, more time",
    )

    def __post_init__(self) -> None:
        for name, known in (("schedule", SCHEDULES), ("mixed_precision", PRECISIONS)):
            if getattr(self, name) not in known:
                given = repr(getattr(self, name))
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {given}")
        for name in ("lr", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for least, names in (
            (1, ("epochs", "batch_size", "accumulate", "evaluate_every", "top_k")),
            (0, ("backbone_lr", "sampling_lr_factor", "weight_decay", "drop_epoch", "giou_weight")),
            (0, ("warmup_steps", "patience", "num_workers", "checkpoint_minutes")),
        ):
            for name in names:
                if not least <= getattr(self, name) < math.inf:
                    raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
