"""The declaration of an optimizer. RepOptimizer does the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradrep_kernels.grad_mult import GradMult
from gradrep_kernels.ops.registry import OPS
from gradrep_kernels.optim.branch_factors import BranchFactors

COUNT = "step"
"""The entry of a parameter's state that counts its steps, where a rule does."""

Factor = GradMult | BranchFactors
"""What a step multiplies by: a Grad Mult, and under AdamW the factors of the branches."""


@dataclass(frozen=True)
class State:
    """An array that an optimizer keeps for each parameter."""

    key: str  # in optimizer.state[p], and so in checkpoints
    # start(p, dtype=..., memory_format=...) makes the array for the first step, which may overwrite it.
    start: Callable[..., Tensor] = torch.empty_like
    dtype: Callable[[torch.dtype, torch.dtype], torch.dtype] = torch.promote_types  # from parameter's and gradient's
    used: Callable[[dict[str, Any]], bool] = lambda group: True  # whether the parameters of a group have it
    later: bool = False  # whether it may begin when others have gone on for some time

    def new(self, p: Tensor, grad: Tensor) -> Tensor:
        return self.start(p, dtype=self.dtype(p.dtype, grad.dtype), memory_format=torch.preserve_format)


@dataclass(frozen=True)
class UpdateRule:
    """One way to update: its op, its arrays, and its twin among torch's functional optimizers."""

    op: str  # a step op of the table; its reference is the specification
    states: tuple[State, ...]  # in the order of the op's StepRule.states
    # functional(optimizer, group, multiplied): torch's own update of a group, with multiplied(p, g) = M ⊙ g for g.
    # It serves torch.compile, differentiable steps and sparse gradients.
    functional: Callable[[Optimizer, dict[str, Any], Callable[[Tensor, Tensor], Tensor]], None]
    # Which option of a group keeps sparse gradients from being applied; None: none does.
    not_with_sparse: Callable[[dict[str, Any]], str | None] = lambda group: None
    # A group's row of the table of hyper-parameters: numbers or one-element tensors. None: the group's entries under
    # the names of the op's columns. An optimizer whose groups hold a pair (betas) unpacks it here.
    hyper: Callable[[dict[str, Any]], Sequence[Any]] | None = None
    # Whether the update depends on how many steps a parameter has taken (step_counts.py). That is then the last column
    # of the table of hyper-parameters, and `hyper` leaves it out.
    counts: bool = False
    factor: type[Factor] = GradMult  # what it multiplies by
    stochastic: bool = False  # whether states in bfloat16 are rounded by random bits (ops/reference/rounding_rule.py)

    def in_bfloat16(self) -> UpdateRule:
        """The same rule with its states stored in bfloat16, and rounded by random bits."""
        states = tuple(replace(state, dtype=lambda param, grad: torch.bfloat16) for state in self.states)
        return replace(self, states=states, stochastic=True)

    def check(self) -> None:
        """Raise ValueError unless the rule has as many states as its op."""
        wanted, states = OPS[self.op].step.states, [state.key for state in self.states]
        if len(wanted) != len(states):
            raise ValueError(f"{self.op} keeps {list(wanted)}, in this order, and its rule has {states}")

    def missing(self, entry: Mapping[str, Any]) -> list[str]:
        """List what the entry of a parameter lacks though it has a part of its state. Each array alone may go on."""
        if not self.counts:
            return []
        needed = [COUNT, *(state.key for state in self.states if not state.later)]
        missing = [key for key in needed if entry.get(key) is None]
        return missing if len(missing) < len(needed) else []

    def hyper_row(self, group: dict[str, Any]) -> Sequence[Any]:
        return [group[key] for key in OPS[self.op].step.hyper] if self.hyper is None else self.hyper(group)
