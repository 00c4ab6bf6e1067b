"""Options: their defaults per data set, their checks, and their JSON."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch

from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.options.resolve import OPTIONS, Options, resolve

pytestmark = pytest.mark.usefixtures("one_thread")


def test_defaults_are_those_of_the_data_set(tmp_path):
    for kind, source in (("digits", "digits"), ("mnist", f"mnist:{tmp_path}"), ("svhn", f"svhn:{tmp_path}")):
        options = resolve({"data": source})
        assert options.preset is None
        for name in ("epochs", "batch_size", "weight_decay", "label_smoothing", "augment", "remove_near"):
            assert getattr(options, name) == OPTIONS[name].default_for(kind)
    assert resolve({}).epochs <= 15


def test_options_survive_json(options):
    assert Options.from_json(json.loads(json.dumps(options.to_json()))) == options


def test_options_json_keeps_its_form():
    """Runs of earlier versions are resumed from such a file."""
    stored = {
        "data": "cifar10:/somewhere/cifar",
        "quick": False,
        "model": "repopt_vgg_small",
        "recipe": ["sgs", "repopt"],
        "ablate": ["ones"],
        "scales": None,
        "seeds": 3,
        "seed": 0,
        "epochs": 200,
        "evaluate_every": 1,
        "search_epochs": 240,
        "batch_size": 128,
        "lr": [0.1],
        "lr_seeds": 2,
        "validation": 0.0,
        "search_lr": 0.1,
        "momentum": 0.9,
        "momentum_dtype": None,
        "ema_decay": None,
        "weight_decay": 0.0005,
        "warmup": 3,
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
        "workers": 2,
    }
    before = Options.from_json(stored)
    # Such runs had RepVGG's branches whatever the model, and the Hyper-Search had the settings of the trainings.
    assert (before.branches, before.preset, before.nesterov, before.decay) == ("repvgg", None, False, "repopt")
    assert (before.schedule, before.optimizer, before.amp, before.accumulate) == ("cosine", "sgd", None, 1)
    search = before.of_search()
    assert (search.batch_size, search.weight_decay, search.warmup, search.clip_norm) == (128, 0.0005, 3, 1.0)
    assert (search.augment, search.lr, search.epochs) == (("crop", "flip", "cutout"), (0.1,), 240)
    assert Options.from_json(json.loads(json.dumps(before.to_json()))) == before
    with pytest.raises(InputError, match="it differs in colour"):
        Options.from_json({**stored, "colour": "red"})
    with pytest.raises(InputError, match="it differs in lr, seeds"):
        Options.from_json({name: value for name, value in stored.items() if name not in ("lr", "seeds")})


def test_rows_are_in_the_order_of_the_table_and_ablations_follow_repopt():
    assert [row.name for row in resolve({"recipe": ("all",)}).rows] == [
        "sgd",
        "sgs",
        "repopt",
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
    assert [row.name for row in resolve({"ablate": ("ones",)}).rows][2:5] == ["repopt", "repopt-ones", "csla"]


def test_a_quick_job_has_other_defaults_and_takes_what_is_given():
    quick = resolve({"quick": True, "epochs": 9})
    assert (quick.epochs, quick.seeds, quick.lr) == (9, 1, (0.1,))
    assert [row.name for row in quick.rows] == ["sgd", "repopt"]
    assert quick.workers == 1


def test_several_learning_rates_need_a_part_that_chooses():
    assert resolve({"lr": ("0.1", "0.03", "0.1")}).lr == (0.03, 0.1)
    assert resolve({"lr": "0.3"}).validation == 0
    assert resolve({"lr": (0.1, 0.2)}).validation == 0.35
    assert (resolve({"lr": "0.3"}).search_lr, resolve({"lr": (0.3, 1)}).search_lr) == (0.3, 0.1)
    assert resolve({}, search=True).lr == (0.1,)


def test_what_is_likely_not_meant_is_told():
    assert resolve({"workers": 1}).advice() == []
    told = resolve({"warmup": 9, "epochs": 4, "sgs_warmup": 4, "threads": 64, "workers": 64}).advice()
    assert [line.split()[0] for line in told] == ["--workers", "--warmup", "--search-warmup", "no"]
    assert resolve({"warmup": 3, "search_epochs": 3}, search=True).advice() == [
        "--warmup 3 leaves no epoch of --search-epochs 3 after the warm-up"
    ]
    assert resolve({"epochs": 1, "sgs_warmup": 1, "recipe": ("sgd",), "warmup": 0, "workers": 1}).advice() == []
    (told,) = resolve({"epochs": 1, "recipe": ("dyrep",), "warmup": 0, "workers": 1}).advice()
    assert told == "no branch of dyrep grows in 1 epoch: it trains the plain network"
    assert resolve({"epochs": 2, "recipe": ("dyrep",), "warmup": 0, "workers": 1}).advice() == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"branches": "acb", "recipe": ("dbb", "dyrep")},
            "--branches acb: none of the recipes dbb, dyrep has branches",
        ),
        ({"scales": "/x.pt", "recipe": ("repvgg",)}, "--scales /x.pt: none of the recipes repvgg uses scales"),
        ({"scales": "/x.pt", "recipe": ("sgd",), "ablate": ("ones",)}, "none of the recipes sgd, repopt-ones uses"),
        ({"hs_init": 1.0, "recipe": ("sgd", "repvgg")}, "--hs-init 1.0: none of the recipes sgd, repvgg uses scales"),
    ],
)
def test_options_that_no_row_heeds(given, message):
    with pytest.raises(InputError, match=re.escape(message)):
        resolve(given)


def test_a_resumed_run_may_have_another_number_of_workers(options):
    options.check_against({"workers": 5})
    assert options.resumed_with({"workers": 5, "epochs": 2}) == dataclasses.replace(options, workers=5)


WRONG_OPTIONS = {
    "no lr": ({"lr": ()}, "--lr must name a learning rate"),
    "lr in words": ({"lr": ("0.1", "high")}, "--lr must be a number, or several with commas between: .*'high'"),
    "lr among others": ({"lr": ("0.1", "-1")}, "--lr must be a number above 0, got -1.0"),
    "no validation": (
        {"lr": (0.1, 0.2), "validation": 0.0},
        "--validation must be above 0 to choose among --lr 0.1,0.2",
    ),
    "no recipe": ({"recipe": ()}, "--recipe must name at least one recipe of sgd, "),
    "workers": ({"workers": 0}, "--workers must be from 1 to 64, got 0"),
    "threads": ({"threads": 0}, "--threads must be from 1 to "),
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
    "decay": ({"ema_decay": 1.0}, "--ema-decay must be in"),
    "momentum dtype": ({"momentum_dtype": "float16"}, "--momentum-dtype must be one of bfloat16, got 'float16'"),
    "recipe": (
        {"recipe": ("sgd", "adam")},
        "--recipe must be one of sgd, sgs, sgs-grid, repopt, repopt+sgs, csla, repvgg, .*all, rivals, got 'adam'",
    ),
    "ablate": ({"ablate": ("hs",)}, "--ablate must be one of init, grad, ones, hs-init, channel-mean, got 'hs'"),
    "augment": ({"augment": ("blur",)}, "--augment must be one of resized, crop, flip, .*, got 'blur'"),
    "model": ({"model": "b3"}, "--model must be one of small, .*, got 'b3'"),
    "branches": (
        {"branches": "resnet"},
        "--branches must be one of repvgg, acb, repghost, mobileone:N, replk:K, unireplk, qarepvgg, got 'resnet'",
    ),
    "branches in part": ({"branches": "replk"}, "--branches: replk:K is how this preset is written, got 'replk'"),
    "branches without form": ({"branches": "dbb"}, "--branches 'dbb' have no exact form: its average branch"),
    "device": ({"device": "tpu"}, "--device must be cpu, cuda or cuda:N, got 'tpu'"),
    "image size": ({"image_size": 32}, "--image-size is for folder:DIR, digits has its own"),
    "data": ({"data": "mnist"}, "--data must be digits, .*, got 'mnist'"),
    "preset": ({"preset": "sgs"}, "--preset must be one of repopt-hs, .*, got 'sgs'"),
    "preset of another command": ({"preset": "repopt-qat"}, "--preset repopt-qat is of a trained network: `quantize"),
    "preset without data": ({"preset": "sgs-imagenet"}, "--preset sgs-imagenet needs --data folder:DIR"),
    "preset of two kinds": ({"preset": "sgs-cifar-200"}, "needs --data cifar10:DIR or --data cifar100:DIR"),
    "nesterov": ({"nesterov": True, "momentum": 0.0}, "--nesterov needs a --momentum above 0, got 0"),
    "parts": ({"accumulate": 5}, "--accumulate 5 must divide --batch-size 32"),
    "multiplied by adam": (
        {"optimizer": "adam", "lr": 0.1},
        "--optimizer adam: repopt multiply .* goes with sgd, adamw; leave",
    ),
    "averages of adam": (
        {"optimizer": "adam", "lr": 0.1, "recipe": ("sgd",), "ema_decay": 0.9},
        "--ema-decay goes with --optimizer sgd and adamw, got adam",
    ),
    "one scaling by adam": (
        {"optimizer": "adam", "lr": 0.1, "recipe": ("sgs-grid",), "sgs_alpha": 1.0, "sgs_beta": 1.0},
        "--optimizer adam: sgs-grid multiply .* goes with sgd, adamw; leave",
    ),
    "nesterov of the search": (
        {"momentum": 0.0, "search_nesterov": True},
        "--search-nesterov needs a --momentum above 0, got 0",
    ),
    "momentum of adamw": (
        {"optimizer": "adamw", "lr": 0.1, "momentum_dtype": "bfloat16"},
        "--momentum-dtype goes with --optimizer sgd",
    ),
    "grid": ({"recipe": ("sgs-grid",), "sgs_alpha": 2.0}, "--recipe sgs-grid needs --sgs-alpha and --sgs-beta"),
    "start": ({"hs_init": "low"}, "--hs-init must be depth or a number above 0, got 'low'"),
    "start below": ({"hs_init": "-1"}, "--hs-init must be depth or a number above 0, got '-1'"),
    "strides": ({"strides": ("2", "0", "1")}, "--strides must be whole numbers of at least 1 .*, got '2,0,1'"),
    "test size": ({"test_size": 32}, "--test-size is for folder:DIR, digits has its own"),
}


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_a_wrong_option_is_named(case):
    given, said = WRONG_OPTIONS[case]
    with pytest.raises(InputError, match=said.replace("+", "[+]")):
        resolve(given)


def test_nesterov_of_a_search_that_is_not_done_is_no_matter(tmp_path):
    """SGS, Table 5, has SGD without momentum. The preset's Hyper-Search has Nesterov's."""
    options = resolve({"data": f"cifar100:{tmp_path}", "preset": "sgs-cifar-200", "momentum": 0.0})
    assert (options.search_nesterov, options.nesterov) == (True, False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_gpu_is_told():
    with pytest.raises(InputError, match=r"--device cuda: torch .*; use --device cpu"):
        resolve({"device": "cuda"})


def test_a_resumed_run_takes_no_other_options(options):
    options.check_against({})
    options.check_against({"data": str(options.data), "model": "small", "epochs": 2, "augment": ("flip", "crop")})
    for given, said in (
        ({"epochs": 3}, "--epochs was 2 when this run was started, now it is 3"),
        ({"augment": ("flip",)}, "--augment was crop,flip when"),
        ({"model": "vgg11"}, "--model was repopt_vgg_small when .* vgg11"),
        ({"data": "digits"}, "--data was cifar10:.*, now it is digits"),
        ({"data": f"cifar100:{options.data.folder}"}, "--data was cifar10:.*, now it is cifar100:"),
        ({"ablate": ("ones",)}, "--ablate was "),
        ({"branches": "acb"}, "--branches was None when this run was started, now it is acb"),
    ):
        with pytest.raises(InputError, match=said):
            options.check_against(given)
