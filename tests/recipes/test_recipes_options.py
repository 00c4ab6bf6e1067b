"""Options: their defaults per data set, their checks, and their JSON."""

from __future__ import annotations

import json

import pytest
import torch

from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.options import OPTIONS, Options, resolve
from gradrep_kernels.recipes.table import RECIPES

pytestmark = pytest.mark.usefixtures("one_thread")


def test_defaults_are_those_of_the_data_set(tmp_path):
    for kind, source in (("digits", "digits"), ("cifar10", f"cifar10:{tmp_path}"), ("folder", f"folder:{tmp_path}")):
        options = resolve({"data": source})
        for name in ("epochs", "batch_size", "weight_decay", "label_smoothing", "augment", "remove_near"):
            assert getattr(options, name) == OPTIONS[name].default_for(kind)
    assert (options.lr, options.momentum, options.weight_decay, options.warmup, options.image_size) == (
        0.1,
        0.9,
        4e-5,
        5,
        224,
    )
    assert resolve({}).epochs <= 15


def test_options_survive_json(options):
    assert Options.from_json(json.loads(json.dumps(options.to_json()))) == options


def test_options_json_keeps_its_form():
    """Runs of earlier versions are resumed from such a file."""
    stored = {
        "data": "cifar10:/somewhere/cifar",
        "model": "repopt_vgg_small",
        "recipe": ["sgs", "repopt"],
        "ablate": ["ones"],
        "scales": None,
        "seeds": 3,
        "seed": 0,
        "epochs": 200,
        "search_epochs": 240,
        "batch_size": 128,
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 0.0005,
        "warmup": 5,
        "label_smoothing": 0.0,
        "augment": ["flip", "crop", "cutout"],
        "sgs_every": 5,
        "sgs_warmup": 1,
        "sgs_batches": 2,
        "sgs_k": 5.0,
        "remove_near": False,
        "clip_norm": 1.0,
        "image_size": None,
        "check_steps": 0,
        "device": "cpu",
        "threads": 1,
    }
    given = {"recipe": ("repopt", "sgs"), "ablate": ("ones",), "clip_norm": 1.0, "threads": 1}
    options = resolve({"data": "cifar10:/somewhere/cifar", **given})
    assert list(options.to_json().items()) == list(stored.items())
    assert Options.from_json(stored) == options


def test_all_recipes_come_with_the_initial_scales_as_their_ablation():
    assert [row.name for row in resolve({}).rows] == [
        "sgd",
        "sgs",
        "repopt",
        "repopt-hs-init",
        "repopt+sgs",
        "csla",
        "repvgg",
    ]
    assert [row.name for row in resolve({"recipe": ("csla", "sgd")}).rows] == ["sgd", "csla"]
    assert [row.name for row in resolve({"recipe": ("sgd",), "ablate": ("grad", "init")}).rows] == [
        "sgd",
        "repopt-init",
        "repopt-grad",
    ]
    assert [row.name for row in resolve({"ablate": ()}).rows] == list(RECIPES)


WRONG_OPTIONS = {
    "epochs": ({"epochs": 0}, "--epochs must be at least 1, got 0"),
    "batch": ({"batch_size": 1}, "--batch-size must be at least 2"),
    "lr": ({"lr": -1.0}, "--lr must be a number above 0, got -1.0"),
    "nan": ({"lr": float("nan")}, "--lr must be a number above 0, got nan"),
    "momentum": ({"momentum": 1.0}, "--momentum must be in"),
    "smoothing": ({"label_smoothing": 1.0}, "--label-smoothing must be in"),
    "seeds": ({"seeds": 0}, "--seeds must be at least 1"),
    "every": ({"sgs_every": 0}, "--sgs-every must be at least 1"),
    "k": ({"sgs_k": 0.0}, "--sgs-k must be a number above 0"),
    "clip": ({"clip_norm": 0.0}, "--clip-norm must be a number above 0"),
    "recipe": (
        {"recipe": ("sgd", "adam")},
        "--recipe must be one of sgd, sgs, repopt, repopt+sgs, csla, repvgg, all, got 'adam'",
    ),
    "ablate": ({"ablate": ("hs",)}, "--ablate must be one of init, grad, ones, hs-init, channel-mean, got 'hs'"),
    "augment": ({"augment": ("blur",)}, "--augment must be one of flip, crop, cutout, got 'blur'"),
    "model": ({"model": "b3"}, "--model must be one of small, .*, got 'b3'"),
    "device": ({"device": "tpu"}, "--device must be cpu, cuda or cuda:N, got 'tpu'"),
    "image size": ({"image_size": 32}, "--image-size is for folder:DIR, digits has its own"),
    "data": ({"data": "mnist"}, "--data must be digits, .*, got 'mnist'"),
}


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_a_wrong_option_is_named(case):
    given, said = WRONG_OPTIONS[case]
    with pytest.raises(InputError, match=said.replace("+", "[+]")):
        resolve(given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_gpu_is_told():
    with pytest.raises(InputError, match=r"--device cuda: torch .*; use --device cpu"):
        resolve({"device": "cuda"})


def test_a_resumed_run_takes_no_other_options(options):
    options.check_against({})
    options.check_against(
        {"data": str(options.data), "model": "small", "epochs": 2, "augment": ("cutout", "crop", "flip")}
    )
    for given, said in (
        ({"epochs": 3}, "--epochs was 2 when this run was started, now it is 3"),
        ({"augment": ("flip",)}, "--augment was flip,crop,cutout when"),
        ({"model": "vgg11"}, "--model was repopt_vgg_small when .* vgg11"),
        ({"data": "digits"}, "--data was cifar10:.*, now it is digits"),
        ({"data": f"cifar100:{options.data.folder}"}, "--data was cifar10:.*, now it is cifar100:"),
        ({"ablate": ()}, "--ablate was hs-init"),
    ):
        with pytest.raises(InputError, match=said):
            options.check_against(given)
