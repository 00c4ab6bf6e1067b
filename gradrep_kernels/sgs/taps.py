"""The taps of a convolution: which kernels can be scaled, and where their taps lie on the input map."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence


def two_ints(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    """Return (rows, columns) from a number or a pair of numbers, none below `least`."""
    try:
        pair = tuple(operator.index(v) for v in value) if isinstance(value, Iterable) else (operator.index(value),) * 2
    except TypeError:
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}") from None
    if len(pair) != 2 or min(pair) < least:
        raise ValueError(f"{name} must be an int or a pair of ints, none below {least}, got {value!r}")
    return pair


def scalable_kernel(kernel_size: Sequence[int]) -> str | None:
    """Why a kernel of this size has no spatial scaling, or None if it has one."""
    kh, kw = kernel_size
    if kh % 2 == 0 or kw % 2 == 0:
        return f"{kh} x {kw} kernel: both sides must be odd"
    if kh == 1 or kw == 1:
        return f"{kh} x {kw} kernel: both sides must be larger than 1"
    return None


def resolve_padding(
    padding: int | str | Sequence[int], kernel_size: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """Return the padding of a convolution with an odd kernel as (rows, columns).

    'same' and 'valid' mean what they mean in torch.nn.Conv2d. An odd kernel gets as much on one side as on the other.
    """
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"padding must be a number, a pair, 'same' or 'valid', got {padding!r}")
        return (0, 0) if padding == "valid" else tuple(d * (k // 2) for d, k in zip(dilation, kernel_size))
    return two_ints("padding", padding, 0)


def half_displacements(kernel_size: Sequence[int], dilation: Sequence[int] = (1, 1)) -> list[tuple[int, int]]:
    """Return one of each pair ±d of the taps of an odd kernel, times the dilation.

    That makes 4 for 3x3, 12 for 5x5 and 24 for 7x7. They are the taps after the centre, row by row. S is
    point-symmetric, so half of the taps are enough.
    """
    (kh, kw), (rows, columns) = kernel_size, dilation
    taps = [(i, j) for i in range(-(kh // 2), kh // 2 + 1) for j in range(-(kw // 2), kw // 2 + 1)]
    return [(i * rows, j * columns) for i, j in taps[len(taps) // 2 + 1 :]]


def flat(displacements: Iterable[tuple[int, int]]) -> list[int]:
    """[(i, j), ...] as [i, j, ...], which is how the ops take displacements."""
    return [v for displacement in displacements for v in displacement]
