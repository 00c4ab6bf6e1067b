"""Runs that are killed or interrupted at any moment and resumed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cases_recipes import (
    assert_same_results,
    assert_same_tensors,
    tensors,
    train_arguments,
)

from gradrep_kernels.cli import main
from gradrep_kernels.recipes import files, metrics

pytestmark = pytest.mark.usefixtures("no_pictures")

# Serves one killed run for each line of its input: forks a process that kills itself at the n-th call of something.
KILLER = """
import json, os, signal, sys
from pathlib import Path
import matplotlib.figure
from gradrep_kernels.cli import main
from gradrep_kernels.recipes import metrics, training
from gradrep_kernels.sgs import SpatialGradientScaling

def at_call(n, function):
    calls = 0
    def counting(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return counting

def die_at(where, n):
    if where == "step":
        training.learning_rate = at_call(n, training.learning_rate)
    elif where == "sgs":
        update, forward = SpatialGradientScaling.update, at_call(n, lambda model, batch: model(batch[0]))
        SpatialGradientScaling.update = lambda self, batches, _=None: update(self, batches, forward)
    elif where == "rename":
        Path.replace = at_call(n, Path.replace)
    elif where == "metrics":
        metrics.append = at_call(n, metrics.append)

for line in sys.stdin:
    where, n, arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)  # Standard output is for the exit codes.
        signal.alarm(120)
        die_at(where, n)
        os._exit(main(arguments))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def run_and_kill(tmp_path):
    """Run the command line in a process of its own that dies at the n-th call of something. Returns its exit code."""
    with (
        (tmp_path / "stderr.txt").open("w") as stderr,
        subprocess.Popen(
            [sys.executable, "-c", KILLER],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as server,
    ):

        def run(where, n, arguments):
            print(json.dumps([where, n, arguments]), file=server.stdin, flush=True)
            return int(server.stdout.readline())

        yield run


# In this order, each a process of its own with --resume. An epoch has 3 steps. The search has 2 epochs, csla and then
# repopt+sgs have 3 each.
KILLS = {
    "search, second epoch, in its second step": ("step", 5),
    # The first file is metrics.jsonl, the second the state of the search's second epoch.
    "between the temporary file and its rename": ("rename", 2),
    "after the state, before the metrics": ("metrics", 1),
    "csla, third epoch, in its last step": ("step", 9),
    "in an update of the spatial scaling, in its second pass": ("sgs", 2),
}


def stands(folder):
    """The trainings that are done, and {one under way: its whole epochs}."""
    done = {path.stem for path in folder.glob("*.json")} - {"seconds", "check", "speed", "ranks"}
    return done, {path.stem: len(tensors(path)["epochs"]) for path in folder.glob("*.pt")}


def test_a_run_killed_again_and_again_ends_with_the_same_weights(source, finished, tmp_path, run_and_kill):
    arguments = train_arguments(source, tmp_path, "--name", "killed", "--recipe", "repopt+sgs,csla", "--epochs", "3")
    killed = tmp_path / "killed"
    reached = []
    for n, (what, (where, count)) in enumerate(KILLS.items()):
        status = run_and_kill(where, count, [*arguments, *(["--resume"] if n else [])])
        assert status == -signal.SIGKILL, f"{what}: {(tmp_path / 'stderr.txt').read_text()}"
        reached.append(stands(killed / "state"))
        assert not (killed / "summary.json").exists()
        leftovers = list(killed.rglob(f"*{files.TEMPORARY}"))
        assert bool(leftovers) == (where == "rename")  # until the next start
    assert reached == [
        (set(), {"search": 1}),
        (set(), {"search": 1}),
        (set(), {"search": 2}),
        ({"search"}, {"csla-seed0": 2}),
        ({"search", "csla-seed0"}, {"repopt+sgs-seed0": 1}),
    ]
    assert main(["train", "--out", str(tmp_path), "--name", "killed", "--resume"]) == 0
    assert not list(killed.rglob(f"*{files.TEMPORARY}"))
    assert_same_results(finished, killed)


def test_resuming_a_finished_run_only_writes_its_report_again(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "copy")
    before = {path: path.stat().st_mtime_ns for path in (folder / "weights").iterdir()}
    lines = (folder / "metrics.jsonl").read_text()
    (folder / "summary.json").unlink()
    assert main(["train", "--out", str(tmp_path), "--name", "copy", "--resume"]) == 0
    assert (folder / "summary.json").exists()
    assert (folder / "metrics.jsonl").read_text() == lines
    assert {path: path.stat().st_mtime_ns for path in (folder / "weights").iterdir()} == before


def test_a_run_of_before_there_were_branches_goes_on(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "before")
    stored = json.loads((folder / "options.json").read_text())
    del stored["options"]["branches"]
    (folder / "options.json").write_text(json.dumps(stored))
    for path in (folder / "summary.json", folder / "state" / "csla-seed0.json", folder / "weights" / "csla-seed0.pt"):
        path.unlink()
    assert main(["train", "--out", str(tmp_path), "--name", "before", "--resume"]) == 0
    assert_same_results(finished, folder, ordered=False)
    assert json.loads((folder / "summary.json").read_text())["options"]["branches"] == "repvgg"


def test_resume_without_a_name_takes_the_last_default_one(source, tmp_path, monkeypatch):
    arguments = train_arguments(source, tmp_path, "--recipe", "sgd", "--epochs", "1")
    assert main(arguments) == 0

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "append", stopped)
        assert main(arguments) == 130
    assert not (tmp_path / "cifar10-small-2" / "summary.json").exists()
    assert main(["train", "--data", source, "--model", "small", "--out", str(tmp_path), "--resume"]) == 0
    assert (tmp_path / "cifar10-small-2" / "summary.json").exists()
    assert_same_tensors(
        *(tensors(tmp_path / name / "weights" / "sgd-seed0.pt") for name in ("cifar10-small", "cifar10-small-2"))
    )


