"""The CUDA C++ over parameters compiled for three GPUs as the build compiles it. No GPU is needed.

Registers, spills, 128-bit accesses, precision, instructions.
"""

from __future__ import annotations

import re
from collections import Counter

import pytest

pytest.importorskip("triton", reason="Triton is not installed: it brings cuobjdump")

import compile_gate

TARGETS = compile_gate.CUDA_TARGETS
DTYPES = {"float32": "f", "float64": "d", "bfloat16": "NS_8BFloat16E", "float16": "NS_4HalfE"}
MOST_REGISTERS = 64  # four blocks of 256 threads per multiprocessor
RESERVED = {"sm_80": 0, "sm_90": 1024, "sm_100": 1024}  # bytes of shared memory that each block of any kernel has there
MOST_PARAMETERS = 32764
KINDS = ("kNone", "kWide", "kNarrow")  # TailKind of csrc/step_cuda.h
# SASS, all ways through the kernel together. In a launch's loop one way is 25 to 101 for an element (step_cuda.h).
MOST_INSTRUCTIONS = {"kNone": 1000, "kWide": 1100, "kNarrow": 1400}

pytestmark = pytest.mark.skipif(compile_gate.setup_py().nvcc() is None, reason="nvcc is not found")


def compiled(kernel: str, target: str) -> compile_gate.Compiled:
    """The one kernel whose mangled name this is a part of."""
    (found,) = (made for (name, of), made in compile_gate.built_cuda()[1].items() if of == target and kernel in name)
    return found


def step(dtype: str, kind: str, target: str, update: str = "9SgdUpdate") -> compile_gate.Compiled:
    return compiled(f"step_kernelINS_{update}E{DTYPES[dtype]}LNS_8TailKindE{KINDS.index(kind)}E", target)


def assert_sound(made: compile_gate.Compiled, dtype: str, most_registers: int = MOST_REGISTERS) -> None:
    assert made.spills == 0
    assert made.registers <= most_registers
    assert (made.double_precision > 0) == (dtype == "float64")
    assert made.contracted == 0
    assert ".ftz" not in made.assembly
    assert not re.search(r"\bdiv\.(full|approx)|\brcp\.", made.assembly)
    assert not made.count(r"(LD|ST)\.|LDL|STL|ATOM|RED")  # no memory but the tensors', read by its own kind of access
    (parameters,) = re.findall(r"\.param \.align \d+ \.b8 \w+\[(\d+)\]", made.assembly)
    assert int(parameters) <= MOST_PARAMETERS


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_step(dtype, kind, target):
    made = step(dtype, kind, target)
    assert_sound(made, dtype)
    assert made.shared == 0 or made.shared == RESERVED[target]
    assert sum(made.instructions.values()) <= MOST_INSTRUCTIONS[kind]
    # Parameter, gradient, buffer, average: read and written once where all are aligned, each element alone elsewhere.
    # What is stored in 16 bits has an average in 32, so two accesses. A buffer in bfloat16 has as many elements as the
    # parameter's 16 bytes.
    size = {"float32": 4, "float64": 8}.get(dtype, 2)
    of_state = 2 if kind == "kNarrow" else size
    accesses = Counter({16: 2, size: 2})
    accesses[16 // size * of_state] += 1
    accesses[of_state] += 1
    if kind != "kNone":
        accesses[16] += 1 if size >= 4 else 2
        accesses[max(size, 4)] += 1
    stores = {16: r"STG\.E\.128$", 8: r"STG\.E\.64$", 4: r"STG\.E$", 2: r"STG\.E\.U16$"}
    assert {n: made.count(pattern) for n, pattern in stores.items()} == {n: accesses[n] for n in stores}
    assert (made.wide_loads, made.count("STG")) == (accesses[16], accesses.total())


# Three states and the layers of factors are alive at once. Two blocks of 256 threads fit a multiprocessor, in float32
# three: 74 to 76 registers without random bits.
MOST_REGISTERS_OF_ADAMW = {"float32": 80, "float64": 108, "bfloat16": 90, "float16": 90}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_step_of_adamw(dtype, kind, target):
    made = step(dtype, kind, target, "11AdamwUpdate")
    assert_sound(made, dtype, 128 if kind == "kNarrow" else MOST_REGISTERS_OF_ADAMW[dtype])
    assert made.shared == 0 or made.shared == RESERVED[target]
    assert sum(made.instructions.values()) <= 4600  # four variants; of divisions and roots most is for denormals
    size = {"float32": 4, "float64": 8}.get(dtype, 2)
    of_state = 2 if kind == "kNarrow" else size
    accesses = Counter({16: 2, size: 2})
    accesses[16 // size * of_state] += 3
    accesses[of_state] += 3
    if kind != "kNone":
        accesses[16] += 1 if size >= 4 else 2
        accesses[max(size, 4)] += 1
    assert (made.wide_loads, made.count("STG")) == (accesses[16], accesses.total())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_norm(dtype, target):
    made = compiled(f"grad_norm_kernelI{DTYPES[dtype]}E", target)
    assert_sound(made, dtype)
    assert made.shared == RESERVED[target] + 256 * (8 if dtype == "float64" else 4)
    assert (made.wide_loads, made.wide_stores) == (1, 0)
    assert made.count("STG") == 1


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_that_are_scaled(dtype, target):
    made = compiled(f"scale_gradients_kernelI{DTYPES[dtype]}E", target)
    assert_sound(made, dtype)
    assert made.wide_loads == made.wide_stores > 0  # several where the loop is unrolled
    assert made.count("STG") > made.wide_stores


@pytest.mark.parametrize("target", TARGETS)
def test_the_small_kernels(target):
    """They compute in float64 where the op does, and are one launch of one block."""
    for kernel in ("norm_root_kernel", "pack_hyper_kernelINS_9SgdUpdateE", "pack_hyper_kernelINS_11AdamwUpdateE"):
        made = compiled(kernel, target)
        assert made.spills == 0
        assert made.contracted == 0
