"""The CUDA C++ compiled for three GPUs as the build compiles it: registers, spills, atomics, precision.

No GPU is needed.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig

import pytest
import torch
from torch.utils import cpp_extension

pytest.importorskip("triton", reason="Triton is not installed: it brings cuobjdump")

import compile_gate

from gradrep_kernels.ops.registry import OPS

TARGETS = compile_gate.CUDA_TARGETS
DTYPES = {"float32": "f", "float64": "d", "bfloat16": "NS_8BFloat16E", "float16": "NS_4HalfE"}
WORDS = {"float32": "128", "bfloat16": "64", "float16": "64"}  # bits of four pixels
RESERVED = {"sm_80": 0, "sm_90": 1024, "sm_100": 1024}  # bytes of shared memory that each block of any kernel has there
MOST_REGISTERS = 64  # four blocks of 256 threads per multiprocessor; nobody trains in float64

pytestmark = pytest.mark.skipif(compile_gate.setup_py().nvcc() is None, reason="nvcc is not found")


@pytest.fixture(scope="session")
def built():
    """The objects, and what nvcc made of each kernel."""
    return compile_gate.built_cuda()


@pytest.fixture(scope="session")
def compiled(built):
    def find(kernel: str, dtype: str, target: str, constant: str = "") -> compile_gate.Compiled:
        (found,) = (
            made
            for (name, of), made in built[1].items()
            if of == target and f"{kernel}I{constant}{DTYPES[dtype]}E" in name
        )
        return found

    return find


def assert_sound(made: compile_gate.Compiled, dtype: str) -> None:
    assert made.spills == 0
    assert made.registers <= MOST_REGISTERS or dtype == "float64"
    assert (made.double_precision > 0) == (dtype == "float64")
    assert made.contracted == 0
    assert ".ftz" not in made.assembly
    assert not re.search(r"\bdiv\.(full|approx)|\brcp\.", made.assembly)
    assert made.shared == RESERVED[made.target]  # what else a block has is asked for at the launch
    assert not made.count(r"(LD|ST)\.")  # the compiler knows which accesses are to shared memory


def counting(tiles: str, pitch: int = 0, private_tables: bool = True) -> str:
    """A kernel's `Counting` in its mangled name."""
    number = ("none", "numbers", "pixels").index(tiles)
    return f"NS_8CountingILNS_5TilesE{number}ELi{pitch}ELb{private_tables:d}EEE"


PITCHES = (25, 35, 0)  # of the tables; 0: known at run time
# Most instructions for a word of four pixels: of all four displacements of 3x3, of any four, of any one.
A_WORD = {25: (60, 78, 30), 35: (60, 78, 30), 0: (90, 32)}
FOUR_PAIRS_OF_PIXELS = 102  # with remove_near, one displacement
EIGHT_PIXELS = 80  # from the map into a tile of bin numbers, where four lie together


def assert_counts_in_shared_memory(made: compile_gate.Compiled) -> None:
    assert made.count(r"ATOMS\.POPC\.INC") > 0  # which counts the threads that want one address
    assert not made.count(r"ATOMS\.(ADD|CAS)|ATOM\.")
    assert made.count(r"REDG?\.E\.ADD\.64") > 0  # tables into the result
    assert len(re.findall(r"\bdiv\.rn\.f", made.assembly)) > 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pitch", PITCHES)
