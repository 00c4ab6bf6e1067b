"""Checks of the controller's arguments, and of a state that it is to load."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradrep_kernels.sgs.gathering import Binning
from gradrep_kernels.sgs.history import History
from gradrep_kernels.sgs.layers import Layer
from gradrep_kernels.wrappers import saved_name


def check_objects(model: object, process_group: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if process_group is not None and not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        kind = type(process_group).__name__
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup or None, got {kind}")


def check_ints(**values: tuple[object, int]) -> None:
    """Raise ValueError unless each is an int that is not below its least. They are given as name=(value, least)."""
    for name, (value, least) in values.items():
        if not _is_int(value, least):
            raise ValueError(f"{name} must be an int, {least} or more, got {value!r}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


class SavedState(NamedTuple):
    """What a state holds, after a comparison with the controller."""

    scalings: Mapping[str, Tensor]
    binnings: dict[Layer, Binning]
    steps: int
    paused: bool
    epoch: int | None
    history: History


def saved_state(state_dict: Mapping, live: Mapping[str, Tensor], layers: Iterable[Layer]) -> SavedState:
    """Read a state. Those of earlier versions have no history.

    Args:
        live:   the scalings of the controller by name
        layers: of the controller

    Raises:
        ValueError: names, shapes, dtypes or values that do not fit.
    """
    scalings = _saved_scalings(state_dict, live)
    steps, paused, epoch = state_dict.get("steps", 0), state_dict.get("paused", False), state_dict.get("epoch")
    if not _is_int(steps, 0) or not isinstance(paused, bool):
        raise ValueError(f"steps must be an int, 0 or more, and paused a bool, got {steps!r} and {paused!r}")
    if epoch is not None and not _is_int(epoch):
        raise ValueError(f"epoch must be an int or None, got {epoch!r}")
    history = _saved_history(state_dict.get("history"), layers)
    return SavedState(scalings, _saved_binnings(state_dict, layers), steps, paused, epoch, history)


def _saved_scalings(state_dict: Mapping, live: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if not isinstance(state_dict, Mapping) or not isinstance(state_dict.get("scalings"), Mapping):
        raise ValueError("state_dict must be what state_dict() gave: it has no 'scalings'")
    saved = _by_live_names(state_dict["scalings"], live)
    for what, names in (("missing", live.keys() - saved.keys()), ("unexpected", saved.keys() - live.keys())):
        if names:
            raise ValueError(f"scalings do not fit the model: {what} {_first_few(names)}")
    for name, g in saved.items():
        _check_tensor(f"scalings: {name}", g, live[name].shape, torch.is_floating_point, "floating point")
        if not bool(torch.isfinite(g).all() and (g >= 0).all()):
            raise ValueError(f"scalings: {name} must be finite and not negative, got {g.tolist()}")
    return saved


def _saved_binnings(state_dict: Mapping, layers: Iterable[Layer]) -> dict[Layer, Binning]:
    """Return the binnings in a state, which holds them as (ranges, n) by the layer's name, as copies."""
    ranges = state_dict.get("ranges", {})
    if not isinstance(ranges, Mapping):
        raise ValueError(f"ranges must be a dict by layer, got {type(ranges).__name__}")
    by_name, binnings = {layer.name: layer for layer in layers}, {}
    ranges = _by_live_names(ranges, by_name)
    if ranges.keys() - by_name.keys():
        raise ValueError(f"ranges do not fit the model: unexpected {_first_few(ranges.keys() - by_name.keys())}")
    for name, parts in ranges.items():
        if not isinstance(parts, (tuple, list)) or len(parts) != 2:
            raise ValueError(f"ranges: {name} must be a pair (ranges, n), got {type(parts).__name__}")
        shape = by_name[name].statistics_shape
        _check_tensor(f"ranges: {name}", parts[0], (*shape, 2, 2), torch.is_floating_point, "floating point")
        _check_tensor(f"ranges: n of {name}", parts[1], shape, lambda n: n.dtype == torch.int64, "int64")
        if (parts[1] < 0).any():
            raise ValueError(f"ranges: n of {name} must not be negative")
        binnings[by_name[name]] = Binning(*(part.detach().to("cpu", copy=True) for part in parts))
    return binnings


def _saved_history(saved: object, layers: Iterable[Layer]) -> History:
    """Return the history in a state, by the names of the layers. `saved` is what `History.state` gave, or None."""
    if saved is None:
        return History()
    if not isinstance(saved, Mapping) or not isinstance(saved.get("scalings"), Mapping):
        raise ValueError(f"history must be what state_dict() gave: it has no 'scalings', got {type(saved).__name__}")
    lists = [saved.get(key) for key in ("numbers", "epochs", "steps")]
    if not all(isinstance(values, (list, tuple)) for values in lists) or len(set(map(len, lists))) > 1:
        raise ValueError("history must hold lists of numbers, epochs and steps, of one length")
    numbers, epochs, steps = lists
    are_ints = all(_is_int(n) for n in (*numbers, *epochs, *steps) if n is not None)
    if not are_ints or not _is_int(saved.get("updates"), 0) or not _is_int(saved.get("stride"), 1):
        raise ValueError("history: updates, stride, numbers, epochs and steps must be ints")
    by_name = {layer.name: layer for layer in layers}
    scalings = _by_live_names(saved["scalings"], by_name)
    if scalings.keys() - by_name.keys():
        raise ValueError(f"history does not fit the model: unexpected {_first_few(scalings.keys() - by_name.keys())}")
    for name, g in scalings.items():
        shape = (len(numbers), *by_name[name].kernel_size)
        _check_tensor(f"history: {name}", g, shape, torch.is_floating_point, "floating point")
    return History.of_state({**saved, "scalings": scalings})


def _by_live_names(saved: Mapping[str, object], live: Mapping[str, object]) -> dict[str, object]:
    """Return `saved` under names without what wrappers add, which earlier versions saved with them."""
    return {name if name in live or not isinstance(name, str) else saved_name(name): v for name, v in saved.items()}


def _is_int(value: object, least: int | None = None) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)


def _check_tensor(name: str, value: object, shape: tuple[int, ...], fits: Callable[[Tensor], bool], dtype: str) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a Tensor, got {type(value).__name__}")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must be {list(shape)}, got {list(value.shape)}")
    if not fits(value):
        raise ValueError(f"{name} must be {dtype}, got {value.dtype}")


def _first_few(names: Iterable[str]) -> str:
    names = sorted(map(str, names))
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
