"""conftest.py: a CUDA error that sticks fails its own test and no other.

Needs no GPU: the tests inside bring a device of their own.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")
DEVICE_LOST = runpy.run_path(str(CONFTEST))["DEVICE_LOST"]  # `import conftest` gives that of any folder

# A kernel that goes wrong in tests 1 and 3. It is noticed when somebody waits for the device, and from then on always.
TESTS = """
import sys
import types

import pytest

lost = False


def synchronize():
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


cuda = types.SimpleNamespace(is_initialized=lambda: {initialized}, synchronize=synchronize)
sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)  # torch itself takes seconds to import


@pytest.fixture
def tensor(request):
    global lost
    yield
    lost = lost or (request.node.callspec.params["n"] in {lost_in} and {at_teardown})


@pytest.mark.gpu
@pytest.mark.parametrize("n", range(5))
def test_on_gpu(n, tensor):
    global lost
    assert not lost, "the error of another test"
    lost = n in {lost_in} and not {at_teardown}


def test_elsewhere():
    pass
"""


def write_tests(folder: Path, lost_in=(1, 3), initialized=True, at_teardown=False) -> Path:
    shutil.copy(CONFTEST, folder)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    file = folder / "test_inside.py"
    file.write_text(TESTS.format(lost_in=lost_in, initialized=initialized, at_teardown=at_teardown))
    return file


def outcomes(junit: Path) -> dict[str, list[str]]:
    """Name of a test -> what went wrong with it, once for each of its entries."""
    found: dict[str, list[str]] = {}
    for case in ET.parse(junit).iter("testcase"):
        wrong = [child.get("message") for child in case if child.tag in ("failure", "error")]
        found.setdefault(case.get("name"), []).extend(wrong)
    return found


def run(folder: Path, *options: str, **env: str) -> tuple[subprocess.CompletedProcess, dict[str, list[str]]]:
    junit = folder / "junit.xml"
    junit.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-rfE", "-p", "no:cacheprovider", f"--junitxml={junit}", *options]
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **env}  # plugins double the start
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    return done, outcomes(junit)


@pytest.mark.parametrize("at_teardown", [False, True], ids=["in the test", "in a fixture's teardown"])
def test_the_session_ends_with_the_test_that_lost_the_device(tmp_path, at_teardown):
    write_tests(tmp_path, at_teardown=at_teardown)
    done, found = run(tmp_path)
    assert done.returncode == DEVICE_LOST, done.stdout + done.stderr
    assert list(found) == ["test_on_gpu[0]", "test_on_gpu[1]"]
    assert found["test_on_gpu[0]"] == []
    assert len(found["test_on_gpu[1]"]) == 1
    assert "illegal memory access" in found["test_on_gpu[1]"][0]
    assert "a CUDA error ended the tests: test_inside.py::test_on_gpu[1]" in done.stdout
    assert "test_inside.py::test_on_gpu[1] - " in done.stdout.split("short test summary info")[1]


def test_another_process_runs_what_is_left(tmp_path):
    write_tests(tmp_path)
    file = tmp_path / "done"
    seen = [run(tmp_path, GRADREP_TESTS_DONE=str(file)) for _ in range(3)]
    assert [done.returncode for done, _ in seen] == [DEVICE_LOST, DEVICE_LOST, 0]
    assert [list(found) for _, found in seen] == [
        ["test_on_gpu[0]", "test_on_gpu[1]"],
        ["test_on_gpu[2]", "test_on_gpu[3]"],
        ["test_on_gpu[4]", "test_elsewhere"],
    ]


def test_a_worker_of_xdist_makes_room_for_another(tmp_path):
    pytest.importorskip("xdist")
    write_tests(tmp_path)
    done, found = run(tmp_path, "-p", "xdist", "-n", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert {name for name, wrong in found.items() if wrong} == {"test_on_gpu[1]", "test_on_gpu[3]"}
    assert len(found) == 6
    for n in (1, 3):
        assert any("illegal memory access" in wrong for wrong in found[f"test_on_gpu[{n}]"])


def test_nobody_waits_in_a_process_that_has_not_used_cuda(tmp_path):
    file = write_tests(tmp_path, initialized=False)
    file.write_text(file.read_text().replace("assert not lost", "assert True"))
    done, found = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(found) == 6
