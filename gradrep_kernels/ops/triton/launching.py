"""Launching kernels: on which tensors they run, and how many launches there were."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret
"""Whether TRITON_INTERPRET=1 was set when the kernels were defined. They run on CPU tensors then, and only there."""

LAUNCHES: Counter[tuple[str, str, torch.dtype]] = Counter()
"""(op, device, dtype) -> kernels launched so far in this process."""


def launch(
    op: str, device: torch.device, dtype: torch.dtype, kernel: Any, programs: int, *arguments: Any, **named: Any
) -> None:
    """Launch `programs` programs of a kernel. `op` and `dtype` are for LAUNCHES."""
    LAUNCHES[op, str(device), dtype] += 1
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*arguments, **named)
