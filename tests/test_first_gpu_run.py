# ruff: noqa: E402 - the benches are no package: their folder goes on the path first
"""What runs on the first day on a GPU: nothing in it may fail for a reason that shows without one.

The GPU, nvcc, Nsight Compute and Python are played by scripts that write down how they were called.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cases_recipes import write_mnist

import gradrep_kernels.sgs.gathering as gathering
from gradrep_kernels.ops import backends
from gradrep_kernels.ops.registry import OPS

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
if not BENCH.is_dir():
    pytest.skip("the benches are not here", allow_module_level=True)
sys.path.insert(0, str(BENCH))

import profile_once
import study_fashion

SCRIPT = BENCH / "first_gpu_run.sh"
PHASES = ("device", "small-run", "probe", "tests", "step", "counts", "ncu")
CPU = torch.device("cpu")


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


# -- the probe


@pytest.mark.skipif(nvcc() is None, reason="nvcc is not found")
def test_the_probe_compiles_without_a_warning(tmp_path):
    flags = ["-std=c++17", "-O3", "-arch=sm_90", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra"]
    command = [nvcc(), *flags, "-o", str(tmp_path / "probe"), str(BENCH / "probe.cu")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    if torch.cuda.is_available():
        return
    ran = subprocess.run([tmp_path / "probe"], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (2, "probe: there is no GPU here\n")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not found")
def test_modules_and_probe_are_built_for_one_architecture():
    done = subprocess.run(["make", "-n", "gpu-build", "ARCH=8.0"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("make")]  # of make within make
    modules, _, probe = lines[-4:-1]
    assert 'GRADREP_BUILD=require GRADREP_CUDA=1 TORCH_CUDA_ARCH_LIST="8.0"' in modules
    assert probe == "nvcc -std=c++17 -O3 -arch=sm_80 -o build/probe bench/probe.cu"
    assert "build/probe" in SCRIPT.read_text()  # where the first run looks for it


# -- every kernel once


def test_every_op_is_called_by_each_backend_that_has_it(monkeypatch):
    in_updates = set()
    implementation = gathering.implementation

    def noted(op, device):
        in_updates.add(op)
        return implementation(op, device)

    monkeypatch.setattr(gathering, "implementation", noted)
    calls = dict(profile_once.calls(CPU, quick=True))
    served = [b for b in profile_once.BACKENDS["cpu"] if backends.report(("cpu",))[0][b] == "available"]
    for backend in served:
        for op in (
            "rep_sgd_step",
            "rep_adamw_step",
            "rep_grad_norm",
            "scale_gradients_",
            "pair_ranges",
            "joint_histogram",
        ):
            assert any(name.startswith(f"{op}, {backend}") for name in calls)
        calls[f"update from a training batch, {backend}"]()
    for found in profile_once.maps(CPU, quick=True):
        assert f"joint_histogram, {served[0]}, {found.name}" in calls
    # What adds to a table has its place there.
    assert in_updates >= {op for op in OPS if op.endswith("_") and not op.startswith("scale_gradients")}


def test_calls_end_in_time(capsys):
    assert profile_once.run(CPU, quick=True, seconds=0) == 0
    assert "no time for rep_sgd_step" in capsys.readouterr().out


def test_every_kernel_has_a_name_that_is_profiled():
    pattern = re.search(r'^kernels="(.*)"$', SCRIPT.read_text(), re.MULTILINE)[1]
    sources = "".join(path.read_text() for path in sorted(ROOT.glob("csrc/*.[ch]*")))
    names = re.findall(r"__global__ void (?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(", sources)
    assert len(names) == sources.count("__global__ void")
    for path in ROOT.glob("gradrep_kernels/ops/triton/*.py"):
        names += re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
    assert {"rep_sgd_step_kernel", "rep_adamw_step_kernel"} <= set(names)
    assert len(names) >= 8
    assert [name for name in names if not re.search(pattern, name)] == []


# -- the whole run


def limits() -> dict[str, int]:
    """Of the phases with a GPU and both modules there."""
    phases = re.findall(r"\bphase \"?([\w-]+?)(?:\$again)?\"? (\d+)", SCRIPT.read_text())
    return {name: int(limit) for name, limit in phases if name != "build"}


def test_the_limits_fit_into_the_deadline():
    deadline = int(re.search(r"^deadline=(\d+)", SCRIPT.read_text(), re.MULTILINE)[1])
    assert tuple(limits()) == PHASES
    export = int(re.search(r"timeout (\d+) \"\$ncu\" --import", SCRIPT.read_text())[1])
    assert sum(limits().values()) + export <= deadline <= 520
    page = (ROOT / "docs" / "howto" / "gpu.md").read_text()
    assert dict(re.findall(r"^\| ([\w-]+) \| (\d+) \| ", page, re.MULTILINE)) == {
        name: str(limit) for name, limit in limits().items()
    }


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_script_is_clean():
    done = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def _run(results: Path, **env: str) -> subprocess.CompletedProcess:
    whole = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(["bash", SCRIPT, results], env=whole, capture_output=True, text=True, timeout=400)


def _rows(results: Path) -> dict[str, str]:
    """Phase -> exit status, as summary.md has them."""
    lines = [line.split(" | ") for line in (results / "summary.md").read_text().splitlines() if line.startswith("| ")]
    assert [cell.strip("| ") for cell in lines[0]] == ["phase", "seconds", "exit status"]
    return {phase.strip("| "): state.strip("| ") for phase, _, state in lines[1:]}


class Machine:
    """A machine with a GPU. `fails` are words of commands that end with an exit status: the first that fits."""

    def __init__(self, folder: Path, modules: tuple[str, ...] = ("_C", "_C_cuda"), **fails: int):
        self.folder, self.results = folder / "bin", folder / "results"
        self.folder.mkdir()
        self.calls = folder / "calls"
        ends = "\n".join(f'case "$*" in *{word}*) exit {status};; esac' for word, status in fails.items())
        loaded = "\n".join(
            f'case "$*" in *"gradrep_kernels env") echo {name} is loaded from x;; esac' for name in modules
        )
        self.script("python", f"{loaded}\n{ends}")
        self.script("nvidia-smi", 'case "$*" in *=compute_cap*) echo 9.0;; *) echo A GPU, 9.0;; esac')
        make = """[ "$1" = -o ] && printf '#!/bin/sh\\necho measured' >"$2" && chmod +x "$2"; shift"""
        self.script("nvcc", f"{ends}\nwhile [ $# -gt 1 ]; do {make}; done")
        self.script("ncu", 'for a; do [ "$b" = --export ] && echo report >"$a.ncu-rep"; b=$a; done; echo a,csv')

    def script(self, name: str, text: str) -> None:
        path = self.folder / name
        env = "$GRADREP_CUDA $TORCH_CUDA_ARCH_LIST $GRADREP_COMMIT"
        path.write_text(f'#!/bin/bash\necho "{name} $* [{env}]" >>{self.calls}\n{text}\n')
        path.chmod(0o755)

    def run(self, **env: str) -> subprocess.CompletedProcess:
        path = f"{self.folder}{os.pathsep}{os.environ['PATH']}"
        names = {"PATH": path, "PY": str(self.folder / "python"), "DRY_RUN": "", "COMMIT": "abc1234", **env}
        return _run(self.results, **names)

    def called(self, word: str) -> list[str]:
        return [line for line in self.calls.read_text().splitlines() if word in line]


def test_all_phases_run_on_a_gpu(tmp_path):
    machine = Machine(tmp_path)
    done = machine.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert _rows(machine.results) == dict.fromkeys(PHASES, "0")
    assert "MISSING" not in done.stdout
    assert machine.called("setup.py") == []
    (built,) = machine.called("nvcc")
    assert "-arch=sm_90 " in built
    assert "measured" in (machine.results / "log.txt").read_text()
    (small,) = machine.called("small_run.py")
    assert "small_run.py cuda [" in small
    for bench in machine.called("bench_"):
        assert f"--device cuda --seconds 0.5 --results {machine.results} [" in bench
        assert "abc1234]" in bench
    (profiled,) = machine.called("--profile-from-start")
    assert profiled.count("--section ") == 9
    assert f"--export {machine.results}/kernels {machine.folder}/python bench/profile_once.py" in profiled
    assert (machine.results / "kernels.csv").read_text() == "a,csv\n"
    summary = (machine.results / "summary.md").read_text()
    for words in (
        "A GPU, 9.0",
        "Commit abc1234.",
        "**The kernels agree with the reference.**",
        "\n_C is loaded from x",
    ):
        assert words in summary


@pytest.mark.parametrize(
    ("fails", "correct"),
    [
        ({"small_run": 1}, False),
        ({"grad_norm": 1}, False),
        ({"bench_": 1}, True),
        ({"gradrep_kernels": 1}, True),
        ({"probe": 1}, True),
    ],
    ids=["small run", "tests", "benches", "env", "nvcc"],
)
def test_a_phase_that_fails_takes_nothing_from_the_others(tmp_path, fails, correct):
    machine = Machine(tmp_path, **fails)
    done = machine.run()
    assert (done.returncode == 0) is correct
    assert ("DO NOT AGREE" in done.stdout) is not correct
    assert tuple(_rows(machine.results)) == PHASES


def test_tests_that_a_cuda_error_left_run_again(tmp_path):
    machine = Machine(tmp_path, grad_norm=86)
    assert machine.run().returncode == 1
    assert [name for name in _rows(machine.results) if name.startswith("tests")] == [
        "tests",
        "tests again",
        "tests once more",
    ]


@pytest.mark.parametrize("modules", [(), ("_C",), ("_C_cuda",)], ids=lambda modules: " ".join(modules) or "none")
def test_a_missing_module_is_named_and_the_gpus_is_built(tmp_path, modules):
    machine = Machine(tmp_path, modules)
    done = machine.run()
    for name in ("_C", "_C_cuda"):
        assert (f"gradrep_kernels.{name} IS MISSING HERE" in done.stdout) is (name not in modules)
    builds = machine.called("setup.py")
    assert len(builds) == ("_C_cuda" not in modules)
    assert all("build_ext --inplace [only 9.0 " in build for build in builds)
    assert [name for name in _rows(machine.results) if name != "build"] == list(PHASES)


def small_runs(folder: Path, python: str) -> tuple[list, dict[str, str], Path]:
    """A command and its environment, of a copy of the script in which the small run has 4 s, and its results."""
    copy = folder / "bench" / SCRIPT.name
    copy.parent.mkdir()
    text = SCRIPT.read_text()
    copy.write_text(text.replace("phase small-run 75", "phase small-run 4").replace("grace=5 ", "grace=1 "))
    (folder / "tests").mkdir()
    machine = Machine(folder)
    machine.script("python", f'case "$*" in {python};; esac')
    path = f"{machine.folder}{os.pathsep}{os.environ['PATH']}"
    return (
        ["bash", copy, machine.results],
        {**os.environ, "PATH": path, "PY": f"{machine.folder}/python"},
        machine.results,
    )


@pytest.mark.parametrize("left", ["", "setsid sleep 60 & "], ids=["alone", "a process outlives it"])
def test_a_phase_ends_at_its_limit(tmp_path, left):
    command, env, results = small_runs(tmp_path, f"*small_run*) {left}sleep 60")
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=50)
    rows = _rows(results)
    assert rows["small-run"] == "124 (its time limit)", done.stdout
    assert rows["step"] == "0"
    assert done.returncode == 1


@pytest.mark.parametrize(("status", "builds"), [(1, 0), (0, 1)], ids=["no time to load it", "it does not load"])
def test_a_module_that_could_not_be_looked_at_is_not_built_anew(tmp_path, status, builds):
    command, env, results = small_runs(tmp_path, f'*"gradrep_kernels env") exit {status}')
    (tmp_path / "gradrep_kernels").mkdir()
    (tmp_path / "gradrep_kernels" / "_C_cuda.abi3.so").touch()
    subprocess.run(command, env=env, capture_output=True, timeout=50)
    assert [name for name in _rows(results) if name == "build"] == ["build"] * builds


def status_when_stopped(command: list, by: signal.Signals, begun: Path, env: dict[str, str] | None = None) -> int:
    """The exit status. What writes its process id to `begun`, and then sleeps, is gone."""
    run = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 100  # a busy machine takes 40 s to import torch
    while time.monotonic() < end and not (begun.exists() and begun.read_text().strip()):
        time.sleep(0.1)
    run.send_signal(by)
    status = run.wait(10)
    for _ in range(50):  # init may still have to hear of it
        try:
            os.kill(int(begun.read_text()), 0)
        except ProcessLookupError:
            return status
        time.sleep(0.1)
    raise AssertionError("it still runs")


def test_a_torch_that_sees_no_gpu_is_told_and_nothing_is_built_for_it(tmp_path):
    says = "echo '_C is loaded from x. _C_cuda is built (y), but torch sees no GPU here'"
    command, env, results = small_runs(tmp_path, f'*"gradrep_kernels env") {says};; *small_run*) exit 1')
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=50)
    assert "!! torch sees no GPU here: no kernel can run" in done.stdout
    assert "MISSING" not in done.stdout
    assert "build" not in _rows(results)
    assert done.returncode == 1


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM], ids=lambda by: by.name)
def test_a_run_that_is_stopped_leaves_nothing_running(tmp_path, by):
    command, env, results = small_runs(tmp_path, f"*small_run*) echo $$ >{tmp_path}/begun; exec sleep 60")
    assert status_when_stopped(command, by, tmp_path / "begun", env) == 128 + by
    assert "device" in _rows(results)
    assert "small-run" not in _rows(results)
    assert "== stopped after" in (results / "log.txt").read_text()


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM], ids=lambda by: by.name)
def test_a_gpu_check_that_is_stopped_leaves_nothing_running(tmp_path, by):
    begun, test = tmp_path / "begun", tmp_path / "test_long.py"
    lines = ["import os, time, pytest", "@pytest.mark.gpu", "def test_long():"]
    lines += [f"    open({str(begun)!r}, 'w').write(str(os.getpid()))", "    time.sleep(60)", ""]
    test.write_text("\n".join(lines))
    options = ["--dry-run", "--results", tmp_path, "--only", "tests", "--test-args", test]
    status = status_when_stopped([sys.executable, BENCH / "gpu_check.py", *options], by, begun)
    assert status == (-by if by == signal.SIGINT else 128 + by)


def test_dry_run(tmp_path):
    """Every phase in full, as far as it needs no GPU."""
    pytest.importorskip("pytest_benchmark")
    done = _run(tmp_path, DRY_RUN="1", PY=sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = _rows(tmp_path)
    assert tuple(rows) == PHASES
    assert {rows[name] for name in PHASES if name != "probe"} == {"0"}
    assert rows["probe"].startswith("skipped: compiled" if nvcc() else "skipped: there is no nvcc")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {
        "summary.md",
        "log.txt",
        *(f"{bench}.{kind}" for bench in ("rep_sgd_step", "joint_histogram") for kind in ("json", "md")),
    }
    for path in tmp_path.glob("*/*.json"):
        content = json.loads(path.read_text())
        assert content["quick"]
        assert content["measurements"]
        assert content["failed"] == []


# -- tests without the packages that may be missing there

HIDING = """
import sys

