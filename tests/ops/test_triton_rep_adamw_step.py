"""rep_adamw_step in Triton: in the interpreter, and what its compiled kernels have.

On a GPU test_rep_adamw_step.py compares its bits with the reference's, among all kernels.
"""

from __future__ import annotations

import importlib

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import compile_gate
import interpreter
from gate_variants import TYPE, compiled_over_parameters, compiled_step

from gradrep_kernels.ops.triton import INTERPRETED, plans
from gradrep_kernels.ops.triton.addressing import POINTERS
from gradrep_kernels.ops.triton.rep_grad_norm import rep_grad_norm_kernel

adamw = importlib.import_module("gradrep_kernels.ops.triton.rep_adamw_step")  # not the op of that name
compiles = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: nothing is compiled")
EVERYTHING = ("grad_scale", "found_inf", "clip", "tail")

# Five arrays, three of them states, the factors' addresses and eight numbers are alive at once. More than the 64
# registers of the SGD step, and no spill: two blocks of 256 threads and three of 128 fit a multiprocessor, which have
# 24 KB and more on their way.
MOST_REGISTERS = {torch.float32: 96, torch.float64: 114, torch.bfloat16: 168, torch.float16: 168}


def test_in_the_interpreter():
    interpreter.run("interpreted_rep_adamw_step.py")


@compiles
@pytest.mark.parametrize("target", compile_gate.TARGETS)
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("dtype", plans.COMPUTE, ids=str)
def test_rep_adamw_step(dtype, everything, target):
    given = EVERYTHING if everything else ()
    made = compiled_step(adamw.rep_adamw_step_kernel, dtype, target, given, everything, many_states=True)
    sizes = [dtype.itemsize] * 5 + [plans.COMPUTE[dtype].itemsize] * everything  # parameter, gradient, states, average
    stored = sizes if everything else [*sizes[:1], *sizes[2:]]  # unscaled gradients are written too
    assert made.wide_loads >= sizes.count(max(sizes))
    assert made.wide_stores >= stored.count(max(sizes))
    assert made.claims_of_alignment() == [True] * len(sizes)
    assert made.spills == 0
    assert made.registers <= MOST_REGISTERS[dtype]
    assert made.shared == 0
    assert (made.double_precision > 0) == (dtype == torch.float64)
    if target != "gfx942":  # divisions and roots are made of fused steps there; in PTX they are one instruction
        assert made.contracted == 0


@compiles
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_divisions_and_roots_are_rounded_as_ieee_754_says(dtype, target):
    made = compiled_step(adamw.rep_adamw_step_kernel, dtype, target, many_states=True)
    if target == "sm_90":
        bits = dtype.itemsize * 8
        assert made.count(rf"div\.rn\.f{bits}")
        assert made.count(rf"sqrt\.rn\.f{bits}")
        assert made.count(r"div\.full|sqrt\.approx|rcp\.approx") == 0
    else:
        assert made.count(r"v_div_fixup")


@compiles
@pytest.mark.parametrize("target", compile_gate.TARGETS)
@pytest.mark.parametrize("dtype", plans.COMPUTE, ids=str)
def test_the_gradient_norm_over_branches(dtype, target):
    types = {"partial": TYPE[plans.COMPUTE[dtype]]}
    constants = {"WIDTH": POINTERS.value + 4, "FACTOR": adamw._squares}
    made = compiled_over_parameters(rep_grad_norm_kernel, dtype, target, types, constants, many_states=True)
    assert made.wide_loads >= 1
    assert made.claims_of_alignment() == [True]
    assert made.spills == 0
    assert (made.double_precision > 0) == (dtype == torch.float64)
