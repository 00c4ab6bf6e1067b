"""One AdamW update of the branches that a weight stands for.

Source: RepOptimizers (Ding et al., 2023), section 3.2, applied to AdamW (Loshchilov and Hutter, 2019);
torch.optim.AdamW for rounding and order. The published code multiplies by Σ α, which is wrong where an α is negative.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradrep_kernels.ops.reference.multiply import compute_dtype, diagonal_taps
from gradrep_kernels.ops.reference.step_tail import Tail, incoming, one_each, store_state, update_average
from gradrep_kernels.ops.schema import StepRule, op

HYPER = ("lr", "beta1", "beta2", "eps", "weight_decay", "amsgrad", "maximize", "step")
"""Columns of the table of hyper-parameters. `step` is how many steps a row's parameters have taken before this one."""


def kept_states(hyper: Tensor) -> list[int]:
    """3 for each row with amsgrad, else 2: the greatest exp_avg_sq so far is kept for amsgrad alone  # [R, 8] -> R"""
    return (2 + (hyper[:, HYPER.index("amsgrad")] != 0).int()).tolist()


@op(
    "one AdamW update of all parameters of all groups, summed over the branches that each weight stands for",
    writes=("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "averages"),
    step=StepRule(
        ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"), ("factors", "identities"), HYPER, kept_states, layered=True
    ),
)
@torch.no_grad()
def rep_adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    factors: list[Tensor | None],
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
    """Update `params` and their states in place.

        t ← step + 1;  g ← −g if maximize;  g ← G ⊙ g;  W ← (1 − lr · wd) W
        m ← m + (1 − β1)(g − m);  v ← β2 v + (1 − β2) g²;  x ← max(x, v) if amsgrad, else v
        n = lr / (1 − β1^t) · m;  s = √x / √(1 − β2^t)
        W ← W − Σ_b α_b² n / (α_b s + ε)

    Args:
        params, grads, groups, grad_scale, found_inf, clip, averages, numbers, elements, tail: see rep_sgd_step
        exp_avgs, exp_avg_sqs: P tensors of the same shapes, m and v, zeros before a parameter's first step
        max_exp_avg_sqs: the same, x; any tensor, not touched, where the row has no amsgrad
        factors:         P times None or [1 + B, ...], each of which broadcasts to the parameter: G, then B times |α| of
                         the branches that reach a tap, and 0 where there are fewer. None: G = 1, one branch with α = 1
        identities:      P times None or [O], a factor |α| more at (o, o mod I, centre); 1 of a trainable identity
        first_steps:     P times anything: the states say it
        hyper:           [R, 8] float64, columns as in HYPER. `groups` are its rows

    1 − β^t is formed in float64. Every product and sum is rounded on its own. On a CPU the square roots of float64 are
    MKL's, whose last bit is not always that of IEEE 754.
    """
    if found_inf is not None and found_inf.item() != 0:
        return
    rows, tail = hyper.tolist(), Tail.of(tail)
    columns = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, factors, identities, groups)
    more = one_each(len(params), averages, numbers, elements)
    for p, grad, m, v, x, factor, identity, group, average, number, element in zip(*columns, *more):
        lr, beta1, beta2, eps, weight_decay, amsgrad, maximize, step = rows[group]
        step_size = lr / (1 - beta1 ** (step + 1))
        inverse_root = 1 / math.sqrt(1 - beta2 ** (step + 1))
        dtype = compute_dtype(p.dtype)
        w, g = (real(t) for t in (p.to(dtype), incoming(grad, dtype, grad_scale, clip)))
        if maximize:
            g = -g
        gradient_factor, alphas = _dealt(factor, p, w.dtype)
        if gradient_factor is not None:
            g = g * gradient_factor
        w = w * (1 - lr * weight_decay)
        new_m = mixed(real(m.to(dtype)), g, 1 - beta1)
        new_v = real(v.to(dtype)) * beta2 + g * g * (1 - beta2)
        store_state(m, like(new_m, m), tail, number, element, 0)
        store_state(v, like(new_v, v), tail, number, element, 1)
        if amsgrad:
            new_v = torch.maximum(real(x.to(dtype)), new_v)
            store_state(x, like(new_v, x), tail, number, element, 2)
        n, s = new_m * step_size, root(new_v) * inverse_root
        p.copy_(like(w - branched(n, s, alphas, identity, eps), p))
        update_average(average, p, tail)


def mixed(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """start + weight (end − start), from the nearer end as torch.lerp does."""
    way = end - start
    return start + way * weight if weight < 0.5 else end - way * (1 - weight)


def root(x: Tensor) -> Tensor:
    """√x, rounded as IEEE 754 says. On a CPU torch takes MKL's, which is off by a bit in one of 2,000 numbers."""
    return x.double().sqrt().to(x.dtype) if x.is_cpu and x.dtype == torch.float32 else x.sqrt()


def branched(n: Tensor, s: Tensor, alphas: Tensor | None, identity: Tensor | None, eps: float) -> Tensor:
    """Σ_b α_b² n / (α_b s + ε), in the order of the branches, the identity last  # [O, I, kh, kw]"""
    if alphas is None:
        return n / (s + eps)
    total = None
    for alpha in alphas:
        # Where fewer branches reach a tap than another, α is 0: with ε = 0 it would add 0 / 0.
        part = torch.where(alpha > 0, alpha * alpha * n / (alpha * s + eps), 0.0)
        total = part if total is None else total + part
    if identity is not None:
        taps, one = diagonal_taps(n.shape, n.device), identity.to(n.dtype)
        one = one.reshape(-1, *(1,) * (n.dim() - 4))  # complex weights are pairs of numbers
        total[taps] += one * one * n[taps] / (one * s[taps] + eps)
    return total


def _dealt(factor: Tensor | None, p: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """G and the |α|, which broadcast to the parameter."""
    if factor is None:
        return None, None
    factor = factor.to(dtype)
    if p.is_complex():
        factor = factor.unsqueeze(-1)
    return factor[0], factor[1:]


def real(t: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones, which AdamW updates each on its own, as torch's does."""
    return torch.view_as_real(t) if t.is_complex() else t


def like(t: Tensor, stored: Tensor) -> Tensor:
    return torch.view_as_complex(t.contiguous()) if stored.is_complex() else t
