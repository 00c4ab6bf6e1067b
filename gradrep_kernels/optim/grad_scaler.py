"""GradScaler: overflows are looked for in the read of the gradients that takes their norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradrep_kernels.optim.rep_optimizer import RepOptimizer


class GradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler that reads the gradients of a FusedRepSGD once before its step, not twice.

    Before the step of an optimizer with fused=True, torch's scaler reads and writes all gradients to look for an inf or
    a NaN. With `max_grad_norm` the step then reads them for their norm. This scaler asks the optimizer for the norm,
    which is finite where every gradient is, and the step takes it over. So unscaling, clipping, step and averages take
    two reads of the gradients. Other optimizers, and optimizers without fused=True, are served as by torch's.

        scaler = gr.GradScaler()
        optimizer = gr.FusedRepSGD(params, lr=0.1, fused=True, max_grad_norm=1.0, ema_decay=0.9998)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    Args: those of torch.amp.GradScaler. Its methods and checkpoints are torch's too.

    Finite gradients count as an overflow where their norm is beyond the range of float32. On a GPU the sum of their
    squares in a chunk of some thousand elements must be below 3e38 too.
    """

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().step(optimizer, *args, **kwargs)
        finally:
            if isinstance(optimizer, RepOptimizer):
                optimizer.forget_norm()  # a step that was not taken leaves it

    def _check_inf_per_device(self, optimizer: Optimizer) -> dict[torch.device, Tensor]:
        # torch calls it in `step`, for an optimizer that unscales itself and has not been unscaled before. Should a
        # later torch call it no more, its own check takes place.
        norm = optimizer.norm_before_step() if isinstance(optimizer, RepOptimizer) else None
        if norm is None:
            return super()._check_inf_per_device(optimizer)
        found: dict[torch.device, Any] = {norm.device: torch.isfinite(norm).logical_not().float()}
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = found
        return found
