"""The forms of a network that models/ gives, by the name of their mode."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from gradrep_kernels import csla
from gradrep_kernels.branches.normed import normed_model

__all__ = ["BranchForm", "ScalesOrPath", "branch_form", "scales_of_mode"]

ScalesOrPath = csla.Scales | str | os.PathLike[str] | None


@dataclass(frozen=True)
class BranchForm:
    """Which convolutions of a network have which branches in its multi-branch forms.

    A network says so by an attribute `branch_form`. The defaults are those of `csla.hyper_search_model`, as are the
    meanings of the fields.
    """

    branches: str = "repvgg"
    where: tuple[str, ...] | None = None
    """Names of the convolutions that have branches. Scales leave out the others."""
    init: Mapping[str, float] | str = "depth"

    @property
    def partial(self) -> bool:
        """What csla's functions take as `partial` with scales of this form."""
        return self.where is not None

    def hyper_search(self, model: nn.Module) -> nn.Module:
        """Return a new model with trainable scales."""
        return csla.hyper_search_model(model, self.init, branches=self.branches, where=self.where)

    def explicit(self, model: nn.Module, scales: csla.Scales) -> nn.Module:
        """Return a new model with constant scales."""
        return csla.csla_model(model, scales, partial=self.partial)

    def normed(self, model: nn.Module) -> nn.Module:
        """Return a new model with a norm in each branch."""
        return normed_model(model, branches=self.branches, where=self.where)


def branch_form(model: nn.Module) -> BranchForm:
    """Return what a network says of its branches: RepVGG's at every k x k convolution where it says nothing."""
    return getattr(model, "branch_form", BranchForm())


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
