"""Which tensors a kernel may walk flat."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def is_dense(t: Tensor) -> bool:
    """Tell whether the elements fill their memory, each a place of its own, so that kernels may walk it flat."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape) if n != 1):
        if stride != expected:
            return t.numel() == 0
        expected *= size
    return True


def alike(shape: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
    """Tell whether strides `a` and `b` of one shape are the same but for sizes of 1, where a stride says nothing."""
    return a == b or all(x == y or n == 1 for x, y, n in zip(a, b, shape))
