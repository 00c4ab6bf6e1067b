"""Presets: the settings of the papers' experiments, and which one holds where none is named."""

from __future__ import annotations

import json

import pytest

from gradrep_kernels.cli import main
from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.options import resolve
from gradrep_kernels.recipes.presets import PRESETS

TRAINED = [name for name, preset in PRESETS.items() if preset.command != "quantize"]
DATA = {"cifar10": "cifar10:/x", "cifar100": "cifar100:/x", "folder": "folder:/x"}


def resolved(name, **given):
    return resolve({"preset": name, "data": DATA[PRESETS[name].kinds[-1]], **given})


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("search", [False, True])
def test_settings_of_a_preset_are_all_taken(name, search):
    preset = PRESETS[name]
    options = resolve({"preset": name, "data": DATA[preset.kinds[-1]]}, search)
    for option, value in preset.settings(search).items():
        assert getattr(options, option) == ((value,) if option == "lr" else value) or option in (
            "augment",
            "search_augment",
        )
    assert options.preset == name


def test_options_override_a_preset_wherever_they_stand(capsys):
    for arguments in (["--preset", "sgs-cifar-200", "--epochs", "7"], ["--epochs", "7", "--preset", "sgs-cifar-200"]):
        assert main(["train", "--data", "cifar100:/nowhere", *arguments, "--print-options"]) == 0
        out, err = capsys.readouterr()
        options = json.loads(out)
        assert (options["epochs"], options["weight_decay"], options["recipe"]) == (7, 5e-4, ["sgd", "sgs"])
        assert "sgs-cifar-200 (Spatial Gradient Scaling, appendix A.1)" in err
    assert main(["search", "--data", "cifar100:/nowhere", "--batch-size", "64", "--print-options"]) == 0
    options = json.loads(capsys.readouterr().out)
    assert (options["preset"], options["batch_size"], options["search_batch_size"]) == ("repopt-hs", 64, 64)
    assert (options["search_epochs"], options["nesterov"], options["schedule"]) == (240, True, "cosine-whole")


PAPERS = {
    "search": ("cifar100:/x", {}, True, "repopt-hs"),
    "repopt": ("cifar100:/x", {"recipe": ("sgd", "repopt")}, False, "repopt-hs"),
    "sgs": ("cifar100:/x", {"recipe": ("sgd", "sgs")}, False, "sgs-cifar-200"),
    "both": ("cifar10:/x", {"recipe": ("sgs", "repopt+sgs")}, False, "repopt-hs"),
    "ablation": ("cifar10:/x", {"recipe": ("sgs",), "ablate": ("ones",)}, False, "repopt-hs"),
    "plain": ("cifar10:/x", {"recipe": ("sgd",)}, False, "sgs-cifar-200"),
    "folder": ("folder:/x", {"recipe": ("repvgg",)}, False, "repopt-imagenet"),
    "folder of sgs": ("folder:/x", {"recipe": ("sgs",)}, False, "sgs-imagenet"),
    "digits": ("digits", {}, False, None),
    "mnist": ("mnist:/x", {}, False, None),
}


@pytest.mark.parametrize("case", PAPERS)
def test_without_a_preset_the_paper_whose_recipe_runs_has_a_say_and_it_is_told(case):
    data, given, search, preset = PAPERS[case]
    options = resolve({"data": data, **given, "workers": 1}, search)
    assert options.preset == preset
    assert (preset is None) == (not any("settings are those of" in line for line in options.advice()))


def test_the_search_has_settings_of_its_own():
    options = resolved("sgs-cifar-600", recipe=("sgs", "repopt"))
    search = options.of_search()
    assert (options.batch_size, options.weight_decay, options.decay, options.nesterov) == (
        128,
        1e-4,
        "everything",
        False,
    )
    assert (search.batch_size, search.weight_decay, search.decay, search.nesterov) == (256, 4e-5, "repopt", True)
    assert (search.epochs, search.label_smoothing, search.schedule, search.lr) == (240, 0.1, "cosine-whole", (0.1,))


def test_another_optimizer_takes_its_own_learning_rate():
    assert resolved("sgs-cifar-200", optimizer="adam").lr == (1e-3,)
    assert resolved("sgs-cifar-200", optimizer="adadelta").lr == (1.0,)
    assert resolved("sgs-cifar-200", optimizer="adam", lr=0.02).lr == (0.02,)
    assert resolved("sgs-cifar-200", optimizer="adam").search_lr == 0.1


def test_a_preset_of_other_data_is_told():
    (line,) = (line for line in resolve({"preset": "sgs-cifar-200", "data": "mnist:/x"}).advice() if "is for" in line)
    assert line == "--preset sgs-cifar-200 is for cifar10 or cifar100, the data is mnist"
    with pytest.raises(InputError, match="--preset"):
        resolve({"preset": "repopt-imagenet"})
