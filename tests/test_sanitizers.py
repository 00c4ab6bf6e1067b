"""AddressSanitizer and UBSan builds of the C++ pass the kernel tests: no wild read or write, no undefined arithmetic."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"

# What covers every loop and every form of M at the sizes that break things, and takes under a minute.
SELECTED = {
    "test_rep_sgd_step.py": "(references_bits and (float32 or bfloat16) and (repopt or dense or per_input)) or test_unscaling or zeros_infinities",
    "test_rep_grad_norm.py": "test_kernel_agrees_with_the_reference and float32 and (repopt or dense or per_input)",
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
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__", ".git", ".venv", "build", "*.egg-info", "runs", "bench"))
    # The run-time choice of machine code resolves before the sanitizer is ready.
    env = {**os.environ, "GRADREP_BUILD": "require", "GRADREP_CUDA": "0", "CFLAGS": f"{FLAGS} -DGRADREP_NO_CLONES -g1 -O1", "LDFLAGS": FLAGS}
    built = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], env=env, cwd=copy, capture_output=True, text=True)
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
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"tests/{file}", "-k", f"({SELECTED[file]}) and not cuda", "-x"]
    done = subprocess.run(command, env=env, cwd=sanitized, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
