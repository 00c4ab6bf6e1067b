"""A step that is planned: what it was made for is told once, and the host's work does not grow with the parameters.

Between the steps the plan compares what torch tells of every tensor with what it told before. Maps do so, whose
functions are torch's own in C, not loops of Python: 1,150 bytecodes for a step of any number of parameters, and
458 more where it clips, averages and rounds states by random bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, gt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradrep_kernels.ops.dense import alike
from gradrep_kernels.ops.reference.step_tail import Tail
from gradrep_kernels.ops.triton import plans, staging
from gradrep_kernels.ops.triton.addressing import POINTERS
from gradrep_kernels.ops.triton.rep_grad_norm import CHUNK, write_norm
from gradrep_kernels.ops.triton.routes import chances

_FACTS, _VERSION, _DEVICE = attrgetter("dtype", "device", "shape"), attrgetter("_version"), attrgetter("device")
NO_TAIL = Tail.of(None)
ABSENT = (-1.0,) * len(NO_TAIL)
_NOTHING = torch.empty(0, device="cpu")  # in the place of a part of a multiplier that is not there: its address is 0


def have_states(
    params: Sequence[Tensor], states: Sequence[Sequence[Tensor]], groups: Sequence[int], number: int
) -> list[int]:
    """How many states the parameters of each group have. A parameter stands itself in the place of one it lacks."""
    have = [len(states)] * number
    for p, group, *own in zip(params, groups, *states):
        there = next((n for n, state in enumerate(own) if state is p), len(own))
        have[group] = min(have[group], there)
    return have


class PlannedStep:
    """The steps of the same parameters, states and multipliers, none of which is a first one.

    Args:
        op:     the step_op.StepOp, whose memory and launches it uses
        plan:   made for gradients like their parameters
        have:   group -> how many states its parameters have
        parts:  scales, identities
        states: with the parameter in the place of one that is not there
    """

    @classmethod
    def of(
        cls,
        op: Any,
        params: list[Tensor],
        states: Sequence[Sequence[Tensor | None]],
        parts: Sequence[Sequence[Tensor | None]],
        groups: Sequence[int],
        averages: Sequence[Tensor | None],
        numbers: Sequence[int],
        elements: Sequence[Tensor | None],
    ) -> PlannedStep | None:
        """Make the plan, or return None where the kernels cannot take every parameter.

        None is made in a CUDA graph capture either, where tables arrive at a replay only.
        """
        if staging.capturing(params[0].device):
            return None
        states = [[p if state is None else state for p, state in zip(params, column)] for column in states]
        have = have_states(params, states, groups, 1 + max(map(abs, groups)))
        structure = (
            list(map(plans.describe, (*parts, averages, params, params, *states))),
            list(groups),
            [2 + has for has in have],
            chances(states, numbers, elements),
        )
        plan = op.plans.plan(structure, params)
        if plan.rest:
            return None
        where = np.array(list(map(plans.addresses, (averages, params, *states))), dtype=np.int64)
        if plans.overlap(where.T, np.delete(plan.extents, 1, axis=1)):  # without the gradients
            return None
        return cls(op, plan, have, parts, params, states, averages)

    def __init__(self, op, plan, have, parts, params, states, averages):
        self._op, self._plan, self._have_states = op, plan, have
        self._given = parts
        # As the kernels read them: those that are read from a copy are replaced by it at the first step.
        self._parts = [[_NOTHING if part is None else part for part in column] for column in parts]
        copied = [parts[which][n] for which, n, _, _ in plan.copied]
        self._copied = [part for part in copied if not part.is_inference()]  # which have no version, and do not change
        self._versions: tuple | None = None
        self._averages = [_NOTHING if average is None else average for average in averages]
        self._arrays = (params, *states)
        self._device = params[0].device
        self._first_steps = [False] * len(params)
        # Gradients are expected to be like their parameters at first.
        own = [state for column in states for state, p in zip(column, params) if state is not p]
        self._own = params + own + [average for average in averages if average is not None]
        self._needs_random_bits = any(state.dtype != p.dtype for column in states for state, p in zip(column, params))
        self._facts, self._strides = _facts(params + self._own)
        self._calls: list[plans.Call] = []
        self._checked: tuple | None = None  # hyper-parameters with which the states that are there suffice

    def take(
        self,
        grads: list[Tensor],
        hyper: Sequence[float | Tensor],
        on_device: list[Tensor],
        places: Sequence[int],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        tail: Sequence[float] = (),
        max_norm: float = 0.0,
        norm: Tensor | None = None,
        clip: Tensor | None = None,
    ) -> bool:
        """Take the step. Returns False, with nothing done, where a tensor is not what it was."""
        numbers, places = tuple(map(float, hyper)), tuple(places)
        if not self._suits(grads) or not self._has_the_states_of(numbers, places):
            return False
        if not {self._device}.issuperset(map(_DEVICE, on_device)) or (norm is not None and norm.device != self._device):
            return False
        known = Tail.of(tail) if tail else NO_TAIL
        if places and len(numbers) + 1 in places:
            known = known._replace(stochastic=True)  # as it may be
        if self._needs_random_bits and not known.stochastic:
            return False
        call = self._call(grads)
        if call is None:
            return False
        table, live = self._completed(call, numbers, on_device, places) if places else (numbers, None)
        if norm is not None:
            clip = self._write_norm(call, norm, grad_scale, max_norm)
        self._op.launch(call, table, grad_scale, found_inf, clip, known, live)
        return True

    def norm(self, grads: list[Tensor], norm: Tensor) -> bool:
        """Write √(Σ M ⊙ g²). Returns False, with nothing done, where a tensor is not what it was."""
        call = self._call(grads) if norm.device == self._device and self._suits(grads) else None
        if call is not None:
            self._write_norm(call, norm)
        return call is not None

    def _call(self, grads: list[Tensor]) -> plans.Call | None:
        """The tables of a step with these gradients. None where tensors share memory."""
        if self._plan.copied:
            self._renew_copies()
        where = [list(map(Tensor.data_ptr, column)) for column in (*self._parts, self._averages, grads, *self._arrays)]
        parts = self._given[0] + self._given[1] if self._plan.capturing() else ()
        call = self._op.plans.call(self._calls, self._plan, (where, self._first_steps), parts, None)
        return None if call.pointers is None else call

    def _write_norm(
        self, call: plans.Call, norm: Tensor, grad_scale: Tensor | None = None, max_norm: float | None = None
    ) -> Tensor | None:
        """Write the norm. Returns the factor that clips by it."""
        width = POINTERS.value + len(self._arrays)
        return write_norm(
            self._op.plans,
            self._plan.rechunked(CHUNK.value),
            call.pointers,
            width,
            norm,
            grad_scale,
            max_norm,
            factor=self._op.norm_factor,
        )

    def _completed(
        self, call: plans.Call, numbers: tuple[float, ...], on_device: list[Tensor], places: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """The hyper-parameters on the device, and the tail if some of it lies there: -1 stands for its other numbers.

        So the count of steps, which the host may have, is no reason for a new table.
        """
        end = len(numbers)
        has_tail = max(places) >= end
        made = self._op.completed(call, numbers + ABSENT if has_tail else numbers, on_device, places)
        return made[:end].view(-1, len(self._op.rule.hyper)), made[end:] if has_tail else None

    def _suits(self, grads: list[Tensor]) -> bool:
        """Whether gradients, parameters and states have the types, dtypes, devices, shapes and strides they had."""
        if len(grads) != len(self._first_steps) or set(map(type, grads)) != {Tensor}:
            return False
        facts, strides = _facts(grads + self._own)
        if facts != self._facts:
            return False
        if strides != self._strides:
            if not all(map(alike, (shape for _, _, shape in facts), strides, self._strides)):
                return False
            self._strides = strides
        return True

    def _has_the_states_of(self, numbers: tuple[float, ...], places: tuple[int, ...]) -> bool:
        """Whether no group without states needs them now. A number that only the device knows may have any value."""
        if self._checked == (numbers, places):
            return True
        table = self._op.table(numbers)
        needed = self._op.rule.kept_states(table)
        if places:
            table.view(-1)[[n for n in places if n < len(numbers)]] = 1
            needed = list(map(max, needed, self._op.rule.kept_states(table)))
        if len(needed) < len(self._have_states) or any(map(gt, needed, self._have_states)):
            return False
        self._checked = numbers, places
        return True

    def _renew_copies(self) -> None:
        """Copy the parts that the kernels cannot read as they are, where that was not done, or they have changed."""
        in_capture = self._plan.capturing()
        versions = (list(map(_VERSION, self._copied)), self._plan.streams())
        if versions == self._versions and not in_capture:
            return
        for which, n, shape, dtype in self._plan.copied:
            self._parts[which][n] = plans.readable_copy(self._given[which][n], shape, dtype)
        self._versions = None if in_capture else versions


def _facts(tensors: list[Tensor]) -> tuple[list[tuple], list[tuple[int, ...]]]:
    # Strides first: of a tensor that has none, torch's error says so.
    strides = list(map(Tensor.stride, tensors))
    return list(map(_FACTS, tensors)), strides
