"""Checkpoints: Grad Mults as plain tensors, held against the live ones, and states that must not be narrowed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradrep_kernels.grad_mult import GradMult
from gradrep_kernels.messages import first_few
from gradrep_kernels.ops.reference.multiply import compute_dtype
from gradrep_kernels.optim.branch_factors import BranchFactors
from gradrep_kernels.optim.multipliers import Multipliers
from gradrep_kernels.optim.parameters import ParamGroups, described, names_of, parameters_of
from gradrep_kernels.optim.tail import AVERAGE, check_counts
from gradrep_kernels.optim.update_rule import Factor, State
from gradrep_kernels.wrappers import saved_name

KEY = "grad_mults"
"""In an optimizer's state_dict."""

FINGERPRINT = "grad_mults_fingerprint"
"""In each parameter group: a number derived from its Grad Mults. It tells a checkpoint that has lost them."""


@dataclass
class Verdict:
    """What a checkpoint says of Grad Mults, parameter by parameter."""

    restored: dict[int, Factor] = field(default_factory=dict)  # by position: none is live, so these are set
    conflicts: list[str] = field(default_factory=list)  # the checkpoint has another one
    kept: list[str] = field(default_factory=list)  # the checkpoint has none, so the live one stays


def pack(mults: dict[int, Factor], groups: ParamGroups) -> dict[int, dict[str, Any]]:
    """Plain tensors in plain dicts: what torch.load(weights_only=True) accepts.

    Each has the name of its parameter, where the optimizer was given names.
    """
    names = names_of(groups)
    packed = {n: _packed(mult) for n, mult in mults.items()}
    for n, parts in packed.items():
        if names[n] is not None:
            parts["name"] = names[n]
    return packed


def _packed(mult: Factor) -> dict[str, Any]:
    return mult.packed() if isinstance(mult, BranchFactors) else {"scale": mult.scale, "identity": mult.identity}


def refresh_fingerprints(groups: ParamGroups, multipliers: Multipliers) -> None:
    for group in groups:
        group[FINGERPRINT] = multipliers.fingerprint(group["params"])


class Loading:
    """One load of a checkpoint: what is judged before torch's part of it, and mended after it.

    Args:
        check(param, mult): gives `mult` as a factor that fits, or raises ValueError
        set_grad_mult(param, mult): sets it
    """

    def __init__(
        self,
        optimizer: Optimizer,
        state_dict: Mapping[str, Any],
        live: Multipliers,
        strict: bool,
        check: Callable[[Tensor, Factor], Factor],
        set_grad_mult: Callable[[Tensor, Factor], None],
    ):
        # Kept as it is before pre-hooks, which may write into its dicts.
        self._given = _dicts_copied(state_dict, 3)
        self._names = [group.get("param_names") for group in optimizer.param_groups]
        self._live, self._strict, self._check, self._set = live, strict, check, set_grad_mult
        self._verdict = Verdict()
        self._restored: list[tuple[Tensor, Factor]] = []
        self._others: list[str] = []  # names of parameters that get the states of others
        self._averages: str | None = None  # what is to be said of averages of the weights

    def judge(self, optimizer: Optimizer, hooked: dict[str, Any]) -> None:
        """As the last pre-hook: raise ValueError where multipliers, sizes or rules differ. Nothing is changed then."""
        groups = optimizer.param_groups
        check_counts(hooked["param_groups"])
        sizes = _other_sizes(hooked, optimizer)
        if sizes:
            raise ValueError(f"the checkpoint is of parameters of other sizes: {first_few(sizes)}")
        partial = _partial(hooked, optimizer)
        if partial:
            raise ValueError(f"the checkpoint has states that cannot go on: {first_few(partial)}")
        states_moved = not _same(self._given["state"], hooked["state"])
        self._hooked, self._verdict = hooked, judge(self._given, hooked, states_moved, groups, self._live)
        if hooked["state"] and not states_moved:
            self._others = _in_another_order(hooked["param_groups"], groups)
        if self._verdict.conflicts and self._strict:
            raise ValueError(
                "the checkpoint's Grad Mults are not the live ones: "
                f"{first_few(self._verdict.conflicts)}. Set the right ones first, or load with strict=False"
            )
        _refuse_other_rules(hooked["param_groups"], optimizer)
        params = parameters_of(groups)
        self._restored = [(params[n], self._check(params[n], mult)) for n, mult in self._verdict.restored.items()]

    def mend(self, optimizer: Optimizer) -> None:
        """As the first post-hook: set what is restored, and give back what torch's part takes."""
        for group, own in zip(optimizer.param_groups, self._names):
            if own is not None:
                # torch takes the names over from the checkpoint. Parameters that stand in another order would then
                # bear each other's names.
                group["param_names"] = own
        keep_dtypes(self._hooked, optimizer)
        self._averages = _about_averages(optimizer)
        for param, mult in self._restored:
            self._set(param, mult)
        refresh_fingerprints(optimizer.param_groups, self._live)

    def messages(self) -> list[str]:
        """Return what the caller is to be warned of."""
        messages = []
        if self._verdict.conflicts:
            problems = first_few(self._verdict.conflicts)
            messages.append(f"the checkpoint's Grad Mults are not the live ones, which stay: {problems}")
        if self._verdict.kept:
            kept = first_few(self._verdict.kept, between=", ")
            messages.append(f"the checkpoint has none of these live Grad Mults, which stay: {kept}")
        if self._others:
            messages.append(
                "the checkpoint's parameters stand in another order. As in torch, states go by position, so these have "
                f"those of other parameters: {first_few(self._others, between=', ')}. A load_state_dict pre-hook can "
                "move them by name"
            )
        return messages if self._averages is None else [*messages, self._averages]


