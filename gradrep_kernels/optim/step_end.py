"""StepEnd: what users see of the end of a step. Clipping, inside the step or alone, and averages of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, _global_optimizer_pre_hooks

from gradrep_kernels.dtensor import local
from gradrep_kernels.optim.eager import eager
from gradrep_kernels.optim.multipliers import Multipliers
from gradrep_kernels.optim.norm import columns_of_parts, gradient_here, gradient_norm, scale_in_place
from gradrep_kernels.optim.parameters import parameters_of, position_of
from gradrep_kernels.optim.plan import StepPlan
from gradrep_kernels.optim.tail import (
    AVERAGE,
    EmaDecay,
    TailOptions,
    as_number,
    checked_count,
    clip_factor,
    first_average,
)


class StepEnd(Optimizer):
    """The part of RepOptimizer that clips and averages."""

    # What RepOptimizer has.
    _tail: TailOptions
    _plan: StepPlan | None
    _multipliers: Multipliers
    _refuse_layout: Callable[[Tensor, str], None]

    # ---- options

    @property
    def max_grad_norm(self) -> float | None:
        """The greatest norm √(Σ M ⊙ g²) that a step takes gradients with. None: a step does not clip."""
        return self._tail.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        self._set_tail(value, self.ema_decay)

    @property
    def ema_decay(self) -> EmaDecay | None:
        """The decay of the averages. None: there are none."""
        return self._tail.ema_decay

    @ema_decay.setter
    def ema_decay(self, value: EmaDecay | None) -> None:
        self._set_tail(self.max_grad_norm, value)

    @property
    def state_dtype(self) -> torch.dtype | None:
        """The dtype of the states of the update rule. None: that of parameter and gradient."""
        return self._tail.state_dtype

    @property
    def rounding_seed(self) -> int:
        """The seed of the random bits that round states in bfloat16. It is the same on all ranks, and saved."""
        return self._tail.seed

    @rounding_seed.setter
    def rounding_seed(self, value: int) -> None:
        self._tail.seed = checked_count(value, "rounding_seed")

    @property
    def last_grad_norm(self) -> Tensor | None:
        """√(Σ M ⊙ g²) of the last step with `max_grad_norm`, before clipping, on the parameters' device  # []

        Reading its number waits for the device, the step does not. None before such a step.
        """
        return self._tail.last_norm

    def _set_tail(self, max_grad_norm: float | None, ema_decay: EmaDecay | None) -> None:
        wanted = TailOptions(max_grad_norm, ema_decay, self.state_dtype)
        wanted.check(self.defaults["differentiable"])
        self._tail.take_over(wanted)

    # ---- clipping

    @eager
    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, *, error_if_nonfinite: bool = False) -> Tensor:
        """Clip by √(Σ M ⊙ g²), the gradient norm of the CSLA model, which keeps CSLA = GR exactly.

        `torch.nn.utils.clip_grad_norm_` does not: it is 10 % off on RepOpt-VGG-B1's scales, 20-27 % on L1's.
        Scales all gradients in place by min(1, max_norm / (norm + 1e-6)), as torch's does, and returns the norm  # []
        Where nothing is clipped, nothing is written. The option `max_grad_norm` does it inside the step, in one read of
        the gradients.

        Raises RuntimeError where the norm is NaN or inf and error_if_nonfinite is True.
        """
        max_norm = as_number(max_norm, "max_norm")
        norm, grads = self._norm()
        if error_if_nonfinite and not bool(torch.isfinite(norm)):
            raise RuntimeError(
                f"the gradient norm is {float(norm)}, so it cannot be clipped; "
                "error_if_nonfinite=False scales the gradients by it anyway"
            )
        scale_in_place(grads, clip_factor(norm, max_norm))
        return norm

    @torch.no_grad()
    def norm_before_step(self) -> Tensor | None:
        """Return √(Σ M ⊙ g²) of the gradients as they are  # [], for the step that comes next to clip by.

        The gradients must not change in between, so a step with pre-hooks takes the norm anew. With `grad_scale` the
        step divides the norm by it. None without gradients. GradScaler calls it.
        """
        norm, grads = self._norm()
        if not grads:
            return None
        # Hooks may change the gradients.
        hooks = self._optimizer_step_pre_hooks or _global_optimizer_pre_hooks
        if self.max_grad_norm is not None and not hooks:
            self._tail.known_norm = norm
        return norm

    def forget_norm(self) -> None:
        """Have the next step take the norm itself, after `norm_before_step`."""
        self._tail.known_norm = None

    def _norm(self) -> tuple[Tensor, list[Tensor]]:
        """√(Σ M ⊙ g²) over all parameters that have a gradient, and these as this rank holds them."""
        planned = None if self._plan is None else self._plan.norm(self.param_groups, self.state)
        if planned is not None:
            return planned
        params = [p for p in dict.fromkeys(parameters_of(self.param_groups)) if p.grad is not None]
        if not params:
            return torch.zeros((), device="cpu"), []
        for p in params:
            if p.grad.layout != torch.strided and self._multipliers.total(p) is not None:
                self._refuse_layout(p, "a Grad Mult")
        parts = columns_of_parts(params, self._multipliers)
        norm = gradient_norm(params, [gradient_here(p) for p in params], parts)
        return norm, [local(p.grad) for p in params]

    # ---- averages

    def ema(self, param: Tensor) -> Tensor:
        """Return the moving average of a parameter, in float32, or float64 where the parameter is.

        It is the tensor that steps write to. Before the parameter's first step the average is its weight, and the
        tensor a copy.

        Raises RuntimeError where there is no ema_decay and no average from a checkpoint, and ValueError for a parameter
        that this optimizer does not have.
        """
        position_of(self.param_groups, param)
        average = self._average(param)
        if average is None:
            self._require_averages()
            return first_average(param)
        return average

    @contextmanager
    def swap_ema(self) -> Iterator[None]:
        """Make the weights the averages inside a `with` statement, for an evaluation, and give them back after it.

            with optimizer.swap_ema():
                accuracy = evaluate(model)

        Weights are changed in place. Meanwhile they are kept aside, in as much memory as they take. Buffers, such as
        the statistics of batch norms, stay the model's. They belong to the weights, and averages that lag behind want
        statistics of their own (torch.optim.swa_utils.update_bn). Inside, `model.state_dict()` holds the averages.
        With parameters that are sharded over ranks, all ranks must enter.

        Raises RuntimeError where there are no averages, in a second `swap_ema` inside the first, and where a step is
        taken inside.
        """
        if self._tail.swapped:
            raise RuntimeError("swap_ema inside swap_ema: the weights are the averages already")
        params = dict.fromkeys(parameters_of(self.param_groups))
        averaged = [(p, average) for p in params if (average := self._average(p)) is not None]
        if not averaged:
            self._require_averages()
        with torch.no_grad():
            kept = [local(p).detach().clone() for p, _ in averaged]
            self._tail.swapped = True
            try:
                for p, average in averaged:
                    local(p).copy_(local(average))
                    torch.autograd.graph.increment_version(p)
            except BaseException:
                self._give_back(averaged, kept)
                raise
        try:
            yield
        finally:
            self._give_back(averaged, kept)

    @torch.no_grad()
    def _give_back(self, averaged: list[tuple[Tensor, Tensor]], kept: list[Tensor]) -> None:
        for (p, _), weight in zip(averaged, kept):
            local(p).copy_(weight)
            torch.autograd.graph.increment_version(p)
        self._tail.swapped = False

    def _average(self, p: Tensor) -> Tensor | None:
        return self.state.get(p, {}).get(AVERAGE.key)

    def ema_state_dict(self, model: nn.Module) -> dict[str, Any]:
        """Return `model.state_dict()` with averages in place of the weights that have one.

        Averages are copies in the dtype of their weight. Buffers and weights without an average are the model's own,
        and share its memory, as in `model.state_dict()`.

        Raises TypeError for what is no model, RuntimeError where no averages are kept, and ValueError for a model of
        which this optimizer has no parameter: a copy, say. FullyShardedDataParallel gathers weights that are not its
        parameters: take its state_dict in `swap_ema`.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        entries, own, averaged = model.state_dict(keep_vars=True), set(parameters_of(self.param_groups)), False
        if own.isdisjoint(value for value in entries.values() if isinstance(value, nn.Parameter)):
            raise ValueError(
                "this optimizer has no parameter of this model. If the model is a copy, give the one that is trained. "
                "If its state_dict holds others than its parameters, as FullyShardedDataParallel's does, take it "
                "inside swap_ema"
            )
        for name, value in entries.items():
            average = self._average(value) if isinstance(value, nn.Parameter) else None
            if average is not None:
                averaged = True
                entries[name] = average.detach().to(value.dtype, copy=True)
            elif isinstance(value, Tensor):
                entries[name] = value.detach()
        if not averaged:
            self._require_averages()
        return entries

    def _require_averages(self) -> None:
        if self.ema_decay is None:
            raise RuntimeError("this optimizer keeps no averages: give it an ema_decay, such as 0.9998")