CHOOSING = ("--recipe", "sgd,repopt", "--lr", "0.02,0.2", "--validation", "0.4", "--seeds", "2", "--search-lr", "0.05")


def test_the_number_of_processes_changes_no_bit(source, tmp_path):
    for workers in ("1", "2"):
        assert main(train_arguments(source, tmp_path, "--name", workers, *CHOOSING, "--workers", workers)) == 0
    assert_same_results(tmp_path / "1", tmp_path / "2", ordered=False)


@contextlib.contextmanager
def under_way(source, tmp_path, name, epochs):
    """A job of two processes in a session of its own, once a training is under way."""
    arguments = train_arguments(source, tmp_path, "--name", name, *CHOOSING, "--epochs", epochs, "--workers", "2")
    with (tmp_path / "stderr.txt").open("w") as stderr:
        job = subprocess.Popen(
            [sys.executable, "-m", "gradrep_kernels", *arguments], stderr=stderr, start_new_session=True
        )
        wait_until(lambda: stands(tmp_path / name / "state")[1], "a training is under way")
        yield job


def test_processes_that_lose_their_parent_end_and_the_run_is_resumed(source, tmp_path):
    with under_way(source, tmp_path, "killed", "40") as job:
        job.kill()
        job.wait()
    wait_until(lambda: not processes_of(job.pid), "the worker processes end")
    arguments = [*CHOOSING, "--epochs", "40"]
    assert main(train_arguments(source, tmp_path, "--name", "killed", *arguments, "--workers", "1", "--resume")) == 0
    assert main(train_arguments(source, tmp_path, "--name", "whole", *arguments)) == 0
    assert_same_results(tmp_path / "whole", tmp_path / "killed", ordered=False)


def test_an_interrupt_ends_all_processes(source, tmp_path):
    with under_way(source, tmp_path, "stopped", "400") as job:
        os.killpg(job.pid, signal.SIGINT)  # as a terminal does
        assert job.wait(60) == 130
    said = (tmp_path / "stderr.txt").read_text().splitlines()
    assert said[-1].startswith("interrupted; --resume goes on")
    assert "Traceback" not in "".join(said)
    wait_until(lambda: not processes_of(job.pid), "all processes end")


def wait_until(holds, what, seconds=90):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def processes_of(session):
    """The living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, of_session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(of_session) == session and state != "Z":
                found.append(stat)
    return found
