"""Whole runs of `train` and `search`: their files, their output, and the same bits again from a seed."""

from __future__ import annotations

import json

import pytest
import torch
from cases_recipes import (
    TINY,
    as_arguments,
    assert_same_results,
    assert_same_tensors,
    tensors,
    train,
)

from gradrep_kernels import csla, models
from gradrep_kernels.cli import main
from gradrep_kernels.recipes.table import RECIPES, Recipe

pytestmark = pytest.mark.usefixtures("no_pictures")
NO_CHECK = ["--check-steps", "0"]  # The check in float64 takes longer than the training.


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def test_a_run_leaves_all_its_files_and_nothing_else(finished):
    assert {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()} == {
        "cost.png",
        "curves.png",
        "identity.png",
        "metrics.jsonl",
        "options.json",
        "scale_means.png",
        "scales.pt",
        "scales.png",
        "spatial_scaling_repopt_sgs.png",
        *(
            f"state/{part}.json"
            for part in ("check", "csla-seed0", "ranks", "repopt+sgs-seed0", "search", "seconds", "speed")
        ),
        "summary.json",
        "summary.md",
        "weights/csla-seed0.pt",
        "weights/repopt+sgs-seed0.pt",
    }
    for picture in finished.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    summary = summary_of(finished)
    assert set(summary["recipes"]) == {"repopt+sgs", "csla"}
    assert summary["csla_equals_gr"]["agrees"]
    assert summary["threads"] == 1
    assert summary["options"]["epochs"] == 3
    assert summary["recipes"]["repopt+sgs"]["sgs_updates"] == 1
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(line["run"], line["epoch"]) for line in lines] == [
        ("search", 1),
        ("search", 2),
        *(("csla-seed0", n) for n in (1, 2, 3)),  # Branches take longest, and the longest goes first.
        *(("repopt+sgs-seed0", n) for n in (1, 2, 3)),
    ]


def test_the_table_and_the_two_checks_are_printed(source, tmp_path, capsys):
    train(source, tmp_path, "--recipe", "repopt", "--epochs", "1", "--seeds", "2")
    out, err = capsys.readouterr()
    assert "recipe" in out
    assert "±" in out
    assert "Scales after 2 epochs of Hyper-Search lie" in out
    assert "CSLA = GR in float64 over 3 steps" in out
    assert "repopt-seed1: test accuracy" in err
    assert "\r" not in err  # plain lines where there is no terminal


def test_the_same_seed_gives_the_same_bits_under_a_name_of_its_own(source, finished, tmp_path):
    train(source, tmp_path, "--recipe", "repopt+sgs,csla", "--epochs", "3")
    assert_same_results(finished, tmp_path / "cifar10-small")
    for _ in range(2):
        train(source, tmp_path, "--recipe", "sgd", "--epochs", "1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cifar10-small", "cifar10-small-2", "cifar10-small-3"]
    assert not (tmp_path / "cifar10-small-2" / "scales.pt").exists()  # plain SGD needs no search


def test_another_seed_gives_other_weights(source, finished, tmp_path):
    train(source, tmp_path, "--name", "x", "--recipe", "csla", "--epochs", "3", "--seed", "1", *NO_CHECK)
    a, b = tensors(finished / "weights" / "csla-seed0.pt"), tensors(tmp_path / "x" / "weights" / "csla-seed1.pt")
    assert not torch.equal(a["linear.weight"], b["linear.weight"])


@pytest.mark.parametrize(("recipe", "warmup", "told"), [("sgs", 2, True), ("sgs", 1, False), ("sgd", 2, False)])
def test_a_spatial_scaling_that_never_falls_due_is_told_once(source, tmp_path, capsys, recipe, warmup, told):
    train(source, tmp_path, "--recipe", recipe, "--epochs", "2", "--seeds", "2", "--sgs-warmup", str(warmup))
    late = "no update of the spatial gradient scaling falls due (--sgs-warmup 2, of 2 epochs"
    assert capsys.readouterr().err.count(late) == told
    if recipe == "sgs":
        (folder,) = tmp_path.iterdir()
        assert summary_of(folder)["recipes"]["sgs"]["sgs_updates"] == (not told)


@pytest.mark.parametrize(("every", "updates"), [(1, 3), (2, 2), (9, 1)])
def test_spatial_scaling_every_epoch_and_rarely(source, tmp_path, every, updates):
    train(source, tmp_path, "--name", "x", "--recipe", "sgs", "--epochs", "4", "--sgs-every", str(every))
    assert summary_of(tmp_path / "x")["recipes"]["sgs"]["sgs_updates"] == updates


def test_a_recipe_is_one_row_of_the_table(source, tmp_path, monkeypatch):
    row = Recipe("acb", "asymmetric branches", network=lambda model, scales: models.acb_model(model))
    monkeypatch.setitem(RECIPES, "acb", row)
    train(source, tmp_path, "--name", "x", "--recipe", "acb,sgd", "--epochs", "1")
    summary = summary_of(tmp_path / "x")
    assert summary["options"]["recipe"] == ["sgd", "acb"]
    assert summary["recipes"]["acb"]["meaning"] == "asymmetric branches"
    assert summary["recipes"]["acb"]["parameters"] > summary["recipes"]["sgd"]["parameters"]
    assert summary["search"] is None
    assert (tmp_path / "x" / "weights" / "acb-seed0.pt").exists()


def test_search_writes_scales_that_train_takes(source, finished, tmp_path, capsys):
    of_search = {name: TINY[name] for name in ("model", "schedule", "batch_size", "search_epochs", "warmup", "threads")}
    output = tmp_path / "mine.pt"
    search = ["search", "--data", source, "--out", str(tmp_path), *as_arguments(of_search), "--output", str(output)]
    assert main(search) == 0
    assert "epochs of Hyper-Search lie" in capsys.readouterr().out
    assert_same_tensors(tensors(output), tensors(finished / "scales.pt"))  # the search of `train`, alone
    assert main(search) == 2
    assert f"--output {output} is there already" in capsys.readouterr().err
    train(
        source, tmp_path, "--name", "y", "--recipe", "repopt+sgs", "--epochs", "3", "--scales", str(output), *NO_CHECK
    )
    assert_same_tensors(*(tensors(folder / "weights" / "repopt+sgs-seed0.pt") for folder in (finished, tmp_path / "y")))
    summary = summary_of(tmp_path / "y")
    assert summary["search"] is None
    assert summary["scales"]["source"] == str(output)
    assert main(["train", "--out", str(tmp_path), "--name", "cifar10-small-search", "--resume"]) == 2
    assert "was started by `search`" in capsys.readouterr().err


def test_scales_named_by_block_are_taken_and_kept_by_conv(source, finished, tmp_path):
    blocks = {name.replace(".conv.", "."): tensor for name, tensor in tensors(finished / "scales.pt").items()}
    published = tmp_path / "blocks.pth"
    torch.save(blocks, published)
    train(source, tmp_path, "--name", "z", "--recipe", "csla", "--epochs", "3", "--scales", str(published), *NO_CHECK)
    assert_same_tensors(*(tensors(folder / "weights" / "csla-seed0.pt") for folder in (finished, tmp_path / "z")))
    kept, searched = (csla.load_scales(folder / "scales.pt") for folder in (tmp_path / "z", finished))
    assert kept.keys() == searched.keys()
