"""What a job is asked to do: options with a default per data set, checked before anything is started."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradrep_kernels import models
from gradrep_kernels.recipes.augmentation import AUGMENTATIONS
from gradrep_kernels.recipes.data import split_source
from gradrep_kernels.recipes.errors import InputError

__all__ = ["ABLATIONS", "DEFAULTS", "MODELS", "RECIPES", "Options", "flag", "resolve"]

RECIPES = {
    "sgd": "plain SGD",
    "sgs": "SGD with spatial gradient scaling",
    "repopt": "RepOptimizer: re-initialised, gradients multiplied, with the searched scales",
    "repopt+sgs": "both",
    "csla": "the explicit multi-branch model that repopt imitates",
    "repvgg": "the multi-branch model with a norm in every branch",
}
ABLATIONS = {  # RepOptimizers, Table 4
    "init": "initialisation not changed",
    "grad": "gradients not multiplied",
    "ones": "all scales 1",
    "hs-init": "the scales that Hyper-Search starts from",
    "channel-mean": "scales averaged over the channels of each layer",
}
MODELS: dict[str, Callable[..., nn.Module]] = {
    "small": models.repopt_vgg_small,
    **{name: getattr(models, name) for name in models.__all__ if not name.endswith("_model")},
}

_ANY_DATA = {
    "model": "small", "recipe": ("all",), "ablate": None, "scales": None, "seeds": 3, "seed": 0, "lr": 0.1, "momentum": 0.9,
    "sgs_warmup": 1, "sgs_batches": 2, "sgs_every": 5, "sgs_k": 5.0, "remove_near": False, "clip_norm": None, "image_size": None,
    "check_steps": 0, "device": "cpu", "threads": None,
}  # fmt: skip
_CIFAR = {  # SGS paper, appendix A.1; Hyper-Search as long as RepOptimizers, section 4.1
    "epochs": 200, "search_epochs": 240, "batch_size": 128, "weight_decay": 5e-4, "warmup": 5, "label_smoothing": 0.0,
    "augment": ("flip", "crop", "cutout"),
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {
        **_ANY_DATA, "epochs": 10, "search_epochs": 30, "batch_size": 32, "weight_decay": 5e-4, "warmup": 1, "label_smoothing": 0.0,
        "augment": ("crop",), "sgs_every": 3, "check_steps": 100,
        "threads": 1,  # images of 16 x 16 gain little from a second one, and lose tenfold where the machine is busy
    },
    "cifar10": {**_ANY_DATA, **_CIFAR},
    "cifar100": {**_ANY_DATA, **_CIFAR},
    "folder": {  # the papers' ImageNet settings
        **_ANY_DATA, "epochs": 120, "search_epochs": 120, "batch_size": 256, "weight_decay": 4e-5, "warmup": 5, "label_smoothing": 0.1,
        "augment": ("flip", "crop"), "remove_near": True, "image_size": 224,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """One job, fully resolved; as JSON beside its results, so that a resumed run can be held against it."""

    data: str
    model: str
    recipe: tuple[str, ...]  # () is a Hyper-Search alone
    ablate: tuple[str, ...]
    scales: str | None
    seeds: int
    seed: int
    epochs: int
    search_epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    warmup: int
    label_smoothing: float
    augment: tuple[str, ...]
    sgs_every: int
    sgs_warmup: int
    sgs_batches: int
    sgs_k: float
    remove_near: bool
    clip_norm: float | None
    image_size: int | None
    check_steps: int
    device: str
    threads: int

    def to_json(self) -> dict[str, Any]:
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Options:
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()})

    def check(self) -> None:
        """Raise InputError, naming the option, where a value is out of its range or the device is not there."""
        for name, (holds, needed) in _RANGES.items():
            value = getattr(self, name)
            if not holds(value):
                raise InputError(f"{flag(name)} must be {needed}, got {value}")
        _check_device(self.device)

    def check_against(self, given: Mapping[str, Any]) -> None:
        """Raise InputError where an option that was given differs from this job's; `given` is what `resolve` takes."""
        kind = split_source(self.data)[0]
        for name, value in _normalised(given, kind).items():
            if getattr(self, name) != value:
                raise InputError(
                    f"{flag(name)} was {_shown(getattr(self, name))} when this run was started, now it is {_shown(value)}; leave it out to resume"
                )


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def resolve(given: Mapping[str, Any]) -> Options:
    """Options from those that were given, by attribute name; the others take their data set's default.

    `recipe`, `ablate` and `augment` are sequences of names. Raises InputError that names the option.
    """
    kind = split_source(given.get("data", "digits"))[0]
    values = {"data": "digits", **_normalised(DEFAULTS[kind], kind), **_normalised(given, kind)}
    if values["ablate"] is None:
        values["ablate"] = ("hs-init",) if values["recipe"] == tuple(RECIPES) else ()
    if values["threads"] is None:
        values["threads"] = _cores()
    if kind != "folder":
        if given.get("image_size") is not None:
            raise InputError(f"--image-size is for folder:DIR, {kind} has its own")
        values["image_size"] = None
    options = Options(**values)
    options.check()
    return options


def _normalised(given: Mapping[str, Any], kind: str) -> dict[str, Any]:
    values = dict(given)
    if "data" in values and kind != "digits":
        values["data"] = f"{kind}:{Path(values['data'].partition(':')[2]).absolute()}"
    if values.get("scales") is not None:
        values["scales"] = str(Path(values["scales"]).absolute())
    if "model" in values:
        values["model"] = _known("model", values["model"], MODELS).__name__
    for name, known in (
        ("recipe", {**RECIPES, "all": ""}),
        ("ablate", ABLATIONS),
        ("augment", dict.fromkeys(AUGMENTATIONS, "")),
    ):
        if values.get(name) is not None:
            for item in values[name]:
                _known(name, item, known)
            values[name] = (
                tuple(RECIPES) if "all" in values[name] else tuple(item for item in known if item in values[name])
            )
    return values


def _known(name: str, value: str, known: Mapping[str, Any]) -> Any:
    if value not in known:
        raise InputError(f"{flag(name)} must be one of {', '.join(known)}, got {value!r}")
    return known[value]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seeds": (lambda v: v >= 1, "at least 1"),
    "seed": (lambda v: v >= 0, "at least 0"),
    "epochs": (lambda v: v >= 1, "at least 1"),
    "search_epochs": (lambda v: v >= 1, "at least 1"),
    "batch_size": (lambda v: v >= 2, "at least 2, for batch normalisation"),
    "lr": (lambda v: 0 < v < float("inf"), "a number above 0"),
    "momentum": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "weight_decay": (lambda v: 0 <= v < float("inf"), "at least 0"),
    "warmup": (lambda v: v >= 0, "at least 0"),
    "label_smoothing": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "sgs_every": (lambda v: v >= 1, "at least 1"),
    "sgs_warmup": (lambda v: v >= 0, "at least 0"),
    "sgs_batches": (lambda v: v >= 1, "at least 1"),
    "sgs_k": (lambda v: 0 < v < float("inf"), "a number above 0"),
    "clip_norm": (lambda v: v is None or 0 < v < float("inf"), "a number above 0"),
    "image_size": (lambda v: v is None or v >= 8, "at least 8"),
    "check_steps": (lambda v: v >= 0, "at least 0"),
    "threads": (lambda v: v >= 1, "at least 1"),
}


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            built = "is built without CUDA" if torch.version.cuda is None else "sees no CUDA device"
            raise InputError(f"--device {name}: torch {torch.__version__} {built}; use --device cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise InputError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
