"""The table of recipes.

A row says how a plain network is trained. Options, job and report follow the table.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from gradrep_kernels import csla
from gradrep_kernels.branches.normed import normed_model
from gradrep_kernels.models import DynamicReparameterization, dbb_model, qarepvgg_model
from gradrep_kernels.models.modes import branch_form
from gradrep_kernels.optim import FusedRepAdamW, FusedRepSGD
from gradrep_kernels.recipes.scale_sources import CHANNEL_MEAN, INITIAL, ONES, SEARCHED, ScaleSource

__all__ = [
    "ABLATIONS",
    "OPTIMIZERS",
    "RECIPES",
    "RIVALS",
    "Ablation",
    "OptimizerKind",
    "OptimizerRule",
    "Recipe",
    "ablated",
    "chosen_rows",
    "default_rate",
    "dyrep_schedule",
    "in_all",
]


@dataclass(frozen=True)
class OptimizerKind:
    """An optimizer class, and its keyword arguments beside `lr` as functions of the options."""

    make: Callable[..., torch.optim.Optimizer]
    settings: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict, hash=False)
    multipliers: str | None = None
    """The keyword that takes what imitates the branches: `grad_mults` or `branch_scales`."""


@dataclass(frozen=True)
class OptimizerRule:
    """An update rule by the names of `--optimizer`."""

    name: str
    plain: OptimizerKind
    """Of rows without multipliers: torch's own, so that the table compares with what one would use otherwise."""
    multiplied: OptimizerKind | None = None
    """Of rows with multipliers, None where this package has none."""

    @property
    def extended(self) -> OptimizerKind:
        """One whose step can do more than torch's where there is one."""
        return self.multiplied or self.plain


_SGD = {"momentum": attrgetter("momentum"), "nesterov": attrgetter("nesterov")}
_TAIL = {
    # By the norm of the CSLA model's gradients, so that the rows stay comparable.
    "max_grad_norm": attrgetter("clip_norm"),
    "ema_decay": attrgetter("ema_decay"),
}
_BFLOAT16 = {"momentum_dtype": lambda options: options.momentum_dtype and getattr(torch, options.momentum_dtype)}


def _torch_rule(name: str, **settings: Callable[[Any], Any]) -> OptimizerRule:
    return OptimizerRule(name.lower(), OptimizerKind(getattr(torch.optim, name), settings))


