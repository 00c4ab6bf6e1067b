"""The C++ and the CUDA scaling of gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from gradrep_kernels.ops import reference
from gradrep_kernels.ops.cpp.step import DTYPES, as_number
from gradrep_kernels.ops.dense import is_dense
from gradrep_kernels.ops.registry import registered


def scale_gradients_(grads, factor: Tensor) -> None:
    """Compute reference.scale_gradients_ with one call for each device.

    The result has the same bits, but for 16-bit gradients that share memory: here each of them is scaled.
    """
    taken: dict[torch.device, list[Tensor]] = {}
    rest: list[Tensor] = []
    for g in grads:
        there = taken.setdefault(g.device, []) if g.dtype in DTYPES and is_dense(g) else rest
        there.append(g)
    for device, alike in taken.items():
        registered("scale_gradients_")(alike, as_number(factor).to(device))
    if rest:
        reference.scale_gradients_(rest, factor)
