"""Old places of classes and public functions that have moved, for pickles and saved models that name them.

A pickle names each of them by its module and its name. One that moves or is renamed gets a row in `MOVED`.
tests/test_compatibility.py loads files that earlier commits wrote.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType

__all__ = ["MOVED", "install"]

# {old place: place today}, each "module:name".
MOVED = {
    "gradrep_kernels.csla.blocks:CSLABlock": "gradrep_kernels.branches.csla:CSLABlock",
    "gradrep_kernels.csla.blocks:CentredConv2d": "gradrep_kernels.branches.algebra:CentredConv2d",
    "gradrep_kernels.csla.blocks:MultiBranch": "gradrep_kernels.branches.algebra:MultiBranch",
    "gradrep_kernels.csla.blocks:ScaleLayer": "gradrep_kernels.branches.csla:ScaleLayer",
    "gradrep_kernels.grad_mult:BranchScales": "gradrep_kernels.branch_scales:BranchScales",
    "gradrep_kernels.models.blocks:NormedBranches": "gradrep_kernels.branches.normed:NormedBranches",
    "gradrep_kernels.sgs.layers:Autocorrelation": "gradrep_kernels.sgs.gathering:Autocorrelation",
    "gradrep_kernels.sgs.layers:MutualInformation": "gradrep_kernels.sgs.gathering:MutualInformation",
    "gradrep_kernels.sgs.layers:Plan": "gradrep_kernels.sgs.gathering:Binning",
    # Public functions, which a partial or a configuration may hold.
    "gradrep_kernels.backends:use_backend": "gradrep_kernels.ops.backends:use_backend",
    "gradrep_kernels.branches.csla:reinitialize": "gradrep_kernels.branches.reinitialize:reinitialize",
    "gradrep_kernels.branches.scales:load_scales": "gradrep_kernels.branches.files:load_scales",
    "gradrep_kernels.branches.scales:save_scales": "gradrep_kernels.branches.files:save_scales",
    "gradrep_kernels.csla.convert:csla_model": "gradrep_kernels.branches.csla:csla_model",
    "gradrep_kernels.csla.convert:hyper_search_model": "gradrep_kernels.branches.csla:hyper_search_model",
    "gradrep_kernels.csla.convert:merge": "gradrep_kernels.branches.convert:merge",
    "gradrep_kernels.csla.convert:reinitialize": "gradrep_kernels.branches.reinitialize:reinitialize",
    "gradrep_kernels.csla.scales:extract_scales": "gradrep_kernels.branches.csla:extract_scales",
    "gradrep_kernels.csla.scales:grad_mults": "gradrep_kernels.branches.scales:grad_mults",
    "gradrep_kernels.csla.scales:load_scales": "gradrep_kernels.branches.files:load_scales",
    "gradrep_kernels.csla.scales:save_scales": "gradrep_kernels.branches.files:save_scales",
    "gradrep_kernels.models.blocks:acb_model": "gradrep_kernels.branches.normed:acb_model",
    "gradrep_kernels.models.blocks:repvgg_model": "gradrep_kernels.branches.normed:repvgg_model",
}


def install() -> None:
    """Make every old place importable.

    The places of today are imported when a pickle asks for them, not before. The package calls this once, after it
    has imported its modules. An old module that is not loaded by then is gone, and an empty module takes its place in
    sys.modules.
    """
    names_of: dict[str, dict[str, str]] = {}
    for old, new in MOVED.items():
        module, name = old.split(":")
        names_of.setdefault(module, {})[name] = new
    for module, names in names_of.items():
        if module not in sys.modules:
            sys.modules[module] = ModuleType(module, "An old place of classes, see gradrep_kernels.moved.")
        sys.modules[module].__getattr__ = _getattr_of(module, names)


def _getattr_of(module: str, names: dict[str, str]) -> Callable[[str], object]:
    """Return the `__getattr__` (PEP 562) of a module that `names` have left."""

    def look_up(name: str) -> object:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new_module, new_name = names[name].split(":")
        return getattr(importlib.import_module(new_module), new_name)

    return look_up
