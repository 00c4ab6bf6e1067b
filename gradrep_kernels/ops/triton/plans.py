"""What lets one launch serve every tensor of a call: pieces, chunks, and where a Grad Mult is read.

A kernel gets three tables. `chunks` names the piece that a program works on; `geometry` has a row of int32 per piece, made
from shapes alone; `pointers` has a row of int64 per piece, which also changes when a tensor moves. A piece is a tensor, or a
part of one that is too large for 32-bit indices.

A multiplier is found from the element's place in memory, whatever the layout. The place splits into three levels,
    place = (outer * middle_size + middle) * inner_size + inner,      scale index = outer * s0 + middle * s1 + inner * s2,
with stride 0 where one element of scale serves all. Neighbouring dimensions that one stride serves are merged first:
[O, 1, kh, kw] takes O, I, kh·kw for a contiguous weight and O, kh·kw, I for channels_last; a dense one is one level.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

INTERPRETED = triton.knobs.runtime.interpret
"""Whether TRITON_INTERPRET=1 was set when the kernels were defined: they run on CPU tensors then, and only there."""

COMPUTE = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
"""Dtypes that the kernels store -> the dtype that they compute in, as the reference does."""

TRITON_DTYPE = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

PIECE = 2**30
"""Elements of a piece at most: an index stays below 2^31, and twice an index below 2^32 (`quotient`)."""

BLOCK = {torch.float32: 1024, torch.float64: 512, torch.bfloat16: 1024, torch.float16: 1024}
"""Elements that one program of the step works on: one (float32: two) 128-bit accesses per tensor and thread."""

TAIL = tl.constexpr(256)
"""Block of the loop over what does not fill a BLOCK: as large as that one, the step would need up to 78 registers, not 40-62."""

LAUNCHES: Counter[tuple[str, str, torch.dtype]] = Counter()
"""(op, device, dtype) -> kernels launched so far in this process."""

# ---- on the device: the columns of `geometry`, of `pointers` (an op's own follow after POINTERS), and the bits of FLAGS

(FIRST_CHUNK, NUMEL, GROUP, ROW, ROW_MAGIC, ROW_SHIFT, INNER, INNER_MAGIC, INNER_SHIFT, OUTER_STRIDE, MIDDLE_STRIDE, INNER_STRIDE,
 CHANNELS, CHANNELS_MAGIC, CHANNELS_SHIFT, PHASE, TAP_STEP, TAP_FIRST, GEOMETRY) = map(tl.constexpr, range(19))  # fmt: skip
(FLAGS, SCALE, IDENTITY, GRAD, POINTERS) = map(tl.constexpr, range(5))
ALIGNED, HAS_SCALE, HAS_IDENTITY, FIRST_STEP = map(tl.constexpr, (1, 2, 4, 8))


def options(dtype: torch.dtype, lanes: int = 64 if torch.version.hip else 32) -> dict[str, Any]:
    """Compile options of every kernel here; `lanes` is the size of a warp."""
    # With 128 threads on AMD the step of float32 would need 66 registers of 64.
    threads = 256 if dtype == torch.float64 or (dtype == torch.float32 and lanes == 64) else 128
    # A product and a sum contracted to one FMA would differ from the reference in the last bit of 18 % of the elements.
    return {"num_warps": threads // lanes, "enable_fp_fusion": False}


@triton.jit
def quotient(n, magic, shift):
    """n // d for n < 2^31, with `magic_division(d)`; 3 instructions where a division by a run-time number takes 20."""
    return (tl.umulhi(n.to(tl.uint32) << 1, magic) >> shift).to(tl.int32)


@triton.jit
def aligned(address, DTYPE: tl.constexpr):
    """The integer `address` as a pointer for 128-bit accesses. Call it only where the flag ALIGNED was seen to be set.

    Cast an address separately on each path. `tl.multiple_of` marks the operation that made its argument, so a pointer that two
    paths share would be marked on both, and an unaligned tensor would meet 128-bit accesses: a sticky `misaligned address`.
    """
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def unaligned(address, DTYPE: tl.constexpr):
    """The integer `address` as a pointer of which nothing more is known."""
    return address.to(tl.pointer_type(DTYPE))


