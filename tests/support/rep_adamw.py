"""FusedRepAdamW for tests that speak of Grad Mults, and its oracle: torch.optim.AdamW of explicit branches.

A Grad Mult M is the one of many branches, so it does not say what AdamW does. Here it stands for one branch with
α = √M, element by element.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import gradrep_kernels as gr
from gradrep_kernels.optim.branch_factors import BranchFactors


def one_branch(mult: gr.GradMult, shape: torch.Size) -> BranchFactors:
    """The factors of the branch that M stands for. Where M has no parts of their own, it is dense."""
    scale = mult.scale.double()
    if mult.identity is not None:  # its parts are brought to the dtype that is computed in before they are added
        scale = gr.GradMult(scale, mult.identity.double()).dense(shape)
    alphas = scale.sqrt()
    alphas = alphas.reshape((1,) * (1 + len(shape) - alphas.dim()) + tuple(alphas.shape))
    return BranchFactors(None, alphas, mult=mult)


class AdamWOfMasks(gr.FusedRepAdamW):
    """FusedRepAdamW that takes Grad Mults, each for one branch."""

    def __init__(self, params, *args, grad_mults=None, **options):
        super().__init__(params, *args, branch_scales=grad_mults, **options)

    def checked_factor(self, param, mult, kind):
        if mult is None or kind is gr.GradMult or isinstance(mult, BranchFactors):
            return super().checked_factor(param, mult, kind)
        return one_branch(super().checked_factor(param, mult, gr.GradMult), param.shape)


class BranchedAdamW(torch.optim.AdamW):
    """torch.optim.AdamW whose weights are α times the parameter of a branch, for given M = α².

    `masks` maps weights to M. States are those of torch on the plain gradient.
    """

    def __init__(self, params, *args, **options):
        super().__init__(params, *args, foreach=False, **options)

    def step_with(self, masks: Mapping[Tensor, Tensor]) -> None:
        """Undo what torch does to the masked weights, and update them by the rule of a branch."""
        groups = [
            (group, p) for group in self.param_groups for p in group["params"] if p in masks and p.grad is not None
        ]
        before = {p: p.detach().clone() for _, p in groups}
        self.step()
        with torch.no_grad():
            for group, p in groups:
                state, (beta1, beta2), lr = self.state[p], map(float, group["betas"]), float(group["lr"])
                t = float(state["step"])
                v = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
                alpha = masks[p].sqrt().to(p.real.dtype)
                m, old = state["exp_avg"], before[p]
                if p.is_complex():  # pairs of real numbers
                    m, v, old, alpha = *map(torch.view_as_real, (m, v, old)), alpha.unsqueeze(-1)
                m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
                branch = m_hat * alpha / (alpha * v_hat.sqrt() + group["eps"])
                new = old * (1 - lr * float(group["weight_decay"])) - lr * alpha * branch
                p.copy_(torch.view_as_complex(new.contiguous()) if p.is_complex() else new)
