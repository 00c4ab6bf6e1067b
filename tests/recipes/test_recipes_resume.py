"""Runs that are killed or interrupted at any moment and resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from cases_recipes import (
    assert_same_results,
    assert_same_tensors,
    tensors,
    train_arguments,
)

from gradrep_kernels.cli import main
from gradrep_kernels.recipes import files, job

KILLER = """
import os, signal, sys
from pathlib import Path
from gradrep_kernels.cli import main
from gradrep_kernels.recipes import files, job, training
from gradrep_kernels.sgs import SpatialGradientScaling

def die():
    os.kill(os.getpid(), signal.SIGKILL)

calls = 0
def at_call(n, function):
    def counting(*args, **kwargs):
        global calls
        calls += 1
        if calls == n:
            die()
        return function(*args, **kwargs)
    return counting

where, n = sys.argv[1], int(sys.argv[2])
if where == "step":
    training.learning_rate = at_call(n, training.learning_rate)
elif where == "sgs":
    update, forward = SpatialGradientScaling.update, at_call(n, lambda model, batch: model(batch[0]))
    SpatialGradientScaling.update = lambda self, batches, _=None: update(self, batches, forward)
elif where == "rename":
    Path.replace = at_call(n, Path.replace)
elif where == "metrics":
    job._Job._append_metrics = at_call(n, job._Job._append_metrics)
sys.exit(main(sys.argv[3:]))
"""

# In this order, each a fresh process with --resume: 3 steps to an epoch; 2 epochs of search, 3 of repopt+sgs, 3 of csla.
KILLS = {
    "search, second epoch, in its second step": ("step", 5),
    "between the temporary file and its rename": (
        "rename",
        2,
    ),  # metrics.jsonl, then the checkpoint of the search's second epoch
    "in an update of the spatial scaling, in its second pass": ("sgs", 2),
    "after the checkpoint, before the metrics": ("metrics", 1),
    "csla, third epoch, in its last step": ("step", 12),
}


def test_a_run_killed_again_and_again_ends_with_the_same_weights(source, finished, tmp_path):
    arguments = train_arguments(source, tmp_path, "--name", "killed", "--recipe", "repopt+sgs,csla", "--epochs", "3")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    reached = []
    for n, (what, (where, count)) in enumerate(KILLS.items()):
        command = [sys.executable, "-c", KILLER, where, str(count), *arguments, *(["--resume"] if n else [])]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == -signal.SIGKILL, f"{what}: {done.stderr}"
        state = tensors(tmp_path / "killed" / "checkpoint.pt")
        reached.append(
            (
                len(state["finished"]),
                None if state["current"] is None else (state["current"]["run"], len(state["current"]["epochs"])),
            )
        )
        assert not (tmp_path / "killed" / "summary.json").exists()
        assert bool(list((tmp_path / "killed").rglob(f"*{files.TEMPORARY}"))) == (
            where == "rename"
        )  # until the next start
    assert reached == [
        (0, ("search", 1)), (0, ("search", 1)), (1, ("repopt+sgs-seed0", 1)), (1, ("repopt+sgs-seed0", 2)), (2, ("csla-seed0", 2)),
    ]  # fmt: skip
    assert main(["train", "--out", str(tmp_path), "--name", "killed", "--resume"]) == 0
    assert not list((tmp_path / "killed").rglob(f"*{files.TEMPORARY}"))
    assert_same_results(finished, tmp_path / "killed")


def test_resuming_a_finished_run_only_writes_its_report_again(finished):
    before = {path: path.stat().st_mtime_ns for path in (finished / "weights").iterdir()}
    metrics = (finished / "metrics.jsonl").read_text()
    (finished / "summary.json").unlink()
    assert main(["train", "--out", str(finished.parent), "--name", finished.name, "--resume"]) == 0
    assert (finished / "summary.json").exists()
    assert (finished / "metrics.jsonl").read_text() == metrics
    assert {path: path.stat().st_mtime_ns for path in (finished / "weights").iterdir()} == before


def test_resume_without_a_name_takes_the_last_default_one(source, tmp_path, monkeypatch):
    arguments = train_arguments(source, tmp_path, "--recipe", "sgd", "--epochs", "1")
    assert main(arguments) == 0

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job._Job, "_append_metrics", stopped)
        assert main(arguments) == 130
    assert not (tmp_path / "cifar10-small-2" / "summary.json").exists()
    assert main(["train", "--data", source, "--out", str(tmp_path), "--resume"]) == 0
    assert (tmp_path / "cifar10-small-2" / "summary.json").exists()
    assert_same_tensors(
        *(tensors(tmp_path / name / "weights" / "sgd-seed0.pt") for name in ("cifar10-small", "cifar10-small-2"))
    )