@triton.jit
def switched(inside, switch):
    """The mask `inside` where the integer `switch` is not 0, else nothing. (The interpreter cannot broadcast a scalar comparison.)"""
    return inside & (tl.zeros_like(inside).to(tl.int32) + switch != 0)


@triton.jit
def multiplier_row(piece, pointers, COMPUTE: tl.constexpr):
    """What `multiplier` needs of a piece, read once per program."""
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
    )


@triton.jit
def multiplier(place, inside, row_of_piece):
    """M at the given places of a piece; 1 where it has none."""
    (scale, identity, has_scale, has_identity, row, row_magic, row_shift, inner, inner_magic, inner_shift,
     outer_stride, middle_stride, inner_stride, channels, channels_magic, channels_shift, phase, tap_step, tap_first) = row_of_piece  # fmt: skip
    o = quotient(place, row_magic, row_shift)
    rest = place - o * row
    middle = quotient(rest, inner_magic, inner_shift)
    index = o * outer_stride + middle * middle_stride + (rest - middle * inner) * inner_stride
    m = tl.load(scale + index, mask=switched(inside, has_scale), other=1.0)
    shifted = o + phase
    channel = shifted - quotient(shifted, channels_magic, channels_shift) * channels
    tap = switched(inside, has_identity) & (rest == channel * tap_step + tap_first)
    return tl.where(tap, m + tl.load(identity + o, mask=tap, other=0.0), m)


# ---- on the host: from shapes to pieces

Sizes = tuple[int, ...]
Described = (
    tuple[torch.dtype, int, Sizes, Sizes] | torch.layout | None
)  # dtype, device number, shape, strides; a layout if it is not strided
Level = tuple[int, int]  # (size, stride of scale)


def magic_division(divisor: int) -> tuple[int, int]:
    """(magic, shift) with n // divisor == (2 n * magic >> 32) >> shift for 0 <= n < 2^31 (rounding up; Granlund and Montgomery, 1994)."""
    shift = (divisor - 1).bit_length()
    return (1 << (31 + shift)) // divisor + 1, shift


class Address(NamedTuple):
    """How the place of an element leads to its multiplier."""

    levels: tuple[Level, Level, Level]
    channels: int = 1
    tap_step: int = 0
    tap_first: int = (
        0  # the identity's tap of output channel o sits at place (o mod channels) * tap_step + tap_first of its row
    )

    @property
    def row(self) -> int:
        return self.levels[1][0] * self.levels[2][0]


class Piece(NamedTuple):
    """A part of a tensor: from which element on, how many, and its address; `scale` and `identity` start at these elements."""

    start: int
    scale: int
    identity: int
    address: Address

    @property
    def numel(self) -> int:
        return self.address.levels[0][0] * self.address.row


def memory_order(shape: Sizes, strides: Sizes) -> list[int] | None:
    """The dimensions with more than one element, outermost first; None where the tensor has gaps or overlaps itself."""
    order = sorted((d for d, size in enumerate(shape) if size != 1), key=lambda d: -strides[d])
    place = 1
    for d in reversed(order):
        if strides[d] != place:
            return None
        place *= shape[d]
    return order


def contiguous_strides(shape: Sizes) -> Sizes:
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


def _merged(dims: Iterable[Level]) -> list[Level]:
    """Levels in place of dimensions (outermost first): neighbours become one where one stride serves both."""
    levels: list[Level] = []
    for size, stride in dims:
        if levels and levels[-1][1] == size * stride:
            levels[-1] = (levels[-1][0] * size, stride)
        else:
            levels.append((size, stride))
    return levels


