"""How to train: every setting of the loop, with the paper's as defaults."""

import math
from dataclasses import dataclass

PRECISIONS = ("no", "bf16", "fp16")


@dataclass(frozen=True)
class TrainConfig:
    """How to train; the defaults are the paper's (section 5 and the official code).

    batch_size: images that one process holds at once; accumulate: how many such batches make one
    step. schedule: "step" multiplies every rate by 0.1 after drop_epoch; "cosine" falls to 1 % at
    the end; both rise linearly over warmup_steps. sampling_lr_factor is for sampling offsets and
    reference points. frozen: parts of a ResNet that do not learn, such as "conv1" and "layer1";
    None leaves that to the model. ema_decay: of the average of weights that is evaluated and
    saved, in [0, 1); 0 is none. evaluate_every: in epochs. top_k: detections of an image in an
    evaluation. patience: evaluations without a better AP after which training stops; 0 is never.
    mixed_precision: "no", "bf16" or "fp16". gradient_checkpointing: a ResNet's stages and the
    layers of encoder and decoder are computed again in the backward pass, rather than kept.
    """

    epochs: int = 50
    batch_size: int = 2
    accumulate: int = 1
    lr: float = 2e-4
    backbone_lr: float = 2e-5
    sampling_lr_factor: float = 0.1
    weight_decay: float = 1e-4
    clip_norm: float = 0.1
    schedule: str = "step"
    drop_epoch: int = 40
    warmup_steps: int = 0
    frozen: tuple[str, ...] | None = None
    ema_decay: float = 0.0
    seed: int = 42
    evaluate_every: int = 1
    top_k: int = 100
    patience: int = 0
    num_workers: int = 0
    checkpoint_minutes: float = 5.0
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.schedule not in ("step", "cosine"):
            raise ValueError(f"schedule must be 'step' or 'cosine', got {self.schedule!r}")
        if self.mixed_precision not in PRECISIONS:
            raise ValueError(
                f"mixed_precision must be one of {PRECISIONS}, got {self.mixed_precision!r}"
            )
        for least, names in (
            (1, ("epochs", "batch_size", "accumulate", "evaluate_every", "top_k")),
            (0, ("backbone_lr", "sampling_lr_factor", "weight_decay", "drop_epoch")),
            (0, ("warmup_steps", "patience", "num_workers", "checkpoint_minutes")),
        ):
            for name in names:
                if not least <= getattr(self, name) < math.inf:
                    raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("lr", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