def _about_averages(optimizer: Any) -> str | None:
    """What to tell a user of whom only one, checkpoint or optimizer, has averages of the weights."""
    stepped = [entry for p in parameters_of(optimizer.param_groups) if (entry := optimizer.state.get(p))]
    has = any(AVERAGE.key in entry for entry in stepped)
    if has and optimizer.ema_decay is None:
        return "the checkpoint has averages of the weights, and this optimizer no ema_decay: they stay as they are"
    if stepped and not has and optimizer.ema_decay is not None:
        return "the checkpoint has no averages of the weights: they begin anew with the next step"
    return None


def _as_many(saved_groups: ParamGroups, groups: ParamGroups) -> bool:
    """Whether groups have as many parameters as those of a checkpoint. Torch refuses others, in its own words."""
    return [len(group["params"]) for group in saved_groups] == [len(group["params"]) for group in groups]


def _refuse_other_rules(saved_groups: ParamGroups, optimizer: Any) -> None:
    """Raise ValueError for a checkpoint of another optimizer. torch's load takes it, or fails half done."""
    needed = [key for key in ("betas", "eps", "momentum") if key in optimizer.defaults]
    missing = [key for key in needed if any(key not in group for group in saved_groups)]
    if missing:
        raise ValueError(
            f"the checkpoint is of another optimizer than {type(optimizer).__name__}: its groups have no "
            f"{' and no '.join(missing)}"
        )


def _saved_states(hooked: Mapping[str, Any], optimizer: Any) -> Iterator[tuple[int, Tensor, State, Tensor]]:
    """The arrays of a checkpoint that the rule or the average has: position, parameter, state and array."""
    states = (*optimizer.update_rule.states, AVERAGE)
    for position, (n, p) in enumerate(zip(_ids(hooked["param_groups"]), parameters_of(optimizer.param_groups))):
        entry = hooked["state"].get(n)
        for state in states if isinstance(entry, Mapping) else ():
            value = entry.get(state.key)
            if isinstance(value, Tensor):
                yield position, p, state, value


def _other_sizes(hooked: Mapping[str, Any], optimizer: Any) -> list[str]:
    """List the states that have another number of elements than their parameter. A step would fail half done."""
    groups = optimizer.param_groups
    if not _as_many(hooked["param_groups"], groups):
        return []
    return [
        f"{described(groups, position)} has shape {list(p.shape)}, its {state.key} {list(value.shape)}"
        for position, p, state, value in _saved_states(hooked, optimizer)
        if value.numel() != p.numel()
    ]


