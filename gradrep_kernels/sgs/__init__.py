"""Spatial gradient scaling: how much each tap of a kernel learns, from the spatial dependence in its input (Detkov et al., 2023)."""

from gradrep_kernels.sgs.controller import SpatialGradientScaling
from gradrep_kernels.sgs.dependence import (
    alpha_beta_scaling,
    normalized_mutual_information,
    spatial_gradient_scaling,
)
from gradrep_kernels.sgs.histograms import joint_histogram, pair_ranges

__all__ = [
    "SpatialGradientScaling",
    "alpha_beta_scaling",
    "joint_histogram",
    "normalized_mutual_information",
    "pair_ranges",
    "spatial_gradient_scaling",
]
