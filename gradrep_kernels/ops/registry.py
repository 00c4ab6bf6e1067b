"""The table of ops: what exists and what it means. Each op is declared beside its reference, which is its schema.

The registered default of every op is its reference, so `torch.ops.gradrep_kernels.<op>` works with or without compiled
code, in either load order, and under torch.compile. Backends only supply implementations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from gradrep_kernels.ops import reference
from gradrep_kernels.ops.schema import Op, plan_ops

NAMESPACE = "gradrep_kernels"

OPS: dict[str, Op] = {}
"""Name -> op. A step is followed by its plan ops, which have no reference: only a backend with kernels makes plans."""

_library = torch.library.Library(NAMESPACE, "DEF")


def register(reference: Callable) -> None:
    """Enter the op that was declared beside `reference` (see `schema.op`) into the table, a step with its plan ops."""
    declared: Op = reference.op
    for row in (declared, *(plan_ops(declared) if declared.step else ())):
        _library.define(row.name + row.schema)
        if row.reference is not None:
            _library.impl(row.name, row.reference, "CompositeExplicitAutograd")
        if row.fake is not None:
            torch.library.register_fake(f"{NAMESPACE}::{row.name}", row.fake)
        OPS[row.name] = row


def registered(name: str) -> Callable:
    """The op as torch dispatches it: a kernel where one is registered for the tensors' device, else the reference."""
    return getattr(torch.ops.gradrep_kernels, name).default


for _reference in (
    reference.rep_sgd_step,
    reference.rep_adamw_step,
    reference.rep_grad_norm,
    reference.scale_gradients_,
    reference.pair_ranges,
    reference.pair_ranges_,
    reference.joint_histogram,
    reference.joint_histogram_,
):
    register(_reference)
