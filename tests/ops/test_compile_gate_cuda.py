"""The CUDA C++ compiled for three GPUs as the build compiles it: registers, spills, atomics, precision.

No GPU is needed.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

pytest.importorskip("triton", reason="Triton is not installed: it brings cuobjdump")

import builds
import compile_gate

TARGETS = ("sm_80", "sm_90", "sm_100")
DTYPES = {"float32": "f", "float64": "d", "bfloat16": "NS_8BFloat16E", "float16": "NS_4HalfE"}
WORDS = {"float32": "128", "bfloat16": "64", "float16": "64"}  # bits of four pixels
RESERVED = {"sm_80": 0, "sm_90": 1024, "sm_100": 1024}  # bytes of shared memory that each block of any kernel has there
MOST_REGISTERS = 64  # four blocks of 256 threads per multiprocessor; nobody trains in float64

pytestmark = pytest.mark.skipif(compile_gate.setup_py().nvcc() is None, reason="nvcc is not found")


@pytest.fixture(scope="session")
def built():
    """The objects, and what nvcc made of each kernel."""

    def build(folder):
        objects, found = compile_gate.compile_cuda(folder, TARGETS)
        (folder / "found.pickle").write_bytes(pickle.dumps(([Path(made).name for made in objects], found)))

    setup_py = compile_gate.setup_py()
    inputs = [*builds.version(setup_py.nvcc(), shutil.which(os.environ.get("CXX") or "c++")), torch.__version__]
    inputs += [*TARGETS, builds.ROOT / "setup.py", Path(compile_gate.__file__), *builds.sources("*.cu", "*.h")]
    folder = builds.kept("cuda", inputs, build)
    names, found = pickle.loads((folder / "found.pickle").read_bytes())
    return [folder / name for name in names], found


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


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_joint_histogram_in_private_tables(compiled, dtype, target):
    made = compiled("joint_histogram_kernel", dtype, target, "Lb1E")
    assert_sound(made, dtype)
    assert (
        made.count(r"ATOMS\.POPC\.INC") >= 4 + 1
    )  # of four pixels in tiles, of pairs: it counts the threads that want one address
    assert not made.count(r"ATOMS\.(ADD|CAS)|ATOM\.")
    assert made.count(r"REDG?\.E\.ADD\.64") > 0  # tables into the result
    assert dtype == "float64" or made.count(rf"LDG\.E\.{WORDS[dtype]}\b") > 0
    assert len(re.findall(r"\bdiv\.rn\.f", made.assembly)) > 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_joint_histogram_without_private_tables(compiled, dtype, target):
    made = compiled("joint_histogram_kernel", dtype, target, "Lb0E")
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
spec = importlib.util.spec_from_file_location("gradrep_kernels._C_cuda", sys.argv[1])
importlib.util.module_from_spec(spec)
for op in ("pair_ranges", "pair_ranges_", "joint_histogram", "joint_histogram_", "rep_sgd_step"):
    print(op, torch._C._dispatch_has_kernel_for_dispatch_key("gradrep_kernels::" + op, "CUDA"))
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
    assert loaded.stdout.split() == [
        "pair_ranges",
        "True",
        "pair_ranges_",
        "True",
        "joint_histogram",
        "True",
        "joint_histogram_",
        "True",
        "rep_sgd_step",
        "False",
    ], loaded.stderr
