"""Readers and checks of single options that know what this package has."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gradrep_kernels.branches.presets import preset as branch_preset
from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.options.declare import Check, number, one_of, some_of
from gradrep_kernels.recipes.options.presets import PRESETS
from gradrep_kernels.recipes.table import RECIPES, RIVALS, in_all

__all__ = [
    "ABOVE_0",
    "BELOW_1",
    "check_device",
    "check_rates",
    "read_branches",
    "read_layers",
    "read_numbers",
    "read_preset",
    "read_rates",
    "read_recipes",
    "read_start",
]

ABOVE_0 = number(lambda value: 0 < value < float("inf"), "a number above 0")
_WIDEST = 2**20
BELOW_1 = number(lambda value: 0 <= value < 1, "in [0, 1)")


def read_branches(flag: str, value: str) -> str:
    """A preset of branches."""
    try:
        branch_preset(value)
    except ValueError as reason:
        raise InputError(f"{flag}{str(reason).removeprefix('branches')}") from None
    return value


def read_recipes(flag: str, value: tuple[str, ...]) -> tuple[str, ...]:
    """Names of rows in the order of the table. 'all' are those of the papers, 'rivals' those of others."""
    names = some_of([*RECIPES, "all", "rivals"])(flag, value)
    if not names:
        raise InputError(f"{flag} must name at least one recipe of {', '.join(RECIPES)}, or all")
    named = {*names, *(in_all() if "all" in names else ()), *(RIVALS if "rivals" in names else ())}
    return tuple(name for name in RECIPES if name in named)


def read_preset(flag: str, value: str) -> str:
    """The name of a preset for `train` or `search`."""
    name = one_of(PRESETS)(flag, value)
    if PRESETS[name].command == "quantize":
        raise InputError(f"{flag} {name} is of a trained network: `quantize RUN` has its settings")
    return name


def read_start(flag: str, value: str | float) -> str | float:
    """'depth' or a number above 0: where the scales of a search start."""
    if value == "depth":
        return value
    try:
        start = float(value)
    except ValueError:
        start = 0.0
    if not 0 < start < float("inf"):
        raise InputError(f"{flag} must be depth or a number above 0, got {value!r}")
    return start


def read_numbers(flag: str, value: Sequence[str | int]) -> tuple[int, ...]:
    """Whole numbers of at least 1."""
    try:
        numbers = tuple(int(part) for part in value)
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise InputError(
            f"{flag} must be whole numbers of at least 1 with commas between, got {','.join(map(str, value))!r}"
        )
    return numbers


def read_layers(flag: str, value: int | Sequence[str | int]) -> tuple[int, ...]:
    """Whole numbers of at least 1, one for each layer, or 'none'."""
    given = (value,) if isinstance(value, int) else tuple(value)
    layers = () if given in ((), ("none",)) else read_numbers(flag, given)
    if max(layers, default=0) > _WIDEST:
        raise InputError(f"{flag} must be at most {_WIDEST}, got {','.join(map(str, layers))}")
    return layers


def check_device(flag: str, name: str) -> None:
    """Raise InputError where there is no such device."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"{flag} must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            built = "is built without CUDA" if torch.version.cuda is None else "sees no CUDA device"
            raise InputError(f"{flag} {name}: torch {torch.__version__} {built}; use {flag} cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise InputError(f"{flag} {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")


def read_rates(flag: str, value: float | str | Sequence[float | str]) -> tuple[float, ...]:
    """Learning rates in rising order, each once."""
    given = (value,) if isinstance(value, (float, int, str)) else value
    try:
        return tuple(sorted({float(rate) for rate in given}))
    except ValueError as reason:
        raise InputError(f"{flag} must be a number, or several with commas between: {reason}") from None


def check_rates(flag: str, value: tuple[float, ...], check: Check = ABOVE_0) -> None:
    """Raise InputError where there is no rate, or one that is not above 0."""
    if not value:
        raise InputError(f"{flag} must name a learning rate, or several with commas between")
    for rate in value:
        check(flag, rate)
