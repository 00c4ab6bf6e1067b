"""How much of a block's output its identity brings when a Hyper-Search starts, for the starts of RepOptimizers."""

from __future__ import annotations

import dataclasses

import torch

from gradrep_kernels import csla
from gradrep_kernels.recipes.build import search_model
from gradrep_kernels.recipes.data.load import Data
from gradrep_kernels.recipes.data.loader import Loader
from gradrep_kernels.recipes.options.resolve import Options
from gradrep_kernels.recipes.training import repeatable

__all__ = ["identity_ratios"]

_STARTS = ("depth", 1.0)  # RepOptimizers, Table 9
_IMAGES = 64


def identity_ratios(options: Options, data: Data) -> dict[str, dict[str, float]]:
    """{start: {block: Var(identity) / Var(sum)}} of the Hyper-Search's network before its first step, on the CPU.

    Source: RepOptimizers, Figure 4. The starts are that of `--hs-init`, `depth` and 1. Nothing for a network without
    identities. Norms take their statistics from the batch of training images that is seen.
    """
    starts = dict.fromkeys((*((options.hs_init,) if options.hs_init is not None else ()), *_STARTS))
    found = {}
    with repeatable(options.threads, "cpu"), torch.no_grad():
        x, _ = next(iter(Loader(data, data.train, min(_IMAGES, len(data.train)), seed=options.seed)))
        for start in starts:
            at_start = dataclasses.replace(options.of_search(), hs_init=start, device="cpu")
            model = search_model(at_start, data).model.train()
            try:
                found[_shown(start)] = csla.identity_variance_ratio(model, x)
            except ValueError:
                return {}
    return found


def _shown(start: str | float) -> str:
    """A start as `--hs-init` takes it."""
    return start if isinstance(start, str) else f"{start:g}"
