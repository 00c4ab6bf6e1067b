"""Wrappers around the C++ and CUDA kernels.

Tensors that a kernel cannot handle are passed to the reference, which gives the same result.
"""

from gradrep_kernels.ops.cpp.rep_adamw_step import rep_adamw_step
from gradrep_kernels.ops.cpp.rep_grad_norm import rep_grad_norm
from gradrep_kernels.ops.cpp.rep_sgd_step import rep_sgd_step
from gradrep_kernels.ops.cpp.scale_gradients import scale_gradients_

__all__ = ["rep_adamw_step", "rep_grad_norm", "rep_sgd_step", "scale_gradients_"]
