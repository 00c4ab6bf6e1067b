"""Where a program finds its elements, and where each element finds its multiplier.

A kernel gets three tables. `chunks` names the piece that a program works on. `geometry` has a row of int32 per piece,
made from shapes alone. `pointers` has a row of int64 per piece, which also changes when a tensor moves. A piece is a
tensor, or a part of one that is too large for 32-bit indices.

A multiplier is found from the element's place in memory, whatever the layout. The place splits into three levels,
    place = (outer * middle_size + middle) * inner_size + inner,
    scale index = outer * s0 + middle * s1 + inner * s2,
with stride 0 where one element of scale serves all. Neighbouring dimensions that one stride serves are merged first:
[O, 1, kh, kw] takes O, I, kh·kw for a contiguous weight and O, kh·kw, I for channels_last. A dense one is one level.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import triton
import triton.language as tl

from gradrep_kernels.ops.dense import memory_order
from gradrep_kernels.ops.triton.division import magic_division, quotient

PIECE = 2**30
"""Elements of a piece at most: an index stays below 2^31, and twice an index below 2^32 (`quotient`)."""

TAIL = tl.constexpr(256)
"""Elements that the loop over unaligned tensors and over the end of a piece takes at a time.

With the block of the aligned path it would need up to 78 registers, not 40-62.
"""

# Columns of `geometry`, columns of `pointers` (an op's own follow after POINTERS), and bits of the column FLAGS.
# Kernels read them by these names: the key of Triton's cache holds no attributes of modules.
(FIRST_CHUNK, NUMEL, GROUP, ROW, ROW_MAGIC, ROW_SHIFT, INNER, INNER_MAGIC, INNER_SHIFT,
 OUTER_STRIDE, MIDDLE_STRIDE, INNER_STRIDE, CHANNELS, CHANNELS_MAGIC, CHANNELS_SHIFT,
 PHASE, TAP_STEP, TAP_FIRST, NUMBER, OCTET, WITHIN_OCTET, LAYERS, LAYER_STRIDE, GEOMETRY) = map(
     tl.constexpr, range(24))  # fmt: skip
(FLAGS, SCALE, IDENTITY, AVERAGE, GRAD, POINTERS) = map(tl.constexpr, range(6))
ALIGNED, HAS_SCALE, HAS_IDENTITY, FIRST_STEP = map(tl.constexpr, (1, 2, 4, 8))

# ---- on the device


@triton.jit
def own_chunk(chunks, geometry, pointers, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Where a program works: its rows of `geometry` and `pointers` (WIDTH wide), first element, size of its piece."""
    program = tl.program_id(0)
    number = tl.load(chunks + program)
    piece = geometry + number * GEOMETRY
    pointers += number * WIDTH
    numel = tl.load(piece + NUMEL)
    start = (program - tl.load(piece + FIRST_CHUNK)) * CHUNK
    return piece, pointers, start, numel


@triton.jit
def aligned(address, DTYPE: tl.constexpr, BYTES: tl.constexpr = 16):
    """The integer `address` as a pointer for accesses of BYTES. Call it only where the flag ALIGNED was seen to be set.

    Cast an address separately on each path. `tl.multiple_of` marks the operation that made its argument, so a pointer
    that two paths share would be marked on both. An unaligned tensor would then meet 128-bit accesses, which end in a
    sticky `misaligned address`.
    """
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), BYTES)


@triton.jit
def unaligned(address, DTYPE: tl.constexpr):
    """The integer `address` as a pointer of which nothing more is known."""
    return address.to(tl.pointer_type(DTYPE))


@triton.jit
def switched(inside, switch):
    """The mask `inside` where the integer `switch` is not 0, else nothing.

    (The interpreter cannot broadcast a scalar comparison.)
    """
    return inside & (tl.zeros_like(inside).to(tl.int32) + switch != 0)


