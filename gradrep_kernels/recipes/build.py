"""Build what a row of the table says: a network, its optimizer, its spatial gradient scaling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from gradrep_kernels import csla
from gradrep_kernels.grad_mult import GradMult
from gradrep_kernels.models.modes import BranchForm, branch_form
from gradrep_kernels.optim import param_groups
from gradrep_kernels.recipes import interrupts
from gradrep_kernels.recipes.data import Data
from gradrep_kernels.recipes.loader import derived_seed
from gradrep_kernels.recipes.options import MODELS, Options
from gradrep_kernels.recipes.table import FUSED_REP_SGD, SGD, OptimizerKind, Recipe
from gradrep_kernels.sgs import SpatialGradientScaling

__all__ = ["Trainee", "build", "multiplier_bytes", "plain_model", "search_model"]

_INITIALISATION = 1  # a purpose for derived_seed


@dataclass
class Trainee:
    """A network with its optimizer and, in some recipes, spatial gradient scaling.

    `lr` is the learning rate at the end of the warm-up. `averages`: whether the optimizer keeps moving averages.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    lr: float
    sgs: SpatialGradientScaling | None = None
    averages: bool = False


def plain_model(options: Options, data: Data, seed: int) -> nn.Module:
    """Draw the target network from `seed` on the CPU, the same for every device.

    Seeds the default generator. The network says which branches it has in its other forms (`branch_form`): those of
    --branches, where it was given.
    """
    torch.manual_seed(derived_seed(seed, _INITIALISATION))
    model = MODELS[options.model](num_classes=len(data.classes), in_channels=data.channels)
    if options.branches is not None:
        model.branch_form = BranchForm(options.branches)
    return model


def search_model(options: Options, data: Data) -> Trainee:
    """The network of the Hyper-Search, drawn from the first seed."""
    plain = plain_model(options, data, options.seed)
    model = branch_form(plain).hyper_search(plain).to(options.device)
    return Trainee(model, _optimizer(SGD, model, options, options.search_lr), options.search_lr)


def build(recipe: Recipe, options: Options, data: Data, searched: csla.Scales | None, seed: int, lr: float) -> Trainee:
    """Network and optimizer of a row at their start.

    All rows begin with the same plain network. `searched` are the scales of the Hyper-Search or of a scales file, None
    where no row needs them. Draws from the default generator.
    """
    model = plain_model(options, data, seed)
    partial = branch_form(model).partial
    scales = None if recipe.scales is None else recipe.scales.scales_for(model, searched)
    if recipe.reinitialize:
        csla.reinitialize(model, scales, partial=partial)
    model = recipe.network(model, scales).to(options.device)
    grad_mults = csla.grad_mults(model, scales, partial=partial) if recipe.grad_mults else None
    if recipe.reinitialize and not recipe.grad_mults:
        grad_mults = {}  # The row that shows what is lost without them.
    kind = FUSED_REP_SGD if options.beyond_torch else recipe.optimizer
    trainee = Trainee(
        model, _optimizer(kind, model, options, lr, grad_mults), lr, averages=options.ema_decay is not None
    )
    if not recipe.sgs:
        return trainee
    trainee.sgs = SpatialGradientScaling(
        model,
        trainee.optimizer,
        k=options.sgs_k,
        every=options.sgs_every,
        warmup=options.sgs_warmup,
        batches=options.sgs_batches,
        remove_near=options.remove_near,
    )
    return trainee


def _optimizer(
    kind: OptimizerKind,
    model: nn.Module,
    options: Options,
    lr: float,
    grad_mults: dict[nn.Parameter, GradMult] | None = None,
) -> torch.optim.Optimizer:
    settings = {"lr": lr, **{name: setting(options) for name, setting in kind.settings.items()}}
    if grad_mults is not None:
        settings["grad_mults"] = grad_mults
    with interrupts.held_back():  # The first optimizer of a process imports torch._dynamo, and so Triton's C++ module.
        return kind.make(param_groups(model, options.weight_decay), **settings)


def multiplier_bytes(trainee: Trainee) -> int:
    """Bytes of the Grad Mults and spatial scalings as the optimizer stores them."""
    optimizer = trainee.optimizer
    if not hasattr(optimizer, "grad_mult"):  # one of torch's own
        return 0
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    multipliers = [optimizer.grad_mult(p, total=True) for p in parameters]
    return sum(multiplier.nbytes for multiplier in multipliers if multiplier is not None)
