"""timm where torchvision is missing: importing timm imports its models, and those torchvision."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from unittest import mock

import pytest
import torchvision_alone

VISION = [
    "torchvision",
    *(f"torchvision.{name}" for name in ("ops", "ops.misc", "datasets", "transforms", "transforms.functional")),
]


@contextlib.contextmanager
def importable_timm() -> Iterator[None]:
    """Let timm be imported. A mock stands in for torchvision where that is missing, and timm is forgotten then."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("needs timm: pip install --no-deps timm (and the extra interop)")
    is_whole = torchvision_alone.usable()
    stubs = {} if is_whole else {name: mock.MagicMock(name=name, __path__=[], __spec__=None) for name in VISION}
    # No mock.patch.dict: it would also forget Triton, which aborts the process when it is imported again.
    sys.modules.update(stubs)
    try:
        yield
    finally:
        if stubs:
            for name in [name for name in sys.modules if name in stubs or name.split(".")[0] == "timm"]:
                del sys.modules[name]
