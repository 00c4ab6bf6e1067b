"""Warnings at the caller's line, numbers with their nouns, and lists that a message shows the beginning of."""

from __future__ import annotations

import sys
import warnings

__all__ = ["counted", "first_few", "warn_outside"]


def warn_outside(text: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the caller's line.

    It lies above this package, and above torch, which calls hooks and wraps functions of it.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_inside(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, category, stacklevel=level)


def _is_inside(module: str) -> bool:
    return module.split(".")[0] in ("gradrep_kernels", "torch")


def counted(number: int, noun: str) -> str:
    """'1 step', '2 steps'."""
    return f"{number} {noun}{'s' * (number != 1)}"


def first_few(parts: list[str], shown: int = 4, between: str = "; ") -> str:
    """Join the first parts into one line that says how many more there are."""
    more = f"{between}and {len(parts) - shown} more" if len(parts) > shown else ""
    return between.join(parts[:shown]) + more
