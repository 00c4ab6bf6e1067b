"""The settings of `quantize`, a field each: flag, default, check and help follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.options.declare import Option, at_least, declared_fields, one_of, option
from gradrep_kernels.recipes.options.presets import PRESETS
from gradrep_kernels.recipes.options.readers import check_device
from gradrep_kernels.recipes.quantization.int8 import FLOWS

__all__ = ["SETTINGS", "Settings", "chosen_settings"]

_LEAST_BITS, _MOST_BITS = 2, 16


def _read_bits(flag: str, value: tuple[str | int, ...]) -> tuple[int, ...]:
    """Numbers of bits in falling order, each once."""
    try:
        bits = sorted({int(one) for one in value}, reverse=True)
    except ValueError:
        bits = []
    if not bits or bits[-1] < _LEAST_BITS or bits[0] > _MOST_BITS:
        needed = f"whole numbers from {_LEAST_BITS} to {_MOST_BITS} with commas between"
        raise InputError(f"{flag} must be {needed}, got {','.join(map(str, value)) or 'none'}")
    return tuple(bits)


@dataclass(frozen=True)
class Settings:
    """What a user chose."""

    bits: tuple[int, ...] = option("that weights are rounded to", (8, 6, 5, 4), reader=_read_bits)
    int8: bool | None = option(
        "weights and activations in 8 bits, after training (PTQ) and trained so (QAT)",
        default_help="where a library for it is here",
    )
    flow: str | None = option(
        f"whose: {'; '.join(f'{flow.name} ({flow.title})' for flow in FLOWS.values())}",
        default_help="the first that is here", reader=one_of(FLOWS), metavar="NAME",
    )  # fmt: skip
    calibration: int = option("training images that PTQ measures activations on", 512, at_least(1))
    qat_epochs: int = option("epochs of QAT, 0: none", PRESETS["repopt-qat"].train["epochs"], at_least(0))
    qat_per_channel: bool = option("in QAT each channel has a step of its own, otherwise a layer has one", True)
    rows: tuple[str, ...] | None = option("recipes of the run", default_help="all")
    seeds: int | None = option("how many of its seeds, the first ones", check=at_least(1), default_help="all")
    layer: str | None = option(
        "the convolution whose weights are drawn", default_help="the middle one of those above 1 x 1", metavar="NAME"
    )
    device: str | None = option("cpu, cuda or cuda:N", check=check_device, default_help="the run's")


SETTINGS: dict[str, Option] = declared_fields(Settings)
"""Every setting by its attribute name."""


def chosen_settings(given: Mapping[str, Any]) -> Settings:
    """Settings from those that a user gave, as argparse leaves them. Raises InputError that names the flag."""
    values = {name: declared.read(given.get(name, declared.default)) for name, declared in SETTINGS.items()}
    for name, declared in SETTINGS.items():
        declared.check(values[name])
    settings = Settings(**values)
    if settings.flow is not None and settings.int8 is False:
        raise InputError(f"--flow {settings.flow}: with --no-int8 there is none")
    return settings
