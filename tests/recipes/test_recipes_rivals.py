"""The rows of other papers: what they train, that it merges, and DyRep's structure from epoch to epoch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases_recipes import TINY, assert_same_tensors, tensors
from torch import nn

from gradrep_kernels import models
from gradrep_kernels.branches.diverse import DiverseBranchBlock
from gradrep_kernels.branches.grown import DynamicBranches
from gradrep_kernels.branches.normed import NormedBranches
from gradrep_kernels.branches.quantizable import QuantizableBranches
from gradrep_kernels.recipes import plots
from gradrep_kernels.recipes.build import build, plain_model
from gradrep_kernels.recipes.costs.run import _maker
from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.merged import merged_figures
from gradrep_kernels.recipes.options.resolve import resolve
from gradrep_kernels.recipes.report import write_report
from gradrep_kernels.recipes.table import RECIPES, RIVALS, in_all
from gradrep_kernels.recipes.training import train_epoch
from gradrep_kernels.recipes.trainings import STATE, Training, do_training, take_structure

pytestmark = pytest.mark.usefixtures("one_thread")
BLOCKS = {"acb": NormedBranches, "dbb": DiverseBranchBlock, "qarepvgg": QuantizableBranches}


def test_rivals_are_asked_for_by_name():
    assert RIVALS == ("acb", "dbb", "qarepvgg", "dyrep")
    assert not {*RIVALS} & {*in_all()}
    assert resolve({"recipe": ("rivals",)}).recipe == RIVALS
    assert not {*RIVALS} & {*resolve({}).recipe}
    assert all(RECIPES[name].compared_with == ("sgd",) for name in RIVALS)


@pytest.mark.parametrize("name", BLOCKS)
def test_rivals_have_the_blocks_of_their_papers_at_every_convolution(name, options, data, scales):
    model = build(RECIPES[name], options, data, None, 0, 0.1).model
    blocks = {where for where, module in model.named_modules() if type(module) is BLOCKS[name]}
    assert blocks == {*scales}
    plain = plain_model(options, data, 0)
    assert all(torch.equal(next(model.get_submodule(n).parameters()), plain.get_submodule(n).weight) for n in blocks)
    trained = train_epoch(build(RECIPES[name], options, data, None, 0, 0.1), data, options, 0, 0, 1, lambda: None)
    assert trained["train_loss"] > 0


@pytest.mark.parametrize("name", [*BLOCKS, "dyrep"])
def test_rivals_keep_to_the_convolutions_that_a_model_names(name, data, source, tiny_ghost):
    options = resolve({"data": source, **TINY, "model": tiny_ghost})
    trainee = build(RECIPES[name], options, data, None, 0, 0.1)
    if name == "dyrep":
        train_epoch(trainee, data, options, 0, 0, 2, lambda: None)
        found = {*trainee.structure.scores}
    else:
        found = {n for n, module in trainee.model.named_modules() if type(module) is BLOCKS[name]}
    assert found == {*plain_model(options, data, 0).branch_form.where}


def test_dyrep_keeps_the_papers_intervals(options, data, tmp_path):
    def of(epochs, source=None):
        changed = dataclasses.replace(options, epochs=epochs, data=options.data if source is None else source)
        structure = build(RECIPES["dyrep"], changed, data, None, 0, 0.1).structure
        return structure.every, structure.until

    folder = resolve({"data": f"folder:{tmp_path}"}).data
    assert of(600) == (15, 500)  # CIFAR
    assert of(120, folder) == (5, 100)  # ImageNet
    assert of(10) == (1, 8)


def test_dyrep_decays_what_the_options_say(options, data):
    for rule in ("repopt", "everything"):
        changed = dataclasses.replace(options, decay=rule, epochs=6)
        trainee = build(RECIPES["dyrep"], changed, data, None, 0, 0.1)
        for epoch in range(3):
            train_epoch(trainee, data, changed, 0, epoch, 6, lambda: None)
        grown = [name for name, module in trainee.model.named_modules() if isinstance(module, DynamicBranches)]
        assert grown
        decayed = {p for group in trainee.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
        norm = trainee.model.get_submodule(grown[0]).branches["1x1"].norm.weight
        assert (norm in decayed) == (rule == "everything")
        assert trainee.model.get_submodule(grown[0]).branches["1x1"].conv.weight in decayed


def test_dyrep_is_not_compiled(options, data):
    with pytest.raises(InputError, match="--compile: dyrep changes its network while it trains"):
        build(RECIPES["dyrep"], dataclasses.replace(options, compile=True), data, None, 0, 0.1)


@pytest.mark.parametrize("name", ["acb", "dbb", "qarepvgg", "repvgg", "csla"])
def test_merged_figures_are_those_of_the_deployed_network(name, options, data, scales):
    trainee = build(RECIPES[name], options, data, scales, 0, 0.1)
    train_epoch(trainee, data, options, 0, 0, 1, lambda: None)
    figures = merged_figures(trainee.model, data, "cpu")
    plain = plain_model(options, data, 0)
    biases = 0 if name == "csla" else sum(m.out_channels for m in plain.modules() if isinstance(m, nn.Conv2d))
    norms = sum(p.numel() for m in plain.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    # A block that takes its norm along leaves a bias, the others leave the norm.
    taken = norms if name in ("acb", "dbb", "repvgg") else 0
    assert figures["parameters_deployed"] == sum(p.numel() for p in plain.parameters()) + biases - taken
    assert 0 < figures["merge_difference"] < 1e-5
    assert merged_figures(plain, data, "cpu") == {}


def test_merged_figures_see_a_wrong_merge(options, data, monkeypatch):
    trainee = build(RECIPES["dbb"], options, data, None, 0, 0.1)
    monkeypatch.setattr(DiverseBranchBlock, "sums", lambda self: self.branches["kxk"].sums())
    assert merged_figures(trainee.model, data, "cpu")["merge_difference"] > 0.05


def test_the_summary_has_the_largest_difference_of_all_seeds(tmp_path, options, data, monkeypatch):
    for name in plots.__all__:
        monkeypatch.setattr(plots, name, lambda *_: None)
    timing = {"seconds": 0.5, "sgs_updated": False, "sgs_seconds": 0.0}
    epochs = [{"train_loss": 1.0, "lr": 0.1, "test_accuracy": 0.5, **timing}]
    kept = {"lr": 0.1, "epochs": epochs, "diverged": None, "parameters": 1234, "multiplier_bytes": 0}
    change = {"epoch": 1, "name": "stage0.conv", "grown": ["1x1"], "cut": []}
    grown = [{**kept, "parameters_deployed": 99, "merge_difference": d, "structure": [change]} for d in (1e-7, 3e-7)]
    trainings = {"sgd": {0.1: [kept, kept]}, "dyrep": {0.1: grown}}
    results = {"check": None, "speed": {name: [0.01, 0.01, 0.01] for name in trainings}, "seconds": 1.0}
    asked = dataclasses.replace(options, recipe=("sgd", "dyrep"), seeds=2)
    recipes = write_report(tmp_path, asked, data, trainings, [0, 1], results, None, None)["recipes"]
    assert (recipes["dyrep"]["parameters_deployed"], recipes["dyrep"]["merge_difference"]) == (99, 3e-7)
    assert recipes["dyrep"]["structure"] == [change]
    assert not {"parameters_deployed", "merge_difference", "structure"} & recipes["sgd"].keys()


class Listener:
    """Stops a training behind the state of an epoch."""

    def __init__(self, last: int | None = None):
        self.last = last

    def batch(self):
        pass

    def epoch(self, training, epoch, epochs, record):
        if epoch == self.last:
            raise KeyboardInterrupt


def test_a_killed_training_of_dyrep_resumes_to_the_same_bits(source, data, tmp_path):
    options = resolve({"data": source, **TINY, "recipe": ("dyrep",), "epochs": 5})
    training = Training("dyrep-seed0", "dyrep", 0, 0.1, 5)
    folders = [tmp_path / "whole", tmp_path / "stopped"]
    for folder in folders:
        (folder / STATE).mkdir(parents=True)
    whole = do_training(folders[0], options, training, Listener())
    for last in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            do_training(folders[1], options, training, Listener(last))
    resumed = do_training(folders[1], options, training, Listener())
    assert [change["epoch"] for change in whole["structure"] if change["grown"]] == [1, 2, 3, 4]
    assert resumed["structure"] == whole["structure"]
    assert 0 < whole["merge_difference"] < 1e-5
    assert whole["parameters_deployed"] < whole["parameters"]
    weights = [tensors(folder / "weights" / "dyrep-seed0.pt") for folder in folders]
    assert_same_tensors(*weights)
    assert [record["train_loss"] for record in resumed["epochs"]] == [r["train_loss"] for r in whole["epochs"]]

    # A row starts from the plain network. Its trained structure is in its weights.
    trainee = build(RECIPES["dyrep"], options, data, None, 0, 0.1)
    take_structure(folders[0], trainee, "dyrep", 0, 0.1)
    trainee.model.load_state_dict(weights[0])
    assert sum(p.numel() for p in trainee.model.parameters()) == whole["parameters"]
    measured = _maker(RECIPES["dyrep"], options, data, None, folders[0])().model  # what `costs` measures
    assert sum(p.numel() for p in measured.parameters()) == whole["parameters"]
    untouched = build(RECIPES["dyrep"], options, data, None, 0, 0.1)
    take_structure(tmp_path, untouched, "dyrep", 0, 0.1)
    assert not any(isinstance(module, DynamicBranches) for module in untouched.model.modules())


def test_the_controller_is_no_model_of_the_commands():
    assert models.DynamicReparameterization is not None
    with pytest.raises(InputError):
        resolve({"model": "DynamicReparameterization"})