def address(shape: Sizes, strides: Sizes, scale: tuple[Sizes, Sizes] | None, identity: Sizes | None) -> Address | None:
    """The address of a multiplier with a `scale` of (shape, strides) and an `identity` of a shape; None where it has none."""
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
    found = Address(tuple(levels), channels, strides[1] if channels > 1 else 0, tap_first)
    return found if len(levels) == 3 and found.row <= PIECE else None


def pieces(address: Address) -> Iterator[Piece]:
    """The parts of a tensor that 32-bit indices reach: whole rows of the outermost level, or parts of a row too long for that."""
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


# ---- on the host: from tensors to launches

Entry = tuple[tuple[Described, ...], Described, Described, int]
"""One parameter: its tensors that must be alike (gradient first), scale, identity, group."""

REMEMBERED = 1024
"""Plans and sets of tensors that an op keeps: step-in-backward has an optimizer per parameter."""


def describe(tensors: Sequence[Tensor | None]) -> list[Described]:
    """What a plan depends on; never a tensor's id, `param.data` is a new object each time."""
    try:
        return [None if t is None else (t.dtype, t.get_device(), t.shape, t.stride()) for t in tensors]
    except RuntimeError:  # a sparse tensor has no strides
        return [t.layout if t is not None and t.layout != torch.strided else describe([t])[0] for t in tensors]


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    try:
        return [0 if t is None else t.data_ptr() for t in tensors]
    except RuntimeError:  # nor has it an address
        return [0 if t is None or t.layout != torch.strided else t.data_ptr() for t in tensors]


class Route(NamedTuple):
    """The pieces of a parameter, and which parts of its multiplier the kernel cannot read where they are."""

    pieces: list[Piece]
    scale_copy: Sizes | None = None
    identity_copy: Sizes | None = None


def route(entry: Entry) -> Route | None:
    """How the kernels take a parameter. None where it is the reference's: gaps or overlaps, tensors that are not alike, other dtypes."""
    alike, scale, identity, group = entry
    if group < 0 or not all(isinstance(one, tuple) for one in alike):
        return None
    dtype, device, shape, strides = alike[0]
    if dtype not in COMPUTE or (device < 0) != INTERPRETED:  # -1 is the CPU
        return None
    for other in alike[1:]:
        if other[:3] != alike[0][:3] or any(a != b for size, a, b in zip(shape, strides, other[3]) if size > 1):
            return None
    if 0 in shape:
        return Route([])
    if scale is None:
        found = address(shape, strides, None, None)
        return found and Route(list(pieces(found)))
    for part in (scale, identity):
        if part is not None and not (isinstance(part, tuple) and part[1] == device and not part[0].is_complex):
            return None
    identity_shape = None if identity is None else tuple(identity[2])
    identity_copy = identity_shape if identity and (identity[0] != COMPUTE[dtype] or identity[3] != (1,)) else None
    missing = len(shape) - len(scale[2])
    if missing < 0:
        return None
    same = (1,) * missing + tuple(scale[2])
    # As it is; as a contiguous copy in the right dtype; with the whole kernel, where it has too many levels ([O, 1, kh, 1]).
    readings = [(copy, (copy, contiguous_strides(copy))) for copy in (same, same[:2] + tuple(shape[2:]))]
    if scale[0] == COMPUTE[dtype]:
        readings.insert(0, (None, scale[2:]))
    for copy, reading in readings:
        found = address(shape, strides, reading, identity_shape)
        if found and all(
            sum((size - 1) * stride for size, stride in piece.address.levels) < 2**31 for piece in pieces(found)
        ):
            return Route(list(pieces(found)), copy, identity_copy)
    return None


