"""Run a file of tests in Triton's interpreter: TRITON_INTERPRET must be set before Triton is imported, so in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(file: str) -> None:
    """Fail with the output of `pytest tests/ops/<file>` where that fails, or where it ran nothing."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "GRADREP_BACKEND": "auto"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore:invalid value:RuntimeWarning",
        str(ROOT / "tests" / "ops" / file),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}", pytrace=False)
