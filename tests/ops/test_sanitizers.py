"""Run the C++ under sanitizers.

AddressSanitizer and UBSan find no wild read or write and no undefined arithmetic in the kernel tests. ThreadSanitizer
finds no data race in the torch-free loops (tests/support/race_driver.cpp).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

import builds
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
LEVEL = "-Og"  # -O3 takes 4.5 times as long to compile with the sanitizers, -O1 twice, and neither is faster to run
# -Og makes no vectors, so the loops of all instruction sets would be the same code, and take three times as long.
ONE_SET = "-DGRADREP_X86_TARGETS=0"

# These tests reach every loop and every form of M at the sizes that break things, and take under a minute.
SELECTED = {
    "ops/test_rep_sgd_step.py": (
        "(references_bits and (float32 or bfloat16) and (repopt or dense or per_input))"
        " or test_unscaling or zeros_infinities"
    ),
    "ops/test_rep_adamw_step.py": (
        "(references_bits and (float32 or bfloat16) and (repopt or dense or per_input)) or large_kernels"
        " or before_and_after or norm_of_a_planned"
    ),
    "ops/test_step_tail.py": (
        "(references_bits and not scaled and (float32 or float16) and (repopt or dense or per_input))"
        " or (planned_steps_clip and not float64) or parts_of_a_parameter or unaligned or scaled_gradients"
    ),
    "ops/test_rep_grad_norm.py": "test_kernel_agrees_with_the_reference and float32 and (repopt or dense or per_input)",
    "optim/test_contract_memory.py": "sgd-auto and (memory_has_moved or share_memory or bumps_the_version)",  # the plan
    "optim/test_contract_amp.py": "sgd-auto and (bumps_the_version or lazy_clone)",
    "ops/test_cpp_joint_histogram.py": "not test_drawn_cases",  # pair_ranges too; the named cases take 14 s
}


def runtime(name: str) -> str | None:
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        return None
    path = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return path if os.path.isabs(path) else None


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> Path:
    """A copy of the checkout whose compiled module has the sanitizers in it."""
    copy = tmp_path_factory.mktemp("sanitized") / "gradrep_kernels"
    shutil.copytree(
        ROOT,
        copy,
        ignore=shutil.ignore_patterns("*.so", "__pycache__", ".git", ".venv", "build", "*.egg-info", "runs", "bench"),
    )
    # Scratch arrays are vectors, and a task may find one larger than it needs. With this define, libstdc++ marks the
    # rest as out of bounds.
    flags = f"{FLAGS} {ONE_SET} -D_GLIBCXX_SANITIZE_VECTOR -g1"

    def build(folder: Path) -> None:
        env = {**os.environ, "GRADREP_BUILD": "require", "GRADREP_CUDA": "0", "CFLAGS": flags, "LDFLAGS": FLAGS}
        env["CXX"] = builds.compiler_with(copy, LEVEL)
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        built = subprocess.run(command, env=env, cwd=copy, capture_output=True, text=True)
        assert built.returncode == 0, built.stdout + built.stderr
        for module in copy.glob("gradrep_kernels/*.so"):
            module.rename(folder / module.name)

    compiler = builds.version(builds.cpp_compiler())
    inputs = [
        flags,
        LEVEL,
        sys.version,
        torch.__version__,
        *compiler,
        ROOT / "setup.py",
        *builds.sources("*.cpp", "*.h"),
    ]
    for module in builds.kept("sanitized", inputs, build).glob("*.so"):
        shutil.copy(module, copy / "gradrep_kernels")
    return copy


@pytest.fixture(scope="module")
def run_of_all(sanitized, tmp_path_factory) -> tuple[subprocess.CompletedProcess, dict[str, list[str]]]:
    """Run one pytest for all files, since each takes 5 s to start.

    The second result maps a file to one text per test: failure, error, skipped, or nothing where it passed.
    """
    env = {
        **os.environ,
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        # Python itself leaks. A report names the place of the error; the stacks of all allocations would take 8 s.
        "ASAN_OPTIONS": "detect_leaks=0:malloc_context_size=1",
        "PYTHONPATH": str(sanitized),
        "GRADREP_BACKEND": "",
        "OMP_NUM_THREADS": "2",
    }
    junit = tmp_path_factory.mktemp("outcomes") / "junit.xml"
    chosen = " or ".join(f"({Path(file).name} and ({tests}))" for file, tests in SELECTED.items())
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", f"--junitxml={junit}"]
    command += [*(f"tests/{file}" for file in SELECTED), "-k", f"({chosen}) and not cuda", "-x"]
    done = subprocess.run(command, env=env, cwd=sanitized, capture_output=True, text=True, timeout=1200)
    outcomes = defaultdict(list)
    for case in ET.parse(junit).iter("testcase") if junit.exists() else ():
        file = case.get("classname").removeprefix("tests.").replace(".", "/") + ".py"
        outcomes[file].append(" ".join(child.tag for child in case if child.tag in ("failure", "error", "skipped")))
    return done, outcomes


@pytest.mark.skipif(runtime("libasan.so") is None, reason="no g++ with AddressSanitizer on this machine")
@pytest.mark.parametrize("file", SELECTED)
def test_kernels_under_sanitizers(run_of_all, file):
    done, outcomes = run_of_all
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert outcomes.keys() == SELECTED.keys()
    assert set(outcomes[file]) == {""}  # none was skipped


@pytest.mark.skipif(runtime("libtsan.so") is None, reason="no g++ with ThreadSanitizer on this machine")
def test_loops_over_pairs_under_thread_sanitizer():
    flags = ["-std=c++20", LEVEL, "-g1", "-fsanitize=thread", "-pthread", ONE_SET, f"-I{ROOT / 'csrc'}"]
    driver = builds.program("race_driver", flags)
    done = subprocess.run([driver], capture_output=True, text=True, timeout=300)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer cannot run under this kernel's address space layout (vm.mmap_rnd_bits)")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
