"""The Triton kernels over pairs of pixels, compiled for four GPUs: registers, spills, precision.

No GPU is needed.
"""

from __future__ import annotations

import itertools
import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import compile_gate
from gate_variants import POINTERS, TYPE, compiled_histogram, compiled_over_pairs

from gradrep_kernels.ops.triton import INTERPRETED
from gradrep_kernels.ops.triton.joint_histogram import CELLS, FIRST, REGISTERS, joint_histogram_kernel, private_cells
from gradrep_kernels.ops.triton.pair_ranges import BLOCK, PLACES, TOGETHER, channel_ranges_kernel, pair_ranges_kernel

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: nothing is compiled")

MOST_REGISTERS = 64  # four blocks of 256 threads on a multiprocessor; nobody trains in float64
HISTOGRAM_VARIANTS = list(itertools.product(TYPE, (*CELLS.values(), 0)))


def assert_sound(made: compile_gate.Compiled, dtype) -> None:
    assert made.spills == 0
    assert "tt.divisibility" not in made.ttir  # a map may start anywhere, so nothing may say that it is aligned
    if made.target != "gfx942":  # LLVM reads the four ends of a pair's ranges at once, which AMD permits at any float
        assert made.wide_loads == made.wide_stores == 0
    assert (made.double_precision > 0) == (dtype == torch.float64)
    if made.target == "gfx942":
        assert re.search(r"\.amdhsa_float_denorm_mode_32 3\n", made.assembly)  # 3: denormals are kept
    else:  # a division is made of fused steps on gfx942; in PTX it is one instruction
        assert made.contracted == 0
        assert ".ftz" not in made.assembly


@pytest.mark.parametrize("target", compile_gate.TARGETS)
@pytest.mark.parametrize(("dtype", "cells"), HISTOGRAM_VARIANTS, ids=str)
def test_joint_histogram(dtype, cells, target):
    made = compiled_histogram(dtype, target, cells)
    assert made.registers <= REGISTERS
    assert made.shared == (4 * FIRST.value if cells else 0)
    assert_sound(made, dtype)
    divisions = made.count("v_div_fixup") if target == "gfx942" else len(re.findall(r"\bdiv\.rn\.f", made.assembly))
    assert divisions == 2
    assert not re.search(r"\bdiv\.(full|approx)|\brcp\.", made.assembly)


@pytest.mark.parametrize("target", compile_gate.TARGETS)
@pytest.mark.parametrize("dtype", TYPE, ids=str)
@pytest.mark.parametrize("n", [True, False], ids=["n", "no n"])
def test_pair_ranges(n, dtype, target):
    constants = {"BLOCK": BLOCK} if n else {"BLOCK": BLOCK, "n": None}
    made = compiled_over_pairs(pair_ranges_kernel, dtype, target, constants)
    assert made.registers <= MOST_REGISTERS or dtype == torch.float64
    assert made.contracted == 0
    assert_sound(made, dtype)


@pytest.mark.parametrize("target", compile_gate.TARGETS)
@pytest.mark.parametrize("dtype", TYPE, ids=str)
@pytest.mark.parametrize("together", [1, TOGETHER])
def test_channel_ranges(together, dtype, target):
    constants = {"TOGETHER": together, "BLOCK": PLACES // together}
    made = compiled_over_pairs(channel_ranges_kernel, dtype, target, constants)
    assert made.registers <= MOST_REGISTERS or dtype == torch.float64
    assert made.contracted == 0
    assert_sound(made, dtype)


@pytest.mark.parametrize("target", compile_gate.CUDA_TARGETS)
def test_the_machine_code_has_what_ptx_says(target):
    """The other gates read PTX."""
    of_ranges = compiled_over_pairs(pair_ranges_kernel, torch.float32, target, {"BLOCK": BLOCK})
    for made in (compiled_histogram(torch.float32, target, 512 + 64), of_ranges):
        sass = made.machine_code()
        assert sass.count("LDG") > sass.wide_loads == sass.wide_stores == sass.double_precision == 0


@pytest.mark.parametrize("target", compile_gate.TARGETS)
def test_strides_beyond_32_bits(target):
    """The one variant that follows from the value of an argument."""
    wide = dict.fromkeys(("stride_n", "stride_c", "stride_h", "stride_w"), "i64")
    assert compiled_histogram(torch.float32, target, 512 + 64, wide).spills == 0
    of_channels = {"TOGETHER": TOGETHER, "BLOCK": PLACES // TOGETHER}
    for kernel, constants in ((pair_ranges_kernel, {"BLOCK": BLOCK}), (channel_ranges_kernel, of_channels)):
        assert compiled_over_pairs(kernel, torch.float32, target, constants, wide).spills == 0


@pytest.mark.parametrize(
    "kernel", [joint_histogram_kernel, pair_ranges_kernel, channel_ranges_kernel], ids=lambda kernel: kernel.__name__
)
def test_a_launch_makes_no_other_variants(kernel):
    """Triton compiles anew for a number that is 1 or a multiple of 16, and for such an address.

    Strides and padding often are such numbers.
    """
    given = {p.name for p in kernel.params if not p.is_constexpr}
    pointers = {name for name in given if name in ("x", "ranges", "ends", *POINTERS)}
    assert {p.name for p in kernel.params if p.do_not_specialize_on_alignment} >= pointers
    assert {p.name for p in kernel.params if p.do_not_specialize} >= given - pointers
    assert len(HISTOGRAM_VARIANTS) <= 16


def test_a_private_table_holds_all_cells():
    for bins in range(1, 100):
        cells = private_cells(bins)
        assert cells >= bins**2 or (cells == 0 and bins > 32)
        assert cells in (0, FIRST.value) or FIRST.value % (cells - FIRST.value) == 0
