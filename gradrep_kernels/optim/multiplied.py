"""Multiplied: what users see of the factors of an optimizer's parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from gradrep_kernels.grad_mult import GradMult
from gradrep_kernels.optim.branch_factors import BranchFactors
from gradrep_kernels.optim.multipliers import Multipliers, as_factor
from gradrep_kernels.optim.parameters import described, is_frozen, parameters_of, position_of
from gradrep_kernels.optim.update_rule import Factor, UpdateRule


class Multiplied(Optimizer):
    """The part of RepOptimizer that holds the factors of parameters."""

    update_rule: ClassVar[UpdateRule]
    _multipliers: Multipliers
    _refresh_fingerprints: Callable[[], None]

    def set_grad_mult(self, param: Tensor, mult: GradMult | Tensor | None) -> None:
        """Set (or with None remove) the caller's Grad Mult of one parameter. Raises ValueError as the constructor does.

        Those of trained parameters that are no longer in `param_groups` are dropped.
        """
        self.take_factor(param, self.checked_factor(param, mult, self.update_rule.factor))
        self._multipliers.drop(self._multipliers.strays(parameters_of(self.param_groups)))
        self._refresh_fingerprints()

    def grad_mult(self, param: Tensor, total: bool = False) -> GradMult | None:
        """Return the caller's Grad Mult of `param`. None stands for 1.

        With total=True it is the product with what `set_spatial_scaling` set. Under AdamW that is no factor of it.
        """
        factor = self.factor(param)
        if total:
            factor = self._multipliers.product(param)
        return factor.mult if isinstance(factor, BranchFactors) else factor

    def factor(self, param: Tensor) -> Factor | None:
        """Return what the caller gave for `param`, as the update takes it.

        Raises ValueError for a parameter that this optimizer does not have.
        """
        if not is_frozen(param):
            position_of(self.param_groups, param, of_mults=True)
        return self._multipliers.caller(param)

    def total_factor(self, param: Tensor) -> Factor | None:
        """Return all that a step multiplies the gradient of `param` by, on its device and shard."""
        return self._multipliers.total(param)

    def set_spatial_scaling(self, param: Tensor, scaling: Tensor | None) -> None:
        """Set (or with None remove) the second factor, G of spatial gradient scaling  # [kh, kw]

        It is no part of a checkpoint. For CSLA = GR to stay exact G must not change while gradients that it multiplied
        live on in the optimizer's arrays, such as a momentum buffer.
        """
        if isinstance(scaling, Tensor) and scaling.dim() != 2:
            raise ValueError(f"a spatial scaling must have shape [kh, kw], got {list(scaling.shape)}")
        self._multipliers.set_spatial(param, self.checked_factor(param, scaling, GradMult))

    def spatial_scaling(self, param: Tensor) -> Tensor | None:
        """Return what `set_spatial_scaling` set  # [kh, kw]"""
        factor = self._multipliers.spatial(param)
        return None if factor is None else factor.scale

    def take_factor(self, param: Tensor, mult: Factor | None) -> None:
        self._multipliers.set_caller(param, mult, waits=not self._holds(param))

    def _holds(self, param: Tensor) -> bool:
        return any(p is param for p in parameters_of(self.param_groups))

    def checked_factor(self, param: Tensor, mult: Any, kind: type[Factor]) -> Any:
        """Make `mult` a factor of this kind that fits `param`. An error names the parameter."""
        if mult is None and param in self._multipliers:
            return None
        if is_frozen(param) and not self._holds(param):
            name = f"frozen parameter of shape {list(param.shape)}"
        else:
            name = described(self.param_groups, position_of(self.param_groups, param, of_mults=True))
        if mult is None:
            return None
        try:
            return as_factor(mult, param.shape, kind)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
