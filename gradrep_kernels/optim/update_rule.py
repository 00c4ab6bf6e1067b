"""What an optimizer of this package declares; RepOptimizer does the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True)
class State:
    """An array that an optimizer keeps for each parameter."""

    key: str  # in optimizer.state[p], and so in checkpoints
    start: Callable[..., Tensor] = (
        torch.empty_like
    )  # start(p, dtype=...): before the first step, which may overwrite it
    dtype: Callable[[torch.dtype, torch.dtype], torch.dtype] = torch.promote_types  # from parameter's and gradient's
    used: Callable[[dict[str, Any]], bool] = lambda group: True  # whether the parameters of a group have it

    def new(self, p: Tensor, grad: Tensor) -> Tensor:
        return self.start(p, dtype=self.dtype(p.dtype, grad.dtype), memory_format=torch.preserve_format)


@dataclass(frozen=True)
class UpdateRule:
    """One way to update: its op, its arrays, and its twin among torch's functional optimizers."""

    op: str  # a step op of the table; its reference is the specification
    states: tuple[State, ...]
    # functional(optimizer, group, multiplied): torch's own update of a group, with multiplied(p, g) = M ⊙ g for g.
    # It serves torch.compile, differentiable steps and sparse gradients.
    functional: Callable[[Optimizer, dict[str, Any], Callable[[Tensor, Tensor], Tensor]], None]
    # Which option of a group keeps sparse gradients from being applied; None: none does.
    not_with_sparse: Callable[[dict[str, Any]], str | None] = lambda group: None