@triton.jit
def multiplier_row(piece, pointers, COMPUTE: tl.constexpr):
    """The values of a piece that `multiplier` needs, read once per program."""
    return (
        tl.load(pointers + SCALE).to(tl.pointer_type(COMPUTE)),
        tl.load(pointers + IDENTITY).to(tl.pointer_type(COMPUTE)),
        tl.load(pointers + FLAGS).to(tl.int32) & HAS_SCALE,
        tl.load(pointers + FLAGS).to(tl.int32) & HAS_IDENTITY,
        tl.load(piece + ROW),
        tl.load(piece + ROW_MAGIC).to(tl.uint32, bitcast=True),
        tl.load(piece + ROW_SHIFT).to(tl.uint32, bitcast=True),
        tl.load(piece + INNER),
        tl.load(piece + INNER_MAGIC).to(tl.uint32, bitcast=True),
        tl.load(piece + INNER_SHIFT).to(tl.uint32, bitcast=True),
        tl.load(piece + OUTER_STRIDE),
        tl.load(piece + MIDDLE_STRIDE),
        tl.load(piece + INNER_STRIDE),
        tl.load(piece + CHANNELS),
        tl.load(piece + CHANNELS_MAGIC).to(tl.uint32, bitcast=True),
        tl.load(piece + CHANNELS_SHIFT).to(tl.uint32, bitcast=True),
        tl.load(piece + PHASE),
        tl.load(piece + TAP_STEP),
        tl.load(piece + TAP_FIRST),
        tl.load(piece + LAYERS),
        tl.load(piece + LAYER_STRIDE),
    )


@triton.jit
def multiplier_place(place, inside, row_of_piece):
    """Where the parts of M at the given places of a piece are: the pointers to scale and identity, and their masks."""
    (scale, identity, has_scale, has_identity, row, row_magic, row_shift, inner, inner_magic, inner_shift,
     outer_stride, middle_stride, inner_stride, channels, channels_magic, channels_shift,
     phase, tap_step, tap_first, _, _) = row_of_piece  # fmt: skip
    o = quotient(place, row_magic, row_shift)
    rest = place - o * row
    middle = quotient(rest, inner_magic, inner_shift)
    index = o * outer_stride + middle * middle_stride + (rest - middle * inner) * inner_stride
    shifted = o + phase
    channel = shifted - quotient(shifted, channels_magic, channels_shift) * channels
    tap = switched(inside, has_identity) & (rest == channel * tap_step + tap_first)
    return scale + index, switched(inside, has_scale), identity + o, tap


@triton.jit
def multiplier_layers(row_of_piece):
    """How many layers the scale of a piece has, and the stride from one to the next."""
    return row_of_piece[19], row_of_piece[20]


@triton.jit
def multiplier(place, inside, row_of_piece):
    """M at the given places of a piece, 1 for a piece without a multiplier."""
    scale, has_scale, identity, tap = multiplier_place(place, inside, row_of_piece)
    m = tl.load(scale, mask=has_scale, other=1.0)
    return tl.where(tap, m + tl.load(identity, mask=tap, other=0.0), m)


# ---- on the host: from shapes to pieces

Sizes = tuple[int, ...]
Level = tuple[int, int]  # (size, stride of scale)


class Address(NamedTuple):
    """How the place of an element leads to its multiplier.

    The identity's tap of output channel o sits at place (o mod channels) * tap_step + tap_first of its row. Where a
    scale has layers, several multipliers that lie one behind the other, the address leads to the first.
    """

    levels: tuple[Level, Level, Level]
    channels: int = 1
    tap_step: int = 0
    tap_first: int = 0
    layers: int = 1
    layer_stride: int = 0

    @property
    def row(self) -> int:
        return self.levels[1][0] * self.levels[2][0]

    @property
    def last(self) -> int:
        """Of the elements of scale that it leads to, the last."""
        return sum((size - 1) * stride for size, stride in self.levels) + (self.layers - 1) * self.layer_stride


class Piece(NamedTuple):
    """A part of a tensor: its first element, the elements of scale and identity that belong to it, and its address."""

    start: int
    scale: int
    identity: int
    address: Address

    @property
    def numel(self) -> int:
        return self.address.levels[0][0] * self.address.row


def contiguous_strides(shape: Sizes) -> Sizes:
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


def _merged(dims: Iterable[Level]) -> list[Level]:
    """Levels in place of dimensions (outermost first). Neighbours that one stride serves become one level."""
    levels: list[Level] = []
    for size, stride in dims:
        if levels and levels[-1][1] == size * stride:
            levels[-1] = (levels[-1][0] * size, stride)
        else:
            levels.append((size, stride))
    return levels


