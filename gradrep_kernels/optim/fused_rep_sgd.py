"""FusedRepSGD: torch.optim.SGD with `g ← M ⊙ g` first, in one pass (RepOptimizers, section 3.4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import SGD, sgd

from gradrep_kernels.optim.multipliers import GradMults
from gradrep_kernels.optim.rep_optimizer import RepOptimizer
from gradrep_kernels.optim.tail import EmaDecay
from gradrep_kernels.optim.update_rule import State, UpdateRule

_OPTIONS = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")


def _functional_sgd(optimizer: SGD, group: dict[str, Any], multiplied: Callable[[Tensor, Tensor], Tensor]) -> None:
    params: list[Tensor] = []
    grads: list[Tensor] = []
    buffers: list[Tensor | None] = []
    has_sparse = optimizer._init_group(group, params, grads, buffers)
    sgd(
        params,
        [multiplied(p, g) for p, g in zip(params, grads)],
        buffers,
        has_sparse_grad=has_sparse,
        foreach=None if torch.compiler.is_compiling() else False,
        fused=False,
        **{key: group[key] for key in _OPTIONS},
    )
    if group["momentum"] != 0:
        for p, buffer in zip(params, buffers):
            optimizer.state[p]["momentum_buffer"] = buffer


class FusedRepSGD(RepOptimizer, SGD):
    """torch.optim.SGD whose gradients are multiplied by constants before weight decay and momentum.

        g ← −g if maximize;  g ← M ⊙ g;  g ← g + wd · W;
        v ← μ v + (1 − dampening) g  (first step of a parameter: v ← g);
        d ← g + μ v if nesterov else v;  W ← W − lr · d

    Source: RepOptimizers (Ding et al., 2023), section 3.4; SGS (Detkov et al., 2023), Eq. 2.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, differentiable: as torch.optim.SGD.
            `lr` and `weight_decay` may be one-element tensors. `foreach` is accepted and changes nothing.
        fused: True asks for in-kernel gradient unscaling under torch.amp.GradScaler. It selects nothing else and is
            never saved: the fused kernels are used whenever they can be.
        grad_mults: {parameter: GradMult | Tensor that broadcasts to it}. None: plain SGD.
        max_grad_norm: The step multiplies gradients by min(1, max_grad_norm / (norm + 1e-6)), where norm = √(Σ M ⊙ g²)
            over all parameters, after unscaling. `.last_grad_norm` is the norm. As with torch.nn.utils.clip_grad_norm_,
            a NaN in one gradient makes all weights NaN, and an inf its own weight, while all others get the factor 0.
        ema_decay: A number in [0, 1], a one-element tensor, or a function of the step's number, which is 1 at first.
            After the update the step moves averages of the weights by e ← e + (1 − ema_decay) (W − e). They are float32
            (float64 of float64 weights), and begin as the weight after a parameter's first step, as those of
            torch.optim.swa_utils.AveragedModel do. They go on in steps without a gradient, as those of a layer that
            is frozen in mid-training. See `ema`, `swap_ema`, `ema_state_dict`.
        momentum_dtype: torch.bfloat16 keeps momentum in half the bytes. It is rounded by random bits that depend on
            nothing but `rounding_seed`, the step's number, the parameter's position and the element
            (ops/reference/rounding_rule.py), so that the mean of many roundings is the exact value. Complex parameters
            are refused, and sparse gradients where there is a momentum.

    Steps are counted where `ema_decay` or `momentum_dtype` need it. With fused=True those that GradScaler skips count.
    A step never changes `.grad`, except that with fused=True it unscales under GradScaler, as torch's fused optimizers
    do. bf16 and fp16 are computed in float32 and rounded once per stored tensor. Products and sums are rounded one by
    one. Where torch.compile traces the step, and with differentiable=True, torch's functional SGD takes M ⊙ g and
    rounds as it does.

    On a GPU a step waits for nothing once the arrays exist. Take three steps before a CUDA graph captures one. A replay
    repeats the learning rate of the capture, unless that is a tensor on the GPU, and the multipliers of the capture.

    Once its steps repeat, the optimizer keeps extra references to the parameters, and torch.utils.swap_tensors refuses
    such tensors. With torch.__future__.set_swap_module_params_on_conversion(True), convert the model before training.

    For sharded parameters (DTensor: FSDP2, tensor parallelism) give the multiplier for the whole weight, and make the
    optimizer after the model is sharded. ZeroRedundancyOptimizer cannot pass `grad_mults` on. Set them on the
    parameters that each rank holds:

        for group in zero.optim.param_groups:
            for p in group["params"]:
                zero.optim.set_grad_mult(p, mults.get(p))

    Raises ValueError for multipliers that do not broadcast to their parameter, are negative, NaN or inf, or belong to a
    parameter that this optimizer does not have. Nothing is changed then.
    """

    update_rule = UpdateRule(
        op="rep_sgd_step",
        states=(State("momentum_buffer", used=lambda group: group["momentum"] != 0),),
        functional=_functional_sgd,
        not_with_sparse=lambda group: "weight decay" if group["weight_decay"] != 0 else None,
    )

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        grad_mults: GradMults | None = None,
        max_grad_norm: float | None = None,
        ema_decay: EmaDecay | None = None,
        momentum_dtype: torch.dtype | None = None,
    ):
        if momentum_dtype not in (None, torch.bfloat16):
            raise ValueError(f"momentum_dtype must be None or torch.bfloat16, got {momentum_dtype!r}")
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
            grad_mults=grad_mults,
            max_grad_norm=max_grad_norm,
            ema_decay=ema_decay,
            state_dtype=momentum_dtype,
        )

    @property
    def momentum_dtype(self) -> torch.dtype | None:
        """The dtype of the momentum buffers. None: that of parameter and gradient."""
        return self.state_dtype