HIDDEN = {hidden}


class Hiding:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Hiding())
"""


def test_all_tests_are_collected_without_optional_packages(tmp_path):
    import gpu_check

    hidden = {*gpu_check.OPTIONAL, "lightning_fabric", "pytorch_lightning", "PIL", "scipy", "tqdm"}
    (tmp_path / "hiding.py").write_text(HIDING.format(hidden=sorted(hidden)))
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path), os.environ.get("PYTHONPATH", "")]),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-p", "hiding", "-p", "no:cacheprovider", "--collect-only", "-q"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


# -- the study


@pytest.fixture
def fashion(tmp_path) -> Path:
    return write_mnist(tmp_path)


def test_study_reads_what_the_files_hold(fashion):
    data = study_fashion.load(fashion, "cpu")
    assert data.description() == {"name": "fashion", "train": 40, "test": 20, "classes": 10, "shape": [1, 28, 28]}
    assert data.test.labels.tolist() == [n % 10 for n in range(20)]
    raw = (fashion / "t10k-images-idx3-ubyte").read_bytes()[16:]
    first = np.frombuffer(raw, np.uint8, 28 * 28).reshape(1, 1, 28, 28)
    assert torch.equal(data.test.read(torch.tensor([0])), torch.from_numpy(first.copy()) / 255)


def test_study_draws_the_same_batches_from_the_same_seed(fashion):
    data = study_fashion.load(fashion, "cpu")
    batches = study_fashion.Batches(data, 16, seed=3)
    assert len(batches) == 2
    epochs = [list(batches), list(batches), list(study_fashion.Batches(data, 16, seed=4))]
    assert all(torch.equal(x, y) and torch.equal(a, b) for (x, a), (y, b) in zip(epochs[0], epochs[1]))
    assert not torch.equal(epochs[0][0][0], epochs[2][0][0])
    x, labels = epochs[0][0]
    assert x.shape == (16, 1, 28, 28)
    assert labels.shape == (16,)


def test_study_trains_as_long_as_the_seconds_hold():
    of_an_epoch = {"sgd": 2.0, "sgs": 3.0}
    assert study_fashion.epochs_that_fit(300, 3, of_an_epoch) == 18  # 3 x 5 s x 18 = 270 s
    assert study_fashion.epochs_that_fit(1, 3, of_an_epoch) == 1


def test_study_compares_seed_by_seed(fashion, capsys):
    pytest.importorskip("scipy")
    results = fashion / "results"
    arguments = [str(fashion), "--device", "cpu", "--results", str(results), "--seeds", "2", "--batch-size", "20"]
    assert study_fashion.main([*arguments, "--epochs", "2", "--model", "small"]) == 0
    found = json.loads((results / "study.json").read_text())
    assert [run["seed"] for run in found["runs"]] == [0, 1]
    assert (found["epochs"], found["options"]["epochs"], found["options"]["model"]) == (2, 2, "repopt_vgg_small")
    for run in found["runs"]:
        assert run["sgd"]["scalings"] is None
        scalings = [np.array(g) for g in run["sgs"]["scalings"].values()]
        assert any(np.ptp(g) > 0 for g in scalings)  # learned before the second epoch
        assert all(math.isclose(g.mean(), 1, rel_tol=1e-5) for g in scalings)
        assert 0 <= run["sgd"]["accuracy"] <= 1
    page = (results / "study.md").read_text()
    assert page.strip() in capsys.readouterr().out
    assert "2 of 2 seeds. sgs" in page
    assert "95 % interval" in page


def test_study_goes_on_without_scipy(fashion, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    arguments = [str(fashion), "--device", "cpu", "--results", str(fashion / "results"), "--seeds", "2"]
    assert study_fashion.main([*arguments, "--epochs", "1", "--model", "small", "--batch-size", "20"]) == 0
    assert "2 of 2 seeds. No interval: this needs scipy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train-images-idx3-ubyte.gz", None, "neither it nor train-images-idx3-ubyte.gz is there"),
        ("train-labels-idx1-ubyte.gz", b"\x1f\x8b cut", "cannot be read"),
        ("t10k-images-idx3-ubyte", b"PNG", "does not begin as an IDX file"),
        ("t10k-labels-idx1-ubyte", bytes((0, 0, 8, 1, 0, 0, 0, 9, 1)), "1 bytes are not the 9"),
        ("t10k-labels-idx1-ubyte", bytes((0, 0, 8, 1, 0, 0, 0, 1, 1)), "20 images and 1 labels"),
        ("t10k-labels-idx1-ubyte", bytes((0, 0, 8, 1, 0, 0, 0, 20)) + bytes([10] * 20), "from 0 to 9"),
    ],
    ids=["missing", "damaged", "other kind", "cut", "too few", "classes"],
)
def test_study_names_the_file_that_is_wrong(fashion, capsys, name, content, words):
    (fashion / name).unlink()
    if content is not None:
        (fashion / name).write_bytes(content)
    assert study_fashion.main([str(fashion), "--device", "cpu", "--results", str(fashion / "results")]) == 2
    assert words in capsys.readouterr().err
    assert not (fashion / "results").exists()