def test_joint_histogram_from_tiles_of_numbers(compiled, dtype, target, pitch):
    made = compiled("joint_histogram_kernel", dtype, target, counting("numbers", pitch))
    assert_sound(made, dtype)
    assert_counts_in_shared_memory(made)
    for found, most in zip(made.lengths(ATOMS=16) + made.lengths(ATOMS=4, LDS=3), A_WORD[pitch], strict=True):
        assert found <= most
    assert dtype == "float64" or made.count(rf"LDG\.E\.{WORDS[dtype]}\b") == 2
    if dtype == "float32":
        assert made.lengths(LDG=2, STS=8)[0] <= EIGHT_PIXELS


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_joint_histogram_from_tiles_of_pixels(compiled, dtype, target):
    made = compiled("joint_histogram_kernel", dtype, target, counting("pixels"))
    assert_sound(made, dtype)
    assert_counts_in_shared_memory(made)
    (found,) = made.lengths(ATOMS=4, LDS=8)
    assert found <= FOUR_PAIRS_OF_PIXELS or dtype == "float64"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_joint_histogram_pair_by_pair(compiled, dtype, target):
    made = compiled("joint_histogram_kernel", dtype, target, counting("none"))
    assert_sound(made, dtype)
    assert_counts_in_shared_memory(made)
    made = compiled("joint_histogram_kernel", dtype, target, counting("none", private_tables=False))
    assert_sound(made, dtype)
    assert made.count(r"REDG?\.E\.ADD\.64") > 0
    assert not made.count(r"ATOM\.|ATOMG")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pair_ranges(compiled, dtype, target):
    for kernel in ("channel_ranges_kernel", "image_extrema_kernel", "pair_ranges_kernel"):
        made = compiled(kernel, dtype, target)
        assert_sound(made, dtype)
        assert dtype == "float64" or not made.count(r"ATOMS\.CAS")  # 64-bit atomics in shared memory are loops
        if kernel != "image_extrema_kernel":  # the result rises by one operation, which answers nothing
            assert made.count(r"REDG?\.E\.(MAX|MIN)") >= 2
            assert not made.count(r"ATOM\.|ATOMG")
    # Many images are on their way at once, and eight blocks of 256 threads on a multiprocessor.
    streaming = compiled("channel_ranges_kernel", dtype, target)
    assert streaming.registers <= 32
    assert streaming.count(r"LDG") >= 8
    if dtype in ("float32", "float64"):
        assert_sound(compiled("ends_to_ranges_kernel", dtype, target), dtype)
        assert compiled("set_numbers_kernel", dtype, target).spills == 0


# What a CUDA build of torch would have.
STAND_IN = """
extern "C" {
int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }
int torch_c10_cuda_check_msg(int, const char*, const char*, unsigned, bool, char**) { return 1; }
void torch_c10_cuda_free_error_msg(char*) {}
}
"""

LOAD = """
import importlib.util, sys, torch, gradrep_kernels
from gradrep_kernels.ops.registry import OPS
spec = importlib.util.spec_from_file_location("gradrep_kernels._C_cuda", sys.argv[1])
importlib.util.module_from_spec(spec)
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(*(op for op in OPS if has("gradrep_kernels::" + op, "CUDA")))
"""


@pytest.mark.skipif(torch.version.cuda is not None, reason="the module itself loads where torch is a CUDA build")
def test_the_module_loads_and_registers(built, tmp_path):
    """With a CPU build of torch, and three functions of a CUDA build made up: nothing else is missing."""
    (tmp_path / "stand_in.cpp").write_text(STAND_IN)
    setup_py, module = compile_gate.setup_py(), tmp_path / "_C_cuda.abi3.so"
    folders = [
        f"-{flag}{folder}"
        for folder in (*setup_py.cuda_library_folders(), *cpp_extension.library_paths())
        for flag in ("L", "Wl,-rpath,")
    ]
    sources = [compile_gate.ROOT / "csrc" / "module.cpp", tmp_path / "stand_in.cpp", *built[0]]
    flags = ["-shared", "-fPIC", "-DTORCH_EXTENSION_NAME=_C_cuda", f"-I{sysconfig.get_path('include')}", *folders]
    libraries = ["-lcudart", "-ltorch", "-ltorch_cpu", "-lc10"]
    linked = subprocess.run(["g++", *flags, *sources, *libraries, "-o", module], capture_output=True, text=True)
    assert linked.returncode == 0, linked.stderr
    loaded = subprocess.run([sys.executable, "-c", LOAD, module], cwd=compile_gate.ROOT, capture_output=True, text=True)
    assert loaded.stdout.split() == list(OPS), loaded.stderr
