"""The options of a job.

One field declares one option: the command line, defaults, checks and JSON follow from it.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gradrep_kernels import models
from gradrep_kernels.branches.presets import PRESETS, preset
from gradrep_kernels.recipes.augmentation import AUGMENTATIONS
from gradrep_kernels.recipes.cores import cores, free_processes
from gradrep_kernels.recipes.data import FOLDER_SIDE, DataSource
from gradrep_kernels.recipes.declare import (
    TRAIN,
    Option,
    absolute_path,
    at_least,
    between,
    number,
    one_of,
    option,
    shown,
    some_of,
)
from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.table import ABLATIONS, RECIPES, Recipe, chosen_rows

__all__ = ["MODELS", "OPTIONS", "Options", "resolve"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "small": models.repopt_vgg_small,
    "deep": models.repopt_vgg_deep,
    **{name: getattr(models, name) for name in models.__all__ if not name.endswith("_model")},
}

_ABOVE_0 = number(lambda value: 0 < value < float("inf"), "a number above 0")
_SEARCH_RATE = 0.1  # RepOptimizers, section 4.1
_BELOW_1 = number(lambda value: 0 <= value < 1, "in [0, 1)")


def _with_meanings(table: Mapping[str, Any]) -> str:
    return "; ".join(f"{row.name} ({row.meaning})" for row in table.values())


def _read_model(flag: str, value: str) -> str:
    """The full name of a model. 'small' is short for 'repopt_vgg_small', 'deep' for 'repopt_vgg_deep'."""
    return MODELS[one_of(MODELS)(flag, value)].__name__


def _read_branches(flag: str, value: str) -> str:
    try:
        preset(value)
    except ValueError as reason:
        raise InputError(f"{flag}{str(reason).removeprefix('branches')}") from None
    return value


def _read_recipes(flag: str, value: tuple[str, ...]) -> tuple[str, ...]:
    names = some_of([*RECIPES, "all"])(flag, value)
    if not names:
        raise InputError(f"{flag} must name at least one recipe of {', '.join(RECIPES)}, or all")
    return tuple(RECIPES) if "all" in names else names


def _check_device(flag: str, name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"{flag} must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            built = "is built without CUDA" if torch.version.cuda is None else "sees no CUDA device"
            raise InputError(f"{flag} {name}: torch {torch.__version__} {built}; use {flag} cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise InputError(f"{flag} {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")


def _read_rates(flag: str, value: float | str | Sequence[float | str]) -> tuple[float, ...]:
    """Learning rates in rising order, each once."""
    given = (value,) if isinstance(value, (float, int, str)) else value
    try:
        return tuple(sorted({float(rate) for rate in given}))
    except ValueError as reason:
        raise InputError(f"{flag} must be a number, or several with commas between: {reason}") from None


def _check_rates(flag: str, value: tuple[float, ...]) -> None:
    if not value:
        raise InputError(f"{flag} must name a learning rate, or several with commas between")
    for rate in value:
        _ABOVE_0(flag, rate)


@dataclass(frozen=True)
class Options:
    """One job, every option resolved.

    Stored as JSON beside the results, so that a resumed run can be held against it. Defaults with `cifar=` are the SGS
    paper's (appendix A.1), with a Hyper-Search as long as that of RepOptimizers, section 4.1. Those with `folder=` are
    the papers' ImageNet settings.
    """

    data: DataSource = option(  # noqa: RUF009 (a dataclasses.field)
        "digits | cifar10:DIR | cifar100:DIR (binary distribution) | folder:DIR (train/CLASS/*, and val/CLASS/* or "
        "test/CLASS/*)",
        "digits", metavar="DATA", reader=lambda flag, text: DataSource.parse(text),
    )  # fmt: skip
    quick: bool = option(
        "a small whole job in one process, for a first look at digits: other defaults, named as quick in this list",
        False, commands=TRAIN, default_help="the whole job",
    )  # fmt: skip
    model: str = option(", ".join(MODELS), "small", metavar="MODEL", reader=_read_model, digits="deep")
    branches: str | None = option(
        f"of each k x k convolution in the Hyper-Search and in all recipes with branches: {', '.join(PRESETS)}",
        default_help="those that the model says (repopt_ghostnet: repghost, in ghost modules alone), else repvgg",
        metavar="PRESET", reader=_read_branches, earlier="repvgg",
    )  # fmt: skip
    recipe: tuple[str, ...] = option(
        f"comma-separated: {_with_meanings(RECIPES)}; or all",
        ("all",), digits=("sgd", "sgs", "repopt", "csla", "repvgg"), quick=("sgd", "repopt"),
        commands=TRAIN, reader=_read_recipes,
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
    epochs: int = option(
        "epochs of each training", check=at_least(1), digits=6, cifar=200, folder=120, quick=3, commands=TRAIN
    )
    evaluate_every: int = option(
        "measure the test accuracy every so many epochs, and after the last", 1, at_least(1), digits=3
    )
    search_epochs: int = option(
        "epochs of the Hyper-Search", check=at_least(1), digits=6, cifar=240, folder=120, quick=2
    )
    batch_size: int = option(
        "images per step", check=at_least(2, ", for batch normalisation"), digits=32, cifar=128, folder=256
    )
    lr: tuple[float, ...] = option(
        "learning rate at the end of the warm-up, half a cosine follows; of several, comma-separated, each recipe "
        "takes the one with the best mean accuracy on the validation part",
        0.1, _check_rates, digits=(0.03, 0.1, 0.3), quick=0.1, reader=_read_rates,
    )  # fmt: skip
    lr_seeds: int = option(
        "how many of the seeds, the first ones, are trained with every learning rate and choose", 2, at_least(1),
        commands=TRAIN,
    )  # fmt: skip
    validation: float = option(
        "share of the training images that chooses the learning rate, and is not trained on",
        lambda values: 0.35 if len(values["lr"]) > 1 else 0.0, _BELOW_1, commands=TRAIN,
        default_help="0.35 with several learning rates, else 0",
    )  # fmt: skip
    search_lr: float = option(
        "learning rate of the Hyper-Search and of the check CSLA = GR",
        lambda values: values["lr"][0] if len(values["lr"]) == 1 else _SEARCH_RATE, _ABOVE_0, commands=TRAIN,
        default_help=f"that of --lr if it is one, else {_SEARCH_RATE}",
    )  # fmt: skip
    momentum: float = option("of SGD", 0.9, _BELOW_1)
    momentum_dtype: str | None = option(
        "in which each training, but not the Hyper-Search, keeps its momentum: bfloat16, in half the bytes",
        reader=one_of(("bfloat16",)), default_help="that of the weights", commands=TRAIN, metavar="DTYPE",
    )  # fmt: skip
    ema_decay: float | None = option(
        "decay of moving averages of the weights in each training, but not in the Hyper-Search: accuracies are then "
        "theirs, and those of the weights are told beside them",
        check=_BELOW_1, default_help="no averages", commands=TRAIN,
    )  # fmt: skip
    weight_decay: float = option("of convolutions, linear weights and identity scales", 5e-4, at_least(0), folder=4e-5)
    warmup: int = option("epochs of linear warm-up", 5, at_least(0), digits=1)
    label_smoothing: float = option("of the cross-entropy", 0.0, _BELOW_1, folder=0.1)
    augment: tuple[str, ...] = option(
        f"comma-separated: {', '.join(AUGMENTATIONS)}; or none",
        digits=("crop",), cifar=("flip", "crop", "cutout"), folder=("flip", "crop"), reader=some_of(AUGMENTATIONS),
    )  # fmt: skip
    sgs_every: int = option(
        "update the spatial gradient scaling every so many epochs", 5, at_least(1), digits=3, commands=TRAIN
    )
    sgs_warmup: int = option("epoch of its first update, counted from 0", 1, at_least(0), commands=TRAIN)
    sgs_batches: int = option("batches for an update", 2, at_least(1), commands=TRAIN)
    sgs_k: float = option("k of its transform", 5.0, _ABOVE_0, commands=TRAIN)
    remove_near: bool = option(
        "drop pairs of near pixels (the SGS paper's ImageNet setting)", False, folder=True, commands=TRAIN
    )
    clip_norm: float | None = option(
        "clip the gradient norm (that of the CSLA model, where there are Grad Mults)", check=_ABOVE_0,
        default_help="no clipping",
    )  # fmt: skip
    image_size: int | None = option(
        "side of the images of folder:DIR", check=between(8, 8192), folder=FOLDER_SIDE, kinds=("folder",)
    )
    check_steps: int = option(
        "steps of the float64 check CSLA = GR; 0: none", 0, at_least(0), digits=30, quick=10, commands=TRAIN
    )
    device: str = option("cpu, cuda or cuda:N", "cpu", _check_device)
    threads: int = option(
        "threads on the CPU; results are the same bit for bit on the same number only",
        # Digits take one: images of 16 x 16 gain little from a second, and lose tenfold where the machine is busy.
        lambda values: cores(), between(1, max(64, cores())), digits=1, default_help="the cores one may use",
    )  # fmt: skip
    workers: int = option(
        "how many trainings run at a time, each in a process; results are the same",
        lambda values: free_processes(values["threads"], values["device"]), between(1, 64), commands=TRAIN,
        default_help="as many as there are cores for, at most 8, and one on a GPU", outcome=False,
        quick=1,  # Another process would import torch as long as it then trains.
    )  # fmt: skip

    @property
    def rows(self) -> list[Recipe]:
        """The rows of the table to train, none for a Hyper-Search alone."""
        return chosen_rows(self.recipe, self.ablate)

    @property
    def beyond_torch(self) -> bool:
        """Whether all rows need an optimizer that can do more than torch's own."""
        return self.ema_decay is not None or self.momentum_dtype is not None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values by name."""
        values = {name: getattr(self, name) for name in OPTIONS}
        return {name: _to_json(value) for name, value in values.items()}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Options:
        """The options that `to_json` wrote.

        Options that came later have the value that runs had before them. Raises InputError if they are of another
        version.
        """
        stored = {name: o.earlier for name, o in OPTIONS.items() if o.earlier is not None} | dict(stored)
        unlike = sorted(OPTIONS.keys() ^ stored.keys())
        if unlike:
            raise InputError(f"it differs in {', '.join(unlike)}")
        readers = {tuple: tuple, DataSource: DataSource.parse}
        return cls(**{name: readers.get(OPTIONS[name].type, lambda v: v)(value) for name, value in stored.items()})

    def check(self) -> None:
        """Raise InputError, naming the option, where a value is out of its range or the device is not there."""
        for name, declared in OPTIONS.items():
            declared.check(getattr(self, name))
        if len(self.lr) > 1 and not self.recipe:
            raise InputError(f"--lr {shown(self.lr)}: a Hyper-Search alone takes one learning rate")
        if len(self.lr) > 1 and not self.validation:
            raise InputError(f"--validation must be above 0 to choose among --lr {shown(self.lr)}")

    def advice(self) -> list[str]:
        """What is likely not meant, a line each."""
        lines = []
        if self.workers * self.threads > cores():
            what = f"--workers {self.workers} with --threads {self.threads} each"
            lines.append(f"{what} are more than the {cores()} cores: they will wait for each other")
        lengths = {"--epochs": self.epochs if self.recipe else None, "--search-epochs": self.search_epochs}
        for flag, epochs in lengths.items():
            if epochs is not None and self.warmup >= epochs:
                lines.append(f"--warmup {self.warmup} leaves no epoch of {flag} {epochs} after the warm-up")
        if self.recipe and any(row.sgs for row in self.rows) and self.sgs_warmup >= self.epochs:
            late = f"--sgs-warmup {self.sgs_warmup}, of {self.epochs} epochs counted from 0"
            lines.append(
                f"no update of the spatial gradient scaling falls due ({late}): it stays ones, and sgs changes nothing"
            )
        return lines

    def resumed_with(self, given: Mapping[str, Any]) -> Options:
        """These options for a resumed run: those on which no result depends may be given anew."""
        anew = {name: value for name, value in _read(given).items() if not OPTIONS[name].outcome}
        return dataclasses.replace(self, **anew)

    def check_against(self, given: Mapping[str, Any]) -> None:
        """Raise InputError where an option that was given differs from this job's.

        `given` is as `resolve` takes it.
        """
        for name, value in _read(given).items():
            if OPTIONS[name].outcome and getattr(self, name) != value:
                was, now = shown(getattr(self, name)), shown(value)
                raise InputError(
                    f"{OPTIONS[name].flag} was {was} when this run was started, now it is {now}; leave it out to resume"
                )


def _declared_options() -> dict[str, Option]:
    hints = typing.get_type_hints(Options)
    declared = {}
    for field in dataclasses.fields(Options):
        hint = hints[field.name]
        if isinstance(hint, types.UnionType):  # X | None
            (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
        plain_type = typing.get_origin(hint) or hint
        declared[field.name] = dataclasses.replace(field.metadata["option"], name=field.name, type=plain_type)
    return declared


OPTIONS: dict[str, Option] = _declared_options()
"""Every option by its attribute name, in the order of their declaration."""


def resolve(given: Mapping[str, Any], search: bool = False) -> Options:
    """Options from those that a user gave, by attribute name.

    The others take the default of the data set. Values are as argparse leaves them: `data` is its text, and `recipe`,
    `ablate` and `augment` are sequences of names. `search` makes them those of a Hyper-Search alone. Raises InputError
    that names the option.
    """
    values = _read(given)
    values.setdefault("data", OPTIONS["data"].read(OPTIONS["data"].default))
    kind = values["data"].kind
    if search:
        values |= {"recipe": (), "ablate": ()}
        values.setdefault("lr", (_SEARCH_RATE,))
    for name, declared in OPTIONS.items():
        if values.get(name) is not None:
            declared.check_kind(kind)
        else:
            default = declared.default_for(kind, values.get("quick", False))
            values[name] = declared.read(default(values) if callable(default) else default)
    options = Options(**values)
    options.check()
    return options


def _read(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: OPTIONS[name].read(value) for name, value in given.items()}


def _to_json(value: Any) -> Any:
    if isinstance(value, DataSource):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
