"""rep_grad_norm in Triton: the interpreter runs it here; on a GPU test_rep_grad_norm.py runs it among all kernels."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import interpreter


def test_in_the_interpreter():
    interpreter.run("interpreted_rep_grad_norm.py")
