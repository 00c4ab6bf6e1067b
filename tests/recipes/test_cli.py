"""The commands as a person uses them: new runs, killed runs, resumed runs, wrong input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from cases_recipes import TINY, as_arguments, write_tiny_cifar10

from gradrep_kernels import csla
from gradrep_kernels.cli import main
from gradrep_kernels.recipes import files, job


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return f"cifar10:{write_tiny_cifar10(tmp_path_factory.mktemp('data') / 'cifar')}"


def train_arguments(source, out, *more):
    return ["train", "--data", source, "--out", str(out), *as_arguments(TINY), *more]


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    """The folder of a whole run, never interrupted."""
    out = tmp_path_factory.mktemp("finished")
    assert main(train_arguments(source, out, "--name", "whole", "--recipe", "repopt+sgs,csla", "--epochs", "3")) == 0
    return out / "whole"


def tensors(path):
    return torch.load(path, weights_only=True)


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def bit_repeatable(metrics_file):
    """The lines of metrics.jsonl without what is timed."""
    return [
        {key: value for key, value in json.loads(line).items() if "seconds" not in key}
        for line in metrics_file.read_text().splitlines()
    ]


def assert_same_results(folder, other):
    weights = sorted(path.name for path in (folder / "weights").iterdir())
    assert weights == sorted(path.name for path in (other / "weights").iterdir())
    for name in weights:
        assert_same_tensors(tensors(folder / "weights" / name), tensors(other / "weights" / name))
    assert_same_tensors(tensors(folder / "scales.pt"), tensors(other / "scales.pt"))
    assert bit_repeatable(folder / "metrics.jsonl") == bit_repeatable(other / "metrics.jsonl")
    a, b = (json.loads((path / "summary.json").read_text()) for path in (folder, other))
    for label in a["recipes"]:
        assert a["recipes"][label]["test_accuracy"] == b["recipes"][label]["test_accuracy"]
        assert a["recipes"][label].get("scalings") == b["recipes"][label].get("scalings")
    assert a["csla_equals_gr"] == b["csla_equals_gr"]


# ---- a whole run


def test_a_run_leaves_all_its_files_and_nothing_else(finished):
    assert {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()} == {
        "checkpoint.pt", "curves.png", "metrics.jsonl", "options.json", "scales.pt", "scales.png", "spatial_scaling_repopt_sgs.png",
        "summary.json", "summary.md", "weights/csla-seed0.pt", "weights/repopt+sgs-seed0.pt",
    }  # fmt: skip
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary["recipes"]) == {"repopt+sgs", "csla"}
    assert summary["csla_equals_gr"]["agrees"]
    assert summary["threads"] == 1
    assert summary["options"]["epochs"] == 3
    assert summary["recipes"]["repopt+sgs"]["sgs_updates"] == 1
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(line["run"], line["epoch"]) for line in lines] == [
        ("search", 1), ("search", 2), *(("repopt+sgs-seed0", n) for n in (1, 2, 3)), *(("csla-seed0", n) for n in (1, 2, 3)),
    ]  # fmt: skip


def test_the_table_and_the_two_checks_are_printed(source, tmp_path, capsys):
    assert main(train_arguments(source, tmp_path, "--recipe", "repopt", "--epochs", "1", "--seeds", "2")) == 0
    out, err = capsys.readouterr()
    assert "recipe" in out
    assert "±" in out
    assert "Scales after 2 epochs of Hyper-Search lie" in out
    assert "CSLA = GR in float64 over 3 steps" in out
    assert "repopt-seed1: test accuracy" in err
    assert "\r" not in err  # plain lines where there is no terminal


def test_the_same_seed_gives_the_same_bits_under_a_name_of_its_own(source, finished, tmp_path):
    again = train_arguments(source, tmp_path, "--recipe", "repopt+sgs,csla", "--epochs", "3")
    assert main(again) == 0
    assert_same_results(finished, tmp_path / "cifar10-small")
    assert main([*again[:-4], "--recipe", "sgd", "--epochs", "1"]) == 0
    assert main([*again[:-4], "--recipe", "sgd", "--epochs", "1"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cifar10-small", "cifar10-small-2", "cifar10-small-3"]
    assert not (tmp_path / "cifar10-small-2" / "scales.pt").exists()  # plain SGD needs no search


def test_another_seed_gives_other_weights(source, finished, tmp_path):
    assert (
        main(train_arguments(source, tmp_path, "--name", "x", "--recipe", "csla", "--epochs", "3", "--seed", "1")) == 0
    )
    a, b = tensors(finished / "weights" / "csla-seed0.pt"), tensors(tmp_path / "x" / "weights" / "csla-seed1.pt")
    assert not torch.equal(a["linear.weight"], b["linear.weight"])


@pytest.mark.parametrize(("recipe", "warmup", "told"), [("sgs", 2, True), ("sgs", 1, False), ("sgd", 2, False)])
def test_a_spatial_scaling_that_never_falls_due_is_told_once(source, tmp_path, capsys, recipe, warmup, told):
    assert (
        main(
            train_arguments(
                source, tmp_path, "--recipe", recipe, "--epochs", "2", "--seeds", "2", "--sgs-warmup", str(warmup)
            )
        )
        == 0
    )
    assert (
        capsys.readouterr().err.count(
            "no update of the spatial gradient scaling falls due (--sgs-warmup 2, of 2 epochs"
        )
        == told
    )
    if recipe == "sgs":
        (folder,) = tmp_path.iterdir()
        assert json.loads((folder / "summary.json").read_text())["recipes"]["sgs"]["sgs_updates"] == (not told)


def test_spatial_scaling_every_epoch_and_rarely(source, tmp_path):
    for every, updates in ((1, 3), (2, 2), (9, 1)):
        name = f"every{every}"
        assert (
            main(
                train_arguments(
                    source, tmp_path, "--name", name, "--recipe", "sgs", "--epochs", "4", "--sgs-every", str(every)
                )
            )
            == 0
        )
        assert json.loads((tmp_path / name / "summary.json").read_text())["recipes"]["sgs"]["sgs_updates"] == updates


# ---- killed


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


# ---- search, then train with its scales


def test_search_writes_scales_that_train_takes(source, finished, tmp_path, capsys):
    wanted = [
        text
        for name, value in TINY.items()
        if name in ("batch_size", "search_epochs", "warmup", "threads")
        for text in as_arguments({name: value})
    ]
    output = tmp_path / "mine.pt"
    search = ["search", "--data", source, "--out", str(tmp_path), *wanted, "--output", str(output)]
    assert main(search) == 0
    assert "epochs of Hyper-Search lie" in capsys.readouterr().out
    assert_same_tensors(tensors(output), tensors(finished / "scales.pt"))  # the search of `train`, alone
    assert main(search) == 2
    assert f"--output {output} is there already" in capsys.readouterr().err
    assert (
        main(
            train_arguments(
                source, tmp_path, "--name", "y", "--recipe", "repopt+sgs,csla", "--epochs", "3", "--scales", str(output)
            )
        )
        == 0
    )
    assert_same_tensors(*(tensors(folder / "weights" / "repopt+sgs-seed0.pt") for folder in (finished, tmp_path / "y")))
    summary = json.loads((tmp_path / "y" / "summary.json").read_text())
    assert summary["search"] is None
    assert summary["scales"]["source"] == str(output)
    assert main(["train", "--out", str(tmp_path), "--name", "cifar10-small-search", "--resume"]) == 2
    assert "was started by `search`" in capsys.readouterr().err


def test_scales_named_by_block_are_taken_and_kept_by_conv(source, finished, tmp_path):
    blocks = {name.replace(".conv.", "."): tensor for name, tensor in tensors(finished / "scales.pt").items()}
    torch.save(blocks, tmp_path / "blocks.pth")
    assert (
        main(
            train_arguments(
                source,
                tmp_path,
                "--name",
                "z",
                "--recipe",
                "csla",
                "--epochs",
                "3",
                "--scales",
                str(tmp_path / "blocks.pth"),
            )
        )
        == 0
    )
    assert_same_results_of("csla-seed0.pt", finished, tmp_path / "z")


def assert_same_results_of(name, folder, other):
    assert_same_tensors(*(tensors(path / "weights" / name) for path in (folder, other)))
    assert csla.load_scales(folder / "scales.pt").keys() == csla.load_scales(other / "scales.pt").keys()


# ---- wrong input


def wrong_cases(source, tmp_path, finished):
    unfit = tmp_path / "unfit.pt"
    flat = tensors(finished / "scales.pt")
    torch.save({name: tensor for name, tensor in flat.items() if not name.startswith("stage0")}, unfit)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("the only copy")
    ours = ["--out", str(tmp_path)]
    theirs = ["--out", str(finished.parent), "--name", finished.name]
    return {
        "data": (["train", *ours, "--data", "cifar10:/nowhere"], "/nowhere: no such folder"),
        "data of a search": (["search", *ours, "--data", "folder:/nowhere"], "/nowhere: no such folder"),
        "option": (["train", *ours, "--epochs", "0"], "--epochs must be at least 1"),
        "scales not there": (["train", *ours, "--data", source, "--scales", "/nowhere.pt"], "--scales /nowhere.pt: no scales file"),
        "scales that do not fit": (["train", *ours, "--data", source, "--scales", str(unfit)], "stage0.conv: missing"),
        "scales of another kind": (["train", *ours, "--data", source, "--scales", str(finished / "summary.md")], "is not a scales file"),
        "scales that nobody uses": (["train", *ours, "--data", source, "--recipe", "sgd", "--scales", str(unfit)], "none of the recipes sgd uses scales"),
        "folder in use": (["train", *ours, "--data", source, "--name", "full"], "has something in it already"),
        "finished run": (["train", *theirs, "--data", source], "has something in it already"),
        "nothing to resume": (["train", *ours, "--name", "none", "--resume"], "there is no run to resume"),
        "no default to resume": (["train", *ours, "--resume"], "there is no run to resume"),
        "resume differs": (["train", *theirs, "--resume", "--lr", "0.2"], "--lr was 0.1 when this run was started, now it is 0.2"),
        "resume of another recipe": (["train", *theirs, "--resume", "--recipe", "sgd"], "--recipe was repopt+sgs,csla when"),
        "search of a train": (["search", *theirs, "--resume"], "was started by `train`"),
        "output folder": (["search", *ours, "--data", source, "--output", "/nowhere/s.pt"], "--output /nowhere/s.pt: no such folder"),
    }  # fmt: skip


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
    assert before == (
        sorted(tmp_path.rglob("*")),
        {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()},
    )


def test_a_damaged_checkpoint_is_told(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "damaged")
    checkpoint = tmp_path / "damaged" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert main(["train", "--out", str(tmp_path), "--name", "damaged", "--resume"]) == 2
    err = capsys.readouterr().err
    assert f"{checkpoint}: cannot be read, it is damaged" in err
    assert err.count("\n") == 1


def test_env_into_a_pipe_that_closes():
    command = f"{sys.executable} -m gradrep_kernels env | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_a_folder_that_cannot_be_written_is_told(source, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert main(["train", "--data", source, "--out", str(tmp_path / "file"), "--name", "x"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_other_data_than_at_the_start_is_refused(source, tmp_path, capsys):
    folder = write_tiny_cifar10(tmp_path / "cifar")
    assert main(train_arguments(f"cifar10:{folder}", tmp_path, "--name", "x", "--recipe", "sgd", "--epochs", "1")) == 0
    (folder / "data_batch_1.bin").write_bytes((folder / "data_batch_1.bin").read_bytes()[:3073])
    assert main(["train", "--out", str(tmp_path), "--name", "x", "--resume"]) == 2
    assert "is not what it was when" in capsys.readouterr().err


def test_a_check_that_fails_is_status_1(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        job, "csla_equals_gr", lambda *_: {"steps": 3, "outputs": 0.5, "weights": 0.25, "agrees": False}
    )
    assert main(train_arguments(source, tmp_path, "--recipe", "repopt", "--epochs", "1")) == 1
    assert "NOT within 1e-10" in capsys.readouterr().out


def test_an_unknown_option_is_argparses_own_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--epoch", "3"])
    assert stopped.value.code == 2
    assert "unrecognized arguments: --epoch" in capsys.readouterr().err


# ---- help and env


@pytest.mark.parametrize("command", ["train", "search", "env"])
def test_every_option_has_help_with_its_default(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    described = text[text.index("\noptions:") :].split("\n  -")[2:]  # without -h
    assert described
    for option in described:
        assert "default: " in " ".join(option.split()), option


def test_env_as_text_and_as_json():
    done = subprocess.run(
        [sys.executable, "-m", "gradrep_kernels", "env", "--json"], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert {"versions", "platform", "cpu", "cuda", "backend", "ops"} <= found.keys()
    assert {row["op"] for row in found["ops"]} >= {"rep_sgd_step", "joint_histogram"}


def test_env_says_which_backend_is_forced(capsys, monkeypatch):
    from gradrep_kernels import use_backend

    with use_backend("reference"):
        assert main(["env"]) == 0
    assert "backend          reference" in capsys.readouterr().out
