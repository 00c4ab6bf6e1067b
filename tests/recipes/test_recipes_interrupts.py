"""Ctrl-C at any moment ends a training, and is never lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys

import pytest
import torch
from cases_recipes import as_arguments, load, write_folder

from gradrep_kernels.cli import main
from gradrep_kernels.recipes import interrupts
from gradrep_kernels.recipes.data.loader import Loader

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")


class Late:
    """Is interrupted while it is destroyed."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):  # Python handles signals between instructions.
            pass


def test_an_interrupt_that_python_drops_is_raised_at_the_next_batch(monkeypatch):
    data, shown = load("digits"), []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    batches = iter(Loader(data, data.train, 10, seed=0))
    with interrupts.noted():
        next(batches)
        Late()
        assert interrupts.asked()
        with pytest.raises(KeyboardInterrupt):
            next(batches)
    assert not shown
    with interrupts.noted():
        interrupts.check()


def test_what_is_dropped_for_another_reason_is_shown_as_ever(monkeypatch):
    class Broken:
        def __del__(self):
            raise KeyError

    shown = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: shown.append(dropped.exc_type))
    with interrupts.noted():
        Broken()
    assert shown == [KeyError]


def test_the_settings_of_the_process_come_back():
    handler, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), interrupts.noted():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is handler
    assert sys.unraisablehook is hook


@pytest.mark.parametrize("theirs", [signal.SIG_IGN, lambda *_: None])
def test_who_ignores_it_or_handles_it_goes_on_doing_so(theirs):
    before = signal.signal(signal.SIGINT, theirs)
    try:
        with interrupts.noted():
            assert signal.getsignal(signal.SIGINT) is theirs
    finally:
        signal.signal(signal.SIGINT, before)


def test_one_press_that_comes_twice_is_one():
    with interrupts.noted():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_a_block_that_is_held_back_is_not_torn():
    done = []

    def hold():
        with interrupts.held_back():
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                done.append("torn")
            done.append("whole")

    with interrupts.noted(), pytest.raises(KeyboardInterrupt):
        hold()
    assert done == ["whole"]
    with pytest.raises(KeyboardInterrupt), interrupts.noted():
        signal.raise_signal(signal.SIGINT)  # The next is raised at once again.


def test_an_error_in_a_block_that_is_held_back_is_told():
    with interrupts.noted(), pytest.raises(KeyError), interrupts.held_back():
        raise KeyError


# Interrupts a training while the C++ module of Triton is made, which calls Python's enum.
INTERRUPTED_IN_TRITON = """
import os, signal, sys
from gradrep_kernels.cli import main

def interrupt(frame, event, _):
    if event == "call" and frame.f_code.co_filename.endswith("enum.py"):
        while frame is not None:
            if frame.f_code.co_name == "exec_module" and "libtriton" in frame.f_locals["module"].__name__:
                print("in it")
                sys.setprofile(None)
                os.kill(os.getpid(), signal.SIGINT)
                return
            frame = frame.f_back

sys.setprofile(interrupt)
sys.exit(main(sys.argv[1:]))
"""


def test_an_interrupt_while_triton_is_imported(tmp_path):
    pytest.importorskip("triton")
    arguments = ["train", "--epochs", "1", "--workers", "1", "--out", str(tmp_path)]
    stopped = subprocess.run([sys.executable, "-c", INTERRUPTED_IN_TRITON, *arguments], capture_output=True, text=True)
    assert stopped.stdout == "in it\n"
    assert stopped.returncode == 130, stopped.stderr
    assert stopped.stderr.splitlines()[-1] == "interrupted; --resume goes on after the last whole epoch"


def test_processes_do_not_get_what_is_kept_from_them():
    code = "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('lives')"
    start = [sys.executable, "-c", code]
    with interrupts.kept_from_children():
        child = subprocess.run(start, capture_output=True, text=True)
    assert child.stdout == "lives\n"
    assert subprocess.run(start, capture_output=True, text=True).returncode == -signal.SIGINT


# For each line of its input, runs the command line in a fork and interrupts it after so many seconds, and not before a
# file is there.
STOPPER = """
import json, os, signal, sys, time
from pathlib import Path
import matplotlib.figure, PIL.Image
from gradrep_kernels.cli import main

for line in sys.stdin:
    seconds, file, arguments = json.loads(line)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 2)
        os.close(write)
        os._exit(main(arguments))
    os.close(write)
    with os.fdopen(read, "rb", buffering=0) as told:
        said = told.read(1)  # The job begins.
        time.sleep(seconds)
        while file and not Path(file).exists():
            time.sleep(0.01)
        os.kill(child, signal.SIGINT)
        said += told.readall()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([status, said.decode()]), flush=True)
"""
MOMENTS = int(os.environ.get("GRADREP_MOMENTS", "12"))


@pytest.mark.parametrize("readers", [0, 2])
def test_a_training_on_a_folder_ends_wherever_it_is_interrupted(tmp_path, readers):
    data = write_folder(tmp_path / "data", per_class=6, size=(64, 48))
    options = {
        "data": f"folder:{data}", "image_size": 32, "batch_size": 4, "epochs": 2000, "seeds": 1, "recipe": "sgs",
        "sgs_every": 1, "sgs_warmup": 0, "sgs_batches": 1, "threads": 1, "workers": 1, "warmup": 0,
        "model": "small", "augment": "crop,flip", "readers": readers, "out": tmp_path / "out", "name": "x",
    }  # fmt: skip
    arguments = ["train", *as_arguments(options)]
    state = tmp_path / "out" / "x" / "state" / "sgs-seed0.pt"
    draw = random.Random(0)
    moments = [(draw.uniform(0, 1.5), None) for _ in range(MOMENTS // 2 if readers else MOMENTS)]
    moments = [*moments[:-1], (0, str(state)), moments[-1]]
    epochs = []
    with subprocess.Popen(
        [sys.executable, "-c", STOPPER],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        for n, moment in enumerate(moments):
            line = [*moment, [*arguments, *(["--resume"] if n else [])]]
            print(json.dumps(line), file=server.stdin, flush=True)
            status, said = json.loads(server.stdout.readline())
            assert status == 130, said
            assert said.splitlines()[-1] == "interrupted; --resume goes on after the last whole epoch", said
            assert "Traceback" not in said
            assert "ignored" not in said
            epochs.append(len(torch.load(state, weights_only=True)["epochs"]) if state.exists() else 0)
    assert epochs == sorted(epochs)
    assert epochs[-2] > 0


def test_an_interrupt_before_there_is_a_run(tmp_path, monkeypatch, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("gradrep_kernels.cli.open_together", stopped)
    assert main(["train", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted\n"
