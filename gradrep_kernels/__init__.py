"""Gradient re-parameterization at zero cost.

Grad Mult inside SGD, spatial gradient scaling, and the tools around them.
"""

from gradrep_kernels import csla, models, moved, plots
from gradrep_kernels.branch_scales import Branch, BranchScales
from gradrep_kernels.grad_mult import GradMult
from gradrep_kernels.ops.backends import use_backend
from gradrep_kernels.optim import FusedRepAdamW, FusedRepSGD, GradScaler, clip_grad_norm_, param_groups
from gradrep_kernels.sgs import (
    SpatialGradientScaling,
    alpha_beta_scaling,
    joint_histogram,
    normalized_mutual_information,
    pair_ranges,
    spatial_gradient_scaling,
)
from gradrep_kernels.version import __version__

__all__ = [
    "Branch",
    "BranchScales",
    "FusedRepAdamW",
    "FusedRepSGD",
    "GradMult",
    "GradScaler",
    "SpatialGradientScaling",
    "__version__",
    "alpha_beta_scaling",
    "clip_grad_norm_",
    "csla",
    "joint_histogram",
    "models",
    "normalized_mutual_information",
    "pair_ranges",
    "param_groups",
    "plots",
    "spatial_gradient_scaling",
    "use_backend",
]

moved.install()