def address(shape: Sizes, strides: Sizes, scale: tuple[Sizes, Sizes] | None, identity: Sizes | None) -> Address | None:
    """The address of a multiplier with a `scale` of (shape, strides) and an `identity` of a shape.

    None where three levels cannot express it, or where the tensor is not dense.
    """
    order = memory_order(shape, strides)
    if order is None:
        return None
    if scale is None:
        return Address(((1, 0), (1, 0), (math.prod(shape), 0)))
    missing = len(shape) - len(scale[0])
    if missing < 0:
        return None
    along = [0] * missing
    for size, scale_size, stride in zip(shape[missing:], *scale):
        if scale_size not in (1, size):
            return None
        along.append(0 if scale_size == 1 else stride)
    if identity is None:
        merged = _merged((shape[d], along[d]) for d in order)
        levels = [(1, 0)] * (3 - len(merged)) + merged
        return Address(tuple(levels)) if len(levels) == 3 else None
    if len(shape) != 4 or identity != shape[:1] or (shape[0] > 1 and order[0] != 0):
        return None
    merged = _merged((shape[d], along[d]) for d in order if d != 0)
    levels = [(shape[0], along[0])] + [(1, 0)] * (2 - len(merged)) + merged
    channels = shape[1]
    tap_first = shape[2] // 2 * strides[2] + shape[3] // 2 * strides[3]
    with_identity = Address(tuple(levels), channels, strides[1] if channels > 1 else 0, tap_first)
    return with_identity if len(levels) == 3 and with_identity.row <= PIECE else None


def pieces(address: Address) -> Iterator[Piece]:
    """Parts of a tensor that 32-bit indices reach: rows of the outermost level, or parts of a row that is too long."""
    (size, stride), middle, inner = address.levels
    if size * address.row <= PIECE:
        yield Piece(0, 0, 0, address)
    elif address.row <= PIECE:
        rows = PIECE // address.row
        rows -= rows % 16 if rows > 16 else 0  # so that every piece starts at a multiple of 16 bytes if the tensor does
        for first in range(0, size, rows):
            part = address._replace(levels=((min(rows, size - first), stride), middle, inner))
            yield Piece(first * address.row, first * stride, first, part)
    else:
        within = address._replace(levels=(middle, (1, 0), inner) if middle[0] > 1 else (inner, (1, 0), (1, 0)))
        for outer in range(size):
            for piece in pieces(within):
                yield piece._replace(start=piece.start + outer * address.row, scale=piece.scale + outer * stride)


Random = tuple[int, int]
"""What chooses the random bits of a parameter: its position in its optimizer, and the number of its first element."""

Part = tuple[Piece, int, Random | None]
"""A piece, its group, and what chooses its parameter's random bits. None: it takes none."""


def first_element(part: Part) -> int:
    """The number of the part's first element in the whole parameter, which its random bits depend on, else 0."""
    piece, _, random = part
    return 0 if random is None else random[1] + piece.start


def geometry_row(part: Part, first_chunk: int) -> list[int]:
    """The columns of `geometry`, in their order."""
    piece, group, random = part
    address, inner = piece.address, piece.address.levels[2]
    strides = [stride for _, stride in address.levels]
    multiplied = [address.row, *magic_division(address.row), inner[0], *magic_division(inner[0]), *strides]
    channels, phase = address.channels, piece.identity % address.channels
    tap = [channels, *magic_division(channels), phase, address.tap_step, address.tap_first]
    counter = [0 if random is None else random[0], *divmod(first_element(part), 8)]
    return [first_chunk, piece.numel, group, *multiplied, *tap, *counter, address.layers, address.layer_stride]


def chunk_tables(parts: Sequence[Part], chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """(chunks [programs], geometry [parts, GEOMETRY]), int32."""
    counts = np.array([-(-piece.numel // chunk) for piece, *_ in parts], dtype=np.int64)
    rows = [geometry_row(part, first) for part, first in zip(parts, np.cumsum(counts) - counts)]
    geometry = np.array(rows, dtype=np.int64).reshape(-1, GEOMETRY.value)
    return np.repeat(np.arange(len(parts), dtype=np.int32), counts), geometry.astype(np.uint32).view(np.int32)
