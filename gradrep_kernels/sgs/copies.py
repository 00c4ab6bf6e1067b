"""Copies and pickles of an optimizer that hooks scale: they are scaled too."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradrep_kernels.sgs.gradient_hooks import GradientScaling, StepHooks, UpdateScaling

Scaler = GradientScaling | UpdateScaling

_REDUCE, _PRE_HOOKS, _POST_HOOKS = "__reduce_ex__", "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"


class _Luggage:
    """Reduces an optimizer together with the scaler of its hooks, for copy.deepcopy and pickle.

    It stands in the optimizer's `__reduce_ex__`, because torch's `Optimizer.__getstate__` keeps nothing but defaults,
    states and groups.
    """

    def __init__(self, optimizer: Optimizer, scaler: Scaler, handles: list[RemovableHandle]):
        self._optimizer = weakref.ref(optimizer)  # which holds this object
        self.scaler, self.handles = scaler, handles

    def __call__(self, protocol: int) -> tuple:
        optimizer = self._optimizer()
        build, args, *rest = type(optimizer).__reduce_ex__(optimizer, protocol)
        state, *items = rest or [None]
        return _shell, (build, args), (_without_hooks(state), self.scaler), *items


def _without_hooks(state: object) -> object:
    """Leave our hooks out of the state of a class that keeps all its attributes: the copy gets its own."""
    if not isinstance(state, dict) or _REDUCE not in state:
        return state
    state = {name: value for name, value in state.items() if name != _REDUCE}
    for name in (_PRE_HOOKS, _POST_HOOKS):
        if name in state:
            ours = {key for key, hook in state[name].items() if isinstance(getattr(hook, "__self__", None), StepHooks)}
            state[name] = type(state[name])((key, hook) for key, hook in state[name].items() if key not in ours)
    return state


def _shell(build: Callable, args: tuple) -> Optimizer:
    """Return an optimizer without its state, which knows how to take that and the scaler.

    The state comes last, so that it may refer to the optimizer.
    """
    optimizer = build(*args)
    optimizer.__setstate__ = partial(_restore, optimizer)
    return optimizer


def _restore(optimizer: Optimizer, state: tuple[object, Scaler]) -> None:
    own_state, scaler = state
    del optimizer.__setstate__
    if own_state is not None:
        optimizer.__setstate__(own_state)
    carry(optimizer, scaler, StepHooks(scaler.before_step, scaler.after_step).register(optimizer))


def carry(optimizer: Optimizer, scaler: Scaler, handles: list[RemovableHandle] | None = None) -> None:
    """Have copies and pickles of the optimizer take the scaler along.

    Args:
        handles: of its hooks, if no controller has them
    """
    optimizer.__reduce_ex__ = _Luggage(optimizer, scaler, handles or [])


def release(optimizer: Optimizer) -> Scaler | None:
    """Undo `carry`, with the hooks that a copy brought, and return the scaler if there was one."""
    luggage = vars(optimizer).get(_REDUCE)
    if not isinstance(luggage, _Luggage):
        return None
    for handle in luggage.handles:
        handle.remove()
    del optimizer.__reduce_ex__
    return luggage.scaler


def carried(optimizer: Optimizer) -> Scaler | None:
    """Return the scaler that copies of the optimizer take along."""
    luggage = vars(optimizer).get(_REDUCE)
    return luggage.scaler if isinstance(luggage, _Luggage) else None
