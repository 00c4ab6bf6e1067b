"""Hyper-Search and CSLA models of any plain network, their scales, and merging.

CSLA is constant-scale linear addition. Source: RepOptimizers (Ding et al., 2023), sections 3.2 to 3.4. The code is in
`branches/`.
"""

from gradrep_kernels.branches.convert import merge
from gradrep_kernels.branches.coverage import Coverage, coverage
from gradrep_kernels.branches.csla import csla_model, extract_scales, hyper_search_model
from gradrep_kernels.branches.files import load_scales, save_scales
from gradrep_kernels.branches.reinitialize import reinitialize
from gradrep_kernels.branches.scales import Scales, branch_scales, grad_mults
from gradrep_kernels.branches.variance import identity_variance_ratio
from gradrep_kernels.equivalence import Equivalence, check_equivalence

__all__ = [
    "Coverage",
    "Equivalence",
    "Scales",
    "branch_scales",
    "check_equivalence",
    "coverage",
    "csla_model",
    "extract_scales",
    "grad_mults",
    "hyper_search_model",
    "identity_variance_ratio",
    "load_scales",
    "merge",
    "reinitialize",
    "save_scales",
]
