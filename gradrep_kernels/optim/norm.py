"""The gradient norm of the CSLA model over all parameters of an optimizer, and gradients scaled by one number."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, methodcaller
from typing import Any

import torch
from torch import Tensor

from gradrep_kernels.dtensor import is_dtensor, local
from gradrep_kernels.ops import backends
from gradrep_kernels.ops.reference import rep_grad_norm
from gradrep_kernels.ops.reference.multiply import compute_dtype
from gradrep_kernels.optim.gather import Gathered
from gradrep_kernels.optim.multipliers import Multipliers
from gradrep_kernels.optim.parameters import are_plain, in_place
from gradrep_kernels.optim.sharding import aligned_grad, norm_over_shards
from gradrep_kernels.optim.tail import unscaled

_facts = (attrgetter("layout"), attrgetter("device"), methodcaller("is_complex"))


def gradient_norm(
    params: Sequence[Tensor], grads: Sequence[Tensor], parts: Sequence[Sequence[Tensor | None]]
) -> Tensor:
    """√(Σ M ⊙ g²) over all devices and shards  # []

    Args:
        params: one at least; they tell how gradients are spread over devices and ranks
        grads:  as this rank holds them (`gradient_here`)
        parts:  the columns of scales and identities
    """
    places: dict[Any, list[int]] = {}
    for n, p in enumerate(params):
        places.setdefault((p.device_mesh, p.placements) if is_dtensor(p) else p.device, []).append(n)
    norms = []
    for there in places.values():
        own, *own_parts = ([column[n] for n in there] for column in (grads, *parts))
        norm = norm_by_kernels(own, own_parts) if are_plain(own) else rep_grad_norm(own, *own_parts)
        norms.append(norm_over_shards(norm, params[there[0]]))
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))


def norm_of_step(work: Gathered, multipliers: Multipliers, grad_scale: Tensor | None) -> Tensor:
    """√(Σ M ⊙ g²) of a gathered step, of what gradients are after unscaling  # []"""
    rows = {row.param: row for row in work.rows()}  # a parameter that is listed twice counts once
    sparse = [p for _, p in work.sparse]
    params = [*rows, *sparse]
    if not params:
        return torch.zeros((), device="cpu")
    grads = [*(row.shards[1] for row in rows.values()), *map(gradient_here, sparse)]
    return unscaled(gradient_norm(params, grads, columns_of_parts(params, multipliers)), grad_scale)


def gradient_here(p: Tensor) -> Tensor:
    """The gradient of `p` as this rank holds it, or the values of a sparse one."""
    return p.grad.coalesce().values() if p.grad.is_sparse else local(aligned_grad(p))


def norm_by_kernels(grads: list[Tensor], parts: Sequence[list[Tensor | None]]) -> Tensor:
    """That of plain gradients on one device. `parts` are the columns of scales and identities."""
    return backends.implementation("rep_grad_norm", grads[0].device.type)(grads, *parts)


def columns_of_parts(params: Sequence[Tensor], multipliers: Multipliers) -> list[list[Tensor | None]]:
    """The scales and the identities of M."""
    mults = map(multipliers.of_norm, params)
    return [list(column) for column in zip(*((None, None) if mult is None else mult.parts() for mult in mults))]


def scale_in_place(grads: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply gradients by one number, in a few launches for each device.  # factor []

    They are rounded as by `in_place`. Plain gradients stay unwritten where the number is 1.
    """
    kinds = list(zip(map(type, grads), *(map(fact, grads) for fact in _facts)))
    for kind in dict.fromkeys(kinds):
        alike = list(grads) if len(set(kinds)) == 1 else [g for g, its in zip(grads, kinds) if its == kind]
        cls, layout, device, is_complex = kind
        if cls is Tensor and layout == torch.strided and not is_complex:
            by = factor.to(device)
            backends.implementation("scale_gradients_", device.type)(alike, by)
            if not by.is_cpu or by.item() != 1:  # else nothing was written
                torch.autograd.graph.increment_version(alike)
            continue
        for g in alike:
            by = factor.to(g.device, compute_dtype(g.dtype).to_real())
            in_place(g, lambda values, by=by: values.mul_(by))
