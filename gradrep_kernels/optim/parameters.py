"""The parameters of an optimizer: their order, their names for messages, and the tensors that kernels may touch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from gradrep_kernels.dtensor import PLAIN

ParamGroups = list[dict[str, Any]]


def parameters_of(groups: ParamGroups) -> list[Tensor]:
    """All parameters, in the order in which checkpoints number them."""
    return [p for group in groups for p in group["params"]]


def position_of(groups: ParamGroups, param: Tensor) -> int:
    """The number of `param` in that order. Raises ValueError where it is not among them."""
    for n, p in enumerate(parameters_of(groups)):
        if p is param:
            return n
    what = f"shape {list(param.shape)}" if isinstance(param, Tensor) else type(param).__name__
    raise ValueError(f"unknown parameter ({what}): it is not in this optimizer's param_groups")


def described(groups: ParamGroups, position: int) -> str:
    """How messages call a parameter: by its name where the optimizer was given names, else by position and shape."""
    names = [name for group in groups for name in group.get("param_names", [None] * len(group["params"]))]
    if names[position] is not None:
        return f"parameter {names[position]!r}"
    return f"parameter {position} of shape {list(parameters_of(groups)[position].shape)}"


def are_plain(shards: Iterable[Tensor]) -> bool:
    """Whether the data of all of them lies where their data_ptr says."""
    return all(type(t) in PLAIN for t in shards)