def _partial(hooked: Mapping[str, Any], optimizer: Any) -> list[str]:
    """List the parameters that have a part of their state only. A step would begin the rest anew."""
    groups = optimizer.param_groups
    if not _as_many(hooked["param_groups"], groups):
        return []
    entries = (hooked["state"].get(n) for n in _ids(hooked["param_groups"]))
    lacking = [optimizer.update_rule.missing(entry) if isinstance(entry, Mapping) else [] for entry in entries]
    return [f"{described(groups, n)} has no {' and '.join(keys)}" for n, keys in enumerate(lacking) if keys]


def _dicts_copied(value: Any, levels: int) -> Any:
    if levels == 0 or not isinstance(value, Mapping):
        return value
    return {key: _dicts_copied(inner, levels - 1) for key, inner in value.items()}


def judge(
    given: Mapping[str, Any], hooked: Mapping[str, Any], states_moved: bool, groups: ParamGroups, live: Multipliers
) -> Verdict:
    """Hold the Grad Mults of a checkpoint against the live ones.

    Args:
        given:        the checkpoint before the caller's pre-hooks
        hooked:       the same after the caller's load_state_dict pre-hooks, which may have moved its parameters
        states_moved: whether they have given some parameter another state
    """
    verdict = Verdict()
    if not _as_many(hooked["param_groups"], groups):
        return verdict
    callers = live.callers(parameters_of(groups))
    if KEY not in given and KEY not in hooked:
        _judge_fingerprints(hooked["param_groups"], groups, live, callers, verdict)
        return verdict
    saved = _placed(given, hooked, states_moved, groups, verdict, live.kind)
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
    callers: dict[int, Factor],
    verdict: Verdict,
) -> None:
    """Judge a checkpoint without the key: one of torch's optimizer, or one that lost it on the way."""
    position = 0
    for n, (group, saved_group) in enumerate(zip(groups, saved_groups)):
        now, saved = live.fingerprint(_in_the_order_of(saved_group, group)), saved_group.get(FINGERPRINT, 0)
        ours = [k for k in range(position, position + len(group["params"])) if k in callers]
        position += len(group["params"])
        if saved == now:
            continue
        if saved == 0:
            verdict.kept += [described(groups, k) for k in ours]
        else:
            are = "none" if now == 0 else "others"
            verdict.conflicts.append(f"group {n} had some, which the checkpoint has lost, and {are} are set")


def _in_the_order_of(saved_group: dict[str, Any], group: dict[str, Any]) -> list[Tensor]:
    """Return the parameters of a group in the order that a saved one has their names in, where both know all names.

    The fingerprint depends on the order, and distributed checkpoint brings states by name into any order.
    """
    theirs, own = _comparable_names([saved_group]), _comparable_names([group])
    if None in theirs or None in own:
        return group["params"]
    by_name = dict(zip(own, group["params"]))
    return [by_name[name] for name in theirs] if by_name.keys() == set(theirs) else group["params"]


def _placed(
    given: Mapping[str, Any],
    hooked: Mapping[str, Any],
    states_moved: bool,
    groups: ParamGroups,
    verdict: Verdict,
    kind: type[Factor],
) -> dict[int, Factor]:
    """Return the Grad Mults of a checkpoint by the position of their parameter here.

    A parameter is found by its name, where checkpoint and optimizer have names. Pre-hooks that match parameters by
    their names move states alone, so a position may be stale. Else a Grad Mult goes where the state of the same number
    goes, unless pre-hooks have moved states and not the multipliers. A name that several parameters have is none.
    """
    before, after = given.get(KEY, {}), hooked.get(KEY, {})
    dropped = bool(before) and not after  # as a hook does that builds its result from the optimizer's own state_dict
    moved = states_moved and _same(before, after)
    packed = _unpacked(before if dropped else after, kind)
    saved_names = dict(zip(_ids(given["param_groups"]), _comparable_names(given["param_groups"])))
    own_names = _comparable_names(groups)
    position_of_name = {name: n for n, name in enumerate(own_names) if name is not None and own_names.count(name) == 1}
    position_of_id = {n: position for position, n in enumerate(_ids(hooked["param_groups"]))}
    placed: dict[int, Factor] = {}
    for n, (mult, name) in packed.items():
        name = saved_names.get(n) if name is None else saved_name(name)
        position = position_of_name.get(name)
        if position is None:
            problem = _why_no_position(name, own_names, dropped, moved)
            if problem:
                what = f"parameter {n}" if name is None else f"parameter {name!r}"
                verdict.conflicts.append(f"{what} has one, but {problem}")
                continue
            # A parameter that is listed twice has one id, and a multiplier for each of its positions.
            position = position_of_id.get(n, n)
        if not 0 <= position < len(own_names):
            raise ValueError(
                f"state_dict['grad_mults'] speaks of parameter {n}; this optimizer has {len(own_names)}, numbered "
                "from 0"
            )
        if position in placed:
            raise ValueError(f"state_dict['grad_mults'] speaks of {described(groups, position)} twice")
        placed[position] = mult
    return placed