def chunk_tables(parts: Sequence[tuple[Piece, int]], chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """(chunks [programs], geometry [pieces, GEOMETRY]) of (piece, group) pairs, int32."""
    counts = np.array([-(-piece.numel // chunk) for piece, _ in parts], dtype=np.int64)
    rows = []
    for (piece, group), first in zip(parts, np.cumsum(counts) - counts):
        where = piece.address
        row, inner, strides = where.row, where.levels[2][0], [stride for _, stride in where.levels]
        rows.append(
            [first, piece.numel, group, row, *magic_division(row), inner, *magic_division(inner), *strides]
            + [
                where.channels,
                *magic_division(where.channels),
                piece.identity % where.channels,
                where.tap_step,
                where.tap_first,
            ]
        )
    geometry = np.array(rows, dtype=np.int64).reshape(-1, GEOMETRY.value)
    return np.repeat(np.arange(len(parts), dtype=np.int32), counts), geometry.astype(np.uint32).view(np.int32)


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel; per piece: number of its entry, and bytes from the start of scale, identity and tensors."""

    device: torch.device
    dtype: torch.dtype
    chunks: Tensor
    geometry: Tensor
    entries: np.ndarray  # [pieces]
    offsets: np.ndarray  # [pieces, 3]


@dataclass(frozen=True)
class Plan:
    """What follows from shapes: the launches, and which entries the kernels (`routes`) and the reference (`rest`) take."""

    routes: dict[int, Route]
    rest: list[int]
    launches: list[Launch]
    extents: np.ndarray  # [entries, tensors] bytes that a step reads or writes
    copied: list[
        tuple[int, int, Sizes, torch.dtype]
    ]  # (0 for scale or 1 for identity, entry, shape, dtype) of what is read from a copy

    def capturing(self) -> bool:
        return any(capturing(launch.device) for launch in self.launches)

    def streams(self) -> list[int]:
        return [stream(launch.device) for launch in self.launches]


@dataclass(frozen=True)
class Call:
    """What an op was called with, and what came of it."""

    structure: tuple
    state: tuple
    streams: list[int]
    plan: Plan
    pointers: list[Tensor] | None  # per launch  # [pieces, POINTERS + ...] int64; None where tensors overlap each other
    hyper: dict[tuple[torch.device, torch.dtype], tuple[list[float], Tensor]] = field(
        default_factory=dict
    )  # of the last step: values, table


ROOM = 2**20
"""Bytes that are pinned for captures, at least: a table of pointers takes 56 per parameter, 3 KB for RepOpt-VGG-B1."""

_captured: list[Any] = []  # what CUDA graphs read at each replay, so it is never freed
_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # scale or identity -> {what for: (version, copy)}


def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def capturing(device: torch.device) -> bool:
    return on_gpu(device) and torch.cuda.is_current_stream_capturing()


def stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if on_gpu(device) else 0


def pinned(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)


def send(table: Tensor, device: torch.device, wait: bool) -> Tensor:
    return table.to(device, non_blocking=not wait)


def keep(*what: Any) -> None:
    """For the CUDA graph that is being captured."""
    _captured.append(what)


def _written(table: Tensor, memory: Tensor) -> Tensor:
    return memory[: table.nbytes].view(table.dtype).view(table.shape).copy_(table)


class Staging:
    """Pinned memory for the tables that are new in a capture.

    A graph copies them from the host at each replay, so every table has a part of its own, which is never written to again.
    Nothing can be pinned inside a capture: that is an allocation, and an error in the default mode. From torch 2.11 on so is a
    copy from memory that is not pinned (github.com/pytorch/pytorch/pull/172156).
    """

    def __init__(self):
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._left = self._wanted = 0

    def reserve(self, nbytes: int = 0) -> None:
        """Outside captures: room for several tables of the largest size so far, once there was one to upload."""
        if nbytes:
            self._wanted = max(self._wanted, ROOM, 16 * nbytes)
        if 2 * self._left < self._wanted:
            self._memory, self._left = pinned(self._wanted), self._wanted

    def take(self, table: Tensor) -> Tensor:
        """Inside a capture: `table` in pinned memory."""
        nbytes = -(-table.nbytes // 64) * 64
        if nbytes > self._left:
            raise RuntimeError(
                f"a table of {table.nbytes} bytes is new in this CUDA graph capture, and memory for it can be pinned only outside: "
                "take one step before the capture"
            )
        part = _written(table, self._memory[len(self._memory) - self._left :])
        self._left -= nbytes
        keep(part)
        return part


staging = Staging()


def upload(table: Tensor, device: torch.device, wait: bool = False) -> Tensor:
    """`table` on the device, in stream order; with wait=True, outside captures, it is there on return, and any stream can read it.

    A CUDA graph repeats the copy at each replay.
    """
    if not on_gpu(device):
        return table
    if capturing(device):
        return send(staging.take(table), device, wait=False)
    if wait:
        return send(table, device, wait=True)
    staging.reserve(table.nbytes)
    return send(_written(table, pinned(table.nbytes)), device, wait=False)


def remember(memory: dict, key: Any, value: Any) -> None:
    if len(memory) >= REMEMBERED:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # kernels on any stream may still read what is dropped here
        memory.clear()
    memory[key] = value


def _copy(part: Tensor, shape: Sizes, dtype: torch.dtype) -> Tensor:
    """A scale or identity as the kernels can read it, kept until the original is written to or dies. A CUDA graph makes it anew at each replay."""
    purpose, version = (shape, dtype, stream(part.device)), 0 if part.is_inference() else part._version
    in_capture = capturing(part.device)
    kept = None if in_capture else _copies.get(part, {}).get(purpose)
    if kept is not None and kept[0] == version:
        return kept[1]
    copy = part.detach().to(dtype).expand(shape).clone(memory_format=torch.contiguous_format)
    if in_capture:
        keep(copy)
    else:
        _copies.setdefault(part, {})[purpose] = (version, copy)
    return copy


class Plans:
    """What an op remembers: shapes -> plan, and tensors -> pointers.

    Args:
        op:       its name, for LAUNCHES
        chunk:    dtype -> elements that one program works on
        distinct: whether two tensors of a call must not overlap (programs run in any order)
    """

    def __init__(self, op: str, chunk: Mapping[torch.dtype, int], distinct: bool):
        self.op, self.chunk, self.distinct = op, chunk, distinct
        self._plans: dict[tuple[Entry, ...], Plan] = {}
        self._calls: dict[tuple, list[Call]] = {}

    def prepare(
        self,
        tensors: Sequence[Sequence[Tensor]],
        scales: Sequence[Tensor | None],
        identities: Sequence[Tensor | None],
        groups: Sequence[int],
        alike: Sequence[int],
        first_steps: Sequence[bool],
    ) -> Call:
        """All that a call needs on the device; what is as it was at an earlier call is neither made nor uploaded again.

        `tensors` are lists with one entry per parameter, gradients first, whose addresses follow each other in a row of
        the pointers. Of a parameter in group n the first alike[n] of them are used, and must be alike.
        """
        columns = (scales, identities, *tensors)
        structure = (list(map(describe, columns)), list(groups), list(alike))
        where = list(map(addresses, columns))
        key = (
            len(groups),
            *(column[0] for column in where[3:]),
        )  # not by the gradients: they move more often than all else
        calls = self._calls.get(key, [])
        plan = next((call.plan for call in calls if call.structure == structure), None) or self._plan(
            structure, tensors[0]
        )
        for which, n, shape, dtype in plan.copied:
            where[which][n] = _copy(columns[which][n], shape, dtype).data_ptr()
        state, streams, in_capture = (where, list(first_steps)), plan.streams(), plan.capturing()
        # A graph may read what any stream uploaded for an earlier step: whoever replays it waits for what that step wrote. Nobody has to
        # wait for an op that only reads, so there a graph has tables of its own.
        same = (
            call
            for call in calls
            if call.plan is plan and call.state == state and (self.distinct if in_capture else call.streams == streams)
        )
        found = next(same, None)
        call = found or Call(
            structure,
            state,
            streams,
            plan,
            self._pointers(plan, np.array(where, dtype=np.int64), np.array(first_steps)),
        )
        if in_capture:
            keep(
                plan, found, *scales, *identities
            )  # a new table is in memory of the graph, and copied there at each replay
        else:
            staging.reserve()
            if found is None:
                remember(self._calls, key, [call, *calls[:3]])  # the allocator often takes turns with a few addresses
        return call

    def _plan(self, structure: tuple, grads: Sequence[Tensor]) -> Plan:
        (scales, identities, *tensors), groups, alike = structure
        entries = tuple(
            (same[: alike[group]], *rest, group)
            for same, *rest, group in zip(zip(*tensors), scales, identities, groups)
        )
        if entries in self._plans:
            return self._plans[entries]
        routes = {n: found for n, entry in enumerate(entries) if (found := route(entry)) is not None}
        parts: dict[tuple[torch.device, torch.dtype], list[tuple[int, Piece]]] = {}
        for n, found in routes.items():
            for piece in found.pieces:
                parts.setdefault((grads[n].device, grads[n].dtype), []).append((n, piece))
        launches = []
        for (device, dtype), numbered in parts.items():
            made = map(torch.from_numpy, chunk_tables([(piece, groups[n]) for n, piece in numbered], self.chunk[dtype]))
            there = [upload(table, device, wait=True) for table in made]
            offsets = [(piece.scale, piece.identity, piece.start) for _, piece in numbered]
            itemsizes = (COMPUTE[dtype].itemsize, COMPUTE[dtype].itemsize, dtype.itemsize)
            launches.append(
                Launch(device, dtype, *there, np.array([n for n, _ in numbered]), np.array(offsets) * itemsizes)
            )
        extents = np.zeros((len(entries), len(tensors)), dtype=np.int64)
        for n in routes:
            extents[n, : alike[groups[n]]] = grads[n].numel() * grads[n].itemsize
        copied = [
            (which, n, shape, COMPUTE[grads[n].dtype])
            for n, found in routes.items()
            for which, shape in enumerate((found.scale_copy, found.identity_copy))
            if shape is not None
        ]
        plan = Plan(routes, [n for n in range(len(entries)) if n not in routes], launches, extents, copied)
        if not plan.capturing():
            remember(self._plans, entries, plan)
        return plan

    def _pointers(self, plan: Plan, where: np.ndarray, first_steps: np.ndarray) -> list[Tensor] | None:
        """`where` are the addresses  # [columns, entries]"""
        starts, extents = where[2:].T[plan.extents > 0], plan.extents[plan.extents > 0]
        order = np.argsort(starts)
        if self.distinct and np.any(starts[order][:-1] + extents[order][:-1] > starts[order][1:]):
            return None
        made = []
        for launch in plan.launches:
            table = where[:, launch.entries].T
            has_scale = table[:, 0] != 0
            has_identity = has_scale & (
                table[:, 1] != 0
            )  # an identity without a scale is not read, as in the reference
            table = table + launch.offsets[:, [0, 1] + [2] * (len(where) - 2)]
            flags = np.where(np.all(table[:, 2:] % 16 == 0, axis=1), ALIGNED.value, 0)
            flags += (
                HAS_SCALE.value * has_scale
                + HAS_IDENTITY.value * has_identity
                + FIRST_STEP.value * first_steps[launch.entries]
            )
            made.append(upload(torch.from_numpy(np.column_stack((flags, table))), launch.device))
        return made

    def launch(self, launch: Launch, kernel: Any, *arguments: Any) -> None:
        LAUNCHES[self.op, str(launch.device), launch.dtype] += 1
        with torch.cuda.device(launch.device) if launch.device.type == "cuda" else contextlib.nullcontext():
            kernel[(len(launch.chunks),)](
                launch.chunks,
                launch.geometry,
                *arguments,
                DTYPE=TRITON_DTYPE[launch.dtype],
                BLOCK=BLOCK[launch.dtype],
                **options(launch.dtype),
            )
