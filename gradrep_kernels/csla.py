"""Constant-scale linear addition: Hyper-Search and CSLA models of any plain network, their scales, and the way back.

Source: RepOptimizers (Ding et al., 2023), sections 3.2 to 3.4.
"""

from gradrep_kernels.branches.convert import csla_model, hyper_search_model, merge, reinitialize
from gradrep_kernels.branches.scales import Scales, extract_scales, grad_mults, load_scales, save_scales

__all__ = [
    "Scales",
    "csla_model",
    "extract_scales",
    "grad_mults",
    "hyper_search_model",
    "load_scales",
    "merge",
    "reinitialize",
    "save_scales",
]
