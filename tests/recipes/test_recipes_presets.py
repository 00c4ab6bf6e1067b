"""Presets: the settings of the papers' experiments, and which one holds where none is named."""

from __future__ import annotations

import json
import re

import pytest
from cases_recipes import ROOT, experiments_table

from gradrep_kernels.cli import main
from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.options.presets import PRESETS
from gradrep_kernels.recipes.options.resolve import resolve

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
    assert (options["preset"], options["batch_size"]) == ("repopt-hs", 64)
    assert not {"epochs", "recipe", "search_batch_size", "sgs_k"} & options.keys()
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
    for quick in (False, True):  # Those of digits are rates for SGD too.
        options = resolve({"optimizer": "adam", "recipe": ("sgd",), "quick": quick})
        assert (options.lr, options.validation, options.search_lr) == ((1e-3,), 0.0, 0.1)
    assert resolve({"optimizer": "sgd"}).lr == resolve({}).lr == (0.03, 0.1, 0.3)


def test_a_misspelt_preset_is_near_another():
    with pytest.raises(InputError, match="got 'sgs-cifar200'; near it are sgs-cifar-200"):
        resolve({"preset": "sgs-cifar200"})
    with pytest.raises(InputError, match="got 'sgss'; near it are sgs"):
        resolve({"recipe": ("sgd", "sgss")})


def test_a_preset_of_other_data_is_told():
    (line,) = (line for line in resolve({"preset": "sgs-cifar-200", "data": "mnist:/x"}).advice() if "is for" in line)
    assert line == "--preset sgs-cifar-200 is for cifar10 or cifar100, the data is mnist"
    with pytest.raises(InputError, match="--preset"):
        resolve({"preset": "repopt-imagenet"})


# -- the page

COLUMNS = {
    "model": ("model", str), "epochs": ("epochs", int), "warm-up": ("warmup", int), "batch": ("batch_size", int),
    "lr": ("lr", lambda text: (float(text),)), "weight decay": ("weight_decay", float), "on what": ("decay", str),
    "smoothing": ("label_smoothing", float), "nesterov": ("nesterov", lambda text: text == "yes"),
    "augmentation": ("augment", lambda text: tuple(text.split(", "))),
}  # fmt: skip
"""Column of docs/experiments.md -> option, and how its text is read."""

BEYOND = {  # what the page says in words
    "repopt-hs-readme": {"clip_norm": 5.0},
    "repopt-imagenet": {"test_size": 224, "test_resize": 224, "image_size": 224},
    "repopt-imagenet-l2se": {"se": True, "test_size": 320, "test_resize": 320, "image_size": 224},
    "repopt-ghost": {"warmup_lr": 1e-4},
    "sgs-cifar-600": {"sgs_every": 30, "sgs_batches": 20, "sgs_warmup": 1, "head_width": (512,), "remove_near": False},
    "sgs-cifar-200": {
        "sgs_every": 5,
        "sgs_batches": 2,
        "sgs_k": 5.0,
        "sgs_warmup": 1,
        "head_width": (4096, 4096),
        "dropout": 0.5,
    },
    "sgs-cifar-512": {"sgs_every": 10, "sgs_batches": 2, "sgs_warmup": 1, "head_width": (4096, 4096), "dropout": 0.5},
    "sgs-imagenet": {"sgs_every": 5, "sgs_batches": 2, "remove_near": True, "test_resize": 256, "test_size": 224},
}


def page_rows():
    return {re.sub("`", "", row["preset"]): row for row in experiments_table("preset")}


def test_the_page_lists_every_preset_of_a_training():
    assert list(page_rows()) == TRAINED


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="an sdist brings no pages")
@pytest.mark.parametrize("name", TRAINED)
def test_presets_are_those_of_the_page(name):
    row = page_rows()[name]
    assert tuple(row["data"].split(", ")) == PRESETS[name].kinds
    options = resolved(name)
    for column, (option, read) in COLUMNS.items():
        assert getattr(options, option) == read(row[column]), column
    for option, value in BEYOND.get(name, {}).items():
        assert getattr(options, option) == value, option
    assert (options.momentum, options.min_lr, options.optimizer) == (0.9, 0.0, "sgd")
    assert options.schedule == ("cosine-whole" if name.startswith("repopt") else "cosine")
    # Of a search alone they are the same, but for the epochs.
    if name.startswith("repopt"):
        search = resolve({"preset": name, "data": DATA[PRESETS[name].kinds[-1]]}, search=True)
        for option, _ in COLUMNS.values():
            if option != "epochs":
                assert getattr(search, option) == getattr(options, option), option
        assert search.search_epochs == options.epochs
