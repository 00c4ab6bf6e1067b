"""From shapes to launches, and from tensors to pointers.

One launch serves all tensors of a call that share device and dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from gradrep_kernels.ops.triton import launching, staging
from gradrep_kernels.ops.triton.addressing import (
    ALIGNED,
    FIRST_STEP,
    HAS_IDENTITY,
    HAS_SCALE,
    Part,
    Piece,
    Random,
    Sizes,
    chunk_tables,
    first_element,
)
from gradrep_kernels.ops.triton.routes import COMPUTE, Entry, Route, addresses, describe, route

TRITON_DTYPE = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

BLOCK = {torch.float32: 1024, torch.float64: 512, torch.bfloat16: 1024, torch.float16: 1024}
"""Elements that one program of the step works on: one (float32: two) 128-bit accesses per tensor and thread."""


@functools.cache
def options(
    dtype: torch.dtype,
    lanes: int = 64 if torch.version.hip else 32,
    AVERAGED: bool = False,
    NARROW: int = 0,
    *,
    many_states: bool = False,
) -> dict[str, Any]:
    """Compile options of the kernels over parameters, for a variant of the step. `lanes` is the size of a warp."""
    # With 128 threads on AMD the step of float32 would need 66 registers of 64.
    threads = 256 if dtype == torch.float64 or (dtype == torch.float32 and lanes == 64) else 128
    if NARROW:  # with two counters of random bits in a thread it would need 66 registers, 74 on AMD
        threads = max(threads, BLOCK[dtype] * (COMPUTE[dtype] if AVERAGED else dtype).itemsize // 16)
    limit = {}
    if many_states:
        # Three states and the |α| need 82 to 114 registers with 256 threads, and up to 152 with 128, where 16-bit
        # tensors have accesses of 128 bits. Two and three blocks fit a multiprocessor, with 24 KB and more on their
        # way. Left to itself, ptxas keeps to 80 or 128, and spills.
        threads = 128 if dtype.itemsize == 2 else 256
        if lanes == 32:
            limit = {"maxnreg": 128 if threads == 256 else 168}
    # A product and a sum contracted to one FMA would differ from the reference in the last bit of 18 % of the elements.
    return {"num_warps": threads // lanes, "enable_fp_fusion": False, **limit}


# ---- from shapes to launches


@dataclass(frozen=True)
class Batch:
    """The tables of one launch.

    Args:
        parts:    what the tables are made from
        averaged: whether some parameter has an average
        narrow:   bit n: state n is bfloat16, and may be rounded by random bits
        octets:   whether the numbers of its elements, for random bits, begin at a multiple of 8  # [pieces]
        entries:  the parameter of each piece  # [pieces]
        offsets:  bytes from the start of scale, identity, average and tensors  # [pieces, 3 + tensors]
    """

    device: torch.device
    dtype: torch.dtype
    chunks: Tensor
    geometry: Tensor
    parts: list[Part]
    averaged: bool
    narrow: int
    octets: np.ndarray
    entries: np.ndarray
    offsets: np.ndarray

    def rechunked(self, chunk: int) -> Batch:
        """The same for programs that each work on `chunk` elements."""
        return replace(self, **_tables(self.parts, chunk, self.device))


def _tables(parts: list[Part], chunk: int, device: torch.device) -> dict[str, Tensor]:
    made = map(torch.from_numpy, chunk_tables(parts, chunk))
    return dict(zip(("chunks", "geometry"), (staging.upload(table, device, wait=True) for table in made)))


@dataclass(frozen=True)
class Plan:
    """All that follows from shapes.

    Args:
        routes:  entry -> how the kernels take it
        rest:    entries that the reference takes
        batches: one per launch
        extents: bytes that a call reads or writes  # [entries, 1 + tensors], the average first
        copied:  (0 for scale or 1 for identity, entry, shape, dtype) of each part that is read from a copy
        others:  the batches for chunks of another size
    """

    routes: dict[int, Route]
    rest: list[int]
    batches: list[Batch]
    extents: np.ndarray
    copied: list[tuple[int, int, Sizes, torch.dtype]]
    others: dict[int, list[Batch]] = field(default_factory=dict)

    def capturing(self) -> bool:
        return any(staging.capturing(batch.device) for batch in self.batches)

    def streams(self) -> list[int]:
        return [staging.stream(batch.device) for batch in self.batches]

    def rechunked(self, chunk: int) -> list[Batch]:
        """The batches for programs that each work on `chunk` elements, made once. A CUDA graph has its own."""
        if chunk in self.others:
            return self.others[chunk]
        made = [batch.rechunked(chunk) for batch in self.batches]
        if self.capturing():
            staging.keep(made)
        else:
            self.others[chunk] = made
        return made


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
        layered: whether scales are several multipliers, one behind the other
        many_states: whether there are more than two, as `options` wants to know
    """

    def __init__(
        self,
        op: str,
        chunk: Mapping[torch.dtype, int],
        writes: bool,
        layered: bool = False,
        many_states: bool = False,
    ):
        self.op, self.chunk, self.writes, self.layered, self.many_states = op, chunk, writes, layered, many_states
        self.plans: dict[tuple[Entry, ...], Plan] = {}
        self.calls: dict[tuple, list[Call]] = {}

    def prepare(
        self,
        tensors: Sequence[Sequence[Tensor]],
        scales: Sequence[Tensor | None],
        identities: Sequence[Tensor | None],
        averages: Sequence[Tensor | None] | None = None,
        groups: Sequence[int] | None = None,
        used: Sequence[int] = (1,),
        random: Sequence[Random | None] | None = None,
        first_steps: Sequence[bool] | None = None,
    ) -> Call:
        """All that a call needs on the device. Tables of an earlier call of the same tensors are used again.

        `tensors` are lists with one entry per parameter, gradients first. In this order their addresses stand in a row
        of the pointers. Of a parameter in group n the first used[n] of them are used, and must be alike.
        """
        count = len(tensors[0])
        columns = (scales, identities, averages or [None] * count, *tensors)
        groups, random = list(groups or [0] * count), list(random or [None] * count)
        structure = (list(map(describe, columns)), groups, list(used), random)
        where = list(map(addresses, columns))
        key = (count, *(column[0] for column in where[4:]))  # without the gradients, which move most often
        calls = self.calls.get(key, [])
        plan = next((call.plan for call in calls if call.structure == structure), None)
        plan = plan or self.plan(structure, tensors[0])
        for which, n, shape, dtype in plan.copied:
            where[which][n] = readable_copy(columns[which][n], shape, dtype).data_ptr()
        call = self.call(calls, plan, (where, list(first_steps or [False] * count)), (*scales, *identities), structure)
        if calls and key not in self.calls:
            staging.remember(self.calls, key, calls)
        return call

    def call(
        self, calls: list[Call], plan: Plan, state: tuple, parts: Sequence[Tensor | None], structure: tuple | None
    ) -> Call:
        """The call of `plan` on tensors at given addresses: one of `calls`, or a new one, which is put at their head.

        `state` has the addresses (scales, identities, averages, then the tensors) and the list of first steps. `parts`
        are the tensors that a CUDA graph must keep alive.
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
        """The plan of a call. `structure` is what `describe` tells of its columns, then groups, used and random."""
        (scales, identities, averages, *tensors), groups, used, random = structure
        entries = tuple(
            Entry(same[: used[group]], *parts, group, average, chance, self.layered)
            for same, *parts, group, average, chance in zip(zip(*tensors), scales, identities, groups, averages, random)
        )
        if entries in self.plans:
            return self.plans[entries]
        routes = {n: way for n, entry in enumerate(entries) if (way := route(entry)) is not None}
        numbered: dict[tuple[torch.device, torch.dtype, int], list[tuple[int, Piece]]] = {}
        for n, way in routes.items():
            for piece in way.pieces:
                numbered.setdefault((grads[n].device, grads[n].dtype, entries[n].narrow), []).append((n, piece))
        batches = [self._batch(kind, pieces, entries, len(tensors)) for kind, pieces in numbered.items()]
        extents = np.zeros((len(entries), 1 + len(tensors)), dtype=np.int64)
        for n in routes:
            sizes = entries[n].itemsizes
            extents[n, : len(sizes)] = grads[n].numel() * np.array(sizes)
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
        self,
        kind: tuple[torch.device, torch.dtype, int],
        numbered: list[tuple[int, Piece]],
        entries: Sequence[Entry],
        tensors: int,
    ) -> Batch:
        """`numbered` are pieces with the numbers of their entries."""
        device, dtype, narrow = kind
        parts = [(piece, entries[n].group, entries[n].random) for n, piece in numbered]
        offsets = np.zeros((len(parts), 3 + tensors), dtype=np.int64)
        for row, (n, piece) in zip(offsets, numbered):
            sizes = entries[n].itemsizes
            row[:2] = piece.scale * COMPUTE[dtype].itemsize, piece.identity * COMPUTE[dtype].itemsize
            row[2 : 2 + len(sizes)] = piece.start * np.array(sizes)
        octets = np.array([first_element(part) % 8 == 0 for part in parts])
        which = np.array([n for n, _ in numbered])
        averaged = any(entries[n].average is not None for n in which)
        tables = _tables(parts, self.chunk[dtype], device)
        return Batch(device, dtype, *tables.values(), parts, averaged, narrow, octets, which, offsets)

    def _pointers(self, plan: Plan, where: np.ndarray, first_steps: np.ndarray) -> list[Tensor] | None:
        """The tables of pointers. `where` are the addresses  # [columns, entries]"""
        if self.writes and overlap(where[2:].T, plan.extents):
            return None
        made = []
        for batch in plan.batches:
            table = where[:, batch.entries].T
            has_scale = table[:, 0] != 0
            has_identity = has_scale & (table[:, 1] != 0)  # the reference reads no identity without a scale either
            table = table + batch.offsets
            flags = ALIGNED.value * ((table[:, 2:] % 16 == 0).all(axis=1) & batch.octets)
            flags += HAS_SCALE.value * has_scale + HAS_IDENTITY.value * has_identity
            flags += FIRST_STEP.value * first_steps[batch.entries]
            made.append(staging.upload(torch.from_numpy(np.concatenate((flags[:, None], table), axis=1)), batch.device))
        return made

    def launch(self, batch: Batch, kernel: Any, *arguments: Any, **variant: Any) -> None:
        """Launch a kernel over the batch. `variant` are the constants by which variants of it differ."""
        made = options(batch.dtype, many_states=self.many_states, **variant)
        launching.launch(
            self.op, batch.device, batch.dtype, kernel, len(batch.chunks), batch.chunks, batch.geometry, *arguments,
            DTYPE=TRITON_DTYPE[batch.dtype], BLOCK=BLOCK[batch.dtype], **variant, **made,
        )  # fmt: skip
