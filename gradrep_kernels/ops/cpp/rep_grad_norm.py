"""The C++ gradient norm."""

from __future__ import annotations

from torch import Tensor

from gradrep_kernels.ops import reference
from gradrep_kernels.ops.cpp.step import DTYPES
from gradrep_kernels.ops.dense import is_dense
from gradrep_kernels.ops.registry import registered


def rep_grad_norm(grads, scales, identities) -> Tensor:
    """Compute reference.rep_grad_norm of CPU tensors. The order of summation differs, so the last bit may."""
    if not grads or any(g.dtype not in DTYPES for g in grads):
        return reference.rep_grad_norm(grads, scales, identities)
    return registered("rep_grad_norm")([g if is_dense(g) else g.contiguous() for g in grads], scales, identities)
