"""M ⊙ t from the parts of a Grad Mult, with one multiplication per element and no temporary M of weight size."""

from __future__ import annotations

import torch
from torch import Tensor

_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for bf16 and fp16, which are rounded once per stored tensor, and any other dtype itself."""
    return _WIDER.get(dtype, dtype)


def diagonal_taps(shape: torch.Size | tuple[int, ...], device=None) -> tuple[Tensor, Tensor, int, int]:
    """Index the identity's taps in a weight of `shape` [O, I, kh, kw]: (o, o mod I, centre row, centre column)."""
    o = torch.arange(shape[0], device=device)
    return o, o % max(shape[1], 1), shape[2] // 2, shape[3] // 2


def multiply(t: Tensor, scale: Tensor | None, identity: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Multiply M ⊙ t  # [O, I, kh, kw]

    The parts of M are brought to `dtype` first, then added, then multiplied with t.
    """
    if scale is None:
        return t
    scale = scale.to(dtype)
    product = t * scale
    if identity is not None:
        taps = diagonal_taps(t.shape, t.device)
        product[taps] = t[taps] * (scale.expand(t.shape)[taps] + identity.to(dtype))
    return product
