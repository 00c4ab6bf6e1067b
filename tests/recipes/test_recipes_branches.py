"""Branches of the commands: those of --branches, and those that a model says."""

from __future__ import annotations

import json

import pytest
import torch
from cases_recipes import TINY, as_arguments, assert_same_tensors, tensors, train
from torch import nn

from gradrep_kernels import csla, models
from gradrep_kernels.branches.csla import CSLABlock
from gradrep_kernels.branches.normed import NormedBranches
from gradrep_kernels.cli import main
from gradrep_kernels.recipes.build import build, plain_model, search_model
from gradrep_kernels.recipes.options.resolve import resolve
from gradrep_kernels.recipes.scale_sources import initial_scales
from gradrep_kernels.recipes.table import ABLATIONS, RECIPES, ablated

pytestmark = pytest.mark.usefixtures("no_pictures", "one_thread")
DIGITS = {"data": "digits", "model": "small", "batch_size": 200, "epochs": 1, "search_epochs": 1, "warmup": 0}


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def kernel_sizes(block):
    return [m.kernel_size for m in block.modules() if isinstance(m, nn.Conv2d)]


def blocks_of(model, kind):
    return {name: m for name, m in model.named_modules() if isinstance(m, kind)}


def test_every_row_has_the_branches_that_were_given(data, options):
    given = resolve({**TINY, "data": str(options.data), "branches": "acb"})
    search = search_model(given, data).model
    scales = csla.extract_scales(search)
    rows = {name: build(RECIPES[name], given, data, scales, 0, 0.1).model for name in ("csla", "repvgg")}
    acb = [(3, 3), (1, 3), (3, 1)]
    found = {
        "search": blocks_of(search, CSLABlock),
        "csla": blocks_of(rows["csla"], CSLABlock),
        "repvgg": blocks_of(rows["repvgg"], NormedBranches),
    }
    for name, blocks in found.items():
        assert list(blocks) == list(scales), name
        assert all(kernel_sizes(block) == acb for block in blocks.values()), name
    for row in (RECIPES["repopt"], *map(ablated, ABLATIONS)):
        trainee = build(row, given, data, scales, 0, 0.1)
        if row.grad_mults:
            m = trainee.optimizer.grad_mult(trainee.model.get_submodule("stage0.conv").weight).scale[0, 0]
            assert m[0, 0] < m[0, 1] < m[1, 1], row.name
            assert m[0, 1] == pytest.approx(float(m[2, 1])), row.name


def test_a_search_and_a_training_with_other_branches(tmp_path, capsys):
    """What `search` writes, `train` takes, and it gives what `train` finds alone."""
    output = tmp_path / "acb.pt"
    ours = ["--out", str(tmp_path), "--branches", "acb"]
    of_search = {name: value for name, value in DIGITS.items() if name != "epochs"}
    assert main(["search", *as_arguments({**of_search, "threads": 1}), *ours, "--output", str(output)]) == 0
    assert (tmp_path / "digits-small-acb-search").is_dir()
    assert {tuple(value.tensors()) for value in csla.load_scales(output).values()} == {("conv", "1x3", "3x1")}
    its_search = {"search_batch_size": DIGITS["batch_size"], "search_warmup": 0}
    arguments = as_arguments({**TINY, **DIGITS, **its_search, "lr": 0.1, "recipe": "repopt"})
    assert main(["train", *arguments, *ours]) == 0
    assert main(["train", *arguments, *ours, "--scales", str(output), "--check-steps", "0"]) == 0
    searched, given = tmp_path / "digits-small-acb", tmp_path / "digits-small-acb-2"
    assert_same_tensors(*(tensors(folder / "weights" / "repopt-seed0.pt") for folder in (searched, given)))
    summary = summary_of(searched)
    assert summary["options"]["branches"] == "acb"
    assert summary["csla_equals_gr"]["agrees"]
    assert "repopt_vgg_small with acb branches on digits" in (searched / "summary.md").read_text()
    assert main(["train", "--out", str(tmp_path), "--data", "digits", "--model", "small", *ours, "--resume"]) == 0
    assert "Written to " + str(given) in capsys.readouterr().out  # the last of the default name
    assert main(["train", *arguments, "--out", str(tmp_path), "--scales", str(output)]) == 2
    err = capsys.readouterr().err
    has = "other branches than --model repopt_vgg_small without --branches has"
    assert f"{has}: stage0.conv: kxk + 1x3 + 3x1, not kxk + 1x1;" in err
    assert err.count("\n") == 1


