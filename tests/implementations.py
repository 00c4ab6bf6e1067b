"""Which implementation of an op can be had on which device here; the tests run over all of them."""

from __future__ import annotations

import pytest
import torch

from gradrep_kernels import backends

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def of(op: str) -> list:
    """pytest parameters (callable, device), the reference left out; what is missing is skipped with its reason."""
    found = []
    for row in backends.report(DEVICES):
        if row["op"] != op:
            continue
        for backend in ("cpp", "triton", "cuda"):
            if (backend == "cpp" and row["device"] != "cpu") or (backend != "cpp" and row["device"] != "cuda"):
                continue
            missing = [] if row[backend] == "available" else [pytest.mark.skip(reason=row[backend])]
            found.append(pytest.param(backend, row["device"], id=f"{backend}-{row['device']}", marks=missing))
    return found


def get(op: str, backend: str, device: str):
    with backends.use_backend(backend):
        return backends.implementation(op, device)
