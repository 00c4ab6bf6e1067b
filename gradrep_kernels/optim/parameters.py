"""The parameters of an optimizer: their order, their names for messages, and the tensors that kernels may touch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradrep_kernels.dtensor import PLAIN
from gradrep_kernels.ops.reference.multiply import compute_dtype

ParamGroups = list[dict[str, Any]]


def parameters_of(groups: ParamGroups) -> list[Tensor]:
    """All parameters, in the order in which checkpoints number them."""
    return [p for group in groups for p in group["params"]]


def position_of(groups: ParamGroups, param: Tensor, of_mults: bool = False) -> int:
    """The number of `param` in that order.

    Raises ValueError where it is not among them, with advice about the keys of multipliers for `of_mults`.
    """
    for n, p in enumerate(parameters_of(groups)):
        if p is param:
            return n
    what = f"shape {list(param.shape)}" if isinstance(param, Tensor) else type(param).__name__
    if not of_mults:
        hint = ""
    elif isinstance(param, nn.Parameter):
        hint = ". If it is another model's, make the multipliers from this one. If it is to join later, freeze it first"
    else:
        hint = "; keys are parameters of the model, as in what csla.grad_mults gives"
    raise ValueError(f"unknown parameter ({what}): it is not in this optimizer's param_groups{hint}")


def names_of(groups: ParamGroups) -> list[str | None]:
    """The names of all parameters, in that order. None stands for one whose name is not known.

    Those of a group that parameters have joined or left without their names are not.
    """
    names = []
    for group in groups:
        own = group.get("param_names")
        names += own if own is not None and len(own) == len(group["params"]) else [None] * len(group["params"])
    return names


def is_frozen(param: Tensor) -> bool:
    """Whether `param` is a parameter that is not trained now. It may join a group later."""
    return isinstance(param, nn.Parameter) and not param.requires_grad


def described(groups: ParamGroups, position: int) -> str:
    """How messages call a parameter: by its name where the optimizer was given names, else by position and shape."""
    name = names_of(groups)[position]
    if name is not None:
        return f"parameter {name!r}"
    return f"parameter {position} of shape {list(parameters_of(groups)[position].shape)}"


def are_plain(shards: Iterable[Tensor]) -> bool:
    """Whether the data of all of them lies where their data_ptr says."""
    return all(type(t) in PLAIN for t in shards)


@contextmanager
def names_for_all(groups: ParamGroups, new: dict[str, Any]) -> Iterator[None]:
    """Let a group without names join groups with names, and the other way round: unknown names become None.

    torch.optim refuses it. Callbacks that unfreeze layers add bare parameters to whatever optimizer there is. The
    groups are as before if the block raises.
    """
    if not groups or not isinstance(new, dict) or not isinstance(new.get("params"), Iterable):
        yield
        return
    given = new["params"]
    if not isinstance(given, (Tensor, set)):
        given = new["params"] = list(given)
    named = "param_names" in new or any(isinstance(p, tuple) for p in given)
    unnamed_groups = [group for group in groups if "param_names" not in group] if named else []
    if not named and any("param_names" in group for group in groups):
        new["param_names"] = [None] * (1 if isinstance(given, Tensor) else len(given))
    for group in unnamed_groups:
        group["param_names"] = [None] * len(group["params"])
    try:
        yield
    except BaseException:
        for group in [*unnamed_groups, *([] if named else [new])]:
            group.pop("param_names", None)
        raise


def in_place(grad: Tensor, operation: Callable[[Tensor], object]) -> None:
    """Apply `operation`, which writes into its argument, to the values of a gradient.

    bf16 and fp16 are computed in float32 and rounded once: a factor below 6e-8 is 0 in float16, one of 65536 is inf.
    """
    dtype = compute_dtype(grad.dtype)
    if dtype == grad.dtype:
        operation(grad)
        return
    values = grad
    if grad.layout != torch.strided:
        values = grad._values() if grad.layout == torch.sparse_coo else grad.values()
    wide = values.to(dtype)
    operation(wide)
    values.copy_(wide)