def test_a_number_in_the_name_of_a_preset_is_no_part_of_a_path(source, tmp_path):
    train(source, tmp_path, "--recipe", "repvgg", "--epochs", "1", "--branches", "mobileone:2")
    assert [path.name for path in tmp_path.iterdir()] == ["cifar10-small-mobileone2"]


# ---- a model that says which branches it has


def ghost_convs(model):
    return [name for name, _ in model.named_modules() if name.endswith("cheap_operation.0")]


def test_a_model_says_which_branches_it_has(data, options, tiny_ghost):
    given = resolve({**TINY, "data": str(options.data), "model": tiny_ghost})
    plain = plain_model(given, data, 0)
    scales = initial_scales(plain)
    own = csla.extract_scales(models.repopt_ghostnet("hs", width=0.05))
    assert list(scales) == list(own) == ghost_convs(plain)
    for name, value in own.items():
        assert value.one_by_one is None
        assert_same_tensors(scales[name].tensors(), value.tensors())
    repopt, explicit, normed = (
        build(RECIPES[row], given, data, scales, 0, 0.1) for row in ("repopt", "csla", "repvgg")
    )
    multiplied = [name for name, p in repopt.model.named_parameters() if repopt.optimizer.grad_mult(p) is not None]
    assert multiplied == [f"{name}.weight" for name in scales]
    assert list(blocks_of(explicit.model, CSLABlock)) == list(scales)
    blocks = blocks_of(normed.model, NormedBranches)
    assert list(blocks) == list(scales)
    assert all(len(block.norms) == 1 and block.norm_identity is not None for block in blocks.values())
    every = resolve({**TINY, "data": str(options.data), "model": tiny_ghost, "branches": "repvgg"})
    assert "conv_stem" in initial_scales(plain_model(every, data, 0))  # --branches is for all convolutions


def test_a_ghost_network_end_to_end(source, tmp_path, tiny_ghost, capsys):
    """By block names, as the published file has them. A file that leaves one out is refused."""
    output = tmp_path / "scales.pt"
    short = {**TINY, "epochs": 1, "search_epochs": 1, "warmup": 0}
    of_search = {name: short[name] for name in ("batch_size", "search_epochs", "warmup", "threads")}
    ours = ["--data", source, "--out", str(tmp_path), "--model", tiny_ghost]
    assert main(["search", *as_arguments(of_search), *ours, "--output", str(output)]) == 0
    published = {name.replace(".cheap_operation.0.", "."): value for name, value in tensors(output).items()}
    torch.save(published, tmp_path / "published.pth")
    given = [*as_arguments(short), *ours, "--recipe", "sgd,repopt,csla,repvgg"]
    assert main(["train", *given, "--scales", str(tmp_path / "published.pth")]) == 0
    run = tmp_path / f"cifar10-{tiny_ghost}"
    assert_same_tensors(tensors(run / "scales.pt"), tensors(output))
    assert list(csla.load_scales(run / "scales.pt")) == ghost_convs(models.repopt_ghostnet(width=0.05))
    summary = summary_of(run)
    assert summary["csla_equals_gr"]["agrees"]
    assert set(summary["recipes"]) == {"sgd", "repopt", "csla", "repvgg"}
    capsys.readouterr()
    lacking = {name: value for name, value in published.items() if not name.startswith("blocks.0.0.ghost2")}
    torch.save(lacking, tmp_path / "lacking.pth")
    assert main(["train", *given, "--scales", str(tmp_path / "lacking.pth")]) == 2
    err = capsys.readouterr().err
    assert err.endswith("blocks.0.0.ghost2.cheap_operation.0: no branches, not kxk + identity\n")
    assert err.count("\n") == 1
