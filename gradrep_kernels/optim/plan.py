"""The steady state of a step: the tensors that do not change from step to step are handed to the kernels once.

A step of torch's fused SGD over 62 small tensors takes 80-109 µs, 60 of them in Python. A planned step passes only the
gradients and the hyper-parameters. The kernel checks that every tensor still has the dtype, shape and strides it had,
and does nothing where one has not. StepPlan compares the rest of what can change.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from itertools import chain, repeat
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from gradrep_kernels.captures import capturing
from gradrep_kernels.dtensor import PLAIN
from gradrep_kernels.ops import backends
from gradrep_kernels.ops.registry import OPS
from gradrep_kernels.optim.gather import Gathered, places_on_device
from gradrep_kernels.optim.multipliers import Multipliers
from gradrep_kernels.optim.parameters import ParamGroups, parameters_of
from gradrep_kernels.optim.step_counts import count_steps, counted_rows, refuse_capture, were_written_to
from gradrep_kernels.optim.tail import AVERAGE, TailOptions, average_idle, clip_factor
from gradrep_kernels.optim.update_rule import COUNT, UpdateRule

_params, _grad, _layout, _device = itemgetter("params"), *map(attrgetter, ("grad", "layout", "device"))
_NUMBERS = frozenset((bool, int, float))
Scaler = tuple[Tensor | None, Tensor | None]  # grad_scale, found_inf


class StepPlan:
    """A plan over all groups of an optimizer, for the parameters that have a gradient now."""

    @classmethod
    def of(
        cls,
        gathered: Gathered,
        rule: UpdateRule,
        groups: ParamGroups,
        state: Mapping[Tensor, Any],
        multipliers: Multipliers,
        tail: TailOptions,
    ) -> StepPlan | None:
        """Make the plan of steps like the one that was gathered, or None where some parameter does not suit it.

        None is made in a CUDA graph capture: copies of multipliers would be filled at the graph's replays only.
        """
        if len(gathered.arguments) != 1:
            return None
        (destination,) = gathered.arguments
        planner = backends.planner(rule.op, destination.device) if destination.plain else None
        if planner is None:
            return None
        rows = gathered.arguments[destination].rows
        for row in rows:
            states = [kept for kept in row.states if kept is not None]
            if type(row.param) not in PLAIN or type(row.grad) is not Tensor:
                return None
            if not planner.takes(*row[:2], states, row.average, row.elements, rule.stochastic):
                return None
        if len({row.param.device for row in rows}) > 1 or capturing(rows[0].param.device):
            return None
        params, numbers = [row.param for row in rows], [row.group for row in rows]
        states, parts = (map(list, zip(*column)) for column in zip(*((row.states, row.multiplier) for row in rows)))
        averages, positions = [row.average for row in rows], [row.number for row in rows]
        handle = planner.make(
            params,
            *states,
            *parts,
            numbers,
            averages=averages if any(average is not None for average in averages) else None,
            numbers=positions if rule.stochastic else None,
        )
        return cls(planner, handle, rows, gathered, rule, groups, state, multipliers, tail) if handle else None

    def __init__(self, planner, handle, rows, gathered, rule, groups, state, multipliers, tail):
        params = [row.param for row in rows]
        self._planner, self._handle, self._op, self._device = planner, handle, rule.op, params[0].device
        # Not __del__: at exit the op is gone before it. Not a parameter: it may be where no kernel frees plans by then.
        weakref.finalize(self, _free, planner, torch.empty(0, device=self._device), self._handle)
        self._params = params
        self._listed = parameters_of(groups)
        active = set(map(id, params))
        self._idle = [p for p in self._listed if id(p) not in active]
        self._idle_averages = list(gathered.idle.items())
        self._written = params + [kept for row in rows for kept in (*row.states, row.average) if kept is not None]
        self._options, self._options_version = tail, tail.version
        self._tail = tail if tail.is_used else None
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
        self._like_norm = torch.empty((), dtype=dtype, device=self._device)
        self._multipliers, self._version = multipliers, multipliers.version
        self._group_sizes = [len(group["params"]) for group in groups]
        self._state, self._keys = state, list(state)
        # For each kind of state: how to read it off an entry of `state`, and what was read.
        averages = [AVERAGE] if tail.averages else []
        self._kept = [
            (key, itemgetter(key), _read(state, key))
            for key in (*(kept.key for kept in (*rule.states, *averages)), *([COUNT] if rule.counts else ()))
        ]
        self._counted = None if gathered.counts is None else gathered.counts.rows
        self._hyper = rule.hyper or itemgetter(*OPS[rule.op].step.hyper)

    def _holds(self, groups: ParamGroups, state: Mapping[Tensor, Any]) -> bool:
        """Whether groups, parameters and states are the same objects.

        For 62 of each it takes 5 µs. Comparing lists of ids takes 8.
        """
        if state is not self._state or len(state) != len(self._keys):
            return False
        if [len(group["params"]) for group in groups] != self._group_sizes:
            return False
        listed = chain.from_iterable(map(_params, groups))
        if not all(map(is_, listed, self._listed)) or not all(map(is_, state, self._keys)):
            return False
        for key, read, kept in self._kept:
            try:
                same = all(map(is_, map(read, state.values()), kept))
            except (KeyError, TypeError):
                same = all(map(is_, _read(state, key), kept))
            if not same:
                return False
        return True

    def _gradients(self, groups: ParamGroups, state: Mapping[Tensor, Any]) -> list[Tensor | None] | None:
        """All gradients, or None where the plan no longer holds."""
        if (
            self._multipliers.version != self._version
            or self._options.version != self._options_version
            or backends.planner(self._op, self._device.type) is not self._planner
            or (self._counted is not None and were_written_to(self._counted))
            or not self._holds(groups, state)
            or not all(map(is_, map(_grad, self._idle), repeat(None)))
        ):
            return None
        # Maps, not comprehensions, over parameters: the interpreter's work does not grow with their number.
        return list(map(_grad, self._params))

    def norm(self, groups: ParamGroups, state: Mapping[Tensor, Any]) -> tuple[Tensor, list[Tensor]] | None:
        """The norm of all gradients, and these. None where the plan no longer holds, or takes no such gradients."""
        grads = self._gradients(groups, state)
        if grads is None or set(map(type, grads)) != {Tensor}:
            return None
        if set(zip(map(_layout, grads), map(_device, grads))) != {(torch.strided, self._device)}:
            return None
        norm = self._new_norm()
        return (norm, grads) if self._planner.norm(self._handle, grads, norm) else None

    def _new_norm(self) -> Tensor:
        return torch.empty_like(self._like_norm)  # half the time of torch.empty(())

    def step(self, groups: ParamGroups, state: Mapping[Tensor, Any], scaler: Scaler) -> bool:
        """Take the step. Returns False, with nothing done, where the plan no longer holds."""
        grads = self._gradients(groups, state)
        if grads is None:
            return False
        grad_scale, found_inf = scaler
        if grad_scale is not None:
            grad_scale = grad_scale.to(self._device, torch.float32)
        if found_inf is not None:
            found_inf = found_inf.to(self._device, torch.float32)
        if self._counted is None:
            hyper = list(chain.from_iterable(map(self._hyper, groups)))
        else:
            refuse_capture(self._counted, self._device)
            hyper = counted_rows(self._counted, self._hyper, groups)
        tail, norm, clip, numbers = self._tail, None, None, ()
        if tail is not None:
            numbers = tail.numbers(self._device)
            decay = numbers[0] if numbers else 0.0
            norm = tail.take_known_norm(grad_scale)
            if norm is not None:
                clip = clip_factor(norm, tail.max_grad_norm)
            elif tail.max_grad_norm is not None:
                norm = self._new_norm()
        places, on_device = [], []
        if not _NUMBERS.issuperset(map(type, chain(hyper, numbers))):
            both = [*hyper, *numbers]
            places = places_on_device(both)
            on_device = [both[n] for n in places]
            for n in places:
                both[n] = 0.0
            hyper, numbers = both[: len(hyper)], both[len(hyper) :]
        arguments = (self._handle, grads, hyper, on_device, places, grad_scale, found_inf)
        if tail is not None:
            arguments += (numbers, tail.max_grad_norm or 0.0, None if clip is not None else norm, clip)
        taken = False
        try:
            taken = self._planner.step(*arguments)
        except NotImplementedError:
            pass  # gradients or numbers are on another device now, which has no op of plans
        except (RuntimeError, TypeError):
            # Sparse and missing gradients are looked for only here: it would cost 2 µs a step.
            if all(g is not None and g.layout == torch.strided for g in grads):
                raise
        if not taken:
            return False
        torch.autograd.graph.increment_version(self._written if grad_scale is None else self._written + grads)
        if self._counted is not None:
            count_steps(self._counted, found_inf)
        if self._idle_averages:
            average_idle(self._idle_averages, decay, found_inf)
        if tail is not None:
            tail.took(self._device, norm)
        return True


def _free(planner: backends.Planner, somewhere: Tensor, handle: int) -> None:
    with _disable_current_modes():  # the garbage collector comes at any time, while torch.compile traces too
        planner.free(somewhere, handle)


def _read(state: Mapping[Tensor, Any], key: str) -> list[Tensor | None]:
    """That state of every entry. There may be entries without it, and entries that are no parameter's."""
    return [entry.get(key) if isinstance(entry, dict) else None for entry in state.values()]
