"""What the tests of kernels run on, and how tests are marked: those that need a GPU, and those that are slow."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import implementations
import pytest
import torch

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def conftest(pytestconfig):
    """The module tests/conftest.py; `import conftest` gives that of any folder."""
    return pytestconfig.pluginmanager.get_plugin(str(TESTS / "conftest.py"))


class Marked(NamedTuple):
    test: str
    needs_gpu: bool  # is skipped where there is none, with a reason that says so
    marks: list[str]


def marked(item: pytest.Item) -> Marked:
    skips = (m for m in item.iter_markers() if m.name == "skip" or (m.name == "skipif" and m.args[0]))
    needs_gpu = any(re.search("(needs|sees).*GPU|not a CUDA build", mark.kwargs["reason"]) for mark in skips)
    return Marked(item.nodeid, needs_gpu, sorted({mark.name for mark in item.iter_markers()}))


COLLECT = f"""
import json
import sys

sys.path.insert(0, {str(Path(__file__).parent)!r})
import pytest


class Collector:
    def pytest_collection_finish(self, session):
        from test_implementations import marked

        with open(sys.argv[2], "w") as file:
            json.dump([marked(item) for item in session.items], file)


options = ["--collect-only", "-p", "no:cacheprovider", "-p", "no:xdist"]
sys.exit(pytest.main([*options, sys.argv[1]], plugins=[Collector()]))
"""


def _collected_here(config: pytest.Config, conftest) -> list[pytest.Item] | None:
    """All tests as a machine without a GPU sees them; None where this run has not collected all, or sees a GPU."""
    items = config.stash[conftest.COLLECTED]
    whole_files = not any("::" in argument for argument in config.args)
    every_file = {item.path for item in items} == set(TESTS.rglob("test_*.py"))
    return items if whole_files and every_file and not torch.cuda.is_available() else None


@pytest.fixture(scope="module")
def all_tests(pytestconfig, conftest, tmp_path_factory) -> list[Marked]:
    """Every test of the repository. Where this run does not collect all files, another does, in some 10 s."""
    items = _collected_here(pytestconfig, conftest)
    if items is not None:
        return [marked(item) for item in items]
    file = tmp_path_factory.mktemp("collected") / "tests.json"
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, str(TESTS), str(file)],
        cwd=TESTS.parent,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [Marked(*row) for row in json.loads(file.read_text())]


def test_what_needs_a_gpu_is_marked_so(all_tests):
    """Every test that is skipped where there is none; `-m gpu` must find it whatever its name."""
    assert [row.test for row in all_tests if row.needs_gpu and "gpu" not in row.marks] == []
    for name in (
        "test_one_kernel_for_all_parameters_and_groups",
        "test_models_on_two_kinds_of_device",
        "test_many_pixels",
        "test_layouts",
    ):
        assert any(f"::{name}" in row.test and "gpu" in row.marks for row in all_tests if row.needs_gpu), name


def test_slow_tests_are_marked_so(all_tests, conftest):
    """A part of a name that no test has was renamed. What is not slow covers every folder."""
    slow = [row.test for row in all_tests if "slow" in row.marks]
    assert [part for part in conftest.SLOW if not any(part in test for test in slow)] == []
    quick = [row.test for row in all_tests if "slow" not in row.marks]
    rooms = [path.name for path in TESTS.iterdir() if any(path.glob("test_*.py"))]
    assert [room for room in rooms if not any(f"{room}/" in test for test in quick)] == []
    assert len(slow) < len(quick)


def test_kernels_for_a_gpu_are_marked_so(monkeypatch):
    monkeypatch.setattr(implementations, "DEVICES", ("cpu", "cuda"))
    marks = {p.id: {mark.name for mark in p.marks} for p in implementations.of("joint_histogram")}
    assert {name for name, names in marks.items() if "gpu" in names} == {"triton-cuda", "cuda-cuda"}
    assert marks.keys() == {"cpp-cpu", "triton-cuda", "cuda-cuda"}
