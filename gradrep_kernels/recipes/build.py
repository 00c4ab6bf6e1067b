"""From a row of the table to a network with its optimizer and, where the recipe says so, its spatial gradient scaling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from gradrep_kernels import csla, models
from gradrep_kernels.branch_scales import BranchScales
from gradrep_kernels.optim import FusedRepSGD, param_groups
from gradrep_kernels.recipes.data import Data
from gradrep_kernels.recipes.loader import derived_seed
from gradrep_kernels.recipes.options import MODELS, Options
from gradrep_kernels.sgs import SpatialGradientScaling

__all__ = ["Row", "Trainee", "build", "initial_scales", "multiplier_bytes", "plain_model", "rows", "search_model"]

_INITIALISATION = 1  # a purpose for derived_seed


@dataclass(frozen=True)
class Row:
    """One line of the table: a recipe, or RepOpt with one of its rules broken."""

    recipe: str
    ablation: str | None = None

    @property
    def label(self) -> str:
        return self.recipe if self.ablation is None else f"{self.recipe}-{self.ablation}"

    @property
    def uses_scales(self) -> bool:
        """Whether it needs searched scales, and not only those that Hyper-Search starts from."""
        return self.recipe in ("repopt", "repopt+sgs", "csla") and self.ablation not in ("ones", "hs-init")

    @property
    def uses_sgs(self) -> bool:
        return self.recipe.endswith("sgs")


@dataclass
class Trainee:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    sgs: SpatialGradientScaling | None = None


def rows(options: Options) -> list[Row]:
    """The recipes in the order of the table, the ablations after `repopt` (after all where that is not asked for)."""
    found = []
    ablations = [Row("repopt", name) for name in options.ablate]
    for recipe in options.recipe:
        found.append(Row(recipe))
        if recipe == "repopt":
            found += ablations
    return found if "repopt" in options.recipe else found + ablations


def plain_model(options: Options, data: Data, seed: int) -> nn.Module:
    """The target network, drawn from `seed` on the CPU (the same on every device). Sets the default generator's seed."""
    torch.manual_seed(derived_seed(seed, _INITIALISATION))
    return MODELS[options.model](num_classes=len(data.classes), in_channels=data.channels)


def initial_scales(model: nn.Module) -> csla.Scales:
    """The scales that Hyper-Search starts from."""
    with torch.random.fork_rng(devices=[]):
        return csla.extract_scales(csla.hyper_search_model(model))


def search_model(options: Options, data: Data) -> Trainee:
    model = csla.hyper_search_model(plain_model(options, data, options.seed)).to(options.device)
    return Trainee(model, _sgd(model, options))


def build(row: Row, options: Options, data: Data, scales: csla.Scales | None, seed: int) -> Trainee:
    """Network and optimizer at their start; all rows begin with the same plain network. Draws from the default generator."""
    model = plain_model(options, data, seed)
    if row.recipe == "csla":
        model = csla.csla_model(model, scales)
    elif row.recipe == "repvgg":
        model = models.repvgg_model(model)
    elif row.recipe in ("repopt", "repopt+sgs"):
        scales = _ablated(row.ablation, scales, model)
        if row.ablation != "init":
            csla.reinitialize(model, scales)
    model = model.to(options.device)
    if row.recipe in ("sgd", "csla", "repvgg"):
        return Trainee(model, _sgd(model, options))
    grad_mults = csla.grad_mults(model, scales) if row.recipe.startswith("repopt") and row.ablation != "grad" else None
    groups = param_groups(model, options.weight_decay)
    optimizer = FusedRepSGD(groups, lr=options.lr, momentum=options.momentum, grad_mults=grad_mults)
    if not row.uses_sgs:
        return Trainee(model, optimizer)
    sgs = SpatialGradientScaling(
        model, optimizer, k=options.sgs_k, every=options.sgs_every, warmup=options.sgs_warmup, batches=options.sgs_batches,
        remove_near=options.remove_near,
    )  # fmt: skip
    return Trainee(model, optimizer, sgs)


def _sgd(model: nn.Module, options: Options) -> torch.optim.SGD:
    """torch's own, for what has no multiplier: the rows to compare with are what one would use otherwise."""
    return torch.optim.SGD(param_groups(model, options.weight_decay), lr=options.lr, momentum=options.momentum)


def _ablated(ablation: str | None, scales: csla.Scales | None, model: nn.Module) -> csla.Scales:
    if ablation == "hs-init":
        return initial_scales(model)
    if ablation == "ones":
        return {name: _changed(value, torch.ones_like) for name, value in initial_scales(model).items()}
    if ablation == "channel-mean":
        return {
            name: _changed(value, lambda t: t.double().mean().to(t.dtype).expand_as(t))
            for name, value in scales.items()
        }
    return scales


def _changed(value: BranchScales, change) -> BranchScales:
    tensors = {name: change(tensor) for name, tensor in value.tensors().items()}
    return BranchScales(tensors["conv"], tensors.get("1x1"), tensors.get("identity", value.identity))


def multiplier_bytes(trainee: Trainee) -> int:
    """What Grad Mults and spatial scalings take in their stored form."""
    if not isinstance(trainee.optimizer, FusedRepSGD):
        return 0
    found = (
        trainee.optimizer.grad_mult(p, total=True) for group in trainee.optimizer.param_groups for p in group["params"]
    )
    return sum(mult.nbytes for mult in found if mult is not None)
