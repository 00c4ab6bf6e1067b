"""The table of recipes.

A row says how a plain network is trained. Options, job and report follow the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from gradrep_kernels import csla
from gradrep_kernels.models.modes import branch_form
from gradrep_kernels.optim import FusedRepSGD
from gradrep_kernels.recipes.scale_sources import CHANNEL_MEAN, INITIAL, ONES, SEARCHED, ScaleSource

__all__ = [
    "ABLATIONS",
    "FUSED_REP_SGD",
    "RECIPES",
    "SGD",
    "Ablation",
    "OptimizerKind",
    "Recipe",
    "ablated",
    "chosen_rows",
]


@dataclass(frozen=True)
class OptimizerKind:
    """An optimizer class, and its keyword arguments beside `lr` as functions of the options."""

    make: Callable[..., torch.optim.Optimizer]
    settings: Mapping[str, Callable[[Any], Any]] = field(hash=False)


# Recipes without a multiplier use torch's own optimizer, so that the table compares with what one would use otherwise.
SGD = OptimizerKind(torch.optim.SGD, {"momentum": attrgetter("momentum")})
FUSED_REP_SGD = OptimizerKind(
    FusedRepSGD,
    {
        "momentum": attrgetter("momentum"),
        # By the norm of the CSLA model's gradients, so that the rows stay comparable.
        "max_grad_norm": attrgetter("clip_norm"),
        "ema_decay": attrgetter("ema_decay"),
        "momentum_dtype": lambda options: options.momentum_dtype and getattr(torch, options.momentum_dtype),
    },
)


def _plain(model: nn.Module, scales: csla.Scales | None) -> nn.Module:
    return model


@dataclass(frozen=True)
class Recipe:
    """One row of the table. The default of each field is plain SGD's."""

    name: str
    meaning: str
    network: Callable[[nn.Module, csla.Scales | None], nn.Module] = _plain
    """Gives the network to train from the plain one and the scales of `scales` (None without)."""
    scales: ScaleSource | None = None
    reinitialize: bool = False
    """Whether `csla.reinitialize` is applied to the plain network (Rule of Initialization)."""
    grad_mults: bool = False
    """Whether the optimizer gets the Grad Mults of the scales (Rule of Iteration)."""
    optimizer: OptimizerKind = SGD
    sgs: bool = False
    """Whether spatial gradient scaling runs beside the optimizer."""
    rate_of: str | None = None
    """The row whose learning rate it takes, None for a choice of its own."""
    compared_with: tuple[str, ...] = ("sgd",)
    """The rows that the report compares it with, seed by seed."""

    @property
    def plain_network(self) -> bool:
        """Whether it trains the plain network."""
        return self.network is _plain

    @property
    def needs_search(self) -> bool:
        """Whether it needs the scales of a Hyper-Search or of a scales file."""
        return self.scales is not None and self.scales.needs_search

    @property
    def uses_branches(self) -> bool:
        """Whether it trains branches, or imitates them.

        The model must then have convolutions that can be converted.
        """
        return self.scales is not None or not self.plain_network


def _by_name(*rows: Any) -> dict[str, Any]:
    return {row.name: row for row in rows}


_REPOPT = Recipe(
    "repopt",
    "RepOptimizer: re-initialised, gradients multiplied, with the searched scales",
    scales=SEARCHED,
    reinitialize=True,
    grad_mults=True,
    optimizer=FUSED_REP_SGD,
    compared_with=("sgd", "repvgg"),
)
RECIPES: dict[str, Recipe] = _by_name(
    Recipe("sgd", "plain SGD", compared_with=()),
    Recipe("sgs", "SGD with spatial gradient scaling", optimizer=FUSED_REP_SGD, sgs=True),
    _REPOPT,
    dataclasses.replace(_REPOPT, name="repopt+sgs", meaning="both", sgs=True, compared_with=("sgd", "repopt")),
    Recipe(
        "csla",
        "the explicit multi-branch model that repopt imitates",
        network=lambda model, scales: branch_form(model).explicit(model, scales),
        scales=SEARCHED,
        rate_of=_REPOPT.name,  # They are one training in two forms, which the check CSLA = GR shows.
    ),
    Recipe(
        "repvgg",
        "the multi-branch model with a norm in every branch",
        network=lambda model, scales: branch_form(model).normed(model),
    ),
)


@dataclass(frozen=True)
class Ablation:
    """`repopt` with some fields of its row changed."""

    name: str
    meaning: str
    changes: Mapping[str, Any] = field(hash=False)


ABLATIONS: dict[str, Ablation] = _by_name(  # RepOptimizers, Table 4
    Ablation("init", "initialisation not changed", {"reinitialize": False}),
    Ablation("grad", "gradients not multiplied", {"grad_mults": False}),
    Ablation("ones", "all scales 1", {"scales": ONES}),
    Ablation("hs-init", "the scales that Hyper-Search starts from", {"scales": INITIAL}),
    Ablation("channel-mean", "scales averaged over the channels of each layer", {"scales": CHANNEL_MEAN}),
)


def ablated(name: str) -> Recipe:
    """The row of an ablation, named `repopt-NAME`."""
    ablation = ABLATIONS[name]
    return dataclasses.replace(
        _REPOPT,
        name=f"{_REPOPT.name}-{name}",
        meaning=f"RepOpt, {ablation.meaning}",
        rate_of=_REPOPT.name,  # Table 4 changes one thing at a time.
        compared_with=("sgd", _REPOPT.name),
        **ablation.changes,
    )


def chosen_rows(recipes: Sequence[str], ablations: Sequence[str]) -> list[Recipe]:
    """The rows of a job, in order.

    The ablations follow `repopt`, or stand at the end where it is not asked for.
    """
    rows = [RECIPES[name] for name in recipes]
    at = recipes.index(_REPOPT.name) + 1 if _REPOPT.name in recipes else len(rows)
    return [*rows[:at], *map(ablated, ablations), *rows[at:]]
