"""A second optimizer's step in Triton, to show what a leaf costs: w <- w - lr (fast + slow), two averages of M ⊙ g."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradrep_kernels.ops.reference.multiply import multiply
from gradrep_kernels.ops.schema import StepRule, op
from gradrep_kernels.ops.triton.addressing import multiplier
from gradrep_kernels.ops.triton.step_frame import ARGUMENTS, step_frame
from gradrep_kernels.ops.triton.step_op import StepOp

STATES = tl.constexpr(2)
COLUMNS = tl.constexpr(3)


@op(
    "shows what a leaf costs",
    writes=("params", "fast", "slow"),
    step=StepRule(
        states=("fast", "slow"),
        multipliers=("scales", "identities"),
        hyper=("lr", "fast_decay", "slow_decay"),
        keeps_state=lambda hyper: [True] * len(hyper),
    ),
)
def reference(
    params: list[Tensor],
    grads: list[Tensor],
    fast: list[Tensor],
    slow: list[Tensor],
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
    """hyper: [G, 3] = lr and both decays"""
    rows = zip(params, grads, fast, slow, scales, identities, first_steps, groups)
    for p, grad, quick, sluggish, scale, identity, first, group in rows:
        lr, *decays = hyper[group].tolist()
        g = multiply(grad, scale, identity, grad.dtype)
        for average, decay in zip((quick, sluggish), decays):
            average.copy_(g if first else average * decay + g)
        p.copy_(p - (quick + sluggish) * lr)


@triton.jit
def update(place, inside, param, grad, states, first, row_of_piece, hyper, grad_scale):
    fast, slow = states
    w, g = tl.load(param + place, mask=inside), tl.load(grad + place, mask=inside)
    g = g * multiplier(place, inside, row_of_piece)
    quick = tl.where(first, g, tl.load(fast + place, mask=inside) * tl.load(hyper + 1) + g)
    sluggish = tl.where(first, g, tl.load(slow + place, mask=inside) * tl.load(hyper + 2) + g)
    tl.store(fast + place, quick, mask=inside)
    tl.store(slow + place, sluggish, mask=inside)
    tl.store(param + place, w - (quick + sluggish) * tl.load(hyper), mask=inside)


@triton.jit(do_not_specialize_on_alignment=ARGUMENTS)
def second_step_kernel(
    chunks, geometry, pointers, hyper, grad_scale, found_inf, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):
    step_frame(
        chunks, geometry, pointers, hyper, grad_scale, found_inf, update, COLUMNS, STATES, DTYPE, BLOCK
    )  # fmt: skip


def pack(hyper: Tensor, dtype: torch.dtype) -> Tensor:
    return hyper.to(dtype)


second_step = StepOp(reference, second_step_kernel, pack)
