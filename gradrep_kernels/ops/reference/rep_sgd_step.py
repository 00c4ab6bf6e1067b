"""One SGD-momentum update with Grad Mult.

Source: RepOptimizers (Ding et al., 2023), section 3.2, Rule of Iteration; torch.optim.SGD for the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradrep_kernels.ops.reference.multiply import compute_dtype, multiply
from gradrep_kernels.ops.reference.step_tail import Tail, incoming, one_each, store_state, update_average
from gradrep_kernels.ops.schema import StepRule, op

HYPER = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
"""Columns of the table of hyper-parameters, one row per parameter group."""


def kept_states(hyper: Tensor) -> list[int]:
    """1 for each group that has a momentum, and so reads and writes its buffers, else 0  # [G, 6] -> G"""
    return (hyper[:, HYPER.index("momentum")] != 0).int().tolist()


@op(
    "one SGD-momentum update of all parameters of all groups, with M ⊙ g in place of g",
    writes=("params", "momentum_buffers", "averages"),
    step=StepRule(("momentum_buffers",), ("scales", "identities"), HYPER, kept_states),
)
@torch.no_grad()
def rep_sgd_step(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
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
    """Update `params` and `momentum_buffers` in place, as torch.optim.SGD does with M ⊙ g in place of g.

    Args:
        params:           P tensors of any shape and floating (or complex) dtype
        grads:            P tensors of the same shapes; left alone, except unscaled in place where `grad_scale` is given
        momentum_buffers: P tensors of the same shapes, of the parameters' dtype or bfloat16; where the group's momentum
                          is 0, any tensor (not touched)
        scales:           P times None or a tensor that broadcasts to the parameter, the `scale` of its Grad Mult
        identities:       P times None or [O], the `identity` of its Grad Mult
        first_steps:      P times whether this is the parameter's first step (its buffer becomes g)
        groups:           P row numbers of `hyper`
        hyper:            [G, 6] float64, columns as in HYPER
        grad_scale:       one element, or None: gradients are divided by it first
        found_inf:        one element, or None: any non-zero value means that nothing at all is changed
        clip:             one element, or None: gradients are multiplied by it, after grad_scale and not in place
        averages:         P times None or the moving average of the parameter, in the dtype that is computed in
        numbers:          P positions of parameters in their optimizer, which choose the random bits; None: 0, 1, ...
        elements:         P times None or the numbers of the elements in the whole parameter (`element_numbers`)
        tail:             [4] float64, columns as in step_tail.COLUMNS; None: no averages, no random bits

    Every product and sum is rounded on its own (no FMA): `torch.add(alpha=)` contracts, and 18 % of the elements would
    differ in the last bit.
    """
    if found_inf is not None and found_inf.item() != 0:
        return
    rows, tail = hyper.tolist(), Tail.of(tail)
    columns = (params, grads, momentum_buffers, scales, identities, first_steps, groups)
    more = one_each(len(params), averages, numbers, elements)
    for p, grad, buffer, scale, identity, first, group, average, number, element in zip(*columns, *more):
        lr, momentum, dampening, weight_decay, nesterov, maximize = rows[group]
        dtype = compute_dtype(p.dtype)
        w, g = p.to(dtype), incoming(grad, dtype, grad_scale, clip)
        if maximize:
            g = -g
        g = multiply(g, scale, identity, w.real.dtype if w.is_complex() else dtype)
        if weight_decay != 0:
            g = g + w * weight_decay
        d = g
        if momentum != 0:
            v = g if first else buffer.to(dtype) * momentum + g * (1 - dampening)
            store_state(buffer, v, tail, number, element)
            d = g + v * momentum if nesterov else v
        p.copy_(w - d * lr)
        update_average(average, p, tail)
