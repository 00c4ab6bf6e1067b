"""From shapes to routes: how the kernels take a parameter, or that they do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradrep_kernels.ops.dense import alike
from gradrep_kernels.ops.triton import launching
from gradrep_kernels.ops.triton.addressing import Piece, Random, Sizes, address, contiguous_strides, pieces

COMPUTE = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
"""Dtypes that the kernels store -> the dtype that they compute in, as the reference does."""

Described = tuple[torch.dtype, int, Sizes, Sizes] | torch.layout | None
"""dtype, device number, shape, strides of a tensor; its layout if it is not strided."""


class Entry(NamedTuple):
    """One parameter, as a call has it."""

    tensors: tuple[Described, ...]  # that must be alike: gradient, parameter, states
    scale: Described
    identity: Described
    group: int
    average: Described = None
    random: Random | None = None  # None: no state may have another dtype than the parameter
    layered: bool = False  # whether the scale is several multipliers, one behind the other

    @property
    def narrow(self) -> int:
        """Bit n: state n is bfloat16, and rounded by random bits."""
        return sum(1 << n for n, state in enumerate(self.tensors[2:]) if self.random and state[0] == torch.bfloat16)

    @property
    def itemsizes(self) -> list[int]:
        """Bytes of an element of the average, 0 where there is none, and of the tensors."""
        return [0 if self.average is None else self.average[0].itemsize, *(one[0].itemsize for one in self.tensors)]


def describe(tensors: Sequence[Tensor | None]) -> list[Described]:
    """The facts that a plan depends on. A tensor's id is none of them, since `param.data` is a new object each time."""
    try:
        return [None if t is None else (t.dtype, t.get_device(), t.shape, t.stride()) for t in tensors]
    except RuntimeError:  # a sparse tensor has no strides
        return [t.layout if t is not None and t.layout != torch.strided else describe([t])[0] for t in tensors]


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """Where the tensors begin in memory, 0 for one that is None or sparse."""
    try:
        return [0 if t is None else t.data_ptr() for t in tensors]
    except RuntimeError:  # a sparse tensor has no address
        return [0 if t is None or t.layout != torch.strided else t.data_ptr() for t in tensors]


class Route(NamedTuple):
    """The pieces of a parameter, and the shapes of the copies of scale and identity that the kernel needs."""

    pieces: list[Piece]
    scale_copy: Sizes | None = None
    identity_copy: Sizes | None = None


def route(entry: Entry) -> Route | None:
    """How the kernels take a parameter.

    None if the reference must take it: its tensors have gaps or overlaps, are not alike, or have other dtypes.
    """
    tensors, scale, identity, group, average, random, layered = entry
    if group < 0 or not all(isinstance(one, tuple) for one in tensors) or (random and random[1] is None):
        return None
    dtype, device, shape, strides = tensors[0]
    if dtype not in COMPUTE or (device < 0) != launching.INTERPRETED:  # -1 is the CPU
        return None
    wanted = [dtype] * len(tensors)
    for n in range(2, len(tensors)):
        wanted[n] = torch.bfloat16 if entry.narrow >> n - 2 & 1 else dtype
    if average is not None:
        tensors, wanted = (*tensors, average), [*wanted, COMPUTE[dtype]]
    for other, stored in zip(tensors, wanted):
        if not isinstance(other, tuple) or other[:3] != (stored, device, shape) or not alike(shape, strides, other[3]):
            return None
    if 0 in shape:
        return Route([])
    if scale is None:
        plain = address(shape, strides, None, None)
        return plain and Route(list(pieces(plain)))
    for part in (scale, identity):
        if part is not None and not (isinstance(part, tuple) and part[1] == device and not part[0].is_complex):
            return None
    identity_shape = None if identity is None else tuple(identity[2])
    identity_copy = identity_shape if identity and (identity[0] != COMPUTE[dtype] or identity[3] != (1,)) else None
    first = scale[2][:1] if layered else ()
    missing = len(shape) + len(first) - len(scale[2])
    if missing < 0 or (layered and missing):
        return None
    same = (1,) * missing + tuple(scale[2][len(first) :])
    # The scale as it is, or a contiguous copy in the right dtype, or a copy with the whole kernel: [O, 1, kh, 1] has
    # too many levels otherwise.
    readings = [
        ((*first, *copy), (copy, contiguous_strides(copy)), math.prod(copy))
        for copy in (same, same[:2] + tuple(shape[2:]))
    ]
    if scale[0] == COMPUTE[dtype]:
        behind = len(first)
        readings.insert(0, (None, (scale[2][behind:], scale[3][behind:]), scale[3][0] if layered else 0))
    for copy, reading, layer_stride in readings:
        where = address(shape, strides, reading, identity_shape)
        if where and layered:
            where = where._replace(layers=first[0], layer_stride=layer_stride)
        parts = [] if where is None else list(pieces(where))
        if where and all(part.address.last < 2**31 for part in parts):
            return Route(parts, copy, identity_copy)
    return None


def chances(
    states: Sequence[Sequence[Tensor | None]], numbers: Sequence[int], elements: Sequence[Tensor | None]
) -> list[Random | None]:
    """What chooses the random bits of each parameter, where it has a state in bfloat16.

    It has no first element where `elements` are more than where a run of the parameter begins, or not to be read here.
    """
    made: list[Random | None] = []
    for number, first, *own in zip(numbers, elements, *states):
        narrow = any(state is not None and state.dtype == torch.bfloat16 for state in own)
        made.append((number, _begin(first)) if narrow else None)
    return made


def _begin(first: Tensor | None) -> int | None:
    if first is None:
        return 0
    return int(first) if first.is_cpu and first.numel() == 1 and first.dtype == torch.int64 else None
