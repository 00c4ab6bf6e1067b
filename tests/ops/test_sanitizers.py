"""Run the C++ under sanitizers.

AddressSanitizer and UBSan find no wild read or write and no undefined arithmetic in the kernel tests. ThreadSanitizer
finds no data race in the torch-free loops (tests/support/race_driver.cpp).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
# -O1 makes no vectors, so the loops of the other instruction sets would be the same code at three times the cost.
ONE_SET = "-DGRADREP_X86_TARGETS=0"

# These tests reach every loop and every form of M at the sizes that break things, and take under a minute.
SELECTED = {
    "ops/test_rep_sgd_step.py": (
        "(references_bits and (float32 or bfloat16) and (repopt or dense or per_input))"
        " or test_unscaling or zeros_infinities"
    ),
    "ops/test_rep_grad_norm.py": "test_kernel_agrees_with_the_reference and float32 and (repopt or dense or per_input)",
    # The cached plan.
    "optim/test_optim_contract.py": "auto and (memory_has_moved or share_memory or bumps_the_version or lazy_clone)",
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
    copy = tmp_path_factory.mktemp("sanitized") / "gradrep_kernels"
    shutil.copytree(
        ROOT,
        copy,
        ignore=shutil.ignore_patterns("*.so", "__pycache__", ".git", ".venv", "build", "*.egg-info", "runs", "bench"),
    )
    # Scratch arrays are vectors, and a task may find one larger than it needs. With this define, libstdc++ marks the
    # rest as out of bounds.
    flags = f"{FLAGS} {ONE_SET} -D_GLIBCXX_SANITIZE_VECTOR -g1 -O1"
    env = {**os.environ, "GRADREP_BUILD": "require", "GRADREP_CUDA": "0", "CFLAGS": flags, "LDFLAGS": FLAGS}
    built = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], env=env, cwd=copy, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return copy


@pytest.mark.skipif(runtime("libasan.so") is None, reason="no g++ with AddressSanitizer on this machine")
@pytest.mark.parametrize("file", SELECTED)
def test_kernels_under_sanitizers(sanitized, file):
    env = {
        **os.environ,
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaks
        "PYTHONPATH": str(sanitized),
        "GRADREP_BACKEND": "",
        "OMP_NUM_THREADS": "2",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        f"tests/{file}",
        "-k",
        f"({SELECTED[file]}) and not cuda",
        "-x",
    ]
    done = subprocess.run(command, env=env, cwd=sanitized, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.skipif(runtime("libtsan.so") is None, reason="no g++ with ThreadSanitizer on this machine")
def test_loops_over_pairs_under_thread_sanitizer(tmp_path):
    driver = tmp_path / "race_driver"
    flags = ["-std=c++20", "-O1", "-g1", "-fsanitize=thread", "-pthread", ONE_SET, f"-I{ROOT / 'csrc'}"]
    built = subprocess.run(
        ["g++", *flags, ROOT / "tests" / "support" / "race_driver.cpp", "-o", driver], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    done = subprocess.run([driver], capture_output=True, text=True, timeout=300)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer cannot run under this kernel's address space layout (vm.mmap_rnd_bits)")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
