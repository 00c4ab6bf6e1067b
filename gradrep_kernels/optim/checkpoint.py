"""Checkpoints: Grad Mults as plain tensors, held against the live ones, and states that must not be narrowed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradrep_kernels.grad_mult import GradMult
from gradrep_kernels.ops.reference.multiply import compute_dtype
from gradrep_kernels.optim.multipliers import Multipliers
from gradrep_kernels.optim.parameters import ParamGroups, described, names_of, parameters_of
from gradrep_kernels.optim.update_rule import State

KEY = "grad_mults"
"""In an optimizer's state_dict."""

FINGERPRINT = "grad_mults_fingerprint"
"""In each parameter group: a number derived from its Grad Mults. It tells a checkpoint that has lost them."""

_SHOWN = 4  # parameters listed in one message


@dataclass
class Verdict:
    """What a checkpoint says of Grad Mults, parameter by parameter."""

    restored: dict[int, GradMult] = field(default_factory=dict)  # by position: none is live, so these are set
    conflicts: list[str] = field(default_factory=list)  # the checkpoint has another one
    kept: list[str] = field(default_factory=list)  # the checkpoint has none, so the live one stays


def pack(mults: dict[int, GradMult], groups: ParamGroups) -> dict[int, dict[str, Any]]:
    """Plain tensors in plain dicts: what torch.load(weights_only=True) accepts.

    Each has the name of its parameter, where the optimizer was given names.
    """
    names = names_of(groups)
    packed = {n: {"scale": mult.scale, "identity": mult.identity} for n, mult in mults.items()}
    for n, parts in packed.items():
        if names[n] is not None:
            parts["name"] = names[n]
    return packed


def refresh_fingerprints(groups: ParamGroups, multipliers: Multipliers) -> None:
    for group in groups:
        group[FINGERPRINT] = multipliers.fingerprint(group["params"])


def as_given(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Keep a checkpoint as it is before pre-hooks, which may write into it."""
    return {key: dict(value) if isinstance(value, Mapping) else value for key, value in state_dict.items()}


def judge(given: Mapping[str, Any], hooked: Mapping[str, Any], groups: ParamGroups, live: Multipliers) -> Verdict:
    """Hold the Grad Mults of a checkpoint against the live ones.

    Args:
        given:  the checkpoint as `as_given` kept it
        hooked: the same after the caller's load_state_dict pre-hooks, which may have moved its parameters
    """
    verdict = Verdict()
    callers = live.callers(parameters_of(groups))
    if KEY not in given and KEY not in hooked:
        _judge_fingerprints(hooked["param_groups"], groups, live, callers, verdict)
        return verdict
    saved = _placed(given, hooked, groups, verdict)
    for n in sorted(callers.keys() | saved.keys()):
        if n not in saved:
            verdict.kept.append(described(groups, n))
        elif n not in callers:
            verdict.restored[n] = saved[n]
        elif not callers[n].same(saved[n], parameters_of(groups)[n].shape):
            verdict.conflicts.append(f"{described(groups, n)} has another one")
    return verdict


def _judge_fingerprints(
    saved_groups: list[dict[str, Any]],
    groups: ParamGroups,
    live: Multipliers,
    callers: dict[int, GradMult],
    verdict: Verdict,
) -> None:
    """Judge a checkpoint without the key: one of torch's optimizer, or one that lost it on the way."""
    position = 0
    for n, (group, saved_group) in enumerate(zip(groups, saved_groups)):
        now, saved = live.fingerprint(group["params"]), saved_group.get(FINGERPRINT, 0)
        ours = [k for k in range(position, position + len(group["params"])) if k in callers]
        position += len(group["params"])
        if saved == now:
            continue
        if saved == 0:
            verdict.kept += [described(groups, k) for k in ours]
        else:
            are = "none" if now == 0 else "others"
            verdict.conflicts.append(f"group {n} had some, which the checkpoint has lost, and {are} are set")


def _placed(
    given: Mapping[str, Any], hooked: Mapping[str, Any], groups: ParamGroups, verdict: Verdict
) -> dict[int, GradMult]:
    """Return the Grad Mults of a checkpoint by the position of their parameter here.

    A parameter is found by its name, where checkpoint and optimizer have names. Pre-hooks that match parameters by
    their names move states alone, so a position may be stale. Else a Grad Mult goes where the state of the same number
    goes, unless pre-hooks have moved states and not the multipliers.
    """
    before, after = given.get(KEY, {}), hooked.get(KEY, {})
    dropped = bool(before) and not after  # as a hook does that builds its result from the optimizer's own state_dict
    stale = dropped or (_same(before, after) and not _same(given.get("state", {}), hooked["state"]))
    packed = _unpacked(before if dropped else after)
    position_of_name = {name: n for n, name in enumerate(names_of(groups)) if name is not None}
    ids = [n for group in hooked["param_groups"] for n in group["params"]]
    position_of_id = dict(zip(ids, range(len(parameters_of(groups)))))
    placed: dict[int, GradMult] = {}
    for n, (mult, name) in packed.items():
        if name in position_of_name:
            position = position_of_name[name]
        elif stale:
            what = f"parameter {n}" if name is None else f"parameter {name!r}"
            verdict.conflicts.append(
                f"{what} has one, but load_state_dict pre-hooks moved the states and not 'grad_mults', and the "
                "optimizer knows no such name"
            )
            continue
        elif n not in position_of_id:
            raise ValueError(
                f"state_dict['grad_mults'] speaks of parameter {n}; this optimizer has "
                f"{len(parameters_of(groups))}, numbered from 0"
            )
        else:
            position = position_of_id[n]
        if position in placed:
            raise ValueError(f"state_dict['grad_mults'] speaks of {described(groups, position)} twice")
        placed[position] = mult
    return placed


def _unpacked(packed: Any) -> dict[int, tuple[GradMult, str | None]]:
    """What `pack` packed: (Grad Mult, name of its parameter if there is one) by number."""
    if not isinstance(packed, Mapping):
        raise ValueError(f"state_dict['grad_mults'] must be a dict, got {type(packed).__name__}")
    try:
        return {int(n): (GradMult(p["scale"], p["identity"]), p.get("name")) for n, p in packed.items()}
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"state_dict['grad_mults'] must hold a 'scale' and an 'identity' per parameter: {error!r}"
        ) from None


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(torch.equal(a, b.to(a.device, a.dtype)))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


def first_few(parts: list[str], between: str = "; ") -> str:
    more = f"{between}and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
    return between.join(parts[:_SHOWN]) + more


def keep_wide_states(
    saved: Mapping[int, Any], saved_groups: list[dict[str, Any]], optimizer: Any, states: tuple[State, ...]
) -> None:
    """Give states back the precision that torch's load_state_dict takes from them.

    It casts them to the dtype of their parameter. The momentum of bf16 weights with float32 gradients is float32, and a
    resumed run must go on with its bits.
    """
    ids = [n for group in saved_groups for n in group["params"]]
    for n, p in zip(ids, parameters_of(optimizer.param_groups)):
        entry, loaded = saved.get(n), optimizer.state.get(p)
        if not isinstance(entry, Mapping) or loaded is None or not p.is_floating_point():
            continue
        for state in states:
            value, cast = entry.get(state.key), loaded.get(state.key)
            if isinstance(value, Tensor) and isinstance(cast, Tensor) and value.dtype != cast.dtype:
                new = state.dtype(p.dtype, getattr(p, "grad_dtype", None) or p.dtype)
                if value.dtype in (new, compute_dtype(p.dtype)):
                    loaded[state.key] = value.to(cast.device)
