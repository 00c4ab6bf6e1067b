"""The deployed form of a trained network: how large it is, and how far its outputs are from the trained one's."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from gradrep_kernels import csla
from gradrep_kernels.branches.algebra import MultiBranch
from gradrep_kernels.recipes.data.load import Data
from gradrep_kernels.recipes.data.loader import Loader

__all__ = ["merged_figures"]

_IMAGES = 32


@torch.no_grad()
def merged_figures(model: nn.Module, data: Data, device: str) -> dict[str, Any]:
    """Merge the blocks of a network, and compare both in eval mode on the first test images.

    Returns parameters_deployed, and merge_difference: the largest difference of outputs over the largest output, None
    where that is not finite. Both compute in float64, so it is the rounding of the merged weights. Nothing for a
    network without blocks. `model` is not changed.
    """
    if not any(isinstance(module, MultiBranch) for module in model.modules()):
        return {}
    merged = csla.merge(model)
    x, _ = next(iter(Loader(data, data.test, _IMAGES, device=device)))
    expected, found = (copy.deepcopy(m).double().eval()(x.double()) for m in (model, merged))
    difference = float((found - expected).abs().max() / expected.abs().max())
    return {
        "parameters_deployed": sum(p.numel() for p in merged.parameters()),
        "merge_difference": difference if difference < float("inf") else None,
    }
