"""The C++ and the CUDA gradient norm."""

from __future__ import annotations

from torch import Tensor

from gradrep_kernels.ops import reference
from gradrep_kernels.ops.cpp.step import DTYPES
from gradrep_kernels.ops.dense import is_dense
from gradrep_kernels.ops.registry import registered


def rep_grad_norm(grads, scales, identities) -> Tensor:
    """Compute reference.rep_grad_norm of CPU or CUDA tensors. The order of summation differs.

    On a CPU the last bit may. On a GPU, chunks of at most 8192 elements are summed in the dtype of the step, and those
    sums in float64. The relative error against the reference is 1e-6 for float32, float16 and bfloat16, and 1e-14 for
    float64 (csrc/rep_grad_norm_cuda.h counts the roundings).
    """
    if not grads or len({g.device for g in grads}) > 1 or any(g.dtype not in DTYPES for g in grads):
        return reference.rep_grad_norm(grads, scales, identities)
    return registered("rep_grad_norm")([g if is_dense(g) else g.contiguous() for g in grads], scales, identities)
