"""The check CSLA = GR: explicit branches and Grad Mults train the same network."""

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

TOLERANCE = 1e-10
"""Largest accepted difference. float64 rounds at 1e-16, and 100 steps with batch norms raise that to about 1e-13."""
_BATCH = 16
_PURPOSE = 4  # for derived_seed


def csla_equals_gr(options: Options, data: Data, scales: csla.Scales) -> dict[str, float | int | bool]:
    """Train a network both ways and compare.

    One is the explicit CSLA model with torch.optim.SGD, the other the re-initialised target with FusedRepSGD. Both see
    the same `check_steps` batches of 16 images in float64 on the CPU, with the learning rate, momentum and weight decay
    of the job.

    Returns `steps`, the largest absolute difference of the outputs over all steps (`outputs`), that of all weights and
    statistics after the branches are merged at the end (`weights`), and whether both stay below 1e-10 (`agrees`).
    """
    target = plain_model(options, data, options.seed).double()
    exact = {name: _double(value) for name, value in scales.items()}
    state = torch.get_rng_state()
    explicit = csla.csla_model(copy.deepcopy(target), exact)
    torch.set_rng_state(state)  # Both draw the same 1x1 kernels.
    csla.reinitialize(target, exact)
    hyper = {"lr": options.lr, "momentum": options.momentum}
    optimizers = (
        torch.optim.SGD(param_groups(explicit, options.weight_decay), **hyper),
        FusedRepSGD(param_groups(target, options.weight_decay), **hyper, grad_mults=csla.grad_mults(target, exact)),
    )
    largest = 0.0
    for x, labels in itertools.islice(_batches(data, options.seed), options.check_steps):
        outputs = []
        for model, optimizer in zip((explicit, target), optimizers):
            optimizer.zero_grad()
            y = model(x.double())
            F.cross_entropy(y, labels).backward()
            optimizer.step()
            outputs.append(y.detach())
        largest = max(largest, _difference(*outputs))
    merged = csla.merge(explicit).state_dict()
    weights = max(_difference(merged[name], tensor) for name, tensor in target.state_dict().items())
    return {
        "steps": options.check_steps,
        "outputs": largest,
        "weights": weights,
        "agrees": max(largest, weights) <= TOLERANCE,
    }


def _batches(data: Data, seed: int):
    for epoch in itertools.count():
        yield from Loader(data, data.train, _BATCH, seed=derived_seed(seed, _PURPOSE, epoch))


def _double(value: BranchScales) -> BranchScales:
    """Scales in float64, so that Σα² is not rounded to float32, as the branches' α·α is not."""
    one_by_one = None if value.one_by_one is None else value.one_by_one.double()
    identity = value.identity if isinstance(value.identity, bool) else value.identity.double()
    return BranchScales(value.kxk.double(), one_by_one, identity)


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())
