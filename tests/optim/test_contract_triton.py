"""The contract of an optimizer whose step is served, and planned, by Triton, in the interpreter.

What a backend does not see is left out: joining, checkpoints, torch.compile.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import interpreter


@pytest.mark.parametrize("part", ["amp", "gradients", "hyper_parameters", "life", "memory", "parameters", "sgd"])
def test_in_the_interpreter(part):
    interpreter.run(f"test_contract_{part}.py", folder="optim")
