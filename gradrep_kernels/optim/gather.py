"""From parameter groups to the arguments of a step op."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradrep_kernels.captures import capturing
from gradrep_kernels.dtensor import local
from gradrep_kernels.ops import backends
from gradrep_kernels.ops.registry import OPS
from gradrep_kernels.optim.multipliers import Multipliers
from gradrep_kernels.optim.parameters import ParamGroups, are_plain
from gradrep_kernels.optim.sharding import aligned_grad, element_numbers_of
from gradrep_kernels.optim.step_counts import StepCounts, counted_rows, refuse_capture
from gradrep_kernels.optim.tail import AVERAGE
from gradrep_kernels.optim.update_rule import COUNT, UpdateRule


class Destination(NamedTuple):
    """Where parameters are updated: on which type of device, and whether kernels may touch their memory."""

    device: str
    plain: bool


class Row(NamedTuple):
    """A parameter's part in a step."""

    param: Tensor
    grad: Tensor
    states: tuple[Tensor | None, ...]  # None where its group does not use that state
    multiplier: tuple[Tensor | None, ...]  # parts of what it is multiplied by: scale or factors, identity
    first_step: bool
    group: int  # its row of the table of hyper-parameters: its parameter group, or see StepCounts
    shards: list[Tensor]  # parameter, gradient, states as this rank holds them; the parameter for an unused state
    average: Tensor | None  # as the optimizer has it
    number: int  # its position in the optimizer
    elements: Tensor | None  # where the shard lies in the whole parameter (rounding_rule.element_numbers)


@dataclass
class StepArguments:
    """The arguments of a step op for the parameters of one destination."""

    rows: list[Row] = field(default_factory=list)

    def columns(self) -> list[list]:
        """Return the op's columns.

        Where a state is not used, the parameter stands in its place. No kernel touches it.
        """
        rows = ((*row.shards, *row.multiplier, row.first_step, row.group) for row in self.rows)
        return [list(column) for column in zip(*rows)]

    def tail_columns(self) -> tuple[list, list, list]:
        """Return the op's columns that belong to the tail: averages, numbers, elements."""
        averages = [None if row.average is None else local(row.average) for row in self.rows]
        return averages, [row.number for row in self.rows], [row.elements for row in self.rows]

    def written(self, unscaled: bool) -> list[Tensor]:
        """The tensors that a step changes, gradients included where it unscales them."""
        states = [state for row in self.rows for state in (*row.states, row.average) if state is not None]
        return [row.param for row in self.rows] + states + ([row.shards[1] for row in self.rows] if unscaled else [])


@dataclass
class Gathered:
    """All that one step has to do."""

    arguments: dict[Destination, StepArguments] = field(default_factory=dict)
    sparse: list[tuple[dict[str, Any], Tensor]] = field(default_factory=list)  # group, parameter
    new_states: dict[tuple[Tensor, str], Tensor] = field(default_factory=dict)  # parameter and key: its first array
    without_average: dict[Tensor, None] = field(default_factory=dict)  # parameters whose average begins with this step
    idle: dict[Tensor, Tensor] = field(default_factory=dict)  # parameters without a gradient: the averages they have
    counts: StepCounts | None = None  # where the rule counts the steps of each parameter

    @property
    def is_steady(self) -> bool:
        """Whether the next step may be like this one."""
        return not self.sparse and not self.new_states and not self.without_average

    def average_later(self, p: Tensor) -> None:
        """Leave the average of a parameter to a row of it that comes after those so far."""
        for arguments in self.arguments.values():
            arguments.rows = [row._replace(average=None) if row.param is p else row for row in arguments.rows]

    def rows(self) -> list[Row]:
        return [row for arguments in self.arguments.values() for row in arguments.rows]


