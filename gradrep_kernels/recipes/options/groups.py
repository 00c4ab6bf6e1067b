"""The options of a job, declared in groups. The first line of a group is its heading in the help.

One field declares one option: the command line, defaults, checks and JSON follow from it. `resolve.py` puts the groups
together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradrep_kernels.branches.presets import PRESETS as BRANCHES
from gradrep_kernels.optim.param_groups import DECAY_RULES
from gradrep_kernels.recipes.cores import cores, free_processes, own_threads
from gradrep_kernels.recipes.data.augmentation import AUGMENTATIONS
from gradrep_kernels.recipes.data.load import FOLDER_SIDE, DataSource
from gradrep_kernels.recipes.networks import MODELS, check_model
from gradrep_kernels.recipes.options.declare import (
    TRAIN,
    absolute_path,
    at_least,
    between,
    number,
    one_of,
    option,
    some_of,
)
from gradrep_kernels.recipes.options.presets import PRESETS
from gradrep_kernels.recipes.options.readers import (
    ABOVE_0,
    BELOW_1,
    check_device,
    check_rates,
    read_branches,
    read_layers,
    read_numbers,
    read_preset,
    read_rates,
    read_recipes,
    read_start,
)
from gradrep_kernels.recipes.schedules import SCHEDULES
from gradrep_kernels.recipes.table import ABLATIONS, OPTIMIZERS, RECIPES

__all__ = ["SEARCHED", "SEARCH_RATE", "Machine", "Pictures", "Scaling", "Search", "Subject", "Training"]

SEARCH_RATE = 0.1  # RepOptimizers, section 4.1


def _with_meanings(table: Mapping[str, Any]) -> str:
    return "; ".join(f"{row.name} ({row.meaning})" for row in table.values())


def _as_trained(name: str) -> dict[str, Any]:
    """What all settings of the Hyper-Search have in common. Their default is that of the trainings."""
    return {
        "default": lambda values: values[name],
        "default_help": f"that of --{name.replace('_', '-')}",
        "commands": TRAIN,
        "earlier": None,
    }


@dataclass(frozen=True)
class Subject:
    """what is trained, and on which data"""

    data: DataSource = option(  # noqa: RUF009 (a dataclasses.field)
        "digits | cifar10:DIR | cifar100:DIR | mnist:DIR | fashion:DIR | svhn:DIR | folder:DIR (train/CLASS/*, and "
        "val/CLASS/* or test/CLASS/*)",
        "digits", metavar="DATA", reader=lambda flag, text: DataSource.parse(text),
    )  # fmt: skip
    download: bool = option(
        "let torchvision fetch the data into DIR where it is not there", False, outcome=False, earlier=False
    )
    preset: str | None = option(
        f"settings of a paper's experiment, which other options override: {', '.join(PRESETS)}",
        default_help="of CIFAR and of folders that of the paper whose recipes run, else none", metavar="NAME",
        reader=read_preset, earlier=None,
    )  # fmt: skip
    quick: bool = option(
        "a small whole job in one process, for a first look at digits: other defaults, named as quick in this list",
        False, commands=TRAIN, default_help="the whole job",
    )  # fmt: skip
    model: str = option(
        f"{', '.join(MODELS)}, or timm:NAME", "small", metavar="MODEL", reader=check_model, digits="deep"
    )
    strides: tuple[int, ...] | None = option(
        "of stage0 and of the first block of each stage of a RepOpt-VGG (RepOptimizers, Table 6)",
        default_help="the model's", reader=read_numbers, earlier=None,
    )  # fmt: skip
    se: bool = option(
        "squeeze-and-excitation after every ReLU of a RepOpt-VGG, or in every block of a ResNet", False, earlier=False
    )
    width: float | None = option(
        "channels of the convolutions of a VGG, over its own: 0.25 is a quarter",
        check=number(lambda value: 0 < value <= 100, "above 0 and at most 100"), default_help="1",
        earlier=None,
    )  # fmt: skip
    head_width: tuple[int, ...] | None = option(
        "hidden layers of so many ReLUs before the classes of a VGG: a number for one, several, or none",
        default_help="the model's, or none", reader=read_layers, earlier=None,
    )  # fmt: skip
    dropout: float | None = option(
        "share of their features that is set to 0 in training", check=BELOW_1, default_help="the model's, or 0",
        earlier=None,
    )  # fmt: skip
    branches: str | None = option(
        f"of each k x k convolution in the Hyper-Search and in all recipes with branches: {', '.join(BRANCHES)}",
        default_help="those that the model says (repopt_ghostnet: repghost, in ghost modules alone), else repvgg",
        metavar="PRESET", reader=read_branches, earlier="repvgg",
    )  # fmt: skip
    hs_init: str | None = option(
        "where the scales of convolutions start in the Hyper-Search: depth (√(2/l)), or a number for all (Table 9: 1)",
        default_help="depth, or what the model says", metavar="START", reader=read_start, earlier=None,
    )  # fmt: skip
    recipe: tuple[str, ...] = option(
        f"comma-separated: {_with_meanings(RECIPES)}; or all (of the two papers), or rivals",
        ("sgd", "sgs", "repopt"), digits=("sgd", "sgs", "repopt", "csla", "repvgg"), quick=("sgd", "repopt"),
        commands=TRAIN, reader=read_recipes,
    )  # fmt: skip  # () is a Hyper-Search alone
    ablate: tuple[str, ...] = option(
        "more rows, each RepOpt with one thing changed (RepOptimizers, Table 4): "
        f"{_with_meanings(ABLATIONS)}; or none",
        (), default_help="none", commands=TRAIN, reader=some_of(ABLATIONS),
    )  # fmt: skip
    scales: str | None = option(
        "a scales file, own or published, instead of the Hyper-Search",
        default_help="Hyper-Search", commands=TRAIN, metavar="FILE", reader=absolute_path,
    )  # fmt: skip
    seeds: int = option("how many seeds each recipe is trained with", 3, at_least(1), digits=4, quick=1, commands=TRAIN)
    seed: int = option("first seed; the Hyper-Search's too", 0, at_least(0))


@dataclass(frozen=True)
class Training:
    """every training"""

    epochs: int = option("epochs of each training", check=at_least(1), digits=6, small=40, quick=3, commands=TRAIN)
    evaluate_every: int = option(
        "measure the test accuracy every so many epochs, and after the last", 1, at_least(1), digits=3
    )
    batch_size: int = option(
        "images per step, over all processes", check=at_least(2, ", for batch normalisation"), digits=32, small=128,
    )  # fmt: skip
    accumulate: int = option(
        "parts of each batch that are computed one after the other, to save memory; norms see a part", 1, at_least(1),
        earlier=1,
    )  # fmt: skip
    optimizer: str = option(
        f"of all rows: {', '.join(OPTIMIZERS)}; Grad Mults go with sgd and adamw", "sgd", commands=TRAIN,
        reader=one_of(OPTIMIZERS), metavar="NAME", earlier="sgd",
    )  # fmt: skip
    lr: tuple[float, ...] = option(
        "learning rate at the end of the warm-up, half a cosine follows; of several, comma-separated, each recipe "
        "takes the one with the best mean accuracy on the validation part",
        0.1, check_rates, digits=(0.03, 0.1, 0.3), quick=0.1,
        reader=read_rates, default_help="0.1 (0.03,0.1,0.3 for digits; quick: 0.1), torch's of another --optimizer",
    )  # fmt: skip
    lr_seeds: int = option(
        "how many of the seeds, the first ones, are trained with every learning rate and choose", 2, at_least(1),
        commands=TRAIN,
    )  # fmt: skip
    validation: float = option(
        "share of the training images that is not trained on: it chooses the learning rate, and its accuracy is told",
        lambda values: 0.35 if len(values["lr"]) > 1 else 0.0, BELOW_1, commands=TRAIN,
        default_help="0.35 with several learning rates, else 0",
    )  # fmt: skip
    momentum: float = option("of SGD and RMSprop", 0.9, BELOW_1)
    nesterov: bool = option("Nesterov's momentum in SGD", False, earlier=False)
    momentum_dtype: str | None = option(
        "in which each training, but not the Hyper-Search, keeps its momentum: bfloat16, in half the bytes",
        reader=one_of(("bfloat16",)), default_help="that of the weights", commands=TRAIN, metavar="DTYPE",
    )  # fmt: skip
    ema_decay: float | None = option(
        "decay of moving averages of the weights in each training, but not in the Hyper-Search: accuracies are then "
        "theirs, and those of the weights are told beside them",
        check=BELOW_1, default_help="no averages", commands=TRAIN,
    )  # fmt: skip
    weight_decay: float = option("of what --decay says", 5e-4, at_least(0))
    decay: str = option(
        f"what decays: {'; '.join(f'{name} ({meaning})' for name, meaning in DECAY_RULES.items())}", "repopt",
        reader=one_of(DECAY_RULES), metavar="SET", earlier="repopt",
    )  # fmt: skip
    warmup: int = option("epochs of linear warm-up", 5, at_least(0), digits=1)
    warmup_lr: float = option("learning rate before the first step of the warm-up", 0.0, at_least(0), earlier=0.0)
    min_lr: float = option("learning rate that the cosine ends at", 0.0, at_least(0), earlier=0.0)
    schedule: str = option(
        f"after the warm-up: {'; '.join(f'{name} ({meaning})' for name, meaning in SCHEDULES.items())}", "cosine",
        reader=one_of(SCHEDULES), metavar="NAME", earlier="cosine",
    )  # fmt: skip
    label_smoothing: float = option("of the cross-entropy", 0.0, BELOW_1)
    clip_norm: float | None = option(
        "clip the gradient norm (that of the CSLA model, where there are Grad Mults)", check=ABOVE_0,
        default_help="no clipping",
    )  # fmt: skip


@dataclass(frozen=True)
class Pictures:
    """how images are read"""

    augment: tuple[str, ...] = option(
        f"comma-separated: {', '.join(AUGMENTATIONS)}; or none",
        digits=("crop",), small=("crop",),
        reader=some_of(AUGMENTATIONS),
    )  # fmt: skip
    images: int | None = option(
        "train on so many of the training images, of every class as large a part", check=at_least(2),
        default_help="all", earlier=None,
    )  # fmt: skip
    image_size: int | None = option(
        "side of the training images of folder:DIR", check=between(8, 8192), folder=FOLDER_SIDE, kinds=("folder",)
    )
    test_size: int | None = option(
        "side of the test images of folder:DIR, cut from their centre", lambda values: values["image_size"],
        between(8, 8192), kinds=("folder",), default_help="that of --image-size", earlier=None,
    )  # fmt: skip
    test_resize: int | None = option(
        "what the shorter side of a test image is scaled to before that", lambda values: values["test_size"],
        between(8, 8192), kinds=("folder",), default_help="--test-size", earlier=None,
    )  # fmt: skip
    readers: int = option(
        "processes that read images of folder:DIR for each training, 0: the training's own", 0, between(0, 64),
        outcome=False, earlier=0,
    )  # fmt: skip


@dataclass(frozen=True)
class Search:
    """the Hyper-Search, which is always done by SGD"""

    search_epochs: int = option("epochs of the Hyper-Search", check=at_least(1), digits=6, small=40, quick=2)
    search_lr: float = option(
        "learning rate of the Hyper-Search and of the check CSLA = GR",
        lambda v: v["lr"][0] if len(v["lr"]) == 1 and v.get("optimizer", "sgd") == "sgd" else SEARCH_RATE, ABOVE_0,
        commands=TRAIN, default_help=f"that of --lr if it is one and of sgd, else {SEARCH_RATE}",
    )  # fmt: skip
    search_batch_size: int = option("images per step", check=at_least(2), **_as_trained("batch_size"))
    search_weight_decay: float = option("weight decay", check=at_least(0), **_as_trained("weight_decay"))
    search_decay: str = option("what decays", reader=one_of(DECAY_RULES), metavar="SET", **_as_trained("decay"))
    search_warmup: int = option("epochs of warm-up", check=at_least(0), **_as_trained("warmup"))
    search_warmup_lr: float = option("learning rate before it", check=at_least(0), **_as_trained("warmup_lr"))
    search_schedule: str = option("schedule", reader=one_of(SCHEDULES), metavar="NAME", **_as_trained("schedule"))
    search_nesterov: bool = option("Nesterov's momentum", **_as_trained("nesterov"))
    search_label_smoothing: float = option("label smoothing", check=BELOW_1, **_as_trained("label_smoothing"))
    search_augment: tuple[str, ...] = option("augmentation", reader=some_of(AUGMENTATIONS), **_as_trained("augment"))
    search_clip_norm: float | None = option("clip the gradient norm", check=ABOVE_0, **_as_trained("clip_norm"))


SEARCHED: dict[str, str] = {
    name: name.removeprefix("search_") for name in Search.__dataclass_fields__ if name != "search_lr"
}
"""Setting of the Hyper-Search -> that of a training which it stands for."""


@dataclass(frozen=True)
class Scaling:
    """spatial gradient scaling"""

    sgs_every: int = option("update it every so many epochs", 5, at_least(1), digits=3, commands=TRAIN)
    sgs_warmup: int = option("epoch of its first update, counted from 0", 1, at_least(0), commands=TRAIN)
    sgs_batches: int = option("batches for an update", 2, at_least(1), commands=TRAIN)
    sgs_k: float = option("k of its transform", 5.0, ABOVE_0, commands=TRAIN)
    sgs_dependence: str = option(
        "how pixels depend on each other: nmi, autocorrelation (SGS, Table 3)", "nmi", commands=TRAIN,
        reader=one_of(("nmi", "autocorrelation")), metavar="NAME", earlier="nmi",
    )  # fmt: skip
    sgs_apply_to: str = option(
        "what it multiplies: gradient, or update (SGS, Table 5: Adagrad*)", "gradient", commands=TRAIN,
        reader=one_of(("gradient", "update")), metavar="NAME", earlier="gradient",
    )  # fmt: skip
    sgs_alpha: float | None = option(
        "of sgs-grid: the scaling of the centre over that of the edges (SGS, Figure 7)", check=ABOVE_0, commands=TRAIN,
        default_help="none", earlier=None,
    )  # fmt: skip
    sgs_beta: float | None = option(
        "of sgs-grid: over that of the corners", check=ABOVE_0, commands=TRAIN, default_help="none", earlier=None
    )
    remove_near: bool = option("drop pairs of near pixels (the SGS paper's ImageNet setting)", False, commands=TRAIN)


@dataclass(frozen=True)
class Machine:
    """where and how it is computed"""

    check_steps: int = option(
        "steps of the float64 check CSLA = GR; 0: none", 0, at_least(0), digits=30, quick=10, commands=TRAIN
    )
    costs: bool = option(
        "measure images a second, memory and the largest batch at the end, as `costs RUN` does", False, commands=TRAIN,
        outcome=False, earlier=False,
    )  # fmt: skip
    device: str = option("cpu, cuda or cuda:N; under torchrun cuda is each process's own", "cpu", check_device)
    amp: str | None = option(
        "mixed precision: bf16, or fp16 with a GradScaler", reader=one_of(("bf16", "fp16")), metavar="DTYPE",
        default_help="float32", earlier=None,
    )  # fmt: skip
    channels_last: bool = option("images and kernels in the channels_last layout", False, earlier=False)
    compile: bool = option("train by torch.compile's code", False, earlier=False)
    sync_bn: bool = option(
        "under torchrun, norms see the whole batch instead of each process's part", False, earlier=False
    )
    threads: int = option(
        "threads on the CPU; results are the same bit for bit on the same number only",
        # Digits take one: images of 16 x 16 gain little from a second, and lose tenfold where the machine is busy.
        lambda values: own_threads(), between(1, max(64, cores())), digits=1,
        default_help="OMP_NUM_THREADS, else the cores one may use",
    )  # fmt: skip
    workers: int = option(
        "how many trainings run at a time, each in a process; results are the same",
        lambda values: free_processes(values["threads"], values["device"]), between(1, 64), commands=TRAIN,
        default_help="as many as there are cores for, at most 8, and one on a GPU", outcome=False,
        quick=1,  # Another process would import torch as long as it then trains.
    )  # fmt: skip
