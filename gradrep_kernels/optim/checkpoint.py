"""Grad Mults in checkpoints: written as plain tensors, and held against the live ones when a checkpoint is loaded."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gradrep_kernels.grad_mult import GradMult
from gradrep_kernels.optim.multipliers import Multipliers
from gradrep_kernels.optim.parameters import ParamGroups, described, parameters_of

KEY = "grad_mults"
"""In an optimizer's state_dict."""

FINGERPRINT = "grad_mults_fingerprint"
"""In each parameter group: a number derived from its Grad Mults. It tells a checkpoint that has lost them."""

_SHOWN = 4  # mismatches listed in one error


def pack(mults: dict[int, GradMult]) -> dict[int, dict[str, Tensor | None]]:
    """Plain tensors in plain dicts: what torch.load(weights_only=True) accepts."""
    return {n: {"scale": mult.scale, "identity": mult.identity} for n, mult in mults.items()}


def unpack(packed: Any, count: int) -> dict[int, GradMult]:
    """What `pack` packed, for an optimizer of `count` parameters."""
    if not isinstance(packed, dict):
        raise ValueError(f"state_dict['grad_mults'] must be a dict, got {type(packed).__name__}")
    try:
        mults = {int(n): GradMult(parts["scale"], parts["identity"]) for n, parts in packed.items()}
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"state_dict['grad_mults'] must hold a 'scale' and an 'identity' per parameter: {error!r}"
        ) from None
    unknown = sorted(n for n in mults if not 0 <= n < count)
    if unknown:
        raise ValueError(
            f"state_dict['grad_mults'] speaks of parameter {unknown[0]}; this optimizer has {count}, numbered from 0"
        )
    return mults


def refresh_fingerprints(groups: ParamGroups, multipliers: Multipliers) -> None:
    for group in groups:
        group[FINGERPRINT] = multipliers.fingerprint(group["params"])


def compare(
    state_dict: dict[str, Any], groups: ParamGroups, multipliers: Multipliers
) -> tuple[dict[int, GradMult], str | None]:
    """Hold a checkpoint's Grad Mults against the live ones.

    Returns those to restore, by the position of their parameter, and what is wrong, if anything is. Nothing is restored
    where some are live: those must be the same.
    """
    if KEY not in state_dict:
        return {}, _lost(state_dict["param_groups"], groups, multipliers)
    saved = unpack(state_dict[KEY], len(parameters_of(groups)))
    live = multipliers.callers(parameters_of(groups))
    return ({}, _differences(live, saved, groups)) if live else (saved, None)


def _lost(saved_groups: list[dict[str, Any]], groups: ParamGroups, multipliers: Multipliers) -> str | None:
    for n, (group, saved_group) in enumerate(zip(groups, saved_groups)):
        live = multipliers.fingerprint(group["params"])
        saved = saved_group.get(FINGERPRINT, live)
        if saved != live:
            were = "none" if saved == 0 else "some, which the checkpoint has lost"
            are = "none" if live == 0 else "others" if saved else "some"
            return f"group {n} had {were}, and {are} are set"
    return None


def _differences(live: dict[int, GradMult], saved: dict[int, GradMult], groups: ParamGroups) -> str | None:
    params = parameters_of(groups)
    problems = []
    for n in sorted(live.keys() | saved.keys()):
        if n not in saved:
            problems.append(f"{described(groups, n)} has none in the checkpoint")
        elif n not in live:
            problems.append(f"{described(groups, n)} has one only in the checkpoint")
        elif not live[n].same(saved[n], params[n].shape):
            problems.append(f"{described(groups, n)} has another one")
    if not problems:
        return None
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + more
