"""RepOptimizer: what every optimizer with Grad Mult shares. It knows no update rule."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from gradrep_kernels.dtensor import is_dtensor
from gradrep_kernels.ops.reference import step_tail
from gradrep_kernels.ops.reference.multiply import compute_dtype, multiply
from gradrep_kernels.optim import checkpoint
from gradrep_kernels.optim.eager import eager, keep_out_of_graphs
from gradrep_kernels.optim.gather import Gathered, gather, hyper_table, table_of, take_steps
from gradrep_kernels.optim.multiplied import Multiplied
from gradrep_kernels.optim.multipliers import GradMults, Multipliers, refuse_strays, warn_of_forgotten
from gradrep_kernels.optim.norm import norm_of_step
from gradrep_kernels.optim.parameters import (
    described,
    in_place,
    names_for_all,
    parameters_of,
    position_of,
)
from gradrep_kernels.optim.plan import Scaler, StepPlan
from gradrep_kernels.optim.step_counts import count_steps, with_own_counts
from gradrep_kernels.optim.step_end import StepEnd
from gradrep_kernels.optim.tail import AVERAGE, EmaDecay, TailOptions, average_idle, clip_factor, first_average
from gradrep_kernels.optim.update_rule import UpdateRule

# ZeroRedundancyOptimizer puts all its keyword arguments into the groups, on every rank.
_NOT_OF_A_GROUP = {
    "grad_mults": "call set_grad_mult, under ZeroRedundancyOptimizer that of its .optim",
    "branch_scales": "call set_branch_scales, under ZeroRedundancyOptimizer that of its .optim",
    "max_grad_norm": "set it as an attribute. Under ZeroRedundancyOptimizer a rank's step does not see all gradients: "
    "clip before the step",
    "ema_decay": "set it as an attribute, under ZeroRedundancyOptimizer that of its .optim",
    "momentum_dtype": "give it to the constructor. Under ZeroRedundancyOptimizer it cannot be had",
}


class RepOptimizer(Multiplied, StepEnd):
    """An optimizer whose gradients are multiplied by constants, in one pass with its update.

    A leaf inherits from this class and from torch's optimizer of the same rule, in this order. It declares its
    `update_rule`, and its constructor has the signature of torch's with `grad_mults` added.

    Args:
        params, args, options: as torch's optimizer takes them.
        grad_mults:            {parameter: GradMult | Tensor that broadcasts to it}. None: none.
        fused:                 True asks for in-kernel gradient unscaling under torch.amp.GradScaler. It selects nothing
                               else and is never saved.
        max_grad_norm, ema_decay: see FusedRepSGD.
        state_dtype:           None, or torch.bfloat16 for the states of the rule, with stochastic rounding.

    A multiplier of a frozen parameter that is in no group is kept. It takes effect when the parameter joins.

    Raises ValueError for multipliers that do not broadcast to their parameter, are negative, NaN or inf, or belong to a
    trained parameter that this optimizer does not have. Nothing is changed then.
    """

    update_rule: ClassVar[UpdateRule]

    def __init__(
        self,
        params: Iterable,
        *args: Any,
        grad_mults: GradMults | None = None,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        ema_decay: EmaDecay | None = None,
        state_dtype: torch.dtype | None = None,
        **options: Any,
    ):
        if fused and options.get("differentiable"):
            raise RuntimeError("`fused` does not support `differentiable`")
        if fused and options.get("foreach"):
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        if grad_mults is not None and not isinstance(grad_mults, Mapping):
            raise TypeError(f"grad_mults must map parameters to GradMult or Tensor, got {type(grad_mults).__name__}")
        if isinstance(params, nn.Module):
            raise TypeError(
                f"params must be parameters or groups of them, got a {type(params).__name__}: pass "
                "param_groups(model, weight_decay), or model.parameters()"
            )
        self.update_rule.check()
        self._multipliers = Multipliers(self.update_rule.factor)
        self._none_is_meant = grad_mults is not None
        self._tail = TailOptions(max_grad_norm, ema_decay, state_dtype)
        self._tail.check(options.get("differentiable", False))
        self._take_rule()
        self._forget_plan()
        super().__init__(params, *args, **options)
        keep_out_of_graphs(type(self))
        if fused:
            # Only when asked for: Lightning refuses gradient clipping where the attribute is set.
            self._step_supports_amp_scaling = True
        kind = self.update_rule.factor
        checked = [(param, self.checked_factor(param, mult, kind)) for param, mult in (grad_mults or {}).items()]
        for param, factor in checked:
            self.take_factor(param, factor)
        self._refresh_fingerprints()

    def _refresh_fingerprints(self) -> None:
        checkpoint.refresh_fingerprints(self.param_groups, self._multipliers)
        self._tail.save(self.param_groups)

    # ---- the step

    def step(self, closure: Callable[[], Any] | None = None):
        """Update every parameter that has a gradient, once. Returns what `closure` returns.

        Raises RuntimeError where an array, such as a momentum buffer, would be made in a CUDA graph capture.
        """
        if self._tail.swapped:
            raise RuntimeError("a step inside swap_ema would train the averages: leave its block first")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        compiling = torch.compiler.is_compiling()
        if self.defaults["differentiable"] or (compiling and self._can_compile()):
            with torch.set_grad_enabled(bool(self.defaults["differentiable"])):
                for group in self.param_groups:
                    self.update_rule.functional(self, group, self._multiplied)
        # The planned step records nothing for autograd, so it skips torch.no_grad() and saves 1.4 µs.
        elif compiling or not self._planned_step():
            self._gathered_step()
        return loss

    def _can_compile(self) -> bool:
        # torch's functional optimizers neither unscale, skip on overflow, clip, average nor round by random bits. They
        # do not know multipliers of shards either.
        if getattr(self, "found_inf", None) is not None or self._tail.is_used:
            return False
        return not any(is_dtensor(p) for p in parameters_of(self.param_groups))

    @staticmethod
    def profile_hook_step(func: Callable) -> Callable:
        """Wrap `step` with torch's hooks and profiler record, only where somebody listens: they take 8 of 35 µs."""
        heard = Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self, *args, **kwargs):
            listening = (
                self._optimizer_step_pre_hooks
                or self._optimizer_step_post_hooks
                or _global_optimizer_pre_hooks
                or _global_optimizer_post_hooks
                or torch.compiler.is_compiling()
                or torch._C._autograd._profiler_enabled()
            )
            return (heard if listening else func)(self, *args, **kwargs)

        return step

    @property
    def _unscales_itself(self) -> bool:
        return getattr(self, "_step_supports_amp_scaling", False)

    def _scaler(self) -> Scaler:
        """What torch.amp.GradScaler leaves on an optimizer that unscales in its step: grad_scale, found_inf."""
        return getattr(self, "grad_scale", None), getattr(self, "found_inf", None)

    def _planned_step(self) -> bool:
        return self._plan is not None and self._plan.step(self.param_groups, self.state, self._scaler())

    @eager
    @torch.no_grad()
    def _gathered_step(self) -> None:
        grad_scale, found_inf = self._scaler()
        self._plan = None
        rule, groups, options = self.update_rule, self.param_groups, self._tail
        known = options.take_known_norm(grad_scale)
        refuse_strays(self._multipliers, self.param_groups)
        if not self._none_is_meant:
            self._none_is_meant = True
            warn_of_forgotten(self._multipliers, self.param_groups)
        device = next((p.device for p in parameters_of(groups) if p.grad is not None), torch.device("cpu"))
        numbers = options.numbers(device)
        work = gather(
            groups,
            self.state,
            rule,
            self._multipliers,
            unscales=grad_scale is not None,
            averages=options.averages,
            skips=self._unscales_itself,
        )
        for group, p in work.sparse:
            self._refuse_sparse(group, p)
        norm = clip = None
        if options.max_grad_norm is not None:
            norm = norm_of_step(work, self._multipliers, grad_scale) if known is None else known
            clip = clip_factor(norm, options.max_grad_norm)
        if found_inf is not None and not work.is_steady and found_inf.item() != 0:
            options.took(device, norm)
            return  # a skipped step must not leave a state behind
        tail = table_of(numbers) if numbers else None
        take_steps(work, rule, hyper_table(groups, rule, work.counts), (grad_scale, found_inf, clip), tail)
        for (p, key), state in work.new_states.items():
            self.state[p][key] = state
        if work.counts is not None:
            count_steps(work.counts.rows, found_inf)
        for group, p in work.sparse:
            if grad_scale is not None:
                in_place(p.grad, lambda grad: grad.div_(grad_scale))
            rule.functional(self, {**group, "params": [p]}, functools.partial(self._multiplied, clip=clip))
        for p in dict.fromkeys(p for _, p in work.sparse) if options.averages else ():
            if p not in work.without_average:
                step_tail.update_average(self.state[p][AVERAGE.key], p, step_tail.Tail.of(tail))
        if work.idle:
            average_idle(list(work.idle.items()), numbers[0], found_inf)
        for p in work.without_average:
            self.state[p][AVERAGE.key] = first_average(p)
        options.took(device, norm)
        self._plan_next(work)

    def _take_rule(self) -> None:
        if self._tail.state_dtype is not None:
            self.update_rule = type(self).update_rule.in_bfloat16()

    def _forget_plan(self) -> None:
        self._plan: StepPlan | None = None
        self._last_step: tuple | None = None

    def _plan_next(self, work: Gathered) -> None:
        """Plan the next step, once two steady steps in a row had the same parameters and multipliers."""
        if not work.is_steady:
            return
        this_step = (
            self._multipliers.version,
            [
                (destination, [id(row.param) for row in arguments.rows])
                for destination, arguments in work.arguments.items()
            ],
        )
        self._last_step, last_step = this_step, self._last_step
        if this_step == last_step:
            self._plan = StepPlan.of(
                work, self.update_rule, self.param_groups, self.state, self._multipliers, self._tail
            )

    def _refuse_sparse(self, group: dict[str, Any], p: Tensor) -> None:
        what = self.update_rule.not_with_sparse(group)
        if self.update_rule.stochastic and any(state.used(group) for state in self.update_rule.states):
            what = "momentum_dtype"
        if self._multipliers.total(p) is not None:
            what = "a Grad Mult"
        if what is not None:
            self._refuse_layout(p, what)

    def _refuse_layout(self, p: Tensor, what: str) -> None:
        name = described(self.param_groups, position_of(self.param_groups, p))
        raise ValueError(f"{name}: {what} cannot be applied to a gradient of layout {p.grad.layout}")

    def _multiplied(self, p: Tensor, grad: Tensor, clip: Tensor | None = None) -> Tensor:
        """M ⊙ grad for torch's functional optimizers. `clip` is multiplied first."""
        if clip is not None:
            grad = grad.clone()
            in_place(grad, lambda values: values.mul_(clip.to(values.device, values.dtype.to_real())))
        mult = self._multipliers.total(p)
        if mult is None:
            return grad
        g = grad.to(compute_dtype(grad.dtype))  # many real multipliers would underflow in fp16
        return multiply(g, *mult.parts(), g.real.dtype if g.is_complex() else g.dtype).to(grad.dtype)

    # ---- saving, copying, loading

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        for option, instead in _NOT_OF_A_GROUP.items() if isinstance(param_group, dict) else ():
            if option in param_group:
                raise ValueError(f"{option} is not an option of a parameter group: {instead}")
        with names_for_all(self.param_groups, param_group):
            super().add_param_group(param_group)
            added = self.param_groups[-1]
            if self._tail.state_dtype is not None and any(p.is_complex() for p in added["params"]):
                self.param_groups.pop()
                raise ValueError("momentum_dtype=torch.bfloat16 cannot hold a complex momentum: leave it at None")
        added.update({"fused": None, checkpoint.FINGERPRINT: self._multipliers.fingerprint(added["params"])})
        self._tail.save([added])

    def __getstate__(self) -> dict[str, Any]:
        kept = {"_multipliers": self._multipliers, "_tail": self._tail}
        if self._unscales_itself:
            kept["_step_supports_amp_scaling"] = True
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        keep_out_of_graphs(type(self))
        self._forget_plan()
        self.__dict__.setdefault("_none_is_meant", True)  # the original was asked
        if "_multipliers" not in self.__dict__:  # a pickled torch optimizer's state
            self._multipliers = Multipliers(self.update_rule.factor)
        if "_tail" not in state:  # of a checkpoint, or a pickle of torch's optimizer
            self.__dict__.setdefault("_tail", TailOptions()).restore(self.param_groups)
        self._take_rule()
        for group in self.param_groups:
            group["fused"] = None  # of a checkpoint of torch's with fused=True: not ours to take over
        self._refresh_fingerprints()

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state_dict, which torch's optimizer loads, with the key 'grad_mults' added.

        Its value is {position of the parameter: the parts of its Grad Mult, and its name where names were given}.
        Multipliers of frozen parameters that are in no group are not saved.
        """
        self._refresh_fingerprints()  # groups may have been replaced
        callers = self._multipliers.callers(parameters_of(self.param_groups))
        saved = super().state_dict()
        if self.update_rule.counts:
            saved["state"] = with_own_counts(saved["state"])
        return {**saved, checkpoint.KEY: checkpoint.pack(callers, self.param_groups)}

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> None:
        """Load a checkpoint of this class or of torch's optimizer.

        Grad Mults are judged parameter by parameter, after the load_state_dict pre-hooks have run. A parameter is found
        by its name, where checkpoint and optimizer have names, else by its position.

        - None is live: the checkpoint's is restored.
        - Both are equal: nothing happens.
        - They differ: ValueError, and nothing is changed. strict=False keeps the live one and warns.
        - The checkpoint has none, as one of torch's optimizer: the live one stays, and a warning names it.

        A checkpoint that lost them on the way (distributed checkpoint drops the key) is told by the number
        `grad_mults_fingerprint` in its groups. Live ones that give another number are different.

        States go by position, as torch's load_state_dict has it, and a warning says so where names stand in another
        order. They keep a precision above their parameter's, which torch's takes from them.
        """
        check = functools.partial(self.checked_factor, kind=self.update_rule.factor)
        loading = checkpoint.Loading(self, state_dict, self._multipliers, strict, check, self.take_factor)
        handles = [
            self.register_load_state_dict_pre_hook(loading.judge),
            self.register_load_state_dict_post_hook(loading.mend, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()
        for message in loading.messages():
            warnings.warn(message, stacklevel=2)
