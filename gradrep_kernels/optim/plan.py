"""The steady state of a step on the CPU: what does not change from step to step is handed to C++ once.

62 small tensors cost torch's fused SGD 80-109 µs a step, of which 60 is Python. Here a step passes only the gradients and
the hyper-parameters; C++ checks that every tensor still has the dtype, shape and strides it had, and nothing is done where
one has not. The rest of what can change is compared below.
"""

from __future__ import annotations

import weakref
from itertools import chain
from operator import is_, itemgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradrep_kernels.ops import backends
from gradrep_kernels.ops import cpp as cpp_impl

if TYPE_CHECKING:
    from gradrep_kernels.grad_mult import GradMult
    from gradrep_kernels.optim.fused_rep_sgd import FusedRepSGD

_params = itemgetter("params")
_buffer = itemgetter("momentum_buffer")
_hyper = itemgetter("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")


class StepPlan:
    """One plan over all groups of an optimizer, for the parameters that have a gradient now."""

    def __init__(self, optimizer: FusedRepSGD, rows: list[tuple[Tensor, Tensor | None, GradMult | None, int]]):
        """rows: (parameter, its momentum buffer, its total Grad Mult, its group)."""
        self.params = [p for p, _, _, _ in rows]
        buffers = [buffer for _, buffer, _, _ in rows]
        parts = [(None, None) if mult is None else mult.parts() for _, _, mult, _ in rows]
        active = set(map(id, self.params))
        self._listed = optimizer._params()
        self._idle = [p for p in self._listed if id(p) not in active]
        self._mutated = self.params + [b for b in buffers if b is not None]
        self._state = optimizer.state
        self._version = optimizer._multipliers.version
        self._sizes = self._group_sizes(optimizer)
        self._keys, self._buffers = list(self._state), self._all_buffers()
        ops = torch.ops.gradrep_kernels
        self._step = ops.rep_sgd_plan_step.default
        self._handle = ops.rep_sgd_plan.default(
            self.params, buffers, [s for s, _ in parts], [i for _, i in parts], [row for _, _, _, row in rows]
        )
        weakref.finalize(
            self, ops.rep_sgd_plan_free.default, self._handle
        )  # not __del__: at exit the op is gone before it

    @staticmethod
    def can_take(p: Tensor, grad: Tensor, buffer: Tensor | None) -> bool:
        plain = type(p) in (Tensor, torch.nn.Parameter) and type(grad) is Tensor
        return plain and p.device.type == "cpu" and cpp_impl.takes(p, grad, buffer)

    @staticmethod
    def wanted() -> bool:
        return backends.implementation("rep_sgd_step", "cpu") is cpp_impl.rep_sgd_step

    @staticmethod
    def _group_sizes(optimizer: FusedRepSGD) -> list[int]:
        return [len(group["params"]) for group in optimizer.param_groups]

    def _all_buffers(self) -> list[Tensor | None]:
        """What the state holds, entry by entry: it may also hold entries without a buffer, and what is no parameter's."""
        return [entry.get("momentum_buffer") if isinstance(entry, dict) else None for entry in self._state.values()]

    def _holds(self, optimizer: FusedRepSGD) -> bool:
        """Whether groups, parameters and buffers are the same objects. 62 of each: 5 µs; lists of ids take 8."""
        if self._group_sizes(optimizer) != self._sizes or len(self._state) != len(self._keys):
            return False
        listed = chain.from_iterable(map(_params, optimizer.param_groups))
        if not all(map(is_, listed, self._listed)) or not all(map(is_, self._state, self._keys)):
            return False
        try:
            return all(map(is_, map(_buffer, self._state.values()), self._buffers))
        except (KeyError, TypeError):
            return all(map(is_, self._all_buffers(), self._buffers))

    def step(self, optimizer: FusedRepSGD, grad_scale: Tensor | None, found_inf: Tensor | None) -> bool:
        """Take the step; False, and nothing done, where the plan no longer holds."""
        if (
            optimizer.state is not self._state
            or optimizer._multipliers.version != self._version
            or not self._holds(optimizer)
            or any(p.grad is not None for p in self._idle)
        ):
            return False
        grads = [p.grad for p in self.params]
        if grad_scale is not None:
            grad_scale = grad_scale.to("cpu", torch.float32)
        if found_inf is not None:
            found_inf = found_inf.to("cpu", torch.float32)
        hyper = list(chain.from_iterable(map(_hyper, optimizer.param_groups)))
        try:
            if not self._step(self._handle, grads, hyper, grad_scale, found_inf):
                return False
        except (RuntimeError, TypeError):
            if any(
                g is None or g.layout != torch.strided for g in grads
            ):  # looked for only here: it would cost 2 µs a step
                return False
            raise
        torch.autograd.graph.increment_version(self._mutated if grad_scale is None else self._mutated + grads)
        return True
