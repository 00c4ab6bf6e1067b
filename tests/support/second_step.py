"""A second optimizer's step in Triton, to show what a leaf costs: w <- w - lr (fast + slow), two averages of M ⊙ g."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradrep_kernels.ops.reference.multiply import compute_dtype, multiply
from gradrep_kernels.ops.reference.step_tail import Tail, incoming, one_each, store_state, update_average
from gradrep_kernels.ops.schema import StepRule, op
from gradrep_kernels.ops.triton.addressing import multiplier
from gradrep_kernels.ops.triton.step_frame import NUMBERS, TENSORS, step_frame
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
        kept_states=lambda hyper: [2] * len(hyper),
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
    if found_inf is not None and found_inf.item() != 0:
        return
    of_tail = Tail.of(tail)
    columns = (params, grads, fast, slow, scales, identities, first_steps, groups)
    more = one_each(len(params), averages, numbers, elements)
    for p, grad, quick, sluggish, scale, identity, first, group, average, number, element in zip(*columns, *more):
        lr, *decays = hyper[group].tolist()
        dtype = compute_dtype(p.dtype)
        g = multiply(incoming(grad, dtype, grad_scale, clip), scale, identity, dtype)
        kept = [g if first else state.to(dtype) * decay + g for state, decay in zip((quick, sluggish), decays)]
        for which, state in enumerate((quick, sluggish)):
            store_state(state, kept[which], of_tail, number, element, which)
        p.copy_(p.to(dtype) - (kept[0] + kept[1]) * lr)
        update_average(average, p, of_tail)


@triton.jit
def row(hyper):
    return tl.full((), 2, tl.int32), (tl.load(hyper), tl.load(hyper + 1), tl.load(hyper + 2))


@triton.jit
def update(w, g, m, states, first, numbers):
    lr, fast_decay, slow_decay = numbers
    fast, slow = states
    g = g * m
    fast = tl.where(first, g, fast * fast_decay + g)
    slow = tl.where(first, g, slow * slow_decay + g)
    return w - (fast + slow) * lr, (fast, slow)


@triton.jit(do_not_specialize_on_alignment=TENSORS, do_not_specialize=NUMBERS)
def second_step_kernel(
    chunks, geometry, pointers, hyper, grad_scale, found_inf, clip, tail,
    weight: tl.int64, seed: tl.int64, step: tl.int64,
    AVERAGED: tl.constexpr, NARROW: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    step_frame(
        chunks, geometry, pointers, hyper, grad_scale, found_inf, clip, tail, weight, seed, step,
        update, row, multiplier, COLUMNS, STATES, AVERAGED, NARROW, DTYPE, BLOCK,
    )  # fmt: skip


def pack(hyper: Tensor, dtype: torch.dtype) -> Tensor:
    return hyper.to(dtype)


second_step = StepOp(reference, second_step_kernel, pack)
