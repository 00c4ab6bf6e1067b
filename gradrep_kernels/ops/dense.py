"""Which tensors a kernel may walk flat, as one run of memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor


def memory_order(shape: Sequence[int], strides: Sequence[int]) -> list[int] | None:
    """The dimensions of a dense tensor whose size is not 1, outermost in memory first.

    None for a tensor that is not dense: two of its elements share memory, or memory between them is unused.
    A tensor without elements is dense.
    """
    order = sorted((d for d, size in enumerate(shape) if size != 1), key=lambda d: -strides[d])
    expected = 1
    for d in reversed(order):
        if strides[d] != expected:
            return order if 0 in shape else None
        expected *= shape[d]
    return order


def is_dense(t: Tensor) -> bool:
    """Whether `t` fills one run of memory and every element has a place of its own."""
    # torch remembers the answers to the first two questions: 0.2 µs, where the third takes 2 µs.
    return (
        t.is_contiguous()
        or t.is_contiguous(memory_format=torch.channels_last)
        or memory_order(t.shape, t.stride()) is not None
    )


def alike(shape: Sequence[int], strides: Sequence[int], others: Sequence[int]) -> bool:
    """Whether tensors of one shape have the same strides. The stride of a dimension of size 1 says nothing."""
    return strides == others or all(a == b or size == 1 for size, a, b in zip(shape, strides, others))


def share_memory(rows: Iterable[Sequence[Tensor]]) -> bool:
    """Whether dense tensors of one row share memory with those of another.

    Or with each other, unless they are the same memory: a thread reads and writes one place of each.
    """
    extents = sorted(
        {(t.data_ptr(), t.data_ptr() + t.nbytes, n) for n, row in enumerate(rows) for t in row if t.numel() > 0}
    )
    return any(begin < end for (_, end, _), (begin, _, _) in pairwise(extents))
