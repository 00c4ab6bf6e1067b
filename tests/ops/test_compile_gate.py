"""The Triton kernels over parameters, compiled for four GPUs: accesses, registers, spills, precision.

No GPU is needed.
"""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import compile_gate
from gate_variants import TYPE, compiled_over_parameters

from gradrep_kernels.ops.triton import INTERPRETED, addressing, plans
from gradrep_kernels.ops.triton.rep_grad_norm import rep_grad_norm_kernel
from gradrep_kernels.ops.triton.rep_sgd_step import rep_sgd_step_kernel

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: nothing is compiled")

STEP_VARIANTS = list(
    itertools.product(plans.COMPUTE, (False, True), (False, True))
)  # dtype, grad_scale given, found_inf given
MOST_REGISTERS = 64  # eight blocks of 128 threads per multiprocessor


def names(variant) -> str:
    return "-".join(
        [str(variant[0]).removeprefix("torch.")]
        + [name for name, given in zip(("unscale", "found_inf"), variant[1:]) if given]
    )


def accesses(dtype, target) -> int:
    """128-bit accesses of a thread to one tensor on the full path."""
    lanes = compile_gate.TARGETS[target].warp_size
    return plans.BLOCK[dtype] * dtype.itemsize // (plans.options(dtype, lanes)["num_warps"] * lanes * 16)


@pytest.mark.parametrize("target", compile_gate.TARGETS)
@pytest.mark.parametrize("variant", STEP_VARIANTS, ids=names)
def test_rep_sgd_step(variant, target):
    dtype, unscales, _ = variant
    wide = TYPE[plans.COMPUTE[dtype]]
    constants = {name: None for name, given in zip(("grad_scale", "found_inf"), variant[1:]) if not given}
    made = compiled_over_parameters(
        rep_sgd_step_kernel, dtype, target, {"hyper": wide, "grad_scale": wide, "found_inf": "*fp32"}, constants
    )
    assert made.wide_loads >= 3 * accesses(dtype, target)  # parameter, gradient, buffer
    assert made.wide_stores >= (3 if unscales else 2) * accesses(dtype, target)
    assert made.claims_of_alignment() == [True] * 3  # once for each tensor, and not on the path of unaligned ones
    assert made.spills == 0
    assert made.registers <= MOST_REGISTERS
    assert made.shared == 0
    assert (made.double_precision > 0) == (dtype == torch.float64)
    if not (unscales and target == "gfx942"):  # a division is made of fused steps there; in PTX it is one instruction
        assert made.contracted == 0


@pytest.mark.parametrize("target", compile_gate.TARGETS)
@pytest.mark.parametrize("dtype", plans.COMPUTE, ids=str)
def test_rep_grad_norm(dtype, target):
    made = compiled_over_parameters(rep_grad_norm_kernel, dtype, target, {"partial": TYPE[plans.COMPUTE[dtype]]}, {})
    assert made.wide_loads >= accesses(dtype, target)
    assert made.claims_of_alignment() == [True]
    assert made.spills == 0
    assert made.registers <= MOST_REGISTERS
    assert (made.double_precision > 0) == (dtype == torch.float64)


@pytest.mark.parametrize("target", compile_gate.CUDA_TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_machine_code_has_what_ptx_says(dtype, target):
    """The other gates read PTX.

    The assembler could split accesses, join them, or compute in another precision.
    """
    wide = TYPE[plans.COMPUTE[dtype]]
    made = compiled_over_parameters(
        rep_sgd_step_kernel, dtype, target, {"hyper": wide, "grad_scale": wide, "found_inf": "*fp32"}, {}
    )
    sass = made.machine_code()
    assert sass.count("LDG") > sass.wide_loads == made.wide_loads
    assert sass.count("STG") > sass.wide_stores == made.wide_stores
    assert (sass.double_precision > 0) == (dtype == torch.float64)


@pytest.mark.parametrize("kernel", [rep_sgd_step_kernel, rep_grad_norm_kernel], ids=lambda kernel: kernel.__name__)
def test_a_launch_makes_no_other_variants(kernel):
    """Triton compiles anew for pointers that are a multiple of 16: found_inf, a view, often is not."""
    tensors = {p.name for p in kernel.params if not p.is_constexpr}
    assert {p.name for p in kernel.params if p.do_not_specialize_on_alignment} == tensors
    assert len(STEP_VARIANTS) <= 16


CONSTANTS = {
    rep_sgd_step_kernel: {"GEOMETRY", "NUMEL", "PARAM", "STATE", "STATES", "COLUMNS", "TAIL"},
    rep_grad_norm_kernel: {"GEOMETRY", "NUMEL", "POINTERS", "TAIL", "CHUNK"},
    addressing.multiplier_row: {"ROW", "HAS_SCALE", "TAP_FIRST"},
}


@pytest.mark.parametrize("function", CONSTANTS, ids=lambda function: function.__name__)
def test_constants_are_in_the_key_of_tritons_cache(function):
    """Those read as attributes of a module are not, and a kernel compiled with old ones would be found on disk."""
    assert function.cache_key
    assert {name for name, _ in function.used_global_vals} >= CONSTANTS[function]


def test_figures_of_other_compilers_are_kept():
    """A section takes the place of one of the same minor version."""
    import compiled_figures

    text = compiled_figures.merged("", [("Triton 3.9.0", "a"), ("nvcc 13.0", "b")])
    text = compiled_figures.merged(text, [("Triton 3.6.0", "| c |\n| d |")])
    assert text.endswith("\n## Triton 3.6.0\n\n| c |\n| d |\n\n## Triton 3.9.0\n\na\n\n## nvcc 13.0\n\nb\n")
    again = compiled_figures.merged(text, [("Triton 3.9.1", "e"), ("nvcc 12.8", "f")])
    assert again == text.replace("3.9.0\n\na", "3.9.1\n\ne").replace("nvcc 13.0\n\nb", "nvcc 12.8\n\nf")
