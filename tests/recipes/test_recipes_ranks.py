"""Two processes train what one trains, end together, and go on where they were killed."""

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
import recipe_ranks
import torch
from cases_recipes import assert_same_tensors, bit_repeatable, tensors, train, train_arguments
from processes import start_processes

from gradrep_kernels.cli import main
from gradrep_kernels.recipes.networks import MODELS

dist = pytest.importorskip("torch.distributed")
pytestmark = [
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
    ),
    pytest.mark.usefixtures("no_pictures"),
]

# Batches of 15 are 8 and 7 images: parts of 3, 3, 2 and of 3, 2, 2. The augmentation is that of the whole batch.
JOINT = (
    "--model", "frozen", "--recipe", "sgd,sgs,repopt+sgs,csla", "--batch-size", "15",
    "--search-batch-size", "15", "--augment", "crop,flip",
    "--sgs-warmup", "0", "--ema-decay", "0.5", "--clip-norm", "0.5", "--nesterov", "--check-steps", "0",
    "--validation", "0", "--label-smoothing", "0.1",
)  # fmt: skip
OWN_NORMS = ("--recipe", "sgd,repvgg,dyrep", "--ema-decay", "0.5", "--check-steps", "0")
LONG = ("--recipe", "sgd", "--epochs", "24", "--check-steps", "0", "--evaluate-every", "12")
SWEPT = (
    "--model", "frozen", "--recipe", "sgd,sgs", "--batch-size", "15", "--check-steps", "0", "--sgs-warmup", "0",
    "--sweep", "sgs-k=1,9",
)  # fmt: skip
COMPILED = ("--recipe", "sgd", "--amp", "bf16", "--channels-last", "--epochs", "2")


def start(function, folder, *arguments, commands: int = 1) -> None:
    """Call function(rank, folder, ports, *arguments) on two ranks. A port is that of a store, as torchrun has one."""
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(commands)]
    start_processes(function, (folder, [store.port for store in stores], *arguments), 2)


@pytest.fixture(scope="module")
def together(source, tmp_path_factory):
    """The folder of runs of two processes, which are forked once for all of them."""
    out = tmp_path_factory.mktemp("together")
    commands = [
        train_arguments(source, out, "--name", "joint", *JOINT, "--accumulate", "3"),
        train_arguments(source, out, "--name", "norms", *OWN_NORMS),
        train_arguments(source, out, "--name", "long", *LONG),
        train_arguments(source, out, "--name", "compiled", *COMPILED, "--compile"),
        train_arguments(source, out, "--name", "eager", *COMPILED),
        train_arguments(source, out, "--name", "swept", *SWEPT),
        [*resumed(out), "--workers", "1"],
        train_arguments(source, out, "--name", "more workers", *OWN_NORMS, "--workers", "2"),
    ]
    commands[:-1] = map(without_workers, commands[:-1])
    start(recipe_ranks.run_commands, out, commands, commands=len(commands))
    return out


def resumed(out) -> list[str]:
    return ["train", "--out", str(out), "--name", "long", "--resume"]


def without_workers(arguments: list[str]) -> list[str]:
    at = arguments.index("--workers")
    return arguments[:at] + arguments[at + 2 :]


@pytest.fixture
def frozen(monkeypatch):
    monkeypatch.setitem(MODELS, "frozen", recipe_ranks.frozen)


def said(folder, rank):
    return (folder / f"said {rank}").read_text()


def test_both_processes_end_well_and_one_of_them_speaks(together):
    for rank in range(2):
        assert torch.load(together / f"statuses {rank}") == [0, 0, 0, 0, 0, 0, 0, 2], said(together, rank)
    errors = [line for rank in range(2) for line in said(together, rank).splitlines() if line.startswith("error")]
    # Both see what is wrong with the arguments, and the first of them says it.
    assert errors == ["error: --workers 2: the 2 processes of torchrun do one training at a time; leave it out"]
    assert said(together, 1).removesuffix(errors[0] + "\n") == ""
    assert "2 processes train together" in said(together, 0)
    assert not (together / "more workers").exists()


