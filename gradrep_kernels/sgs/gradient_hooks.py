"""Scalings for any torch optimizer: what its step hooks do to gradients, or to the change of the weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter


class GradientScaling:
    """Puts a scaled copy into `.grad` before the step and the caller's tensor back after it (SGS paper, Eq. 2).

    The product is rounded once to the gradient's dtype. With a closure the gradients are the caller's while it runs and
    scaled after it. A step that raises gets no post-hook: the copies then stay in `.grad` until the next step, which puts
    the caller's tensors back first, except where the copy has been written to since (zeroed, or accumulated into).
    """

    def __init__(self):
        self.scalings: dict[Parameter, Tensor] = {}  # G, float32 [kh, kw]
        self._swapped: list[
            tuple[Parameter, Tensor, Tensor, int]
        ] = []  # parameter, the caller's gradient, copy, its version

    def before_step(self, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self._put_back(unless_written=True)
        self._swap()
        closure = closure_of(args, kwargs)
        return None if closure is None else _with_closure(args, kwargs, lambda: self._around(closure))

    def after_step(self) -> None:
        self._put_back()

    def _around(self, closure: Callable) -> object:
        self._put_back()
        loss = closure()
        self._swap()
        return loss

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, g in self.scalings.items():
            grad = parameter.grad
            if grad is not None:
                copy = (grad * g.to(grad.device)).to(grad.dtype)
                parameter.grad = copy
                self._swapped.append((parameter, grad, copy, copy._version))

    def _put_back(self, unless_written: bool = False) -> None:
        for parameter, grad, copy, version in self._swapped:
            if parameter.grad is copy and not (unless_written and copy._version != version):
                parameter.grad = grad
        self._swapped.clear()


class UpdateScaling:
    """Scales the change that a step makes to the weight, whatever the optimizer (the paper's Adagrad*, appendix A.2).

    W <- W_before + G * (W_after - W_before), in float32 at least, rounded once; the optimizer's own weight decay is part of
    the change. A step that raises leaves the weights as it left them.
    """

    def __init__(self):
        self.scalings: dict[Parameter, Tensor] = {}  # G, float32 [kh, kw]
        self._before: list[tuple[Parameter, Tensor]] = []

    def before_step(self, args: tuple, kwargs: dict) -> None:
        self._before = [(parameter, parameter.detach().clone()) for parameter in self.scalings]

    @torch.no_grad()
    def after_step(self) -> None:
        for parameter, before in self._before:
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            before = before.to(dtype)
            parameter.copy_(before + (parameter.to(dtype) - before) * self.scalings[parameter].to(parameter.device))
        self._before = []


def closure_of(args: tuple, kwargs: dict) -> Callable | None:
    """The closure among the arguments of `step`; args[0] is the optimizer."""
    return kwargs.get("closure", args[1] if len(args) > 1 else None)


def _with_closure(args: tuple, kwargs: dict, closure: Callable) -> tuple[tuple, dict]:
    if "closure" in kwargs:
        return args, {**kwargs, "closure": closure}
    return (args[0], closure, *args[2:]), kwargs
