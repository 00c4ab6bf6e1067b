"""Which implementation of an op can be had on which device here, and what a test needs that runs on a GPU."""

from __future__ import annotations

import os

import pytest
import torch

from gradrep_kernels.ops import backends

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def of(op: str) -> list:
    """pytest parameters (backend, device), the reference left out; what is missing is skipped with its reason."""
    found = []
    for row in backends.report(DEVICES):
        if row["op"] != op:
            continue
        for backend in ("cpp", "triton", "cuda"):
            if (backend == "cpp" and row["device"] != "cpu") or (backend != "cpp" and row["device"] != "cuda"):
                continue
            marks = [pytest.mark.gpu] if row["device"] == "cuda" else []
            marks += [] if row[backend] == "available" else [pytest.mark.skip(reason=row[backend])]
            found.append(pytest.param(backend, row["device"], id=f"{backend}-{row['device']}", marks=marks))
    return found


def get(op: str, backend: str, device: str):
    with backends.use_backend(backend):
        return backends.implementation(op, device)


def on_gpu(test):
    """Mark a test that is about a GPU, chosen by `-m gpu`.

    It is skipped where there is none, and where Triton interprets kernels on the CPU.
    """
    return pytest.mark.gpu(pytest.mark.skipif("cuda" not in DEVICES or INTERPRETED, reason="needs a CUDA GPU")(test))