def test_two_processes_train_what_one_trains_on_the_joint_batch(together, source, tmp_path, frozen):
    """In float64: sums of gradients over parts are rounded in another order, and the steps carry that on."""
    train(source, tmp_path, "--name", "joint", *JOINT)
    ours, one = together / "joint", tmp_path / "joint"
    summaries = [json.loads((folder / "summary.json").read_text())["recipes"] for folder in (ours, one)]
    for name, figures in summaries[1].items():
        for key in ("test_accuracy", "weights_test_accuracy", "parameters", "multiplier_bytes"):
            assert summaries[0][name][key] == figures[key]
    names = sorted(path.name for path in (one / "weights").iterdir())
    assert names == sorted(path.name for path in (ours / "weights").iterdir())
    for name in names:
        a, b = (tensors(folder / "weights" / name) for folder in (ours, one))
        assert a["linear.weight"].dtype == torch.float64
        for key in b:
            torch.testing.assert_close(a[key], b[key], rtol=1e-9, atol=1e-9)
    lines = [bit_repeatable(folder / "metrics.jsonl") for folder in (ours, one)]
    for a, b in zip(*lines, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-9)
        assert a.get("scale_means") == pytest.approx(b["scale_means"], rel=1e-9) if a["run"] == "search" else True
    # Integer counts over the same images, from the same first weights: the same bits.
    for name in ("sgs-seed0", "repopt+sgs-seed0"):
        a, b = (json.loads((folder / "state" / f"{name}.json").read_text())["scalings"] for folder in (ours, one))
        assert a["start"] == b["start"]
        assert any(abs(value - 1) > 1e-3 for g in a["start"].values() for row in g for value in row)


def test_norms_see_the_part_of_their_own_process(together, source, tmp_path):
    """And averages are judged with statistics of both: the accuracy that is told is that of the file."""
    train(source, tmp_path, "--name", "norms", *OWN_NORMS)
    for name in ("sgd-seed0.pt", "repvgg-seed0.pt"):
        a, b = (tensors(folder / "norms" / "weights" / name) for folder in (together, tmp_path))
        assert a.keys() == b.keys()
        assert any(not torch.allclose(a[key], b[key], rtol=1e-4) for key in a if key.endswith("weight"))
        assert all(tensor.isfinite().all() for tensor in a.values())


def test_all_processes_have_the_same_weights_and_statistics_after_each_epoch(together):
    digests = [torch.load(together / f"digests {rank}") for rank in range(2)]
    assert len(set(digests[0])) > 30
    assert digests[0] == digests[1]


