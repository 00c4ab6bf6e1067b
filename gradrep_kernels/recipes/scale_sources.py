"""Sources of a recipe's branch scales: searched, or made from the network alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradrep_kernels import csla
from gradrep_kernels.models.modes import branch_form

__all__ = ["CHANNEL_MEAN", "INITIAL", "ONES", "SEARCHED", "ScaleSource", "initial_scales"]


@dataclass(frozen=True)
class ScaleSource:
    """A way to get branch scales for a plain network.

    `scales_for(model, searched)` returns them. `searched` are the scales of the Hyper-Search or of a scales file. They
    are None, and not used, unless `needs_search` is set.
    """

    scales_for: Callable[[nn.Module, csla.Scales | None], csla.Scales]
    needs_search: bool


def initial_scales(model: nn.Module) -> csla.Scales:
    """The scales that a Hyper-Search of `model` starts from.

    Leaves the default generator as it was.
    """
    with torch.random.fork_rng(devices=[]):
        return csla.extract_scales(branch_form(model).hyper_search(model))


def _each_tensor(scales: csla.Scales, change: Callable[[Tensor], Tensor]) -> csla.Scales:
    return {name: branch_scales.mapped(change) for name, branch_scales in scales.items()}


def _mean(tensor: Tensor) -> Tensor:
    return tensor.double().mean().to(tensor.dtype).expand_as(tensor)


SEARCHED = ScaleSource(lambda model, searched: searched, needs_search=True)
CHANNEL_MEAN = ScaleSource(lambda model, searched: _each_tensor(searched, _mean), needs_search=True)
INITIAL = ScaleSource(lambda model, searched: initial_scales(model), needs_search=False)
ONES = ScaleSource(lambda model, searched: _each_tensor(initial_scales(model), torch.ones_like), needs_search=False)
