"""Plain torch: the specification of every op, and the fallback on any machine. One file per op, named as the op."""

from gradrep_kernels.ops.reference.joint_histogram import joint_histogram, joint_histogram_
from gradrep_kernels.ops.reference.pair_ranges import pair_ranges, pair_ranges_
from gradrep_kernels.ops.reference.rep_adamw_step import rep_adamw_step
from gradrep_kernels.ops.reference.rep_grad_norm import rep_grad_norm
from gradrep_kernels.ops.reference.rep_sgd_step import rep_sgd_step
from gradrep_kernels.ops.reference.scale_gradients import scale_gradients_

__all__ = [
    "joint_histogram",
    "joint_histogram_",
    "pair_ranges",
    "pair_ranges_",
    "rep_adamw_step",
    "rep_grad_norm",
    "rep_sgd_step",
    "scale_gradients_",
]
