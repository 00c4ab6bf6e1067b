"""Where the CUDA C++ steps run in tests, and what the steps in Triton upload."""

from __future__ import annotations

import pytest
from cuda_steps import PLACES, OnGpu


@pytest.fixture
def emulated(monkeypatch):
    from emulated_step import Emulated  # it needs a compiler's tools

    return Emulated(monkeypatch)


@pytest.fixture(params=PLACES)
def where(request):
    return OnGpu() if request.param == "cuda" else request.getfixturevalue("emulated")


@pytest.fixture
def uploads(monkeypatch) -> list:
    """The tables that went to the device."""
    from gradrep_kernels.ops.triton import plans, rep_sgd_step, staging  # there may be no Triton

    seen, upload = [], staging.upload

    def counted(table, *more, **named):
        seen.append(table)
        return upload(table, *more, **named)

    monkeypatch.setattr(staging, "upload", counted)
    monkeypatch.setattr(rep_sgd_step, "plans", plans.Plans("rep_sgd_step", plans.BLOCK, writes=True))
    monkeypatch.setattr(rep_sgd_step, "hyper_tables", {})
    return seen
