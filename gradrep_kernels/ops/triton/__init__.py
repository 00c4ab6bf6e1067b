"""The portable GPU implementations, in Triton. Files are named as in reference/.

Importing this raises ImportError, with the reason, where Triton is absent.
"""

from __future__ import annotations

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError(
        "Triton is not installed (a CUDA build of torch brings it; else pip install 'gradrep_kernels[triton]')"
    ) from error

from gradrep_kernels.ops.triton.joint_histogram import joint_histogram, joint_histogram_
from gradrep_kernels.ops.triton.launching import INTERPRETED
from gradrep_kernels.ops.triton.pair_ranges import pair_ranges, pair_ranges_
from gradrep_kernels.ops.triton.rep_adamw_step import (
    rep_adamw_plan,
    rep_adamw_plan_free,
    rep_adamw_plan_norm,
    rep_adamw_plan_step,
    rep_adamw_step,
)
from gradrep_kernels.ops.triton.rep_grad_norm import rep_grad_norm
from gradrep_kernels.ops.triton.rep_sgd_step import (
    rep_sgd_plan,
    rep_sgd_plan_free,
    rep_sgd_plan_norm,
    rep_sgd_plan_step,
    rep_sgd_step,
)
from gradrep_kernels.ops.triton.scale_gradients import scale_gradients_

__all__ = [
    "INTERPRETED",
    "joint_histogram",
    "joint_histogram_",
    "pair_ranges",
    "pair_ranges_",
    "rep_adamw_plan",
    "rep_adamw_plan_free",
    "rep_adamw_plan_norm",
    "rep_adamw_plan_step",
    "rep_adamw_step",
    "rep_grad_norm",
    "rep_sgd_plan",
    "rep_sgd_plan_free",
    "rep_sgd_plan_norm",
    "rep_sgd_plan_step",
    "rep_sgd_step",
    "scale_gradients_",
    "supports",
]

_OPS = frozenset(__all__) - {"INTERPRETED", "supports"}


def supports(op: str, device: str) -> str | None:
    """None where `op` runs on tensors of a device type, else the reason why it does not."""
    if op not in _OPS:
        return f"there is no Triton implementation of {op}"
    if device == "cpu" and not INTERPRETED:
        return "Triton runs on CPU tensors only with TRITON_INTERPRET=1 in the environment before Python starts"
    if device != "cpu" and INTERPRETED:
        return f"TRITON_INTERPRET=1 is set: Triton's kernels are interpreted on the CPU, not run on {device}"
    if device not in ("cpu", "cuda"):
        return f"Triton's kernels are not tested on {device}"
    return None
