"""The options of a job: the groups of `groups.py` in one class, and how they are resolved."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradrep_kernels.messages import counted
from gradrep_kernels.recipes.cores import cores
from gradrep_kernels.recipes.data.load import DataSource
from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.networks import SETTINGS, check_settings, has_setting
from gradrep_kernels.recipes.options.declare import NEW, Option, declared_fields, shown
from gradrep_kernels.recipes.options.groups import (
    SEARCH_RATE,
    SEARCHED,
    Machine,
    Pictures,
    Scaling,
    Search,
    Subject,
    Training,
)
from gradrep_kernels.recipes.options.presets import PRESETS, preset_for
from gradrep_kernels.recipes.table import OPTIMIZERS, Recipe, chosen_rows, default_rate, dyrep_schedule

__all__ = ["OPTIONS", "Options", "resolve"]


@dataclass(frozen=True)
class Options(Machine, Scaling, Search, Pictures, Training, Subject):  # dataclasses takes the last one's fields first
    """One job, every option resolved.

    Stored as JSON beside the results, so that a resumed run can be held against it. Of CIFAR and of folders the
    settings are those of a paper's experiment (presets.py).
    """

    @property
    def rows(self) -> list[Recipe]:
        """The rows of the table to train, none for a Hyper-Search alone."""
        return chosen_rows(self.recipe, self.ablate)

    @property
    def beyond_torch(self) -> bool:
        """Whether all rows need an optimizer that can do more than torch's own."""
        return self.ema_decay is not None or self.momentum_dtype is not None

    @property
    def network_settings(self) -> dict[str, Any]:
        """The settings of the model, by their names."""
        return {name: getattr(self, name) for name in SETTINGS}

    @property
    def searches(self) -> bool:
        """Whether there is a Hyper-Search."""
        return self.scales is None and (not self.rows or any(row.needs_search for row in self.rows))

    def of_search(self) -> Options:
        """The options that the Hyper-Search is trained with, under the names that those of a training have."""
        settings = {plain: getattr(self, name) for name, plain in SEARCHED.items()}
        return dataclasses.replace(
            self, **settings, lr=(self.search_lr,), optimizer="sgd", ema_decay=None, momentum_dtype=None
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values by name."""
        return {name: _to_json(getattr(self, name)) for name in OPTIONS}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Options:
        """The options that `to_json` wrote.

        Options that came later have the value that runs had before them. Raises InputError if they are of another
        version.
        """
        if str(stored.get("data", "")).startswith("folder:") and "test_size" not in stored:
            raise InputError("its pictures were cut in another way, which hid a part of them; start it anew")
        earlier = {name: declared.earlier for name, declared in OPTIONS.items() if declared.earlier is not NEW}
        # The Hyper-Search had no settings of its own.
        earlier |= {name: stored[plain] for name, plain in SEARCHED.items() if plain in stored}
        stored = earlier | dict(stored)
        unlike = sorted(OPTIONS.keys() ^ stored.keys())
        if unlike:
            raise InputError(f"it differs in {', '.join(unlike)}")
        values = {name: _from_json(OPTIONS[name], value) for name, value in stored.items()}
        return cls(**values)

    def check(self) -> None:
        """Raise InputError, naming the option, where a value is out of its range or the device is not there."""
        for name, declared in OPTIONS.items():
            declared.check(getattr(self, name))
        if len(self.lr) > 1 and not self.recipe:
            raise InputError(f"--lr {shown(self.lr)}: a Hyper-Search alone takes one learning rate")
        if len(self.lr) > 1 and not self.validation:
            raise InputError(f"--validation must be above 0 to choose among --lr {shown(self.lr)}")
        check_settings(self.model, **self.network_settings)
        if self.nesterov and not self.momentum:
            raise InputError("--nesterov needs a --momentum above 0, got 0")
        if self.searches and self.search_nesterov and not self.momentum:
            raise InputError("--search-nesterov needs a --momentum above 0, got 0")
        if self.accumulate > 1 and self.batch_size % self.accumulate:
            raise InputError(f"--accumulate {self.accumulate} must divide --batch-size {self.batch_size}")
        self._check_rows()

    def _check_rows(self) -> None:
        kind = OPTIMIZERS[self.optimizer]
        multiplied = [row.name for row in self.rows if row.grad_mults or row.fixed_scaling]
        if multiplied and kind.multiplied is None:
            able = ", ".join(name for name, other in OPTIMIZERS.items() if other.multiplied is not None)
            raise InputError(
                f"--optimizer {self.optimizer}: {', '.join(multiplied)} multiply gradients, which goes with {able}; "
                "leave them out of --recipe and --ablate"
            )
        if self.beyond_torch and kind.multiplied is None:
            flag = "--ema-decay" if self.ema_decay is not None else "--momentum-dtype"
            raise InputError(f"{flag} goes with --optimizer sgd and adamw, got {self.optimizer}")
        if self.momentum_dtype is not None and self.optimizer != "sgd":
            raise InputError(f"--momentum-dtype goes with --optimizer sgd, got {self.optimizer}")
        given = [self.sgs_alpha is not None, self.sgs_beta is not None]
        if any(row.fixed_scaling for row in self.rows) and not all(given):
            raise InputError("--recipe sgs-grid needs --sgs-alpha and --sgs-beta")
        self._check_branches()

    def _check_branches(self) -> None:
        if not self.recipe and not self.ablate:  # a Hyper-Search alone
            return
        names = ", ".join(row.name for row in self.rows)
        if self.scales is not None and not any(row.needs_search for row in self.rows):
            raise InputError(f"--scales {self.scales}: none of the recipes {names} uses scales")
        if self.branches is not None and not any(row.takes_branches for row in self.rows):
            raise InputError(f"--branches {self.branches}: none of the recipes {names} has branches to choose")
        if self.hs_init is not None and not any(row.scales is not None for row in self.rows):
            raise InputError(f"--hs-init {self.hs_init}: none of the recipes {names} uses scales")

    def advice(self) -> list[str]:
        """What is likely not meant, a line each."""
        lines = self._about_preset()
        if self.workers * self.threads > cores():
            what = f"--workers {self.workers} with --threads {self.threads} each"
            lines.append(f"{what} are more than the {cores()} cores: they will wait for each other")
        return lines + self.unlikely()

    def unlikely(self) -> list[str]:
        """What of these options makes results other than their names say, a line each."""
        lines = []
        lengths = [("--warmup", self.warmup, "--epochs", self.epochs)] if self.recipe else []
        if self.searches:
            flag = "--search-warmup" if self.recipe else "--warmup"
            lengths.append((flag, self.search_warmup, "--search-epochs", self.search_epochs))
        for flag, warmup, of_epochs, epochs in lengths:
            if warmup >= epochs:
                lines.append(f"{flag} {warmup} leaves no epoch of {of_epochs} {epochs} after the warm-up")
        if self.recipe and any(row.sgs for row in self.rows) and self.sgs_warmup >= self.epochs:
            late = f"--sgs-warmup {self.sgs_warmup}, of {counted(self.epochs, 'epoch')} counted from 0"
            lines.append(
                f"no update of the spatial gradient scaling falls due ({late}): it stays ones, and sgs changes nothing"
            )
        if any(row.structure is not None for row in self.rows):
            every, until = dyrep_schedule(self)
            if every > until:
                lines.append(
                    f"no branch of dyrep grows in {counted(self.epochs, 'epoch')}: it trains the plain network"
                )
        return lines

    def _about_preset(self) -> list[str]:
        if self.preset is None:
            return []
        preset = PRESETS[self.preset]
        lines = [f"settings are those of {preset.name} ({preset.source}), but for the options given"]
        likely_meant = self.data.kind == "cifar10" and "cifar100" in preset.kinds
        if self.data.kind not in preset.kinds and not likely_meant:
            lines.append(f"--preset {preset.name} is for {' or '.join(preset.kinds)}, the data is {self.data.kind}")
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


OPTIONS: dict[str, Option] = declared_fields(Options)
"""Every option by its attribute name, in the order of their declaration."""


def resolve(given: Mapping[str, Any], search: bool = False) -> Options:
    """Options from those that a user gave, by attribute name.

    The others take the setting of the preset, else the default of the data set. Values are as argparse leaves them:
    `data` is its text, and `recipe`, `ablate` and `augment` are sequences of names. `search` makes them those of a
    Hyper-Search alone. Raises InputError that names the option.
    """
    values = _read(given)
    if "data" not in values:
        if values.get("preset") is not None:
            needed = " or ".join(f"--data {kind}:DIR" for kind in PRESETS[values["preset"]].kinds)
            raise InputError(f"--preset {values['preset']} needs {needed}")
        values["data"] = OPTIONS["data"].read(OPTIONS["data"].default)
    kind = values["data"].kind
    if search:
        values |= {"recipe": (), "ablate": ()}
    preset = _preset(values, kind, search)
    values["preset"] = None if preset is None else preset.name
    settings = {} if preset is None else _read(preset.settings(search))
    if values.get("image_size") is not None:  # The preset's test is one for its own size.
        settings = {name: value for name, value in settings.items() if name not in ("test_size", "test_resize")}
    optimizer = values.get("optimizer") or "sgd"
    if optimizer != "sgd" and values.get("lr") is None:  # Those of presets and of data sets are rates for SGD.
        values["lr"] = (default_rate(optimizer),)
    if search:
        values.setdefault("lr", settings.get("lr", (SEARCH_RATE,)))
    if values.get("model") is not None:  # The preset's network has settings that go together.
        of_network = settings.keys() & set(SETTINGS)
        if not all(has_setting(values["model"], name) for name in of_network):
            settings = {name: value for name, value in settings.items() if name not in of_network}
    for name, declared in OPTIONS.items():
        if values.get(name) is not None:
            declared.check_kind(kind)
        elif name in settings and declared.is_for(kind):
            values[name] = settings[name]
        elif declared.is_for(kind):
            default = declared.default_for(kind, values.get("quick", False))
            values[name] = declared.read(default(values) if callable(default) else default)
        else:
            values[name] = None
    options = Options(**values)
    options.check()
    return options


def _preset(values: Mapping[str, Any], kind: str, search: bool):
    """The preset that was named, else that of the paper whose recipes run."""
    if values.get("preset") is not None:
        return PRESETS[values["preset"]]
    recipes = values.get("recipe")
    if recipes is None:
        recipes = OPTIONS["recipe"].read(OPTIONS["recipe"].default_for(kind))
    papers = {row.paper for row in chosen_rows(recipes, values.get("ablate") or ())}
    return preset_for(kind, papers, search)


def _read(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: OPTIONS[name].read(value) for name, value in given.items()}


def _from_json(declared: Option, value: Any) -> Any:
    if declared.type is DataSource:
        return DataSource.parse(value)
    if declared.type is not tuple or value is None:
        return value
    # Augmentations had another order once, in which they were stored.
    return declared.read(tuple(value)) if declared.name.endswith("augment") else tuple(value)


def _to_json(value: Any) -> Any:
    if isinstance(value, DataSource):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
