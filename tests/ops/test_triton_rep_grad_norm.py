"""rep_grad_norm in Triton: the interpreter runs it here; on a GPU test_rep_grad_norm.py runs it among all kernels."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import interpreter

# Relative, against the reference, which sums in float64. float32: a product takes 3 roundings, a lane adds 16 of them
# in a row, 10 additions follow in a tree: 29 · 2⁻²⁴ of Σ at most, half of that after the root. 16-bit gradients are
# exact in float32.
TOLERANCE = {
    torch.float32: 1e-6,
    torch.bfloat16: 1e-6,
    torch.float16: 1e-6,
    torch.float64: 1e-14,
    torch.complex64: 1e-6,
}


def test_in_the_interpreter():
    interpreter.run("interpreted_rep_grad_norm.py")
