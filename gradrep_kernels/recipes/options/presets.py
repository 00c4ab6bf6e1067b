"""The papers' experiments by name: the settings of each as options.

Sources: RepOptimizers (Ding et al., 2023) and Spatial Gradient Scaling (Detkov et al., 2023), and the code of both. All
anneal the learning rate to 0 by a cosine and have a momentum of 0.9. docs/experiments.md shows the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["PRESETS", "Preset", "preset_for"]

Settings = Mapping[str, Any]
_CIFAR = ("cifar10", "cifar100")


@dataclass(frozen=True)
class Preset:
    """Settings by the names of the options, as a user would give them."""

    name: str
    source: str
    kinds: tuple[str, ...]
    """The data that the paper has."""
    train: Settings = field(hash=False)
    search: Settings = field(hash=False)
    """Of the Hyper-Search, by the names that the options of a training have."""
    command: str = "train"
    """The command that it belongs to first: `train`, `search` or `quantize`."""

    def settings(self, search_alone: bool) -> dict[str, Any]:
        """By option. A run that is a Hyper-Search alone has its settings under the plain names."""
        if search_alone:
            named = {name: value for name, value in self.train.items() if name not in ("recipe", "epochs")}
            return named | {"search_epochs" if name == "epochs" else name: v for name, v in self.search.items()}
        return {**self.train, **{f"search_{name}": value for name, value in self.search.items()}}


# The published code counts the cosine from the first step of all, and its warm-up starts at 0 (timm's scheduler).
_REPOPT = {
    "batch_size": 256, "lr": 0.1, "weight_decay": 4e-5, "decay": "repopt", "schedule": "cosine-whole", "warmup": 5,
    "warmup_lr": 0.0, "label_smoothing": 0.1, "nesterov": True,
}  # fmt: skip
_SEARCH = {**_REPOPT, "epochs": 240, "augment": ("crop", "flip"), "clip_norm": None}
_REPOPT_ROWS = {"recipe": ("sgd", "repopt", "repvgg"), "seeds": 3, "momentum": 0.9}
_ON_CIFAR = {**_SEARCH, **_REPOPT_ROWS, "model": "repopt_vgg_b1"}
_ON_IMAGENET = {
    **_REPOPT, **_REPOPT_ROWS, "model": "repopt_vgg_b1", "epochs": 120, "augment": ("resized", "flip", "randaugment"),
    "image_size": 224, "test_size": 224, "test_resize": 224,
}  # fmt: skip
_SGS = {
    "recipe": ("sgd", "sgs"), "seeds": 3, "momentum": 0.9, "lr": 0.1, "decay": "everything", "schedule": "cosine",
    "warmup": 0, "label_smoothing": 0.0, "nesterov": False, "sgs_warmup": 1, "sgs_k": 5.0, "sgs_batches": 2,
    "remove_near": False,
}  # fmt: skip

_WIDE_HEAD = {"head_width": (4096, 4096), "dropout": 0.5}
"""Of the VGGs that the code of SGS trains for 200 epochs (its README names them wei_vgg11_bn)."""


def _searched_as_trained(settings: Settings) -> dict[str, Any]:
    """The settings of a Hyper-Search that has those of the training (RepOptimizers, section 4.3)."""
    return {name: settings[name] for name in _SEARCH if name in settings}


def _repopt(name: str, source: str, kinds: tuple[str, ...], command: str = "train", **changes: Any) -> Preset:
    base = _ON_IMAGENET if kinds == ("folder",) else _ON_CIFAR
    settings = {**base, **changes}
    return Preset(name, f"RepOptimizers, {source}", kinds, settings, _searched_as_trained(settings), command)


def _sgs(name: str, source: str, kinds: tuple[str, ...], **changes: Any) -> Preset:
    return Preset(name, f"Spatial Gradient Scaling, {source}", kinds, {**_SGS, **changes}, _SEARCH)


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        _repopt("repopt-hs", "section 4.1", ("cifar100",), "search"),
        _repopt("repopt-hs-readme", "README of the code", ("cifar100",), "search", warmup=10, clip_norm=5.0),
        _repopt("repopt-hs-reproduce", "reproduction file of the code", ("cifar100",), "search", label_smoothing=0.0),
        _repopt("repopt-imagenet", "section 4.1", ("folder",)),
        _repopt(
            "repopt-imagenet-l2se", "Table 3", ("folder",),
            model="repopt_vgg_l2", se=True, epochs=200, test_size=320, test_resize=320,
        ),
        _repopt(
            "repopt-ghost", "Appendix D and README of the code", ("folder",), model="repopt_ghostnet_0_5x",
            recipe=("sgd", "repopt", "repvgg"), epochs=300, batch_size=1024, lr=0.6, warmup_lr=1e-4, weight_decay=1e-5,
            augment=("resized", "flip"),
        ),
        # The search's crop and flip; a picture of Caltech256 is brought to the side that ImageNet's have.
        _repopt("repopt-caltech", "section 4.3", ("folder",), epochs=240, augment=("crop", "flip")),
        Preset(
            "repopt-qat", "RepOptimizers, Appendix C", ("folder",), {"epochs": 10}, {}, "quantize"
        ),
        _sgs(
            "sgs-cifar-600", "section 4.1", _CIFAR, model="vgg16", head_width=(512,), epochs=600, batch_size=128,
            weight_decay=1e-4, augment=("crop", "flip"), sgs_every=30, sgs_batches=20,
        ),
        _sgs(
            "sgs-cifar-200", "appendix A.1", _CIFAR, model="vgg16", **_WIDE_HEAD, epochs=200, batch_size=128,
            weight_decay=5e-4, augment=("crop", "flip", "cutout"), sgs_every=5,
        ),
        _sgs(
            "sgs-cifar-512", "section 4.3", _CIFAR, model="vgg11", **_WIDE_HEAD, epochs=200, batch_size=512,
            weight_decay=5e-4, augment=("crop", "flip"), sgs_every=10,
        ),
        _sgs(
            "sgs-imagenet", "section 4.2", ("folder",), model="resnet18", epochs=120, batch_size=256, weight_decay=1e-4,
            decay="repopt", augment=("resized", "flip", "jitter"), image_size=224, test_size=224, test_resize=256,
            nesterov=True, sgs_every=5, remove_near=True,
        ),
    )
}  # fmt: skip
"""Every preset by its name, in the order of docs/experiments.md."""


def preset_for(kind: str, papers: set[str], search_alone: bool) -> Preset | None:
    """The preset of a run that names none: that of the paper whose recipes run.

    `papers` are those of its rows: 'repopt', 'sgs'. Where both run, RepOptimizers' settings hold for all rows. None
    for data that the papers do not have.
    """
    of_repopt = search_alone or "repopt" in papers
    if kind in _CIFAR:
        return PRESETS["repopt-hs" if of_repopt else "sgs-cifar-200"]
    if kind == "folder":
        return PRESETS["repopt-imagenet" if of_repopt else "sgs-imagenet"]
    return None
