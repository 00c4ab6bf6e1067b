"""Clipping through whatever is around an optimizer."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

from gradrep_kernels.optim.rep_optimizer import RepOptimizer
from gradrep_kernels.wrappers import inner_optimizer


def clip_grad_norm_(optimizer: Optimizer, max_norm: float, *, error_if_nonfinite: bool = False) -> Tensor:
    """Clip by the gradient norm of the CSLA model, √(Σ M ⊙ g²), as the optimizer's own method of this name does.

    The optimizer may be inside a wrapper that does not pass the method on, as that of Accelerate:

        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.unscale_gradients(optimizer)
            gr.clip_grad_norm_(optimizer, 1.0)

    Raises TypeError for an optimizer without Grad Mult: torch.nn.utils.clip_grad_norm_ clips for that.
    """
    inner = inner_optimizer(optimizer)
    if not isinstance(inner, RepOptimizer):
        raise TypeError(f"optimizer must be one with Grad Mult, such as FusedRepSGD, got {type(inner).__name__}")
    return inner.clip_grad_norm_(max_norm, error_if_nonfinite=error_if_nonfinite)
