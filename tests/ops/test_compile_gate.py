"""The Triton kernels over parameters, compiled for four GPUs: accesses, registers, spills, precision.

No GPU is needed.
"""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import compile_gate
import triton.language as tl
from gate_variants import TYPE, compiled_over_parameters, compiled_step

from gradrep_kernels.ops.triton import INTERPRETED, addressing, plans
from gradrep_kernels.ops.triton.addressing import POINTERS
from gradrep_kernels.ops.triton.rep_grad_norm import SUMS, finish_kernel, rep_grad_norm_kernel
from gradrep_kernels.ops.triton.rep_sgd_step import rep_sgd_step_kernel
from gradrep_kernels.ops.triton.scale_gradients import scale_gradients_kernel
from gradrep_kernels.ops.triton.step_frame import NUMBERS, TENSORS
from gradrep_kernels.ops.triton.step_tail import tail_kernel

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
    given = [name for name, there in zip(("grad_scale", "found_inf"), variant[1:]) if there]
    made = compiled_step(rep_sgd_step_kernel, dtype, target, given)
    assert made.wide_loads >= 3 * accesses(dtype, target)  # parameter, gradient, buffer
    assert made.wide_stores >= (3 if unscales else 2) * accesses(dtype, target)
    assert made.claims_of_alignment() == [True] * 3  # once for each tensor, and not on the path of unaligned ones
    assert made.spills == 0
    assert made.registers <= MOST_REGISTERS
    assert made.shared == 0
    assert (made.double_precision > 0) == (dtype == torch.float64)
    if not (unscales and target == "gfx942"):  # a division is made of fused steps there; in PTX it is one instruction
        assert made.contracted == 0


EVERYTHING = ("grad_scale", "found_inf", "clip", "tail")
TAILS = {  # name -> what is given, whether there are averages, whether the state is bfloat16
    "average": ((), True, 0),
    "narrow": ((), False, 1),
    "everything": (EVERYTHING, True, 1),
}
TAIL_VARIANTS = [(torch.float32, name) for name in TAILS] + [(torch.bfloat16, "narrow")]
TAIL_VARIANTS += [(dtype, "everything") for dtype in (torch.bfloat16, torch.float16, torch.float64)]


@pytest.mark.parametrize("target", compile_gate.TARGETS)
@pytest.mark.parametrize(("dtype", "name"), TAIL_VARIANTS, ids=str)
def test_the_tail_of_a_step(dtype, name, target):
    """The widest tensors have accesses of 128 bits, the others as many elements at a time, and nothing is exchanged."""
    given, averaged, narrow = TAILS[name]
    made = compiled_step(rep_sgd_step_kernel, dtype, target, given, averaged, narrow)
    lanes = compile_gate.TARGETS[target].warp_size
    threads = plans.options(dtype, lanes, AVERAGED=averaged, NARROW=narrow)["num_warps"] * lanes
    wide = plans.COMPUTE[dtype].itemsize
    sizes = [dtype.itemsize] * 2 + [2 if narrow else dtype.itemsize] + [wide] * averaged  # of elements
    each = plans.BLOCK[dtype] * max(sizes) // (threads * 16)
    assert made.wide_loads >= sizes.count(max(sizes)) * each
    stored = sizes if "grad_scale" in given else sizes[1:]
    assert made.wide_stores >= stored.count(max(sizes)) * each
    assert made.claims_of_alignment() == [True] * len(sizes)
    assert made.spills == 0
    # A double of every number takes two registers. Three blocks of 256 threads fit then, not four.
    assert made.registers <= (80 if dtype == torch.float64 and narrow else MOST_REGISTERS)
    assert made.shared == 0
    assert (made.double_precision > 0) == (dtype == torch.float64)
    if not ("grad_scale" in given and target == "gfx942"):
        assert made.contracted == 0


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_neighbours_share_the_counter_of_their_random_bits(target):
    """A thread's run of 8 elements has one counter. Those of the loop over the rest, 2 of them, have one each."""
    made = [compiled_step(rep_sgd_step_kernel, torch.bfloat16, target, narrow=narrow) for narrow in (0, 1)]
    plain, narrow = (one.count(r"mul\.(hi|wide)\.u32|[sv]_mul_hi_u32|v_mad_u64_u32") for one in made)
    assert 7 <= narrow - plain <= 3 * 7 * 2


