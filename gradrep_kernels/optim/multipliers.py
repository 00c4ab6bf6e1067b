"""The two factors that an optimizer holds for each parameter: the caller's Grad Mult, and the one that SGS sets."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradrep_kernels.branch_scales import BranchScales
from gradrep_kernels.dtensor import is_dtensor
from gradrep_kernels.grad_mult import GradMult, awaits_grad_mult
from gradrep_kernels.messages import first_few, warn_outside
from gradrep_kernels.optim.branch_factors import BranchFactors
from gradrep_kernels.optim.parameters import ParamGroups, described, parameters_of
from gradrep_kernels.optim.sharding import part_on
from gradrep_kernels.optim.update_rule import Factor

# A Mapping's keys have one type: one of Tensors is not one of Parameters, which `csla.grad_mults` gives.
GradMults = Mapping[Tensor, GradMult | Tensor] | Mapping[nn.Parameter, GradMult | Tensor]


@dataclass
class _Factors:
    caller: Factor | None = None
    spatial: GradMult | None = None
    checksum: int = 0  # of the caller's
    total: Factor | None = None  # their product, made on first use
    place: Any = None  # where that product is
    waits: bool = False  # given for a frozen parameter that no group has held yet


class Multipliers:
    """{parameter: its factors}. `version` counts the changes, so that a cache of something derived can tell.

    Args:
        kind: GradMult, or BranchFactors where the update needs them.
    """

    kind: type[Factor] = GradMult  # of pickles that do not say it

    def __init__(self, kind: type[Factor] = GradMult):
        self.kind = kind
        self.version = 0
        self._factors: dict[Tensor, _Factors] = {}

    def __contains__(self, param: Tensor) -> bool:
        return param in self._factors

    def strays(self, params: Iterable[Tensor]) -> list[Tensor]:
        """List the trained parameters with factors that are not among `params`.

        Frozen ones are none: they may join, or join again, and until then nobody steps them.
        """
        if not self._factors:
            return []
        params = set(params)
        for param in params & self._factors.keys():
            self._factors[param].waits = False
        outside = self._factors.keys() - params
        return [param for param in outside if param.requires_grad and not self._factors[param].waits]

    def drop(self, params: Iterable[Tensor]) -> None:
        for param in params:
            del self._factors[param]
            self.version += 1

    def set_caller(self, param: Tensor, mult: Factor | None, waits: bool = False) -> None:
        """Set the caller's factor. One that `waits` is of a frozen parameter that no group holds."""
        self._set(param, caller=mult, checksum=0 if mult is None else _checksum(mult), waits=waits)

    def set_spatial(self, param: Tensor, mult: GradMult | None) -> None:
        self._set(param, spatial=mult)

    def _set(self, param: Tensor, **changes: Any) -> None:
        factors = self._factors.setdefault(param, _Factors())
        for name, value in changes.items():
            setattr(factors, name, value)
        factors.total = None
        if factors.caller is None and factors.spatial is None:
            del self._factors[param]
        elif not is_dtensor(param):
            # The product is made now. The next step may be in a CUDA graph capture, which a product on the CPU breaks.
            self.total(param)
        self.version += 1

    def caller(self, param: Tensor) -> Factor | None:
        factors = self._factors.get(param)
        return None if factors is None else factors.caller

    def spatial(self, param: Tensor) -> GradMult | None:
        factors = self._factors.get(param)
        return None if factors is None else factors.spatial

    def product(self, param: Tensor) -> Factor | None:
        """Multiply caller ⊙ spatial, for the whole weight. BranchFactors hold both side by side."""
        factors = self._factors.get(param)
        if factors is None:
            return None
        if self.kind is BranchFactors:
            if factors.caller is None:
                return BranchFactors.of_spatial(factors.spatial, param.dim())
            return factors.caller.with_spatial(factors.spatial)
        parts = [f for f in (factors.caller, factors.spatial) if f is not None]
        return parts[0] if len(parts) == 1 else parts[0] * parts[1]

    def total(self, param: Tensor) -> Factor | None:
        """Return caller ⊙ spatial on the parameter's device, for a DTensor the part on this rank's shard."""
        factors = self._factors.get(param)
        if factors is None:
            return None
        place = (param.device, param.dtype, param.placements) if is_dtensor(param) else param.device
        if factors.total is None or factors.place != place:
            product = self.product(param)
            factors.total = part_of(param, product) if is_dtensor(param) else product.to(param.device)
            factors.place = place
        return factors.total

    def of_norm(self, param: Tensor) -> GradMult | None:
        """Return M of the norm √(Σ M ⊙ g²), where the step takes it: under AdamW G is no factor of it."""
        total = self.total(param)
        return total.mult if isinstance(total, BranchFactors) else total

    def callers(self, params: Iterable[Tensor]) -> dict[int, Factor]:
        """Return the caller's factors by the position of their parameter."""
        by_position = ((n, self.caller(p)) for n, p in enumerate(params))
        return {n: mult for n, mult in by_position if mult is not None}

    def fingerprint(self, params: Iterable[Tensor]) -> int:
        """Derive a number from the caller's factors of a parameter group. It is 0 where the group has none."""
        sums = [self._factors[p].checksum if p in self._factors else 0 for p in params]
        return zlib.crc32(repr(sums).encode()) if any(sums) else 0


