"""A step that is planned: what it was made for is told once, and the host's work does not grow with the parameters.

Between the steps the plan compares what torch tells of every tensor with what it told before. Maps do so, whose
functions are torch's own in C, not loops of Python: 1,108 bytecodes for a step of any number of parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradrep_kernels.ops.dense import alike
from gradrep_kernels.ops.triton import plans, staging

_FACTS, _VERSION, _DEVICE = attrgetter("dtype", "device", "shape"), attrgetter("_version"), attrgetter("device")
_NOTHING = torch.empty(0, device="cpu")  # in the place of a part of a multiplier that is not there: its address is 0


def have_states(
    params: Sequence[Tensor], states: Sequence[Sequence[Tensor]], groups: Sequence[int], number: int
) -> list[bool]:
    """Whether the parameters of each group have states. A parameter without them stands in their place itself."""
    have = [True] * number
    for p, group, *own in zip(params, groups, *states):
        have[group] &= all(state is not p for state in own)
    return have


class PlannedStep:
    """The steps of the same parameters, states and multipliers, none of which is a first one.

    Args:
        op:     the step_op.StepOp, whose memory and launches it uses
        plan:   made for gradients like their parameters
        have:   group -> whether its parameters have states
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
    ) -> PlannedStep | None:
        """Make the plan, or return None where the kernels cannot take every parameter.

        None is made in a CUDA graph capture either, where tables arrive at a replay only.
        """
        if staging.capturing(params[0].device):
            return None
        states = [[p if state is None else state for p, state in zip(params, column)] for column in states]
        have = have_states(params, states, groups, 1 + max(map(abs, groups)))
        structure = (
            list(map(plans.describe, (*parts, params, params, *states))),
            list(groups),
            [2 + len(states) * has for has in have],
        )
        plan = op.plans.plan(structure, params)
        if plan.rest:
            return None
        where = np.array(list(map(plans.addresses, (params, *states))), dtype=np.int64)
        return None if plans.overlap(where.T, plan.extents[:, 1:]) else cls(op, plan, have, parts, params, states)

    def __init__(self, op, plan, have, parts, params, states):
        self._op, self._plan, self._have_states = op, plan, have
        self._given = parts
        # As the kernels read them: those that are read from a copy are replaced by it at the first step.
        self._parts = [[_NOTHING if part is None else part for part in column] for column in parts]
        copied = [parts[which][n] for which, n, _, _ in plan.copied]
        self._copied = [part for part in copied if not part.is_inference()]  # which have no version, and do not change
        self._versions: tuple | None = None
        self._arrays = (params, *states)
        self._first_steps = [False] * len(params)
        # Gradients are expected to be like their parameters at first.
        own = [state for column in states for state, p in zip(column, params) if state is not p]
        self._own = params + own
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
    ) -> bool:
        """Take the step. Returns False, with nothing done, where a tensor is not what it was."""
        numbers, places = tuple(map(float, hyper)), tuple(places)
        if not self._suits(grads) or not self._has_the_states_of(numbers, places):
            return False
        if not {self._arrays[0][0].device}.issuperset(map(_DEVICE, on_device)):
            return False
        if self._plan.copied:
            self._renew_copies()
        where = [list(map(Tensor.data_ptr, column)) for column in (*self._parts, grads, *self._arrays)]
        parts = self._given[0] + self._given[1] if self._plan.capturing() else ()
        call = self._op.plans.call(self._calls, self._plan, (where, self._first_steps), parts, None)
        if call.pointers is None:
            return False
        table = self._op.completed(call, numbers, on_device, places) if places else numbers
        self._op.launch(call, table, grad_scale, found_inf)
        return True

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
        needed = self._op.rule.keeps_state(table)
        if places:
            table.view(-1)[list(places)] = 1
            needed = [a or b for a, b in zip(needed, self._op.rule.keeps_state(table))]
        if len(needed) < len(self._have_states) or any(
            need and not has for need, has in zip(needed, self._have_states)
        ):
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
