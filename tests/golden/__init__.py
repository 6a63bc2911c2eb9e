"""Numbers that version 0.1 computed, and on which machine: elsewhere sums are added in another
order."""

import hashlib
import os
from pathlib import Path

import torch

from deformable_detr.ops import build

FOLDER = Path(__file__).parent
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def machine() -> str:
    """What decides the last bits of a sum: processor, compiler, torch, and which instructions it
    may use."""
    parts = [
        *(build.machine() if build.compiler() else ()),
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
        *(os.environ.get(name, "") for name in LIMITS),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
