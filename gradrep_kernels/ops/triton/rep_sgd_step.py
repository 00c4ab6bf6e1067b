"""The SGD step in Triton: its update and its hyper-parameters. `step_frame` and `StepOp` do the rest."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradrep_kernels.ops import reference
from gradrep_kernels.ops.triton.addressing import multiplier
from gradrep_kernels.ops.triton.step_frame import NUMBERS, TENSORS, step_frame
from gradrep_kernels.ops.triton.step_op import StepOp

STATES = tl.constexpr(1)  # the momentum buffer
COLUMNS = tl.constexpr(8)  # of the table of hyper-parameters: see `pack`


@triton.jit
def _row(hyper):
    lr, momentum, undamped, weight_decay = tl.load(hyper), tl.load(hyper + 1), tl.load(hyper + 2), tl.load(hyper + 3)
    has_momentum, has_decay = tl.load(hyper + 4).to(tl.int32), tl.load(hyper + 5) != 0
    nesterov, maximize = tl.load(hyper + 6) != 0, tl.load(hyper + 7) != 0
    return has_momentum, (lr, momentum, undamped, weight_decay, has_momentum, has_decay, nesterov, maximize)


@triton.jit
def _update(w, g, m, states, first, numbers):
    lr, momentum, undamped, weight_decay, has_momentum, has_decay, nesterov, maximize = numbers
    g = g * tl.where(maximize, -1.0, 1.0).to(g.dtype)  # unary minus is 0 - g up to Triton 3.6: the sign of zero is lost
    g = g * m
    g = tl.where(has_decay, g + w * weight_decay, g)
    v = tl.where(first, g, states[0] * momentum + g * undamped)
    d = tl.where(has_momentum != 0, tl.where(nesterov, g + v * momentum, v), g)
    return w - d * lr, (v,)


@triton.jit(do_not_specialize_on_alignment=TENSORS, do_not_specialize=NUMBERS)
def rep_sgd_step_kernel(
    chunks, geometry, pointers, hyper, grad_scale, found_inf, clip, tail,
    weight: tl.int64, seed: tl.int64, step: tl.int64,
    AVERAGED: tl.constexpr, NARROW: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    step_frame(
        chunks, geometry, pointers, hyper, grad_scale, found_inf, clip, tail, weight, seed, step,
        _update, _row, multiplier, COLUMNS, STATES, AVERAGED, NARROW, DTYPE, BLOCK,
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
