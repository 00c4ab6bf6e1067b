"""Wrong input of the commands: one line of error and exit status 2."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

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
    with_data = [*ours, "--data", source, "--model", "small"]
    train, search = ["train", *with_data], ["search", *with_data]
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
        "branches": ([*train, "--branches", "resnet"], "--branches must be one of repvgg, acb, repghost, mobileone:N,"),
        "branches of a search": ([*search, "--branches", "dbb"], "--branches 'dbb' have no exact form"),
        "branches that do not fit": (
            [*search, "--branches", "replk:5"],
            "--branches replk:5: branches of stage0.conv: replk:K needs an odd K smaller than the kernel, got 5 for a "
            "3 x 3 kernel\n",
        ),
        "branches without norms": (
            [*train, "--branches", "qarepvgg"],
            "have no form with a norm in each; leave repvgg out of --recipe",
        ),
        "branches that nobody uses": (
            [*train, "--recipe", "sgd,sgs", "--branches", "acb"],
            "--branches acb: none of the recipes sgd, sgs has branches",
        ),
        "scales of other branches": (
            [*train, "--branches", "repghost", "--recipe", "repopt", "--scales", str(finished / "scales.pt")],
            "other branches than --branches repghost has: stage0.conv: kxk + 1x1, not kxk; ",
        ),
        "folder in use": ([*train, "--name", "full"], "has something in it already"),
        "finished run": (["train", *theirs, "--data", source], "has something in it already"),
        "nothing to resume": (["train", *ours, "--name", "none", "--resume"], "there is no run to resume"),
        "no default to resume": (["train", *ours, "--resume"], "there is no run to resume"),
        "resume differs": ([*again, "--lr", "0.2"], "--lr was 0.1 when this run was started, now it is 0.2"),
        "resume with other branches": ([*again, "--branches", "acb"], "--branches was None when this run was started"),
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


def test_damaged_files_of_a_run_are_told(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "damaged")
    resume = ["train", "--out", str(tmp_path), "--name", "damaged", "--resume"]
    for name in ("state/search.json", "options.json"):
        path = tmp_path / "damaged" / name
        path.write_bytes(path.read_bytes()[:10])
        assert main(resume) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: {path} ")
        assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["costs", "quantize"])
@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_damaged_summary_is_told(finished, tmp_path, capsys, command, text):
    shutil.copytree(finished, tmp_path / "damaged")
    (tmp_path / "damaged" / "summary.json").write_bytes(text.encode("latin-1"))
    assert main([command, "damaged", "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {tmp_path / 'damaged' / 'summary.json'} is ")
    assert err.endswith("remove it, and `train --resume` makes it anew\n")
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


def test_scales_of_some_convolutions_are_refused_in_the_words_of_the_commands(source, finished, tmp_path, capsys):
    some = tmp_path / "some.pt"
    flat = tensors(finished / "scales.pt")
    torch.save({name: tensor for name, tensor in flat.items() if not name.startswith(("stage0", "stage1"))}, some)
    assert main(["train", "--data", source, "--model", "small", "--out", str(tmp_path), "--scales", str(some)]) == 2
    err = capsys.readouterr().err
    missing = sorted({name.split(".scale_")[0] for name in flat if name.startswith(("stage0", "stage1"))})
    assert all(f"{name}: missing" in err for name in missing[:3])
    assert err.endswith("; the commands need scales of every convolution and of its shortcut\n")
    assert "partial" not in err


@pytest.mark.skipif(os.name != "posix", reason="names of bytes")
def test_names_of_files_that_are_no_utf_8(tmp_path):
    """They come back as they were given, in a report too."""

    def run(*arguments):  # in a process of its own: pytest-xdist cannot send such names on
        return subprocess.run([sys.executable, "-m", "gradrep_kernels", *arguments], capture_output=True).returncode

    odd = tmp_path / os.fsdecode(b"caf\xe9")
    data = write_tiny_cifar10(odd / "data")
    arguments = train_arguments(
        f"cifar10:{data}", odd, "--name", "x", "--recipe", "sgd", "--epochs", "1", "--seeds", "2"
    )
    assert run(*arguments) == 0
    assert "caf" in (odd / "x" / "summary.md").read_text(encoding="utf-8")
    assert run("train", "--out", str(odd), "--name", "x", "--resume") == 0
