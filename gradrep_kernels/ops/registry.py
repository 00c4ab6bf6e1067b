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

_DECLARED = (
    reference.rep_sgd_step,
    reference.rep_grad_norm,
    reference.pair_ranges,
    reference.joint_histogram,
    reference.joint_histogram_,
)


def _table() -> dict[str, Op]:
    rows = [function.op for function in _DECLARED]
    return {row.name: row for step in rows for row in ([step, *plan_ops(step)] if step.step else [step])}


OPS = _table()
"""Name -> op. A step is followed by its plan ops, which have no reference: only a backend with kernels makes plans."""


def registered(name: str) -> Callable:
    """The op as torch dispatches it: a kernel where one is registered for the tensors' device, else the reference."""
    return getattr(torch.ops.gradrep_kernels, name).default


_library = torch.library.Library(NAMESPACE, "DEF")
for _op in OPS.values():
    _library.define(_op.name + _op.schema)
    if _op.reference is not None:
        _library.impl(_op.name, _op.reference, "CompositeExplicitAutograd")
    if _op.fake is not None:
        torch.library.register_fake(f"{NAMESPACE}::{_op.name}", _op.fake)
