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
    train_arguments,
)

from gradrep_kernels import csla
from gradrep_kernels.cli import main


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
