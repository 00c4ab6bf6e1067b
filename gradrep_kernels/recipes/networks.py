"""The networks that the commands train: from the text of --model to a module."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn

from gradrep_kernels import models
from gradrep_kernels.recipes.errors import InputError

__all__ = ["MODELS", "SETTINGS", "TIMM", "check_model", "check_settings", "has_setting", "make_network"]

_NO_NETWORKS = ("features",)
MODELS: dict[str, Callable[..., nn.Module]] = {
    "small": models.repopt_vgg_small,
    "deep": models.repopt_vgg_deep,
    **{
        name: getattr(models, name)
        for name in models.__all__
        if name.islower() and not name.endswith("_model") and name not in _NO_NETWORKS
    },
}
"""The networks of this package by name. Each takes num_classes and in_channels, and some take more."""

SETTINGS = ("strides", "se", "width", "head_width", "dropout")
"""Options that some of the models have, named as their arguments. None and False stand for the model's own."""

TIMM = "timm:"
"""What stands before the name of a network of timm."""


def check_model(flag: str, text: str) -> str:
    """Return the full name of a model: a function of `gradrep_kernels.models`, or 'timm:NAME'.

    'small' is short for 'repopt_vgg_small', 'deep' for 'repopt_vgg_deep'. Raises InputError that begins with the flag
    where there is no such model, with the nearest names, and where timm is needed and missing.
    """
    if text.startswith(TIMM):
        name = text.removeprefix(TIMM)
        timm = _timm(flag, text)
        if not timm.is_model(name):
            near = difflib.get_close_matches(name, timm.list_models(), n=3)
            hint = f"; near it are {', '.join(TIMM + other for other in near)}" if near else ""
            raise InputError(f"{flag}: timm {timm.__version__} has no model {name!r}{hint}")
        return text
    if text not in MODELS:
        near = difflib.get_close_matches(text, MODELS, n=3)
        hint = f"; near it are {', '.join(near)}" if near else ""
        raise InputError(f"{flag} must be one of {', '.join(MODELS)}, or timm:NAME, got {text!r}{hint}")
    return MODELS[text].__name__


def has_setting(name: str, setting: str) -> bool:
    """Whether a model, as `check_model` names it, has one of the `SETTINGS`."""
    return not name.startswith(TIMM) and _takes(MODELS[name], setting)


def check_settings(name: str, **settings: Any) -> None:
    """Raise InputError, naming the flag, for one of the `SETTINGS` that the model does not have or does not accept."""
    given = _given(name, settings)
    if given:
        with torch.device("meta"):  # draws no random numbers
            _make(name, given)


def make_network(
    name: str, *, num_classes: int, in_channels: int, stem: str | None = None, **settings: Any
) -> nn.Module:
    """Draw a network from the default generator.

    Args:
        name:     as `check_model` returns it.
        stem:     'cifar' or 'imagenet', for models with both. The others ignore it, for it is no user's choice.
        settings: those of `SETTINGS` that the model has.

    Raises InputError, naming the flag, for a setting that the model does not have or does not accept, and where timm is
    needed and missing.
    """
    given = _given(name, settings)
    if name.startswith(TIMM):
        timm = _timm("--model", name)
        return timm.create_model(
            name.removeprefix(TIMM), pretrained=False, num_classes=num_classes, in_chans=in_channels
        )
    if stem is not None and _takes(MODELS[name], "stem"):
        given["stem"] = stem
    return _make(name, {"num_classes": num_classes, "in_channels": in_channels, **given})


def _given(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were given. Raises InputError where the model has no such setting."""
    given = {setting: value for setting, value in settings.items() if value is not None and value is not False}
    for setting in given:
        if not has_setting(name, setting):
            having = ", ".join(other for other in MODELS if has_setting(other, setting))
            raise InputError(f"{_flag(setting)} is for the models {having}; {name} has no such setting")
    return given


def _make(name: str, settings: Mapping[str, Any]) -> nn.Module:
    try:
        return MODELS[name](**settings)
    except ValueError as reason:
        names = rf"\b({'|'.join(SETTINGS)})\b"
        if not re.match(names, str(reason)):
            raise
        raise InputError(re.sub(names, lambda found: _flag(found[0]), str(reason))) from None


def _flag(setting: str) -> str:
    return "--" + setting.replace("_", "-")


def _takes(maker: Callable[..., nn.Module], setting: str) -> bool:
    return setting in inspect.signature(maker).parameters


def _timm(flag: str, text: str) -> ModuleType:
    try:
        import timm
    except (ImportError, RuntimeError) as reason:  # torchvision may be missing, or not fit this torch
        if importlib.util.find_spec("timm") is None:
            raise InputError(f"{flag} {text} needs timm: pip install timm ({reason})") from None
        raise InputError(f"{flag} {text}: timm is here and cannot be imported: {reason}") from None
    return timm