def refuse_strays(multipliers: Multipliers, groups: ParamGroups) -> None:
    """Raise RuntimeError where trained parameters with Grad Mults are in no group."""
    strays = multipliers.strays(parameters_of(groups))
    if strays:
        raise RuntimeError(
            f"parameters with Grad Mults are no longer in param_groups: {len(strays)}, one of shape "
            f"{list(strays[0].shape)}. If something replaced them (wrapping the model after the optimizer was made), "
            "set the Grad Mults again on the new ones; else set_grad_mult(old, None)"
        )


def warn_of_forgotten(multipliers: Multipliers, groups: ParamGroups) -> None:
    """Warn where weights were re-initialised for Grad Mults, and none of them has one."""
    waiting = [(n, p) for n, p in enumerate(parameters_of(groups)) if awaits_grad_mult(p)]
    if waiting and all(multipliers.caller(p) is None for _, p in waiting):
        names = [described(groups, n) for n, _ in waiting]
        wanted = "branch_scales" if multipliers.kind is BranchFactors else "grad_mults"
        warn_outside(
            "weights were re-initialised for Grad Mults, but this optimizer has none for them: "
            f"{first_few(names, between=', ')}. It wants {wanted}=gr.csla.{wanted}(model, scales); {wanted}={{}} "
            "says that none is meant"
        )


def as_factor(mult: GradMult | Tensor | BranchScales | BranchFactors, shape: torch.Size, kind: type[Factor]) -> Factor:
    """Make what an update of this kind multiplies by. Raises TypeError or ValueError where `mult` is none."""
    if kind is GradMult:
        return as_grad_mult(mult, shape)
    if isinstance(mult, BranchFactors):
        mult.mult.check(shape)
        return mult
    if not isinstance(mult, BranchScales):
        raise TypeError(
            f"AdamW needs the BranchScales of a weight, for their Grad Mult does not determine its step; got "
            f"{type(mult).__name__}. gr.csla.branch_scales(model, scales) gives them"
        )
    return BranchFactors.of(mult, shape)


def as_grad_mult(mult: GradMult | Tensor, shape: torch.Size) -> GradMult:
    """Make a GradMult that fits a weight of `shape`. Raises TypeError or ValueError where `mult` is none."""
    if is_dtensor(mult):
        raise TypeError(
            "a Grad Mult must be given for the whole weight, as a plain tensor (full_tensor()); got a DTensor"
        )
    if isinstance(mult, Tensor):
        # A user's full-size mask often has the structured form: 0.1 MB instead of 199 MB for RepOpt-VGG-B1.
        mult = GradMult.from_dense(mult) if mult.shape == shape else GradMult(mult)
    if isinstance(mult, BranchScales):
        raise TypeError(
            "a Grad Mult must be a GradMult or a Tensor, got BranchScales: gr.csla.grad_mults(model, scales) makes "
            "those of a model, and .grad_mult(kernel_size) one"
        )
    if not isinstance(mult, GradMult):
        raise TypeError(f"a Grad Mult must be a GradMult or a Tensor, got {type(mult).__name__}")
    mult.check(shape)
    return mult


def part_of(param: Tensor, product: Factor) -> Factor:
    """The part of a factor that lies on this rank's shard of a DTensor."""
    if isinstance(product, BranchFactors):
        return product.mapped(functools.partial(part_on, param))
    return part_on(param, product)


def _checksum(mult: Factor) -> int:
    value = 0
    for part in mult.tensors().values() if isinstance(mult, BranchFactors) else mult.parts():
        if part is not None:
            value = zlib.crc32(repr((tuple(part.shape), part.dtype)).encode(), value)
            value = zlib.crc32(part.detach().cpu().contiguous().numpy().tobytes(), value)
    return value or 1  # 0 means none
