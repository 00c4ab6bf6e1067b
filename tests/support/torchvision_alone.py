"""torchvision beside a torch that its C++ part was not built for, so that its part in Python can be tested.

A wheel for CUDA beside a CPU build of torch cannot load its operators, and ends its import at the first that is
registered without a schema. Data sets and transforms call none of them. Importing this module defines the schemas when
torchvision is imported, where its own library does not load.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import re
import sys
from pathlib import Path

import pytest

_KEPT = []  # A library's definitions end with it.


def usable() -> bool:
    """Whether torchvision is installed and can be imported, with or without its operators."""
    return importlib.util.find_spec("torchvision") is not None


class _Schemas(importlib.abc.MetaPathFinder):
    """Looks on when torchvision imports its operators, after it has imported torch."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision.extension" and not _KEPT and path:
            _define_operators(Path(next(iter(path))))
        return None


def _define_operators(folder: Path) -> None:
    import torch

    try:
        for library in folder.glob("_C.*"):
            torch.ops.load_library(str(library))
            return
    except OSError:
        pass
    names = set()
    for file in ("_meta_registrations.py", "_autograd_registrations.py"):
        if (folder / file).exists():
            text = (folder / file).read_text(encoding="utf-8")
            names |= set(re.findall(r"torchvision::(\w+)", text)) | set(re.findall(r'register_meta\("(\w+)"', text))
    library = torch.library.Library("torchvision", "DEF")
    for name in sorted(names):
        library.define(f"{name}(Tensor x) -> Tensor")
    _KEPT.append(library)


if not any(isinstance(finder, _Schemas) for finder in sys.meta_path):
    sys.meta_path.insert(0, _Schemas())


needed = pytest.mark.skipif(not usable(), reason="needs torchvision: pip install --no-deps torchvision")
