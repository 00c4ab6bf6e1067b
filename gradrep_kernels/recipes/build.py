"""Build what a row of the table says: a network, its optimizer, its spatial gradient scaling."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gradrep_kernels import csla
from gradrep_kernels.branches.dynamic import DynamicReparameterization
from gradrep_kernels.models.modes import BranchForm, branch_form
from gradrep_kernels.optim import param_groups
from gradrep_kernels.recipes import interrupts
from gradrep_kernels.recipes.data.load import Data
from gradrep_kernels.recipes.data.loader import derived_seed
from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.networks import make_network
from gradrep_kernels.recipes.options.resolve import Options
from gradrep_kernels.recipes.table import OPTIMIZERS, OptimizerKind, Recipe
from gradrep_kernels.sgs import SpatialGradientScaling, alpha_beta_scaling

__all__ = ["Trainee", "build", "multiplier_bytes", "plain_model", "search_model"]

_INITIALISATION, _STRUCTURE = 1, 11  # purposes for derived_seed
_LARGE = 64  # pixels: from this side on ResNets have the stem for ImageNet, which leaves 1 / 32 of it


@dataclass
class Trainee:
    """A network with its optimizer and, in some recipes, spatial gradient scaling or what changes its structure.

    `lr` is the learning rate at the end of the warm-up. `averages`: whether the optimizer keeps moving averages.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    lr: float
    sgs: SpatialGradientScaling | None = None
    averages: bool = False
    structure: DynamicReparameterization | None = None


def plain_model(options: Options, data: Data, seed: int) -> nn.Module:
    """Draw the target network from `seed` on the CPU, the same for every device.

    Seeds the default generator. The network says which branches it has in its other forms (`branch_form`): those of
    --branches, where it was given.
    """
    torch.manual_seed(derived_seed(seed, _INITIALISATION))
    model = make_network(
        options.model,
        num_classes=len(data.classes),
        in_channels=data.channels,
        stem="imagenet" if data.side >= _LARGE else "cifar",
        **options.network_settings,
    )
    if options.branches is not None:
        model.branch_form = BranchForm(options.branches)
    if options.hs_init is not None:
        model.branch_form = replace(branch_form(model), init=options.hs_init)
    return model


def search_model(options: Options, data: Data) -> Trainee:
    """The network of the Hyper-Search, drawn from the first seed. `options` are those of the search."""
    plain = plain_model(options, data, options.seed)
    model = branch_form(plain).hyper_search(plain).to(options.device)
    (lr,) = options.lr
    return Trainee(model, _optimizer(OPTIMIZERS["sgd"].plain, model, options, lr), lr)


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
    rule = OPTIMIZERS[options.optimizer]
    kind = rule.extended if options.beyond_torch or recipe.extended else rule.plain
    multipliers = {}  # Empty in the row that shows what is lost without them.
    if recipe.grad_mults:
        given = csla.grad_mults if kind.multipliers == "grad_mults" else csla.branch_scales
        multipliers = given(model, scales, partial=partial)
    elif not recipe.reinitialize:
        multipliers = None
    optimizer = _optimizer(kind, model, options, lr, multipliers)
    trainee = Trainee(model, optimizer, lr, averages=options.ema_decay is not None)
    if recipe.fixed_scaling:
        _scale_kernels(trainee, alpha_beta_scaling(options.sgs_alpha, options.sgs_beta))
    if recipe.structure is not None:
        if options.compile:
            raise InputError(f"--compile: {recipe.name} changes its network while it trains; leave one of the two out")
        groups = functools.partial(param_groups, weight_decay=options.weight_decay, rule=options.decay)
        trainee.structure = recipe.structure(model, optimizer, groups, options, derived_seed(seed, _STRUCTURE))
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
        dependence=options.sgs_dependence,
        apply_to=options.sgs_apply_to,
    )
    return trainee


def _scale_kernels(trainee: Trainee, scaling: Tensor) -> None:
    """Multiply the gradients of all 3 x 3 kernels by one scaling."""
    for module in trainee.model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            trainee.optimizer.set_spatial_scaling(module.weight, scaling.to(module.weight.device))


def _optimizer(
    kind: OptimizerKind,
    model: nn.Module,
    options: Options,
    lr: float,
    multipliers: dict[nn.Parameter, Any] | None = None,
) -> torch.optim.Optimizer:
    settings = {"lr": lr, **{name: setting(options) for name, setting in kind.settings.items()}}
    if multipliers is not None:
        settings[kind.multipliers] = multipliers
    with interrupts.held_back():  # The first optimizer of a process imports torch._dynamo, and so Triton's C++ module.
        return kind.make(param_groups(model, options.weight_decay, options.decay), **settings)


def multiplier_bytes(trainee: Trainee) -> int:
    """Bytes of the Grad Mults and spatial scalings as the optimizer stores them."""
    optimizer = trainee.optimizer
    if not hasattr(optimizer, "grad_mult"):  # one of torch's own
        return 0
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    multipliers = [optimizer.grad_mult(p, total=True) for p in parameters]
    return sum(multiplier.nbytes for multiplier in multipliers if multiplier is not None)