def test_processes_train_with_compiled_code_in_low_precision(together):
    """By a backend that runs the same operations."""
    losses = [
        [line["train_loss"] for line in bit_repeatable(together / name / "metrics.jsonl")]
        for name in ("compiled", "eager")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


@pytest.mark.parametrize("name", ["norms", "swept"])
def test_another_number_of_processes_cannot_resume(together, capsys, name):
    assert main(["train", "--out", str(together), "--name", name, "--resume"]) == 2
    expected = f"{name} was started on 2 processes, now there are 1; resume it by --nproc-per-node for 2 in all"
    assert expected in capsys.readouterr().err


def test_processes_sweep_together_and_go_on(together, source, tmp_path, frozen, capsys):
    """Batches of 15 are 8 and 7 images, and weights are float64, as above."""
    shutil.copytree(together / "swept", tmp_path / "two" / "swept")
    for name in ("sweep.json", "sgs-k=9/summary.json", "sgs-k=9/state/sgs-seed0.json", "sgs-k=9/weights/sgs-seed0.pt"):
        (tmp_path / "two" / "swept" / name).unlink()
    assert main(["train", "--out", str(tmp_path / "two" / "swept"), "--name", "sgs-k=9", "--resume"]) == 2
    assert "sgs-k=9 was started on 2 processes, now there are 1" in capsys.readouterr().err
    resume = ["train", "--out", str(tmp_path / "two"), "--name", "swept", "--resume"]
    start(recipe_ranks.run_commands, tmp_path / "two", [resume])
    assert torch.load(tmp_path / "two" / "statuses 1") == [0], said(tmp_path / "two", 0)
    train(source, tmp_path, "--name", "swept", *SWEPT)
    tables = [json.loads((out / "swept" / "sweep.json").read_text()) for out in (together, tmp_path / "two", tmp_path)]
    assert [table["statements"] for table in tables[:2]] == [tables[2]["statements"]] * 2
    for point in ("sgs-k=1", "sgs-k=9"):
        for file in ("sgd-seed0.pt", "sgs-seed0.pt"):
            a, again, b = (
                tensors(out / "swept" / point / "weights" / file) for out in (together, tmp_path / "two", tmp_path)
            )
            assert_same_tensors(a, again)
            for key in b:
                torch.testing.assert_close(a[key], b[key], rtol=1e-9, atol=1e-9)
        assert json.loads((together / "swept" / point / "state" / "ranks.json").read_text()) == 2
    taken = json.loads((together / "swept" / "sgs-k=9" / "state" / "sgd-seed0.json").read_text())
    assert taken["taken_from"] == "sgs-k=1"


@pytest.mark.parametrize(
    ("how", "failing", "status", "line"),
    [
        ("input", 0, 2, "error: the pictures are damaged"),
        ("input", 1, 2, "error: the pictures are damaged"),
        ("killed", 1, 2, "error: another process of this training is gone; --resume goes on"),
        ("interrupted", 1, 130, "interrupted; --resume goes on after the last whole epoch"),
    ],
)
def test_what_ends_one_process_ends_the_other_with_one_line(source, tmp_path, how, failing, status, line):
    arguments = without_workers(train_arguments(source, tmp_path, "--name", "a", "--recipe", "sgd"))
    with contextlib.suppress(torch.multiprocessing.ProcessExitedException):  # of the one that was killed
        start(recipe_ranks.fail_on_one, tmp_path, arguments, failing, how)
    wait_until(lambda: (tmp_path / f"ended {1 - failing}").exists(), "the other ends", 30)
    other, seconds = torch.load(tmp_path / f"ended {1 - failing}")
    assert other == 2  # It has lost the one that failed.
    assert seconds < 30
    if how != "killed":
        assert torch.load(tmp_path / f"ended {failing}")[0] == status
    ends = [text for rank in range(2) for text in said(tmp_path, rank).splitlines() if text.startswith(("e", "int"))]
    assert ends == [line]


@contextlib.contextmanager
def torchrun(source, out, *more):
    """A job of two processes by torchrun, in a session of its own."""
    arguments = train_arguments(source, out, "--name", "long", *more)
    command = ["torch.distributed.run", "--nproc-per-node", "2", "-m", "gradrep_kernels", *without_workers(arguments)]
    with (out / "stderr.txt").open("a") as stderr:
        job = subprocess.Popen(
            [sys.executable, "-m", *command],
            stderr=stderr,
            stdout=stderr,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        yield job
    finally:
        job.kill()
        job.wait()


def test_killed_processes_are_resumed_with_the_same_bits(together, source, tmp_path):
    """One of them, by Ctrl-C, and torchrun itself, whose processes must not go on alone."""
    lines = tmp_path / "long" / "metrics.jsonl"

    def epochs() -> int:
        return lines.read_text().count("\n") if lines.exists() else 0

    said_all = tmp_path / "stderr.txt"
    with torchrun(source, tmp_path, *LONG) as job:
        wait_until(lambda: epochs() > 3, "some epochs are done")
        (of_rank_1,) = [pid for pid in children(job.pid) if environment(pid).get("RANK") == "1"]
        os.kill(of_rank_1, signal.SIGKILL)
        assert job.wait(60) not in (0, None)
    with torchrun(source, tmp_path, *LONG, "--resume") as job:
        before = epochs()
        wait_until(lambda: epochs() > before + 3, "it goes on")
        os.kill(job.pid, signal.SIGINT)
        assert job.wait(60) not in (0, None)
    assert "interrupted; --resume goes on after the last whole epoch\n" in said_all.read_text()
    with torchrun(source, tmp_path, *LONG, "--resume") as job:
        before = epochs()
        wait_until(lambda: epochs() > before + 3, "it goes on again")
        orphans = children(job.pid)
        job.kill()
        job.wait()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in orphans), "orphans end", 30)
    assert epochs() < 23, "too fast to be killed three times"
    start(recipe_ranks.run_commands, tmp_path, [resumed(tmp_path)])
    assert torch.load(tmp_path / "statuses 0") == [0], said(tmp_path, 0)
    assert_same_tensors(*(tensors(folder / "long" / "weights" / "sgd-seed0.pt") for folder in (together, tmp_path)))
    ours, whole = (bit_repeatable(folder / "long" / "metrics.jsonl") for folder in (tmp_path, together))
    assert ours == whole


def wait_until(holds, what, seconds=120):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(stat.parent.name))
    return found


def environment(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)