def gather(
    groups: ParamGroups,
    state: Mapping[Tensor, Any],
    rule: UpdateRule,
    multipliers: Multipliers,
    unscales: bool,
    averages: bool,
    skips: bool = False,
) -> Gathered:
    """Collect the parameters that have a gradient, by destination.

    A gradient that is spread over the ranks unlike its parameter is brought to the parameter's placement. Where the
    step unscales gradients, `.grad` becomes that tensor, which has the same values. With `averages` each parameter has
    one, from its first step on. `skips` says whether the device may decide to skip a step.

    Raises RuntimeError for a parameter's first step in a CUDA graph capture: each replay would be a first step.
    """
    gathered = Gathered(counts=StepCounts(groups, state, skips) if rule.counts else None)
    seen: set[Tensor] = set()
    no_parts = (None,) * len(OPS[rule.op].step.multipliers)
    position = -1
    for number, group in enumerate(groups):
        used = [kept for kept in rule.states if kept.used(group)]
        for p in group["params"]:
            position += 1
            own = state.get(p, {})
            average = own.get(AVERAGE.key) if averages else None
            if p.grad is None:
                if average is not None:
                    gathered.idle[p] = average
                continue
            if averages and average is None:
                _refuse_in_capture(p, AVERAGE.key)
                gathered.without_average[p] = None
            if p.grad.layout != torch.strided:
                gathered.sparse.append((group, p))
                continue
            grad, first = aligned_grad(p), False
            missing = rule.missing(own)
            if missing:
                raise RuntimeError(
                    f"a parameter of shape {list(p.shape)} has a state without {' and '.join(missing)}, so that its "
                    "update cannot go on. Delete its whole state to begin anew"
                )
            states = {kept.key: own.get(kept.key) for kept in used}
            for kept in used:
                if states[kept.key] is None:
                    _refuse_in_capture(p, kept.key)
                    first, place = True, (p, kept.key)
                    if place not in gathered.new_states:  # a parameter that is listed twice has one array
                        gathered.new_states[place] = kept.new(p, grad)
                    states[kept.key] = gathered.new_states[place]
            if unscales and grad is not p.grad:
                p.grad = grad
            mult = multipliers.total(p)
            kept_arrays = tuple(states.get(kept.key) for kept in rule.states)
            shard = local(p)
            shards = [shard, local(grad), *(shard if array is None else local(array) for array in kept_arrays)]
            parts = no_parts if mult is None else mult.parts()
            elements = element_numbers_of(p) if rule.stochastic else None
            row_number = number
            if gathered.counts is not None:
                row_number = gathered.counts.row_of(number, p)
                if p in gathered.counts.new:
                    _refuse_in_capture(p, COUNT)
                    gathered.new_states[p, COUNT] = gathered.counts.new[p]
                refuse_capture([gathered.counts.rows[row_number]], p.device)
            row = Row(p, grad, kept_arrays, parts, first, row_number, shards, average, position, elements)
            # A parameter that is listed twice is stepped twice, one after the other, which only the reference does.
            plain = p not in seen and are_plain(shards)
            if p in seen:
                gathered.average_later(p)
            seen.add(p)
            gathered.arguments.setdefault(Destination(p.device.type, plain), StepArguments()).rows.append(row)
    return gathered


def _refuse_in_capture(p: Tensor, key: str) -> None:
    if capturing(p.device):
        raise RuntimeError(
            f"parameters need an array {key!r}, one of shape {list(p.shape)}, and in a CUDA graph capture every replay "
            "would start it anew: take one step before the capture"
        )


def take_steps(
    gathered: Gathered,
    rule: UpdateRule,
    hyper: Tensor,
    numbers: tuple[Tensor | None, Tensor | None, Tensor | None],
    tail: Tensor | None,
) -> None:
    """Call the step op for each destination, and move the version counters, which kernels do not.

    `numbers` are (grad_scale, found_inf, clip).
    """
    for destination, arguments in gathered.arguments.items():
        there = numbers
        if destination.plain:
            step = backends.implementation(rule.op, destination.device)
            there = [None if t is None else _on(t, destination.device) for t in numbers]
        else:
            step = OPS[rule.op].reference
        tables = [t.cpu() if t is not None and destination == ("cpu", True) else t for t in (hyper, tail)]
        more = (None, None, None) if tail is None else arguments.tail_columns()
        step(*arguments.columns(), tables[0], *there, *more, tables[1])
        torch.autograd.graph.increment_version(arguments.written(unscaled=numbers[0] is not None))


def _on(t: Tensor, device: str) -> Tensor:
    return t if t.device.type == device else t.to(device)


def hyper_table(groups: ParamGroups, rule: UpdateRule, counts: StepCounts | None = None) -> Tensor:
    """Read the table of hyper-parameters from the groups, at every step, since schedulers change them  # [R, H] float64

    It lies where `table_of` says.
    """
    if counts is None:
        rows = [v for group in groups for v in rule.hyper_row(group)]
    else:
        rows = counted_rows(counts.rows, rule.hyper_row, groups)
    return table_of(rows).reshape(-1, len(OPS[rule.op].step.hyper))


def table_of(numbers: Sequence[Any]) -> Tensor:
    """Put numbers and one-element tensors into one tensor  # [n] float64

    It lies on the CPU, or, where an entry is a tensor on another device, there: reading that tensor would wait for the
    device, which a CUDA graph does not allow.
    """
    places = places_on_device(numbers)
    if not places:
        return torch.tensor([float(v) for v in numbers], dtype=torch.float64, device="cpu")
    device = numbers[places[0]].device
    # Two launches and one conversion, however many numbers lie there.
    there = torch.stack([numbers[n].detach().reshape(()).to(device) for n in places]).double().unbind()
    by_place = dict(zip(places, there))
    # A graph has constants of its own: those that are kept for later steps may be dropped before its replay.
    constant = _constant.__wrapped__ if capturing(device) else _constant
    return torch.stack([by_place[n] if n in by_place else constant(float(v), device) for n, v in enumerate(numbers)])


def places_on_device(numbers: Sequence[Any]) -> list[int]:
    """Which of the hyper-parameters only a device knows. Reading them would wait for it."""
    return [n for n, v in enumerate(numbers) if isinstance(v, Tensor) and not v.is_cpu]


@functools.lru_cache(maxsize=1024)
def _constant(value: float, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=torch.float64, device=device)
