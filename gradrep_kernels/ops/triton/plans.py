"""From shapes to launches, and from tensors to pointers.

One launch serves all tensors of a call that share device and dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from gradrep_kernels.ops.dense import alike
from gradrep_kernels.ops.triton import launching, staging
from gradrep_kernels.ops.triton.addressing import (
    ALIGNED,
    FIRST_STEP,
    HAS_IDENTITY,
    HAS_SCALE,
    Piece,
    Sizes,
    address,
    chunk_tables,
    contiguous_strides,
    pieces,
)

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

BLOCK = {torch.float32: 1024, torch.float64: 512, torch.bfloat16: 1024, torch.float16: 1024}
"""Elements that one program of the step works on: one (float32: two) 128-bit accesses per tensor and thread."""


def options(dtype: torch.dtype, lanes: int = 64 if torch.version.hip else 32) -> dict[str, Any]:
    """Compile options of the kernels over parameters. `lanes` is the size of a warp."""
    # With 128 threads on AMD the step of float32 would need 66 registers of 64.
    threads = 256 if dtype == torch.float64 or (dtype == torch.float32 and lanes == 64) else 128
    # A product and a sum contracted to one FMA would differ from the reference in the last bit of 18 % of the elements.
    return {"num_warps": threads // lanes, "enable_fp_fusion": False}


# ---- from shapes to launches

Described = tuple[torch.dtype, int, Sizes, Sizes] | torch.layout | None
"""dtype, device number, shape, strides of a tensor; its layout if it is not strided."""

Entry = tuple[tuple[Described, ...], Described, Described, int]
"""One parameter: its tensors that must be alike (gradient first), scale, identity, group."""


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
    tensors, scale, identity, group = entry
    if group < 0 or not all(isinstance(one, tuple) for one in tensors):
        return None
    dtype, device, shape, strides = tensors[0]
    if dtype not in COMPUTE or (device < 0) != launching.INTERPRETED:  # -1 is the CPU
        return None
    for other in tensors[1:]:
        if other[:3] != tensors[0][:3] or not alike(shape, strides, other[3]):
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
    missing = len(shape) - len(scale[2])
    if missing < 0:
        return None
    same = (1,) * missing + tuple(scale[2])
    # The scale as it is, or a contiguous copy in the right dtype, or a copy with the whole kernel: [O, 1, kh, 1] has
    # too many levels otherwise.
    readings = [(copy, (copy, contiguous_strides(copy))) for copy in (same, same[:2] + tuple(shape[2:]))]
    if scale[0] == COMPUTE[dtype]:
        readings.insert(0, (None, scale[2:]))
    for copy, reading in readings:
        where = address(shape, strides, reading, identity_shape)
        parts = [] if where is None else list(pieces(where))
        if where and all(sum((size - 1) * stride for size, stride in part.address.levels) < 2**31 for part in parts):
            return Route(parts, copy, identity_copy)
    return None


@dataclass(frozen=True)
class Batch:
    """The tables of one launch.

    Args:
        entries: the parameter of each piece  # [pieces]
        offsets: bytes from the start of scale, identity and tensors  # [pieces, 3]
    """

    device: torch.device
    dtype: torch.dtype
    chunks: Tensor
    geometry: Tensor
    entries: np.ndarray
    offsets: np.ndarray


@dataclass(frozen=True)
class Plan:
    """All that follows from shapes.

    Args:
        routes:  entry -> how the kernels take it
        rest:    entries that the reference takes
        batches: one per launch
        extents: bytes that a call reads or writes  # [entries, tensors]
        copied:  (0 for scale or 1 for identity, entry, shape, dtype) of each part that is read from a copy
    """

    routes: dict[int, Route]
    rest: list[int]
    batches: list[Batch]
    extents: np.ndarray
    copied: list[tuple[int, int, Sizes, torch.dtype]]

    def capturing(self) -> bool:
        return any(staging.capturing(batch.device) for batch in self.batches)

    def streams(self) -> list[int]:
        return [staging.stream(batch.device) for batch in self.batches]


# ---- from tensors to pointers


def overlap(starts: np.ndarray, extents: np.ndarray) -> bool:
    """Whether two runs of memory share a byte. Those of extent 0 do not count."""
    starts, extents = starts[extents > 0], extents[extents > 0]
    order = starts.argsort()
    return bool((starts[order][:-1] + extents[order][:-1] > starts[order][1:]).any())


@dataclass(frozen=True)
class Call:
    """The tensors of a call, as numbers, and the tables that were made for them.

    Args:
        structure: what `prepare` made the plan from; None for a plan that was made once for many calls
        pointers:  per batch  # [pieces, POINTERS + ...] int64; None where tensors overlap each other
        hyper:     of the last step: what the tables of hyper-parameters were made from, and these
    """

    structure: tuple | None
    state: tuple
    streams: list[int]
    plan: Plan
    pointers: list[Tensor] | None
    hyper: dict[tuple[torch.device, torch.dtype], tuple[tuple, list[Tensor]]] = field(default_factory=dict)


_copies: WeakTensorKeyDictionary = (
    WeakTensorKeyDictionary()
)  # scale or identity -> {(shape, dtype, stream): (version, copy)}


def readable_copy(part: Tensor, shape: Sizes, dtype: torch.dtype) -> Tensor:
    """A scale or identity as the kernels can read it, kept until the original is written to or dies.

    A CUDA graph makes it anew at each replay.
    """
    purpose, version = (shape, dtype, staging.stream(part.device)), 0 if part.is_inference() else part._version
    in_capture = staging.capturing(part.device)
    kept = None if in_capture else _copies.get(part, {}).get(purpose)
    if kept is not None and kept[0] == version:
        return kept[1]
    copy = part.detach().to(dtype).expand(shape).clone(memory_format=torch.contiguous_format)
    if in_capture:
        staging.keep(copy)
    else:
        _copies.setdefault(part, {})[purpose] = (version, copy)
    return copy


class Plans:
    """The memory of an op: shapes -> plan, and tensors -> pointers.

    Args:
        op:     its name, for LAUNCHES
        chunk:  dtype -> elements that one program works on
        writes: whether the op writes to the tensors. They must not overlap then, since programs run in any order
    """

    def __init__(self, op: str, chunk: Mapping[torch.dtype, int], writes: bool):
        self.op, self.chunk, self.writes = op, chunk, writes
        self.plans: dict[tuple[Entry, ...], Plan] = {}
        self.calls: dict[tuple, list[Call]] = {}

    def prepare(
        self,
        tensors: Sequence[Sequence[Tensor]],
        scales: Sequence[Tensor | None],
        identities: Sequence[Tensor | None],
        groups: Sequence[int],
        used: Sequence[int],
        first_steps: Sequence[bool],
    ) -> Call:
        """All that a call needs on the device. Tables of an earlier call of the same tensors are used again.

        `tensors` are lists with one entry per parameter, gradients first. In this order their addresses stand in a row
        of the pointers. Of a parameter in group n the first used[n] of them are used, and must be alike.
        """
        columns = (scales, identities, *tensors)
        structure = (list(map(describe, columns)), list(groups), list(used))
        where = list(map(addresses, columns))
        key = (len(groups), *(column[0] for column in where[3:]))  # without the gradients, which move most often
        calls = self.calls.get(key, [])
        plan = next((call.plan for call in calls if call.structure == structure), None)
        plan = plan or self.plan(structure, tensors[0])
        for which, n, shape, dtype in plan.copied:
            where[which][n] = readable_copy(columns[which][n], shape, dtype).data_ptr()
        call = self.call(calls, plan, (where, list(first_steps)), (*scales, *identities), structure)
        if calls and key not in self.calls:
            staging.remember(self.calls, key, calls)
        return call

    def call(
        self, calls: list[Call], plan: Plan, state: tuple, parts: Sequence[Tensor | None], structure: tuple | None
    ) -> Call:
        """The call of `plan` on tensors at given addresses: one of `calls`, or a new one, which is put at their head.

        `state` has the addresses (scales, identities, then the tensors) and the list of first steps. `parts` are the
        tensors that a CUDA graph must keep alive.
        """
        streams, in_capture = plan.streams(), plan.capturing()
        # A graph of an op that writes may read tables that any stream uploaded for an earlier step: the user who
        # replays it waits for that step's results anyway. Nobody has to wait for an op that only reads, so there a
        # graph has tables of its own.
        earlier = next(
            (
                call
                for call in calls
                if call.plan is plan
                and call.state == state
                and (self.writes if in_capture else call.streams == streams)
            ),
            None,
        )
        call = earlier
        if call is None:
            where, first_steps = state
            pointers = self._pointers(plan, np.array(where, dtype=np.int64), np.array(first_steps))
            call = Call(structure, state, streams, plan, pointers)
        if in_capture:  # a new table is in memory of the graph, and copied there at each replay
            staging.keep(plan, earlier, *parts)
        else:
            staging.room.reserve()
            if earlier is None:  # the allocator often takes turns with a few addresses, so four calls are kept
                calls[:] = call, *calls[:3]
        return call

    def plan(self, structure: tuple, grads: Sequence[Tensor]) -> Plan:
        """The plan of a call: `structure` is what `describe` tells of its columns, the groups, and `prepare`'s used."""
        (scales, identities, *tensors), groups, used = structure
        entries = tuple(
            (same[: used[group]], *rest, group) for same, *rest, group in zip(zip(*tensors), scales, identities, groups)
        )
        if entries in self.plans:
            return self.plans[entries]
        routes = {n: way for n, entry in enumerate(entries) if (way := route(entry)) is not None}
        parts: dict[tuple[torch.device, torch.dtype], list[tuple[int, Piece]]] = {}
        for n, way in routes.items():
            for piece in way.pieces:
                parts.setdefault((grads[n].device, grads[n].dtype), []).append((n, piece))
        batches = [self._batch(device, dtype, numbered, groups) for (device, dtype), numbered in parts.items()]
        extents = np.zeros((len(entries), len(tensors)), dtype=np.int64)
        for n in routes:
            extents[n, : used[groups[n]]] = grads[n].numel() * grads[n].itemsize
        copied = [
            (which, n, shape, COMPUTE[grads[n].dtype])
            for n, way in routes.items()
            for which, shape in enumerate((way.scale_copy, way.identity_copy))
            if shape is not None
        ]
        plan = Plan(routes, [n for n in range(len(entries)) if n not in routes], batches, extents, copied)
        if not plan.capturing():
            staging.remember(self.plans, entries, plan)
        return plan

    def _batch(
        self, device: torch.device, dtype: torch.dtype, numbered: list[tuple[int, Piece]], groups: list[int]
    ) -> Batch:
        """`numbered` are pieces with the numbers of their entries."""
        made = map(torch.from_numpy, chunk_tables([(piece, groups[n]) for n, piece in numbered], self.chunk[dtype]))
        chunks, geometry = (staging.upload(table, device, wait=True) for table in made)
        entries = np.array([n for n, _ in numbered])
        offsets = np.array([(piece.scale, piece.identity, piece.start) for _, piece in numbered])
        itemsizes = (COMPUTE[dtype].itemsize, COMPUTE[dtype].itemsize, dtype.itemsize)
        return Batch(device, dtype, chunks, geometry, entries, offsets * itemsizes)

    def _pointers(self, plan: Plan, where: np.ndarray, first_steps: np.ndarray) -> list[Tensor] | None:
        """The tables of pointers. `where` are the addresses  # [columns, entries]"""
        if self.writes and overlap(where[2:].T, plan.extents):
            return None
        made = []
        for batch in plan.batches:
            table = where[:, batch.entries].T
            has_scale = table[:, 0] != 0
            has_identity = has_scale & (table[:, 1] != 0)  # the reference reads no identity without a scale either
            table = table + batch.offsets[:, [0, 1] + [2] * (len(where) - 2)]
            flags = ALIGNED.value * (table[:, 2:] % 16 == 0).all(axis=1)
            flags += HAS_SCALE.value * has_scale + HAS_IDENTITY.value * has_identity
            flags += FIRST_STEP.value * first_steps[batch.entries]
            made.append(staging.upload(torch.from_numpy(np.concatenate((flags[:, None], table), axis=1)), batch.device))
        return made

    def launch(self, batch: Batch, kernel: Any, *arguments: Any) -> None:
        launching.launch(
            self.op, batch.device, batch.dtype, kernel, len(batch.chunks), batch.chunks, batch.geometry, *arguments,
            DTYPE=TRITON_DTYPE[batch.dtype], BLOCK=BLOCK[batch.dtype], **options(batch.dtype),
        )  # fmt: skip
