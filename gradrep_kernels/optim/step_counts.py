"""How many steps each parameter has taken, for updates that depend on it: the entry `step` of torch.optim.AdamW.

Parameters of one group that began in the same step share one tensor. So counting costs the host the same for any number
of parameters, and kernels get one row of hyper-parameters for each count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradrep_kernels.captures import capturing
from gradrep_kernels.dtensor import local
from gradrep_kernels.optim.parameters import ParamGroups, parameters_of

COUNT = "step"


class CountedRow(NamedTuple):
    """A row of the table of hyper-parameters."""

    group: int  # number of the parameter group
    count: Tensor  # steps before this one  # []
    again: int  # of a parameter that is listed several times: how often it stood before


def device_of_count(group: Mapping[str, Any], p: Tensor, unscales: bool) -> torch.device:
    """Where a parameter is counted: on its device if the host may not look, as torch.optim.AdamW does."""
    return p.device if group.get("capturable") or (unscales and not p.is_cpu) else torch.device("cpu")


class StepCounts:
    """The counts of the parameters that one step updates.

    Args:
        unscales: whether the step may unscale by itself, and skip a step by a number that only the device knows
    """

    def __init__(self, groups: ParamGroups, state: Mapping[Tensor, Any], unscales: bool):
        self.rows: list[CountedRow] = []
        self._state, self._unscales = state, unscales
        self._listed = Counter(map(id, parameters_of(groups)))
        active = {id(p) for p in parameters_of(groups) if p.grad is not None}
        # Counts that other parameters share, which take no step now.
        self._idle = {id(_entry(state, p).get(COUNT)) for p in state if id(p) not in active}
        self._of_group: dict[int, int] = {}  # id of a count: the group that it is of
        self._begun: dict[Any, Tensor] = {}  # counts that begin, or part from those of idle parameters
        self._own: dict[int, Tensor] = {}  # of parameters that are listed several times
        self._numbers: dict[tuple[int, int, int], int] = {}
        self._seen: Counter[int] = Counter()

    def row_of(self, number: int, group: Mapping[str, Any], p: Tensor) -> tuple[int, Tensor | None]:
        """Return the row of a parameter of group `number`, and its count if it has none yet."""
        own = _entry(self._state, p)
        alone = id(p) if self._listed[id(p)] > 1 else 0
        count, new = own.get(COUNT), None
        if alone in self._own:
            count = self._own[alone]
        elif count is None:
            where = device_of_count(group, p, self._unscales)
            key = (number, where, alone)
            if key not in self._begun:
                self._begun[key] = torch.zeros((), dtype=torch.float32, device=where)
            count = new = self._begun[key]
        elif not isinstance(count, Tensor):
            count = own[COUNT] = torch.tensor(float(count), dtype=torch.float32, device="cpu")
        elif id(count) in self._idle or self._of_group.get(id(count), number) != number or alone:
            key = (number, id(count), alone)
            if key not in self._begun:
                self._begun[key] = count.clone()
            count = own[COUNT] = self._begun[key]
        if alone:
            self._own[alone] = count
        self._of_group[id(count)] = number
        row = CountedRow(number, count, self._seen[id(p)])
        self._seen[id(p)] += 1
        key = (number, id(count), row.again)
        if key not in self._numbers:
            self._numbers[key] = len(self.rows)
            self.rows.append(row)
        return self._numbers[key], new

    def hyper(self, hyper_row: Callable[[Any], Sequence[Any]], groups: ParamGroups) -> list[Any]:
        """Return the table of hyper-parameters row by row. Its last column is the count."""
        return counted_rows(self.rows, hyper_row, groups)

    def took(self, found_inf: Tensor | None) -> None:
        """Count the step, unless it was skipped."""
        count_steps(self.rows, found_inf)


def _entry(state: Mapping[Any, Any], p: Any) -> dict[str, Any]:
    """The entry of a parameter. There may be entries of others, and of other kinds."""
    entry = state.get(p)
    return entry if isinstance(entry, dict) else {}


def counted_rows(
    rows: Sequence[CountedRow], hyper_row: Callable[[Any], Sequence[Any]], groups: ParamGroups
) -> list[Any]:
    table: list[Any] = []
    for number, count, again in rows:
        table += hyper_row(groups[number])
        table.append(count.item() + again if count.is_cpu else count + again if again else count)
    return table


def count_steps(rows: Sequence[CountedRow], found_inf: Tensor | None) -> None:
    for _, count, _ in rows:  # a parameter that is listed twice has two rows, and takes two steps
        if found_inf is None:
            count.add_(1)
        else:
            count.add_((found_inf.to(count.device) == 0).reshape(()))


def refuse_capture(rows: Sequence[CountedRow], device: torch.device) -> None:
    """Raise RuntimeError where a CUDA graph captures a step whose count the host keeps: it would not go on."""
    if capturing(device) and any(count.is_cpu for _, count, _ in rows):
        raise RuntimeError(
            "a CUDA graph captures a step whose number counts, and each replay would take the same number: make the "
            "optimizer with capturable=True"
        )


def share_counts(groups: ParamGroups, state: Mapping[Tensor, Any], unscales: bool) -> None:
    """Let parameters of a group with equal counts share one tensor, as after a load."""
    for group in groups:
        shared: dict[tuple[torch.device, float], Tensor] = {}
        for p in group["params"]:
            own = _entry(state, p)
            count = own.get(COUNT)
            if count is None:
                continue
            value = float(local(count)) if isinstance(count, Tensor) else float(count)
            key = (device_of_count(group, p, unscales), value)
            if key not in shared:
                shared[key] = torch.tensor(value, dtype=torch.float32, device=key[0])
            own[COUNT] = shared[key]


def with_own_counts(saved_state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the states of a checkpoint with a count of its own for each parameter, as torch's optimizer needs them.

    torch adds 1 to the count of each parameter, and would add 1 to a shared one many times.
    """
    return {
        key: {**entry, COUNT: entry[COUNT].clone()}
        if isinstance(entry, Mapping) and isinstance(entry.get(COUNT), Tensor)
        else entry
        for key, entry in saved_state.items()
    }
