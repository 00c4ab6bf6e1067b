"""The folder of a run: its name, who has it, and who gets it when two want it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from cases_recipes import TINY, train_arguments

from gradrep_kernels.cli import main
from gradrep_kernels.recipes import lock, runs
from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.runs import open_run

pytestmark = pytest.mark.usefixtures("no_pictures")


def started(source, out, name=None, resume=False):
    given = {} if resume else {"data": source, **TINY, "recipe": ("sgd",)}
    return open_run(out, name, given, resume=resume)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "a/b", "/tmp/x", "../x", "a\\b", "c:x", "a\0b", "a\nb", " a", "\udcff", "a" * 201],
)
def test_a_name_that_would_leave_its_folder_is_refused(source, tmp_path, name, capsys):
    for more in ([], ["--resume"]):
        assert main(train_arguments(source, tmp_path / "out", f"--name={name}", *more)) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: --name must ")
        assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_ordinary_names_are_taken(source, tmp_path):
    for name in ("x", "a b", "größe", "-1", "v1.0", "a..b", "a" * 200):
        with started(source, tmp_path, name) as run:
            assert run.folder == tmp_path / name
    assert len(list(tmp_path.iterdir())) == 7


def test_a_name_that_another_takes_meanwhile(source, tmp_path, monkeypatch):
    asked = []

    def fresh_name(out, base, original=runs.fresh_name):
        name = original(out, base)
        if not asked:
            (out / name).mkdir()
            (out / name / "options.json").write_text("theirs")
        asked.append(name)
        return name

    monkeypatch.setattr(runs, "fresh_name", fresh_name)
    with started(source, tmp_path) as run:
        assert run.folder.name == "cifar10-small-2"
    assert asked == ["cifar10-small", "cifar10-small-2"]
    assert (tmp_path / "cifar10-small" / "options.json").read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == asked


def test_a_given_name_that_another_takes_meanwhile(source, tmp_path, monkeypatch):
    def load_data(*arguments, original=runs.load_job_data):
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "options.json").write_text("theirs")
        return original(*arguments)

    monkeypatch.setattr(runs, "load_job_data", load_data)
    with pytest.raises(InputError, match="has something in it already"):
        started(source, tmp_path, "x")
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "options.json"]


def test_an_empty_folder_and_a_link_to_one_are_taken(source, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out" / "empty").mkdir(parents=True)
    (tmp_path / "out" / "link").symlink_to(tmp_path / "disk")
    for name in ("empty", "link"):
        with started(source, tmp_path / "out", name):
            pass
        assert (tmp_path / "out" / name / "options.json").exists()
    assert (tmp_path / "out" / "link").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["options.json"]


needs_locks = pytest.mark.skipif(lock.fcntl is None, reason="the system has no such locks")


@needs_locks
def test_a_run_is_run_once_at_a_time_and_leaves_no_lock(source, tmp_path):
    with started(source, tmp_path, "x") as run:
        held = run.folder / ".running"
        assert held.read_text() == str(os.getpid())
        for _ in range(2):
            with pytest.raises(InputError, match=f"x is being run by process {os.getpid()}; "):
                started(source, tmp_path, "x", resume=True)
        assert held.read_text() == str(os.getpid())
    assert not held.exists()
    with started(source, tmp_path, "x", resume=True):
        assert held.exists()
    assert [path.name for path in run.folder.iterdir()] == ["options.json"]


@needs_locks
def test_a_refused_resume_holds_nothing(source, tmp_path):
    with started(source, tmp_path, "x"):
        pass
    with pytest.raises(InputError, match=r"--lr was 0\.1 when"):
        open_run(tmp_path, "x", {"lr": 0.2}, resume=True)
    with started(source, tmp_path, "x", resume=True):
        pass


@pytest.mark.parametrize("way", ["no fcntl", "a file system without locks"])
def test_without_locks_a_run_starts_all_the_same(source, tmp_path, monkeypatch, way):
    def flock(*_):
        raise OSError(37, "No locks available")

    if way == "no fcntl":
        monkeypatch.setattr(lock, "fcntl", None)
    else:
        monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", flock)
    with started(source, tmp_path, "x") as run, started(source, tmp_path, "x", resume=True):
        assert [path.name for path in run.folder.iterdir()] == ["options.json"]


# Opens a run and starts a process that outlives it, as worker processes are started.
HOLDER = """
import multiprocessing, sys, time
from pathlib import Path
from gradrep_kernels.recipes.runs import open_run

if __name__ == "__main__":
    out, source = sys.argv[1:]
    run = open_run(Path(out), "x", {"data": source, "recipe": ("sgd",)}, resume=False)
    worker = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(300,))
    worker.start()
    print(worker.pid, flush=True)
    time.sleep(300)
"""


@needs_locks
def test_a_death_releases_the_lock_though_a_worker_lives(source, tmp_path, capsys):
    script = tmp_path / "holder.py"
    script.write_text(HOLDER)
    resume = ["train", "--out", str(tmp_path), "--name", "x", "--resume", "--epochs", "0"]
    with subprocess.Popen([sys.executable, script, tmp_path, source], stdout=subprocess.PIPE, text=True) as holder:
        worker = int(holder.stdout.readline())
        try:
            assert main(resume) == 2
            assert capsys.readouterr().err.endswith(f"x is being run by process {holder.pid}; wait for it or stop it\n")
            holder.kill()
            holder.wait()
            os.kill(worker, 0)  # It lives.
            assert main(resume) == 2
            assert "--epochs was " in capsys.readouterr().err
        finally:
            os.kill(worker, signal.SIGKILL)
            holder.kill()
