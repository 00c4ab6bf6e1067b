"""The forms of a network that models/ gives, by the name of their mode."""

from __future__ import annotations

import os

from gradrep_kernels import csla

__all__ = ["ScalesOrPath", "scales_of_mode"]

ScalesOrPath = csla.Scales | str | os.PathLike[str] | None


def scales_of_mode(mode: str, scales: ScalesOrPath, baseline: str) -> csla.Scales | None:
    """Check a mode, and return its branch scales, read from their file where `scales` is a path.

    Args:
        baseline: the mode of the form that has a norm in each branch.

    Raises ValueError for a mode that is none of 'target', 'hs', 'csla' and `baseline`, for scales that another mode
    than 'csla' gets, and for those that 'csla' does not get.
    """
    if mode not in ("target", "hs", "csla", baseline):
        raise ValueError(f"mode must be 'target', 'hs', 'csla' or {baseline!r}, got {mode!r}")
    if (mode == "csla") != (scales is not None):
        raise ValueError(
            "mode='csla' needs scales (a dict or a file)"
            if scales is None
            else f"scales are for mode='csla', got mode={mode!r}"
        )
    return csla.load_scales(scales) if isinstance(scales, (str, os.PathLike)) else scales
