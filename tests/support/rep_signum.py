"""A second optimizer with Grad Mult, which the package does not have: the proof that an optimizer is a leaf.

Signum (Bernstein et al., 2018, "signSGD", Algorithm 2) with decoupled weight decay and a soft sign:

    g ← −g if maximize;  g ← M ⊙ g;  v ← μ v + (1 − μ) g;  W ← W − lr (v / (1 + |v|) + wd · W)

A hard sign(v) would not do: a constant M > 0 does not change it, so that weights could not tell whether M is applied.

First Signum as torch would have it, which is the oracle. Then the leaf, which shares with it only what torch.compile
traces.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradrep_kernels.ops.reference.multiply import compute_dtype, multiply
from gradrep_kernels.ops.reference.step_tail import Tail, incoming, one_each, store_state, update_average
from gradrep_kernels.ops.registry import OPS, register
from gradrep_kernels.ops.schema import Op, StepRule, op
from gradrep_kernels.optim.rep_optimizer import RepOptimizer
from gradrep_kernels.optim.update_rule import State, UpdateRule

# ---- as torch would have it


class Signum(Optimizer):
    """Signum without Grad Mult, written like torch's own optimizers."""

    def __init__(self, params, lr=1e-3, momentum=0.9, weight_decay=0.0, *, maximize=False, differentiable=False):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, {**defaults, "differentiable": differentiable})

    def _init_group(self, group: dict[str, Any], params: list, grads: list, exp_avgs: list) -> None:
        for p in group["params"]:
            if p.grad is not None:
                if "exp_avg" not in self.state[p]:
                    dtype = torch.promote_types(p.dtype, p.grad.dtype)
                    self.state[p]["exp_avg"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
                params.append(p)
                grads.append(p.grad)
                exp_avgs.append(self.state[p]["exp_avg"])

    def step(self):
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for group in self.param_groups:
                params, grads, exp_avgs = [], [], []
                self._init_group(group, params, grads, exp_avgs)
                signum(params, grads, exp_avgs, group)


def signum(params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], group: dict[str, Any]) -> None:
    """Update a group, parameter by parameter."""
    for p, grad, exp_avg in zip(params, grads, exp_avgs):
        grad = -grad if group["maximize"] else grad
        exp_avg.mul_(group["momentum"]).add_(grad * (1 - group["momentum"]))
        average = exp_avg.clone()  # autograd saves it in a differentiable step, and the next step changes exp_avg
        p.sub_(group["lr"] * (average / (1 + average.abs()) + group["weight_decay"] * p))


# ---- the leaf

HYPER = ("lr", "momentum", "weight_decay", "maximize")


@op(
    "one Signum update of all parameters of all groups, with M ⊙ g in place of g",
    writes=("params", "exp_avgs", "averages"),
    step=StepRule(("exp_avgs",), ("scales", "identities"), HYPER, kept_states=lambda hyper: [1] * len(hyper)),
)
@torch.no_grad()
def rep_signum_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    scales: list[Tensor | None],
    identities: list[Tensor | None],
    first_steps: list[bool],
    groups: list[int],
    hyper: Tensor,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clip: Tensor | None = None,
    averages: list[Tensor | None] | None = None,
    numbers: list[int] | None = None,
    elements: list[Tensor | None] | None = None,
    tail: Tensor | None = None,
) -> None:
    """Update `params` and `exp_avgs` in place. The arguments are those of rep_sgd_step."""
    if found_inf is not None and found_inf.item() != 0:
        return
    rows, tail = hyper.tolist(), Tail.of(tail)
    columns = (params, grads, exp_avgs, scales, identities, groups)
    more = one_each(len(params), averages, numbers, elements)
    for p, grad, v, scale, identity, group, moving, number, element in zip(*columns, *more):
        lr, momentum, weight_decay, maximize = rows[group]
        dtype = compute_dtype(p.dtype)
        w, g = p.to(dtype), incoming(grad, dtype, grad_scale, clip)
        g = multiply(-g if maximize else g, scale, identity, dtype)
        average = v.to(dtype) * momentum + g * (1 - momentum)
        store_state(v, average, tail, number, element)
        p.copy_(w - (average / (1 + average.abs()) + w * weight_decay) * lr)
        update_average(moving, p, tail)


def _functional_signum(optimizer: Signum, group: dict[str, Any], multiplied: Callable[[Tensor, Tensor], Tensor]):
    params, grads, exp_avgs = [], [], []
    optimizer._init_group(group, params, grads, exp_avgs)
    signum(params, [multiplied(p, grad) for p, grad in zip(params, grads)], exp_avgs, group)


class RepSignum(RepOptimizer, Signum):
    """Signum with Grad Mult inside the step."""

    update_rule = UpdateRule(
        op="rep_signum_step",
        states=(State("exp_avg", start=torch.zeros_like),),
        functional=_functional_signum,
        not_with_sparse=lambda group: "Signum",
    )


@functools.cache
def _rows() -> dict[str, Op]:
    before = set(OPS)
    register(rep_signum_step)  # torch defines an op once in a process
    return {name: row for name, row in OPS.items() if name not in before}


def enter() -> None:
    """Enter the op into the table of ops."""
    OPS.update(_rows())


def leave() -> None:
    """Take the op out of the table, for tests that look at the package's own ops."""
    for name in _rows():
        OPS.pop(name, None)
