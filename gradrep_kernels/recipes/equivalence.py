"""CSLA = GR on this very network and these very images: two ways to train, in float64, held against each other."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from gradrep_kernels import csla
from gradrep_kernels.branch_scales import BranchScales
from gradrep_kernels.optim import FusedRepSGD, param_groups
from gradrep_kernels.recipes.build import plain_model
from gradrep_kernels.recipes.data import Data
from gradrep_kernels.recipes.loader import Loader, derived_seed
from gradrep_kernels.recipes.options import Options

__all__ = ["TOLERANCE", "csla_equals_gr"]

TOLERANCE = 1e-10  # float64 has 1e-16; 100 steps of a network with batch norms raise that to about 1e-13
_BATCH = 16
_PURPOSE = 4  # for derived_seed


def csla_equals_gr(options: Options, data: Data, scales: csla.Scales) -> dict[str, float | int | bool]:
    """Train explicit CSLA branches with torch.optim.SGD and the re-initialised target with FusedRepSGD, on the CPU.

    Both see the same `check_steps` batches of 16 images in float64, with the learning rate, momentum and weight decay of
    the job. Returns the steps, the largest absolute difference of the outputs over all steps (`outputs`) and that of all
    weights and statistics after merging the branches at the end (`weights`), and whether both stay below 1e-10 (`agrees`).
    """
    target = plain_model(options, data, options.seed).double()
    exact = {name: _double(value) for name, value in scales.items()}
    state = torch.get_rng_state()
    explicit = csla.csla_model(copy.deepcopy(target), exact)
    torch.set_rng_state(state)  # both draw the same 1x1 kernels
    csla.reinitialize(target, exact)
    hyper = {"lr": options.lr, "momentum": options.momentum}
    optimizers = (
        torch.optim.SGD(param_groups(explicit, options.weight_decay), **hyper),
        FusedRepSGD(param_groups(target, options.weight_decay), **hyper, grad_mults=csla.grad_mults(target, exact)),
    )
    worst = 0.0
    for x, labels in itertools.islice(_batches(data, options.seed), options.check_steps):
        outputs = []
        for model, optimizer in zip((explicit, target), optimizers):
            optimizer.zero_grad()
            y = model(x.double())
            F.cross_entropy(y, labels).backward()
            optimizer.step()
            outputs.append(y.detach())
        worst = max(worst, _difference(*outputs))
    merged = csla.merge(explicit).state_dict()
    weights = max(_difference(merged[name], tensor) for name, tensor in target.state_dict().items())
    return {
        "steps": options.check_steps,
        "outputs": worst,
        "weights": weights,
        "agrees": max(worst, weights) <= TOLERANCE,
    }


def _batches(data: Data, seed: int):
    for epoch in itertools.count():
        yield from Loader(data, data.train, _BATCH, seed=derived_seed(seed, _PURPOSE, epoch))


def _double(value: BranchScales) -> BranchScales:
    """In float64 the Grad Mult Σα² is not rounded to float32, as the explicit branches' product α·α is not."""
    one_by_one = None if value.one_by_one is None else value.one_by_one.double()
    return BranchScales(
        value.kxk.double(), one_by_one, value.identity if isinstance(value.identity, bool) else value.identity.double()
    )


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())
