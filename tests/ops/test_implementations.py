"""What the tests of kernels run on, and how those that need a GPU are told from the others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import implementations

TESTS = Path(__file__).resolve().parents[1]
COLLECT = """
import re
import sys

import pytest


class Judge:
    def pytest_collection_finish(self, session):
        for item in session.items:
            reasons = [m.kwargs["reason"] for m in item.iter_markers() if m.name == "skip" or (m.name == "skipif" and m.args[0])]
            if any(re.search("(needs|sees).*GPU|not a CUDA build", reason) for reason in reasons):
                print("marked" if item.get_closest_marker("gpu") else "unmarked", item.nodeid)


sys.exit(pytest.main(["--collect-only", "-p", "no:cacheprovider", sys.argv[1]], plugins=[Judge()]))
"""


def test_what_needs_a_gpu_is_marked_so():
    """Every test that is skipped where there is none; `-m gpu` must find it whatever its name."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, str(TESTS)],
        cwd=TESTS.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {
        state: [line.split(" ", 1)[1] for line in done.stdout.splitlines() if line.startswith(f"{state} ")]
        for state in ("marked", "unmarked")
    }
    assert not found["unmarked"]
    for name in (
        "test_one_kernel_for_all_parameters_and_groups",
        "test_models_on_two_kinds_of_device",
        "test_many_pixels",
        "test_layouts",
    ):
        assert any(f"::{name}" in test for test in found["marked"]), name


def test_kernels_for_a_gpu_are_marked_so(monkeypatch):
    monkeypatch.setattr(implementations, "DEVICES", ("cpu", "cuda"))
    marks = {p.id: {mark.name for mark in p.marks} for p in implementations.of("joint_histogram")}
    assert {name for name, names in marks.items() if "gpu" in names} == {"triton-cuda", "cuda-cuda"}
    assert marks.keys() == {"cpp-cpu", "triton-cuda", "cuda-cuda"}
