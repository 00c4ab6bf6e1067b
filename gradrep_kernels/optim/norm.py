"""The gradient norm of the CSLA model over all parameters of an optimizer, and gradients scaled by one number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter, methodcaller
from typing import Any

import torch
from torch import Tensor

from gradrep_kernels.dtensor import is_dtensor, local
from gradrep_kernels.ops import backends
from gradrep_kernels.ops.reference import rep_grad_norm
from gradrep_kernels.ops.reference.multiply import compute_dtype
from gradrep_kernels.optim.multipliers import Multipliers
from gradrep_kernels.optim.parameters import are_plain, in_place
from gradrep_kernels.optim.sharding import aligned_grad, norm_over_shards

_facts = (attrgetter("layout"), attrgetter("device"), attrgetter("dtype"), methodcaller("is_complex"))


def gradient_norm(params: Sequence[Tensor], multipliers: Multipliers) -> Tensor:
    """√(Σ M ⊙ g²) of parameters that have a gradient, over all devices and shards  # []"""
    places: dict[Any, list[Tensor]] = {}
    for p in params:
        places.setdefault((p.device_mesh, p.placements) if is_dtensor(p) else p.device, []).append(p)
    norms = [norm_over_shards(_norm_here(there, multipliers), there[0]) for there in places.values()]
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))


def _norm_here(params: Sequence[Tensor], multipliers: Multipliers) -> Tensor:
    """That of parameters on one device, for DTensors over this rank's shards."""
    grads = [p.grad.coalesce().values() if p.grad.is_sparse else local(aligned_grad(p)) for p in params]
    parts = columns_of_parts(params, multipliers)
    return norm_by_kernels(grads, parts) if are_plain(grads) else rep_grad_norm(grads, *parts)


def norm_by_kernels(grads: list[Tensor], parts: Sequence[list[Tensor | None]]) -> Tensor:
    """That of plain gradients on one device. `parts` are the columns of scales and identities."""
    return backends.implementation("rep_grad_norm", grads[0].device.type)(grads, *parts)


def columns_of_parts(params: Sequence[Tensor], multipliers: Multipliers) -> list[list[Tensor | None]]:
    """The scales and the identities of the total Grad Mults."""
    mults = map(multipliers.total, params)
    return [list(column) for column in zip(*((None, None) if mult is None else mult.parts() for mult in mults))]


def scale_in_place(grads: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply gradients by one number, in a few launches for each device and dtype.  # factor []

    They are rounded as by `in_place`.
    """
    kinds = list(zip(map(type, grads), *(map(fact, grads) for fact in _facts)))
    for kind in dict.fromkeys(kinds):
        _, layout, device, dtype, is_complex = kind
        alike = list(grads) if len(set(kinds)) == 1 else [g for g, its in zip(grads, kinds) if its == kind]
        by = factor.to(device, compute_dtype(dtype).to_real())
        if kind[0] is not Tensor or layout != torch.strided or is_complex:
            for g in alike:
                in_place(g, lambda values, by=by: values.mul_(by))
        elif by.dtype == dtype:
            torch._foreach_mul_(alike, by)
        else:
            for some in _runs(alike):
                values = [torch.empty_like(g, dtype=by.dtype) for g in some]
                torch._foreach_copy_(values, some)
                torch._foreach_mul_(values, by)
                torch._foreach_copy_(some, values)


def _runs(tensors: Sequence[Tensor], elements: int = 2**24) -> Iterator[list[Tensor]]:
    """Split a list into runs of about so many elements, which bounds the memory of temporary copies."""
    run: list[Tensor] = []
    left = elements
    for t in tensors:
        if run and t.numel() > left:
            yield run
            run, left = [], elements
        run.append(t)
        left -= t.numel()
    if run:
        yield run
