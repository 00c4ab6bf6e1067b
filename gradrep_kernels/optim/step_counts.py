"""How many steps each parameter has taken, for updates that depend on it: the entry `step` of torch.optim.AdamW.

Each parameter has a tensor of its own, as in torch. Those of a group that have taken as many steps are elements of one
array: counting costs the host the same for any number of parameters, and kernels get one row of hyper-parameters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradrep_kernels.captures import capturing
from gradrep_kernels.dtensor import local
from gradrep_kernels.optim.parameters import ParamGroups, parameters_of
from gradrep_kernels.optim.update_rule import COUNT


@dataclass
class Counts:
    """Equal counts of several parameters of a group."""

    array: Tensor  # steps before this one; the entries of the parameters are its elements  # [n]
    value: float | None  # that number; None: only the device knows it
    version: int  # of the array, which tells whether somebody else has written to one of them


class CountedRow(NamedTuple):
    """A row of the table of hyper-parameters."""

    group: int  # number of the parameter group
    counts: Counts
    again: int  # of a parameter that is listed several times: how often it stood before


def device_of_count(group: Mapping[str, Any], p: Tensor, unscales: bool) -> torch.device:
    """Where a parameter is counted: on its device if the host may not look, as torch.optim.AdamW does."""
    return p.device if group.get("capturable") or (unscales and not p.is_cpu) else torch.device("cpu")


def entry_of(state: Mapping[Any, Any], p: Any) -> dict[str, Any]:
    """The entry of a parameter. There may be entries of others, and of other kinds."""
    entry = state.get(p)
    return entry if isinstance(entry, dict) else {}


class StepCounts:
    """The counts of the parameters that one step updates.

    Args:
        unscales: whether the step may unscale by itself, and skip a step by a number that only the device knows
    """

    def __init__(self, groups: ParamGroups, state: Mapping[Tensor, Any], unscales: bool):
        self.rows: list[CountedRow] = []
        self.new: dict[Tensor, Tensor] = {}  # first counts, which a step that is taken puts into the state
        self._counts: dict[int, Counts] = {}  # by id of the parameter
        self._numbers: dict[tuple[int, int, int], int] = {}
        self._seen: Counter[int] = Counter()
        listed = Counter(map(id, parameters_of(groups)))
        for group in groups:
            alike: dict[Any, list[tuple[Tensor, dict[str, Any]]]] = {}
            for p in dict.fromkeys(group["params"]):
                if p.grad is None or id(p) in self._counts:
                    continue
                own, where = entry_of(state, p), device_of_count(group, p, unscales)
                alone = id(p) if listed[id(p)] > 1 else 0
                alike.setdefault((where, _told(own.get(COUNT), where), alone), []).append((p, own))
            for (where, told, _), members in alike.items():
                self._take(where, told, members)

    def _take(self, where: torch.device, told: Any, members: list[tuple[Tensor, dict[str, Any]]]) -> None:
        """Take equal counts together. They stay where they are if they are all elements of one array of no others."""
        entries = [own.get(COUNT) for _, own in members]
        array = entries[0]._base if isinstance(entries[0], Tensor) else None
        if (
            array is None
            or array.shape != (len(members),)
            or array.device != where
            or any(entry._base is not array for entry in entries)
        ):
            if isinstance(told, _Array):
                array = torch.stack([entry.reshape(()) for entry in entries])
            else:
                array = torch.full((len(members),), told or 0.0, dtype=torch.float32, device=where)
            for (p, own), entry in zip(members, array.unbind()):
                if told is None:
                    self.new[p] = entry
                else:
                    own[COUNT] = entry
        value = (told or 0.0) if where.type == "cpu" else None
        counts = Counts(array, value, array._version)
        self._counts.update((id(p), counts) for p, _ in members)

    def row_of(self, number: int, p: Tensor) -> int:
        """Return the row of a parameter of group `number`. One that is listed again has a row of its own."""
        counts, again = self._counts[id(p)], self._seen[id(p)]
        self._seen[id(p)] += 1
        key = (number, id(counts), again)
        if key not in self._numbers:
            self._numbers[key] = len(self.rows)
            self.rows.append(CountedRow(number, counts, again))
        return self._numbers[key]


class _Array(NamedTuple):
    """An array on a device, none of whose elements the host may read."""

    identity: int


def _told(count: Any, where: torch.device) -> Any:
    """What tells counts that are equal: their number, or on a device the array that they lie in. None of a new one."""
    if count is None:
        return None
    if isinstance(count, Tensor):
        count = local(count)
        if not count.is_cpu and count.device == where and count._base is not None:
            return _Array(id(count._base))
    return float(count)


def counted_rows(
    rows: Sequence[CountedRow], hyper_row: Callable[[Any], Sequence[Any]], groups: ParamGroups
) -> list[Any]:
    """Return the table of hyper-parameters row by row. Its last column is the count."""
    table: list[Any] = []
    for number, counts, again in rows:
        table += hyper_row(groups[number])
        if counts.value is not None:
            table.append(counts.value + again)
        else:
            table.append(counts.array[:1] + again if again else counts.array[:1])
    return table


def count_steps(rows: Sequence[CountedRow], found_inf: Tensor | None) -> None:
    """Count the step, unless it was skipped."""
    for _, counts, _ in rows:  # a parameter that is listed twice has two rows, and takes two steps
        if counts.value is None:
            counts.array.add_(1 if found_inf is None else (found_inf.to(counts.array.device) == 0).reshape(()))
        elif found_inf is None or found_inf.item() == 0:
            counts.array.add_(1)
            counts.value += 1
        counts.version = counts.array._version


def were_written_to(rows: Sequence[CountedRow]) -> bool:
    """Whether somebody else has written to a count since the last step."""
    return any(counts.array._version != counts.version for _, counts, _ in rows)


def refuse_capture(rows: Sequence[CountedRow], device: torch.device) -> None:
    """Raise RuntimeError where a CUDA graph captures a step whose count the host keeps: it would not go on."""
    if capturing(device) and any(counts.value is not None for _, counts, _ in rows):
        raise RuntimeError(
            "a CUDA graph captures a step whose number counts, and each replay would take the same number: make the "
            "optimizer with capturable=True"
        )


def with_own_counts(saved_state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the states of a checkpoint with counts that share no memory, and do not go on counting."""
    return {
        key: {**entry, COUNT: entry[COUNT].clone()}
        if isinstance(entry, Mapping) and isinstance(entry.get(COUNT), Tensor)
        else entry
        for key, entry in saved_state.items()
    }
