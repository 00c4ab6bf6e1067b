"""Wrong input of the commands: one line of error and exit status 2."""

from __future__ import annotations

import shutil

import pytest
import torch
from cases_recipes import (
    tensors,
    train,
    train_arguments,
    write_tiny_cifar10,
)

from gradrep_kernels.cli import main
from gradrep_kernels.recipes import job

pytestmark = pytest.mark.usefixtures("no_pictures")


def wrong_cases(source, tmp_path, finished):
    unfit = tmp_path / "unfit.pt"
    flat = tensors(finished / "scales.pt")
    torch.save({name: tensor for name, tensor in flat.items() if not name.startswith("stage0")}, unfit)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("the only copy")
    ours = ["--out", str(tmp_path)]
    theirs = ["--out", str(finished.parent), "--name", finished.name]
    train, search = ["train", *ours, "--data", source], ["search", *ours, "--data", source]
    again = ["train", *theirs, "--resume"]
    return {
        "no kind of data": (["train", *ours, "--data", "mnist"], "--data must be digits, cifar10:DIR,"),
        "data": (["train", *ours, "--data", "cifar10:/nowhere"], "/nowhere: no such folder"),
        "data of a search": (["search", *ours, "--data", "folder:/nowhere"], "/nowhere: no such folder"),
        "option": (["train", *ours, "--epochs", "0"], "--epochs must be at least 1"),
        "scales not there": ([*train, "--scales", "/nowhere.pt"], "--scales /nowhere.pt: no scales file"),
        "scales that do not fit": ([*train, "--scales", str(unfit)], "stage0.conv: missing"),
        "scales of another kind": ([*train, "--scales", str(finished / "summary.md")], "is not a scales file"),
        "scales that nobody uses": (
            [*train, "--recipe", "sgd", "--scales", str(unfit)],
            "none of the recipes sgd uses scales",
        ),
        "folder in use": ([*train, "--name", "full"], "has something in it already"),
        "finished run": (["train", *theirs, "--data", source], "has something in it already"),
        "nothing to resume": (["train", *ours, "--name", "none", "--resume"], "there is no run to resume"),
        "no default to resume": (["train", *ours, "--resume"], "there is no run to resume"),
        "resume differs": ([*again, "--lr", "0.2"], "--lr was 0.1 when this run was started, now it is 0.2"),
        "resume of another recipe": ([*again, "--recipe", "sgd"], "--recipe was repopt+sgs,csla when"),
        "search of a train": (["search", *theirs, "--resume"], "was started by `train`"),
        "output folder": ([*search, "--output", "/nowhere/s.pt"], "--output /nowhere/s.pt: no such folder"),
    }


def test_wrong_input_is_one_line_and_status_2_and_leaves_nothing(source, finished, tmp_path, capsys):
    cases = wrong_cases(source, tmp_path, finished)
    before = sorted(tmp_path.rglob("*")), {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    for name, (arguments, said) in cases.items():
        assert main(arguments) == 2, name
        out, err = capsys.readouterr()
        assert said in err, name
        assert err.startswith("error: "), name
        assert err.count("\n") == 1, name
        assert out == "", name
    after = sorted(tmp_path.rglob("*")), {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert after == before


def test_a_damaged_checkpoint_is_told(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "damaged")
    checkpoint = tmp_path / "damaged" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert main(["train", "--out", str(tmp_path), "--name", "damaged", "--resume"]) == 2
    err = capsys.readouterr().err
    assert f"{checkpoint}: cannot be read, it is damaged" in err
    assert err.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_told(source, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert main(["train", "--data", source, "--out", str(tmp_path / "file"), "--name", "x"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_other_data_than_at_the_start_is_refused(source, tmp_path, capsys):
    folder = write_tiny_cifar10(tmp_path / "cifar")
    train(f"cifar10:{folder}", tmp_path, "--name", "x", "--recipe", "sgd", "--epochs", "1")
    (folder / "data_batch_1.bin").write_bytes((folder / "data_batch_1.bin").read_bytes()[:3073])
    assert main(["train", "--out", str(tmp_path), "--name", "x", "--resume"]) == 2
    assert "is not what it was when" in capsys.readouterr().err


def test_a_check_that_fails_is_status_1(source, tmp_path, monkeypatch, capsys):
    failed = {"steps": 3, "outputs": 0.5, "weights": 0.25, "agrees": False}
    monkeypatch.setattr(job, "csla_equals_gr", lambda *_: failed)
    assert main(train_arguments(source, tmp_path, "--recipe", "repopt", "--epochs", "1")) == 1
    assert "NOT within 1e-10" in capsys.readouterr().out


def test_an_unknown_option_is_argparses_own_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--epoch", "3"])
    assert stopped.value.code == 2
    assert "unrecognized arguments: --epoch" in capsys.readouterr().err
