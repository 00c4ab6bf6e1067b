"""FusedRepAdamW: torch.optim.AdamW of the branches that a weight stands for, in one pass.

Source: RepOptimizers (Ding et al., 2023), section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import AdamW

from gradrep_kernels.branch_scales import BranchScales
from gradrep_kernels.ops.reference.multiply import compute_dtype
from gradrep_kernels.ops.reference.rep_adamw_step import branched, like, mixed, real
from gradrep_kernels.optim.branch_factors import BranchFactors
from gradrep_kernels.optim.rep_optimizer import RepOptimizer
from gradrep_kernels.optim.step_counts import device_of_count
from gradrep_kernels.optim.tail import EmaDecay
from gradrep_kernels.optim.update_rule import COUNT, State, UpdateRule

ScalesOfBranches = Mapping[Tensor, BranchScales] | Mapping[nn.Parameter, BranchScales]


def _check_mapping(branch_scales: Any) -> None:
    if not isinstance(branch_scales, Mapping):
        raise TypeError(f"branch_scales must map parameters to BranchScales, got {type(branch_scales).__name__}")
    if any(isinstance(key, str) for key in branch_scales):
        raise TypeError(
            "branch_scales must map parameters to BranchScales, and these go by name: "
            "branch_scales=gr.csla.branch_scales(model, scales)"
        )


def _hyper(group: dict[str, Any]) -> Sequence[Any]:
    return (
        group["lr"],
        *group["betas"],
        group["eps"],
        group["weight_decay"],
        group["amsgrad"],
        group["maximize"],
    )


def _functional_adamw(
    optimizer: FusedRepAdamW, group: dict[str, Any], multiplied: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """The update in plain torch operations, which torch.compile traces and autograd records."""
    lr, beta1, beta2, eps, weight_decay, amsgrad, maximize = _hyper(group)
    for p in group["params"]:
        if p.grad is None:
            continue
        state, dtype = optimizer.state[p], compute_dtype(p.dtype)
        if COUNT not in state:
            where = device_of_count(group, p, unscales=False)
            state[COUNT] = torch.zeros((), dtype=torch.float32, device=where)
        count = state[COUNT] = state[COUNT] + 1
        for kept in optimizer.update_rule.states:
            if kept.used(group) and kept.key not in state:
                state[kept.key] = kept.new(p, p.grad)
        t = count.to(p.device, torch.float64)
        step_size, inverse_root = (lr / (1 - beta1**t)).to(dtype), (1 - beta2**t).rsqrt().to(dtype)
        factor = optimizer.total_factor(p)
        factors, identity = (None, None) if factor is None else factor.parts()
        g = real(p.grad.to(dtype))
        g = -g if maximize else g
        if factors is not None:
            factors = factors.to(dtype)
            factors = factors.unsqueeze(-1) if p.is_complex() else factors
            g = g * factors[0]
        w = real(p.to(dtype, copy=True)) * (1 - lr * weight_decay)
        m = mixed(real(state["exp_avg"].to(dtype)), g, 1 - beta1)
        v = real(state["exp_avg_sq"].to(dtype)) * beta2 + g * g * (1 - beta2)
        new = {"exp_avg": m, "exp_avg_sq": v}
        if amsgrad:
            v = new["max_exp_avg_sq"] = torch.maximum(real(state["max_exp_avg_sq"].to(dtype)), v)
        for key, value in new.items():
            if group["differentiable"]:  # autograd needs those of this step in the next one
                state[key] = like(value, p).to(state[key].dtype)
            else:
                state[key].copy_(like(value, p))
        alphas = None if factors is None else factors[1:]
        p.copy_(like(w - branched(m * step_size, v.sqrt() * inverse_root, alphas, identity, eps), p))


class FusedRepAdamW(RepOptimizer, AdamW):
    """torch.optim.AdamW of the branches of CSLA blocks, on the one weight that stands for them.

        t ← t + 1;  g ← −g if maximize;  g ← G ⊙ g;  W ← (1 − lr · wd) W
        m ← β1 m + (1 − β1) g;  v ← β2 v + (1 − β2) g²;  m̂ = m / (1 − β1^t);  v̂ = v / (1 − β2^t)
        W ← W − lr Σ_b α_b² m̂ / (|α_b| √v̂ + ε)

    The sum is over the branches that reach a tap. An identity branch counts with α = 1. m and v are those of the plain
    gradient: a branch's are α m and α² v. So the update is exactly what AdamW does to explicit branches, for scales of
    any sign. The published code multiplies by Σ α, which is wrong where a scale is negative, as in all published files.
    With amsgrad the greatest v takes the place of v, as in torch.optim.AdamW.

    Source: RepOptimizers (Ding et al., 2023), section 3.2; Loshchilov and Hutter, 2019. G is that of spatial gradient
    scaling (`set_spatial_scaling`), which scales the gradient of m and v (Detkov et al., 2023, Table 5).

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable: as
            torch.optim.AdamW. `lr` and betas may be one-element tensors. `foreach` is accepted and changes nothing.
        fused: True asks for in-kernel gradient unscaling under torch.amp.GradScaler. It selects nothing else and is
            never saved: the fused kernels are used whenever they can be.
        branch_scales: {parameter: BranchScales}, as `gr.csla.branch_scales` gives them. None: plain AdamW. Those of a
            linear layer's weight [O, I] have branches of one tap.
        max_grad_norm, ema_decay: as FusedRepSGD. The norm is √(Σ M ⊙ g²) with M = Σ α², in which G is no factor: it is
            what torch.nn.utils.clip_grad_norm_ gives for explicit branches, before SGS scales their gradients.

    States and checkpoints are those of torch.optim.AdamW, which loads them and whose it loads. The tensors `step` of
    parameters that have taken as many steps are elements of one array.

    On a GPU a step waits for nothing once the arrays exist. A CUDA graph needs capturable=True, and three steps before
    the capture. Where torch.compile traces the step, and with differentiable=True, plain torch operations take it.

    Raises TypeError for a Grad Mult in place of branch scales, and ValueError for scales that do not fit their
    parameter, or belong to a parameter that this optimizer does not have. Nothing is changed then.
    """

    update_rule = UpdateRule(
        op="rep_adamw_step",
        states=(
            State("exp_avg", start=torch.zeros_like),
            State("exp_avg_sq", start=torch.zeros_like),
            State("max_exp_avg_sq", start=torch.zeros_like, used=lambda group: group["amsgrad"], later=True),
        ),
        functional=_functional_adamw,
        not_with_sparse=lambda group: "AdamW",
        hyper=_hyper,
        counts=True,
        factor=BranchFactors,
    )

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        branch_scales: ScalesOfBranches | None = None,
        max_grad_norm: float | None = None,
        ema_decay: EmaDecay | None = None,
    ):
        if branch_scales is not None:
            _check_mapping(branch_scales)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            grad_mults=branch_scales,
            max_grad_norm=max_grad_norm,
            ema_decay=ema_decay,
        )

    def set_branch_scales(self, param: Tensor, scales: BranchScales | None) -> None:
        """Set (or with None remove) the branch scales of one parameter. Raises ValueError as the constructor does."""
        self.set_grad_mult(param, scales)

    def branch_scales(self, param: Tensor) -> BranchScales | None:
        """Return the branch scales of one parameter, as they were given or came from a checkpoint."""
        factors = self.factor(param)
        return factors.scales if isinstance(factors, BranchFactors) else None