def _why_no_position(name: str | None, own_names: list[str | None], dropped: bool, moved: bool) -> str | None:
    """Say why a multiplier cannot go by its number either. None: it can."""
    if name is not None and None not in own_names and name not in own_names:
        return "the optimizer has no parameter of this name"
    if dropped:
        return "load_state_dict pre-hooks dropped 'grad_mults', and the optimizer knows no such name"
    if moved:
        return "load_state_dict pre-hooks moved the states and not 'grad_mults', and the optimizer knows no such name"
    return None


def _ids(saved_groups: list[dict[str, Any]]) -> list[int]:
    """The numbers that a checkpoint has for its parameters, in their order."""
    return parameters_of(saved_groups)  # they stand where an optimizer has the parameters


def _comparable_names(groups: ParamGroups) -> list[str | None]:
    """The names of all parameters, of a checkpoint or an optimizer, without what wrappers add to them."""
    return [None if name is None else saved_name(name) for name in names_of(groups)]


def _in_another_order(saved_groups: list[dict[str, Any]], groups: ParamGroups) -> list[str]:
    """List the names here at whose position the checkpoint has another of the names here."""
    if any(isinstance(n, str) for n in _ids(saved_groups)):
        return []  # of torch.distributed.checkpoint, which has placed the states by name and left the names stale
    theirs, own = _comparable_names(saved_groups), _comparable_names(groups)
    return [name for name, other in zip(own, theirs) if None not in (name, other) and name != other and other in own]


def _unpacked(packed: Any, kind: type[Factor]) -> dict[int, tuple[Factor, str | None]]:
    """What `pack` packed: (Grad Mult, name of its parameter if there is one) by number."""
    if not isinstance(packed, Mapping):
        raise ValueError(f"state_dict['grad_mults'] must be a dict, got {type(packed).__name__}")
    try:
        return {int(n): (_unpacked_one(p, kind), p.get("name")) for n, p in packed.items()}
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"state_dict['grad_mults'] must hold a 'scale' and an 'identity' per parameter: {error!r}"
        ) from None


def _unpacked_one(packed: Mapping[str, Any], kind: type[Factor]) -> Factor:
    of_branches = "alphas" in packed
    if of_branches and kind is GradMult:
        raise ValueError("the checkpoint is of FusedRepAdamW: its branch scales are no Grad Mults of this optimizer")
    if of_branches:
        return BranchFactors.unpacked(packed)
    mult = GradMult(packed["scale"], packed["identity"])
    if kind is not GradMult:
        raise ValueError("the checkpoint is of FusedRepSGD: its Grad Mults do not determine a step of AdamW")
    return mult


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(torch.equal(a, b.to(a.device, a.dtype)))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


def keep_dtypes(hooked: Mapping[str, Any], optimizer: Any) -> None:
    """Give states the dtype that they have here, where torch's load_state_dict gave them that of their parameter.

    The momentum of bf16 weights with float32 gradients is float32, and a resumed run must go on with its bits. So must
    one whose momentum is bfloat16. Momentum of a run without momentum_dtype is rounded to the nearest for one with it.
    """
    for _, p, state, value in _saved_states(hooked, optimizer):
        loaded = optimizer.state.get(p, {})
        cast = loaded.get(state.key)
        if not isinstance(cast, Tensor) or not p.is_floating_point():
            continue
        new = state.dtype(p.dtype, getattr(p, "grad_dtype", None) or p.dtype)
        if optimizer.update_rule.stochastic or state is AVERAGE:
            loaded[state.key] = value.to(cast.device, new)
        elif value.dtype != cast.dtype and value.dtype in (new, compute_dtype(p.dtype)):
            loaded[state.key] = value.to(cast.device)
