"""The SGD step in Triton: its update and its hyper-parameters. `step_frame` and `StepOp` do the rest."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradrep_kernels.ops import reference
from gradrep_kernels.ops.triton.addressing import multiplier, switched
from gradrep_kernels.ops.triton.step_frame import ARGUMENTS, step_frame
from gradrep_kernels.ops.triton.step_op import StepOp

STATES = tl.constexpr(1)  # the momentum buffer
COLUMNS = tl.constexpr(8)  # of the table of hyper-parameters: see `pack`


@triton.jit
def _update(place, inside, param, grad, states, first, row_of_piece, hyper, grad_scale):
    """One block. Every product and sum is in the order of the reference, and rounded on its own."""
    buffer = states[0]
    lr, momentum, undamped, weight_decay = tl.load(hyper), tl.load(hyper + 1), tl.load(hyper + 2), tl.load(hyper + 3)
    has_momentum, has_decay = tl.load(hyper + 4).to(tl.int32), tl.load(hyper + 5) != 0
    nesterov, maximize = tl.load(hyper + 6) != 0, tl.load(hyper + 7) != 0
    dtype: tl.constexpr = lr.dtype
    g = tl.load(grad + place, mask=inside).to(dtype)
    if grad_scale is not None:  # before the other loads: 48 registers, not 64
        if dtype == tl.float32:
            g = tl.div_rn(g, tl.load(grad_scale))
        else:
            g = g / tl.load(grad_scale)
        tl.store(grad + place, g, mask=inside)
    w = tl.load(param + place, mask=inside).to(dtype)
    v = tl.load(buffer + place, mask=switched(inside, has_momentum), other=0.0).to(dtype)
    g = g * tl.where(maximize, -1.0, 1.0).to(dtype)  # unary minus is 0 - g up to Triton 3.6: the sign of zero is lost
    g = g * multiplier(place, inside, row_of_piece)
    g = tl.where(has_decay, g + w * weight_decay, g)
    v = tl.where(first, g, v * momentum + g * undamped)
    tl.store(buffer + place, v, mask=switched(inside, has_momentum))
    d = tl.where(has_momentum != 0, tl.where(nesterov, g + v * momentum, v), g)
    tl.store(param + place, w - d * lr, mask=inside)


@triton.jit(do_not_specialize_on_alignment=ARGUMENTS)
def rep_sgd_step_kernel(
    chunks, geometry, pointers, hyper, grad_scale, found_inf, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):
    step_frame(
        chunks, geometry, pointers, hyper, grad_scale, found_inf,
        _update, COLUMNS, STATES, DTYPE, BLOCK,
    )  # fmt: skip


def pack(hyper: Tensor, dtype: torch.dtype) -> Tensor:
    """The table that the kernel reads  # [G, 6] float64 -> [G, COLUMNS]

    lr, momentum, 1 − dampening, weight decay, then as 0 or 1: momentum ≠ 0, weight decay ≠ 0, nesterov, maximize.
    """
    switches = torch.cat((hyper[:, 1:2], hyper[:, 3:]), dim=1) != 0
    return torch.cat((hyper[:, :2], 1 - hyper[:, 2:3], hyper[:, 3:4], switches), dim=1).to(dtype)


rep_sgd_step = StepOp(reference.rep_sgd_step, rep_sgd_step_kernel, pack)

rep_sgd_plan, rep_sgd_plan_step = rep_sgd_step.plan, rep_sgd_step.plan_step
rep_sgd_plan_norm, rep_sgd_plan_free = rep_sgd_step.plan_norm, rep_sgd_step.plan_free
