"""Spatial gradient scaling (Detkov et al., 2023).

The spatial dependence in the input of a convolution says how fast each tap of its kernel is to learn.
"""

from gradrep_kernels.sgs.controller import SpatialGradientScaling
from gradrep_kernels.sgs.dependence import (
    alpha_beta_scaling,
    normalized_mutual_information,
    spatial_gradient_scaling,
)
from gradrep_kernels.sgs.histograms import joint_histogram, pair_ranges
from gradrep_kernels.sgs.history import ScalingUpdate

__all__ = [
    "ScalingUpdate",
    "SpatialGradientScaling",
    "alpha_beta_scaling",
    "joint_histogram",
    "normalized_mutual_information",
    "pair_ranges",
    "spatial_gradient_scaling",
]