@pytest.mark.parametrize("target", compile_gate.TARGETS)
@pytest.mark.parametrize("dtype", plans.COMPUTE, ids=str)
def test_rep_grad_norm(dtype, target):
    types, constants = (
        {"partial": TYPE[plans.COMPUTE[dtype]]},
        {"WIDTH": POINTERS.value, "FACTOR": addressing.multiplier},
    )
    made = compiled_over_parameters(rep_grad_norm_kernel, dtype, target, types, constants)
    assert made.wide_loads >= accesses(dtype, target)
    assert made.claims_of_alignment() == [True]
    assert made.spills == 0
    assert made.registers <= MOST_REGISTERS
    assert (made.double_precision > 0) == (dtype == torch.float64)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", plans.COMPUTE, ids=str)
def test_scale_gradients(dtype, target):
    types = {"factor": TYPE[plans.COMPUTE[dtype]]}
    made = compiled_over_parameters(scale_gradients_kernel, dtype, target, types, {})
    assert min(made.wide_loads, made.wide_stores) >= accesses(dtype, target)
    assert made.claims_of_alignment() == [True]
    assert made.spills == 0
    assert made.registers <= MOST_REGISTERS
    assert (made.double_precision > 0) == (dtype == torch.float64)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_the_sums_of_a_norm_are_finished_in_double_precision(target):
    types = {"partial": "*fp32", "count": "i32", "grad_scale": "*fp32", "norm": "*fp32", "factor": "*fp32"}
    made = compile_gate.compile_variant(
        finish_kernel, {**types, "most": "i64"}, {"BLOCK": SUMS}, target, num_warps=8, enable_fp_fusion=False
    )
    assert made.count(r"sqrt\.rn\.f64|v_sqrt_f64|v_rsq_f64")
    assert made.spills == 0


def test_numbers_of_the_tail_on_the_device():
    types = {"tail": "*fp64", "result": "*i64"}
    for dtype in (tl.float32, tl.float64):
        made = compile_gate.compile_variant(tail_kernel, types, {"compute": dtype}, "sm_90", enable_fp_fusion=False)
        assert made.count(r"cvt\.rn\.f32\.f64") == (dtype == tl.float32)


@pytest.mark.parametrize("target", compile_gate.CUDA_TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_machine_code_has_what_ptx_says(dtype, target):
    """The other gates read PTX.

    The assembler could split accesses, join them, or compute in another precision.
    """
    made = compiled_step(rep_sgd_step_kernel, dtype, target, ("grad_scale", "found_inf"))
    sass = made.machine_code()
    assert sass.count("LDG") > sass.wide_loads == made.wide_loads
    assert sass.count("STG") > sass.wide_stores == made.wide_stores
    assert (sass.double_precision > 0) == (dtype == torch.float64)


OVER_PARAMETERS = [rep_sgd_step_kernel, rep_grad_norm_kernel, scale_gradients_kernel, finish_kernel]


@pytest.mark.parametrize("kernel", OVER_PARAMETERS, ids=lambda kernel: kernel.__name__)
def test_a_launch_makes_no_other_variants(kernel):
    """Triton compiles anew for pointers that are a multiple of 16: found_inf, a view, often is not.

    So it does for numbers that are 1 or a multiple of 16, and for those above 2³¹, as counts of steps and seeds are.
    """
    numbers = {p.name for p in kernel.params if p.do_not_specialize}
    tensors = {p.name for p in kernel.params if not p.is_constexpr} - numbers
    assert {p.name for p in kernel.params if p.do_not_specialize_on_alignment} == tensors
    if kernel is rep_sgd_step_kernel:
        assert (tensors, numbers) == (set(TENSORS), set(NUMBERS))
        assert {p.name for p in kernel.params if p.annotation_type == "i64"} == numbers


CONSTANTS = {
    rep_sgd_step_kernel: {"GEOMETRY", "NUMEL", "PARAM", "STATE", "STATES", "COLUMNS", "TAIL", "OCTET", "ROUNDS"},
    rep_grad_norm_kernel: {"GEOMETRY", "NUMEL", "TAIL", "CHUNK"},
    scale_gradients_kernel: {"GEOMETRY", "NUMEL", "POINTERS", "TAIL", "CHUNK"},
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
