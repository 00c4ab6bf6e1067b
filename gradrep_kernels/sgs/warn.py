"""Warnings that point to the caller's line."""

from __future__ import annotations

import sys
import warnings

from gradrep_kernels.sgs.layers import Layer


def warn_not_finite(layers: list[Layer]) -> None:
    if layers:
        names = ", ".join(name for layer in layers for name in layer.convs)
        warn(f"the input of {names} is not finite; the scaling stays as it was", RuntimeWarning)


def warn(text: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the caller's line.

    It lies above this package, and above torch, which calls the hooks of a step.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_inside(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, category, stacklevel=level)


def _is_inside(module: str) -> bool:
    return module.split(".")[0] in ("gradrep_kernels", "torch")
