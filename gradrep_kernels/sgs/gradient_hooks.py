"""Scalings for any torch optimizer: step hooks that scale the gradients, or the change of the weights."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from gradrep_kernels.dtensor import local, replicated_like


class StepHooks:
    """Calls `before(args, kwargs)` and `after(args, kwargs)` around each step of an optimizer.

    args and kwargs are those of the step, and `before` may return others, as a step pre-hook may.

    An optimizer whose step calls super().step() runs its hooks within its hooks, because torch hooks each class. Only
    the outermost ones count.
    """

    def __init__(
        self,
        before: Callable[[tuple, dict], tuple[tuple, dict] | None],
        after: Callable[[tuple, dict], None],
    ):
        self._before, self._after = before, after
        self._frame: FrameType | None = None  # of the step that is under way, or that raised
        self._steps_inside = 0

    def register(self, optimizer: torch.optim.Optimizer) -> list[RemovableHandle]:
        return [
            optimizer.register_step_pre_hook(self.before_step),
            optimizer.register_step_post_hook(self.after_step),
        ]

    def before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if _is_running(self._frame):
            self._steps_inside += 1
            return None
        self._frame, self._steps_inside = sys._getframe(1), 0
        return self._before(args, kwargs)

    def after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if self._steps_inside > 0:
            self._steps_inside -= 1
            return
        self._frame = None
        self._after(args, kwargs)


def _is_running(frame: FrameType | None) -> bool:
    """Whether the call of `frame` has not ended.

    A step that raised got no post-hook, so the next step looks like one within it. Only the stack tells them apart.
    """
    caller = sys._getframe(1)
    while caller is not None and caller is not frame:
        caller = caller.f_back
    return frame is not None and caller is frame


class _Scaling:
    """The scalings that hooks apply.

    Copies and pickles have them alone, and nothing of a step that is under way: torch copies no gradients either.
    """

    def __init__(self):
        self._scalings: dict[Parameter, Tensor] = {}  # G, float32 [kh, kw]

    def __getstate__(self) -> dict:
        return {"_scalings": self._scalings}

    def __setstate__(self, state: dict) -> None:
        self.__init__()
        self._scalings = state.get("_scalings") or state.get("scalings", {})  # as earlier versions named it

    def set_spatial_scaling(self, parameter: Parameter, g: Tensor | None) -> None:
        if g is None:
            self._scalings.pop(parameter, None)
        else:
            self._scalings[parameter] = g

    def spatial_scaling(self, parameter: Parameter) -> Tensor | None:
        return self._scalings.get(parameter)


class GradientScaling(_Scaling):
    """Puts a scaled copy into `.grad` before the step and the caller's tensor back after it (SGS paper, Eq. 2).

    The product is rounded once to the gradient's dtype. With a closure, the gradients are the caller's while it runs
    and scaled after it. A step that raises gets no post-hook, so the copies stay in `.grad` until the next step. That
    one puts the caller's tensors back first, except where the copy has been written to since (zeroed, or accumulated
    into).
    """

    def __init__(self):
        super().__init__()
        # For each gradient that is swapped: parameter, the caller's gradient, the copy, and the copy's versions.
        self._swapped: list[tuple[Parameter, Tensor, Tensor, tuple[int, int]]] = []

    def before_step(self, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self._put_back(unless_written=True)
        self._swap()
        closure = closure_of(args, kwargs)
        return None if closure is None else _with_closure(args, kwargs, lambda: self._around(closure))

    def after_step(self, args: tuple, kwargs: dict) -> None:
        self._put_back()

    def _around(self, closure: Callable) -> object:
        self._put_back()
        loss = closure()
        self._swap()
        return loss

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, g in self._scalings.items():
            grad = parameter.grad
            if grad is not None:
                copy = (grad * replicated_like(g, grad)).to(grad.dtype)
                parameter.grad = copy
                self._swapped.append((parameter, grad, copy, _versions(copy)))

    def _put_back(self, unless_written: bool = False) -> None:
        for parameter, grad, copy, versions in self._swapped:
            if parameter.grad is copy and not (unless_written and _versions(copy) != versions):
                parameter.grad = grad
        self._swapped.clear()


@torch.no_grad()
def _versions(t: Tensor) -> tuple[int, int]:
    """Return what counts the writes to a tensor.

    FSDP adds gradients to the shard inside a DTensor, which the DTensor's own counter does not notice.
    """
    return t._version, local(t)._version


class UpdateScaling(_Scaling):
    """Scales the change that a step makes to the weight (the paper's Adagrad*, appendix A.2).

    W <- W_before + G * (W_after - W_before), in float32 at least and rounded once. The optimizer's own weight decay is
    part of the change. Where the step raises, its change is not scaled.
    """

    def __init__(self):
        super().__init__()
        self._before: list[tuple[Parameter, Tensor, Tensor]] = []  # parameter, its value, G

    def before_step(self, args: tuple, kwargs: dict) -> None:
        self._before = [(parameter, parameter.detach().clone(), g) for parameter, g in self._scalings.items()]

    @torch.no_grad()
    def after_step(self, args: tuple, kwargs: dict) -> None:
        for parameter, before, g in self._before:
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            before = before.to(dtype)
            parameter.copy_(before + (parameter.to(dtype) - before) * replicated_like(g, parameter))
        self._before = []


def closure_of(args: tuple, kwargs: dict) -> Callable | None:
    """Return the closure among the arguments of `step`, where args[0] is the optimizer."""
    return kwargs.get("closure", args[1] if len(args) > 1 else None)


def _with_closure(args: tuple, kwargs: dict, closure: Callable) -> tuple[tuple, dict]:
    if "closure" in kwargs:
        return args, {**kwargs, "closure": closure}
    return (args[0], closure, *args[2:]), kwargs
