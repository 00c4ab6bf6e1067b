"""The step's frame under a second update, in the interpreter and through the compiler."""

from __future__ import annotations

import types

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import interpreter
import triton
from gate_variants import compiled_step
from second_step import second_step_kernel, update

from gradrep_kernels.ops.triton import INTERPRETED


def test_in_the_interpreter():
    interpreter.run("interpreted_step_frame.py")


@triton.jit
def another_update(w, g, m, states, first, numbers):
    return w - g, states


compiles = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: nothing is compiled")


@compiles
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_state_has_wide_accesses_under_a_condition(target):
    made = compiled_step(second_step_kernel, torch.float32, target)
    assert made.claims_of_alignment() == [True] * 4
    assert made.wide_loads >= 4
    assert made.wide_stores >= 3
    assert made.spills == 0


@compiles
def test_the_update_is_in_the_key_of_tritons_cache():
    """The frame gets the update as an argument. A kernel compiled with another one must not be found on disk."""

    def key(of: triton.JITFunction) -> str:
        fn = second_step_kernel.fn
        twin = types.FunctionType(fn.__code__, {**fn.__globals__, "update": of}, fn.__name__)
        twin.__module__, twin.__qualname__, twin.__annotations__ = fn.__module__, fn.__qualname__, fn.__annotations__
        return triton.jit(twin).cache_key

    assert key(update) == key(update)
    assert key(update) != key(another_update)
    names = {name for name, _ in second_step_kernel.used_global_vals}
    assert names >= {"COLUMNS", "STATES", "STATE", "PARAM", "TAIL", "GEOMETRY", "TAP_FIRST"}