OPTIMIZERS: dict[str, OptimizerRule] = {
    rule.name: rule
    for rule in (
        OptimizerRule(
            "sgd",
            OptimizerKind(torch.optim.SGD, _SGD),
            OptimizerKind(FusedRepSGD, {**_SGD, **_TAIL, **_BFLOAT16}, "grad_mults"),
        ),
        OptimizerRule("adamw", OptimizerKind(torch.optim.AdamW), OptimizerKind(FusedRepAdamW, _TAIL, "branch_scales")),
        # SGS, Table 5, and RepOptimizers, Table 4. Torch's defaults, but for the learning rate and the weight decay.
        *map(_torch_rule, ("Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "NAdam", "RAdam")),
        _torch_rule("RMSprop", momentum=attrgetter("momentum")),
    )
}


def default_rate(optimizer: str) -> float:
    """The learning rate of `--optimizer` where none is given: 0.1 for SGD, for the others torch's default."""
    if optimizer == "sgd":
        return 0.1
    return inspect.signature(OPTIMIZERS[optimizer].plain.make).parameters["lr"].default


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
    extended: bool = False
    """Whether the optimizer is this package's, and not torch's."""
    sgs: bool = False
    """Whether spatial gradient scaling runs beside the optimizer."""
    fixed_scaling: bool = False
    """Whether all gradients have one spatial scaling, that of `--sgs-alpha` and `--sgs-beta`."""
    structure: Callable[..., DynamicReparameterization] | None = None
    """Gives what changes the network while it trains, from network, optimizer, its groups, options and a seed."""
    paper: str = ""
    """Whose experiment it is: 'repopt', 'sgs', 'rival', or nobody's."""
    rate_of: str | None = None
    """The row whose learning rate it takes, None for a choice of its own."""
    compared_with: tuple[str, ...] = ("sgd",)
    """The rows that the report compares it with, seed by seed."""

    @property
    def plain_network(self) -> bool:
        """Whether it trains the plain network, from start to end."""
        return self.network is _plain and self.structure is None

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

    @property
    def takes_branches(self) -> bool:
        """Whether its branches are those of --branches. Rivals have blocks of their own."""
        return self.uses_branches and self.paper != "rival"


def _dyrep(
    model: nn.Module, optimizer: torch.optim.Optimizer, groups: Callable, options: Any, seed: int
) -> DynamicReparameterization:
    every, until = dyrep_schedule(options)
    where = branch_form(model).where
    return DynamicReparameterization(model, optimizer, groups, every=every, until=until, seed=seed, where=where)


def dyrep_schedule(options: Any) -> tuple[int, int]:
    """Epochs between the changes of DyRep, and the epoch from which there are none.

    They are those of its code: every 15 of 600 epochs on CIFAR, every 5 of 120 on ImageNet, none in the last sixth.
    """
    every = options.epochs / (24 if options.data.kind == "folder" else 40)
    return max(1, round(every)), options.epochs * 5 // 6


def _by_name(*rows: Any) -> dict[str, Any]:
    return {row.name: row for row in rows}


_REPOPT = Recipe(
    "repopt",
    "RepOptimizer: re-initialised, gradients multiplied, with the searched scales",
    scales=SEARCHED,
    reinitialize=True,
    grad_mults=True,
    extended=True,
    compared_with=("sgd", "repvgg"),
    paper="repopt",
)
RECIPES: dict[str, Recipe] = _by_name(
    Recipe("sgd", "plain SGD, or another --optimizer", compared_with=()),
    Recipe("sgs", "that with spatial gradient scaling", extended=True, sgs=True, paper="sgs"),
    Recipe(
        "sgs-grid", "that with one fixed scaling, of --sgs-alpha and --sgs-beta", extended=True, fixed_scaling=True,
        paper="sgs",
    ),
    _REPOPT,
    dataclasses.replace(_REPOPT, name="repopt+sgs", meaning="both", sgs=True, compared_with=("sgd", "repopt")),
    Recipe(
        "csla",
        "the explicit multi-branch model that repopt imitates",
        network=lambda model, scales: branch_form(model).explicit(model, scales),
        scales=SEARCHED,
        rate_of=_REPOPT.name,  # They are one training in two forms, which the check CSLA = GR shows.
        paper="repopt",
    ),
    Recipe(
        "repvgg",
        "the multi-branch model with a norm in every branch",
        network=lambda model, scales: branch_form(model).normed(model),
        paper="repopt",
    ),
    Recipe(
        "acb", "the blocks of ACNet: k x k, 1 x k and k x 1 with a norm each",
        network=lambda model, scales: normed_model(model, branches="acb", where=branch_form(model).where),
        paper="rival",
    ),
    Recipe(
        "dbb", "Diverse Branch Block: k x k, 1 x 1, 1 x 1 before k x k, 1 x 1 before an average, with norms",
        network=lambda model, scales: dbb_model(model, where=branch_form(model).where), paper="rival",
    ),
    Recipe(
        "qarepvgg", "QARepVGG: k x k with a norm, 1 x 1 and identity without, and the norm of their sum",
        network=lambda model, scales: qarepvgg_model(model, where=branch_form(model).where), paper="rival",
    ),
    Recipe("dyrep", "DyRep: branches grow and go while it trains", structure=_dyrep, paper="rival"),
)  # fmt: skip
RIVALS = tuple(name for name, row in RECIPES.items() if row.paper == "rival")


def in_all() -> tuple[str, ...]:
    """The rows that `all` stands for: those of the two papers that need no further option."""
    return tuple(name for name, row in RECIPES.items() if row.paper != "rival" and not row.fixed_scaling)


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
