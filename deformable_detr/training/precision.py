"""Mixed precision: the model in half, its output, losses and weights in float32.
Chapter training_at_every_size."""

import torch

PRECISION = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a forward pass in a precision of PRECISION."""
    dtype = PRECISION[precision]
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype if enabled else None, enabled)


def make_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """What keeps small gradients from vanishing in fp16; in other precisions it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
