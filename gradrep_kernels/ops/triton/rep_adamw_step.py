"""The AdamW step over branches in Triton: its update and its hyper-parameters.

`step_frame` and `StepOp` do the rest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradrep_kernels.ops import reference
from gradrep_kernels.ops.triton.addressing import multiplier_layers, multiplier_place
from gradrep_kernels.ops.triton.step_frame import NUMBERS, TENSORS, step_frame
from gradrep_kernels.ops.triton.step_op import StepOp
from gradrep_kernels.ops.triton.step_tail import quotient

STATES = tl.constexpr(3)  # m, v, and with amsgrad the greatest v
COLUMNS = tl.constexpr(11)  # of the table of hyper-parameters: see `pack`


@triton.jit
def _row(hyper):
    numbers = ()
    for n in tl.static_range(COLUMNS):
        numbers += (tl.load(hyper + n),)
    return numbers[8].to(tl.int32), numbers


@triton.jit
def _factors(place, inside, row_of_piece):
    """Where G and the |α| of the branches are. A piece without factors has one branch with α = 1."""
    scale, has_scale, identity, tap = multiplier_place(place, inside, row_of_piece)
    layers, stride = multiplier_layers(row_of_piece)
    return scale, has_scale, identity, tap, layers, stride


@triton.jit
def _root(x):
    """Rounded as IEEE 754 says."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    return tl.sqrt(x)


@triton.jit
def _added(n, s, alpha, eps):
    """What one branch adds, nothing where alpha is 0: fewer branches reach the element than others."""
    return tl.where(alpha > 0, quotient(alpha * alpha * n, alpha * s + eps), 0.0)


@triton.jit
def _update(w, g, factors, states, first, numbers):
    step_size, weight1, rest1, beta2, weight2, eps, kept, inverse_root, used, maximize, from_end = numbers
    scale, has_scale, identity, tap, layers, stride = factors
    m, v, greatest = states
    g = g * tl.where(maximize != 0, -1.0, 1.0).to(g.dtype)
    g = g * tl.load(scale, mask=has_scale, other=1.0)
    way = g - m
    m = tl.where(from_end != 0, g - way * rest1, m + way * weight1)
    v = v * beta2 + g * g * weight2
    greatest = tl.maximum(greatest, v, propagate_nan=tl.PropagateNan.ALL)
    x = tl.where(used > 2, greatest, v)
    n, s = m * step_size, _root(x) * inverse_root
    total = _added(n, s, tl.load(scale + stride, mask=has_scale, other=1.0), eps)
    for layer in range(2, layers):
        total += _added(n, s, tl.load(scale + layer * stride, mask=has_scale, other=0.0), eps)
    total += _added(n, s, tl.load(identity, mask=tap, other=0.0), eps)
    return w * kept - total, (m, v, greatest)


@triton.jit
def _squares(place, inside, row_of_piece):
    """M = Σ α², 1 for a piece without factors."""
    scale, has_scale, identity, tap, layers, stride = _factors(place, inside, row_of_piece)
    alpha = tl.load(scale + stride, mask=has_scale, other=1.0)
    total = alpha * alpha
    for layer in range(2, layers):
        alpha = tl.load(scale + layer * stride, mask=has_scale, other=0.0)
        total += alpha * alpha
    one = tl.load(identity, mask=tap, other=0.0)
    return total + one * one


@triton.jit(do_not_specialize_on_alignment=TENSORS, do_not_specialize=NUMBERS)
def rep_adamw_step_kernel(
    chunks, geometry, pointers, hyper, grad_scale, found_inf, clip, tail,
    weight: tl.int64, seed: tl.int64, step: tl.int64,
    AVERAGED: tl.constexpr, NARROW: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    step_frame(
        chunks, geometry, pointers, hyper, grad_scale, found_inf, clip, tail, weight, seed, step,
        _update, _row, _factors, COLUMNS, STATES, AVERAGED, NARROW, DTYPE, BLOCK,
    )  # fmt: skip


def pack(hyper: Tensor, dtype: torch.dtype) -> Tensor:
    """The table that the kernel reads  # [R, 8] float64 -> [R, COLUMNS]

    lr / (1 − β1^t), 1 − β1, β1, β2, 1 − β2, ε, 1 − lr · wd, 1 / √(1 − β2^t), how many states are used, and as 0 or 1:
    maximize, whether m moves from the gradient's end.
    """
    lr, beta1, beta2, eps, weight_decay, amsgrad, maximize, step = hyper.unbind(1)
    weight1, t = 1 - beta1, step + 1
    columns = (
        lr / (1 - beta1**t),
        weight1,
        1 - weight1,
        beta2,
        1 - beta2,
        eps,
        1 - lr * weight_decay,
        1 / (1 - beta2**t).sqrt(),
        2 + (amsgrad != 0).double(),
        (maximize != 0).double(),
        (weight1 >= 0.5).double(),
    )
    return torch.stack(columns, dim=1).to(dtype)


rep_adamw_step = StepOp(reference.rep_adamw_step, rep_adamw_step_kernel, pack, _squares)

rep_adamw_plan, rep_adamw_plan_step = rep_adamw_step.plan, rep_adamw_step.plan_step
rep_adamw_plan_norm, rep_adamw_plan_free = rep_adamw_step.plan_norm, rep_adamw_step.plan_free
