"""Files that cannot be written: one line that names the file, and a run that can be resumed."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases_recipes import assert_same_results, train_arguments

from gradrep_kernels.cli import main
from gradrep_kernels.recipes import files, metrics
from gradrep_kernels.recipes.errors import OutputError

pytestmark = pytest.mark.usefixtures("no_pictures")

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
NO_ROOM = "/dev/full cannot be written: No space left on device; --resume goes on once there is room"

# Runs the command line once for each line of its input, with no file longer than so many bytes.
LIMITED = """
import json, resource, sys
from gradrep_kernels.cli import main

for line in sys.stdin:
    limit, arguments = json.loads(line)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    print(main(arguments), file=sys.stderr)
"""


@pytest.mark.skipif(os.name != "posix", reason="limits of a process")
def test_a_run_that_finds_no_room_is_resumed(source, finished, tmp_path):
    full = train_arguments(source, tmp_path, "--name", "x", "--recipe", "repopt+sgs,csla", "--epochs", "3")
    search = ["search", *full[1:5], "--name", "s", "--search-epochs", "1", "--batch-size", "10", "--threads", "1"]
    output = ["--output", str(tmp_path / "scales.pt")]
    # options.json has some 1,600 bytes, the state of a training some 500,000.
    lines = [(300, full), (100_000, full), (20_000, [*full, "--resume"]), (20_000, [*search, *output])]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED],
        input="".join(json.dumps(line) + "\n" for line in lines),
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    said = [line for line in done.stderr.splitlines() if line.isdigit() or "error" in line.lower()]
    state = tmp_path / "x" / "state" / "search.pt"
    later = "cannot be written: File too large; --resume goes on once there is room"
    assert said == [
        f"error: {tmp_path / 'x'} cannot be written: File too large",
        "2",
        f"error: {state} {later}",
        "2",
        f"error: {state} {later}",
        "2",
        f"error: {tmp_path / 's' / 'state' / 'search.pt'} {later}",
        "2",
    ]
    left = {str(path.relative_to(tmp_path / "x")) for path in (tmp_path / "x").rglob("*") if path.is_file()}
    assert left == {"metrics.jsonl", "options.json", "state/ranks.json"}
    assert not list(tmp_path.glob(".*"))
    assert main(["train", "--out", str(tmp_path), "--name", "x", "--resume"]) == 0
    assert_same_results(finished, tmp_path / "x")


@needs_full
@pytest.mark.parametrize(
    "write",
    [
        lambda: files.append_text(FULL, "text"),
        lambda: torch.save({"x": torch.zeros(10)}, FULL),
        lambda: torch.save({"x": torch.zeros(1_000_000)}, FULL),
    ],
    ids=["text", "few tensors", "many tensors"],
)
def test_a_write_that_fails_names_its_file(write):
    with pytest.raises(OutputError, match=r"^/dev/full cannot be written: "), files.writing(FULL):
        write()


@needs_full
def test_tensors_that_find_no_room_say_so_and_leave_nothing(tmp_path, monkeypatch):
    (tmp_path / "x.pt").write_text("the one before")

    def on_a_full_disk(self, mode, original=Path.open):
        return original(FULL, mode) if mode == "wb" else original(self, mode)

    for value in (torch.zeros(10), torch.zeros(1_000_000)):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", on_a_full_disk)
            with pytest.raises(OutputError) as failed:
                files.save_tensors(tmp_path / "x.pt", value)
        assert str(failed.value) == NO_ROOM.replace("/dev/full", str(tmp_path / "x.pt"))
        assert [path.read_text() for path in tmp_path.iterdir()] == ["the one before"]


def test_an_interrupt_that_torch_covers_is_raised(tmp_path, monkeypatch):
    def covered(*_):
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")

    monkeypatch.setattr(torch, "save", covered)
    with pytest.raises(KeyboardInterrupt):
        files.save_tensors(tmp_path / "x.pt", {})
    assert not list(tmp_path.iterdir())


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="of the caller's"), files.writing(tmp_path):
        raise RuntimeError("of the caller's own")


def test_the_error_crosses_processes():
    error = OutputError.of("x.pt", OSError(errno.EROFS, "Read-only file system"))
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(error) == "x.pt cannot be written: Read-only file system; --resume goes on once it can be"


def test_any_other_write_of_a_run_is_told_in_one_line(source, tmp_path, monkeypatch, capsys):
    def append(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    arguments = train_arguments(source, tmp_path, "--name", "x", "--recipe", "sgd", "--seeds", "2")
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "append", append)
        assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.endswith(NO_ROOM.replace("/dev/full", str(tmp_path / "x")) + "\n")
    assert main([*arguments, "--resume"]) == 0
