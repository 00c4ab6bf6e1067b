"""What `quantize RUN` does: each trained network of a finished run in few bits.

Source: RepOptimizers (Ding et al., 2023), section 4.4 and Appendix C. The figures of a training are in
state/quantize-NAME.json of the run's folder as soon as it is done, and are not computed again with the same settings.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradrep_kernels import csla
from gradrep_kernels.branches.rounding import rounded_weights
from gradrep_kernels.branches.spread import KernelHistory, kernel_histories, kernel_spread, largest_over_std
from gradrep_kernels.messages import counted, first_few
from gradrep_kernels.recipes import files
from gradrep_kernels.recipes.build import Trainee, build
from gradrep_kernels.recipes.data.loader import Loader, derived_seed
from gradrep_kernels.recipes.environment import commit, versions
from gradrep_kernels.recipes.errors import InputError, extra
from gradrep_kernels.recipes.lock import Lock
from gradrep_kernels.recipes.options.resolve import Options
from gradrep_kernels.recipes.progress import Reporter
from gradrep_kernels.recipes.quantization.int8 import Flow, chosen_flow
from gradrep_kernels.recipes.quantization.report import write_report
from gradrep_kernels.recipes.quantization.settings import Settings
from gradrep_kernels.recipes.runs import stored_options, stored_summary
from gradrep_kernels.recipes.table import Recipe
from gradrep_kernels.recipes.training import accuracy, repeatable, train_epoch
from gradrep_kernels.recipes.trainings import STATE, WEIGHTS, kept_weights, searched_scales, training_name
from gradrep_kernels.recipes.validation import split_data

__all__ = ["quantize"]

_QAT_RATE = 0.01
"""Of the training's learning rate."""
_CALIBRATION = 40  # a purpose for derived_seed
_EXAMPLES = 8  # images that a network is traced with
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def quantize(folder: Path, settings: Settings, reporter: Reporter) -> dict[str, Any]:
    """Do the work in the folder of a finished run. Returns what quantize.json holds.

    Raises InputError where the run or a setting is not what it should be, and where 8 bits were asked for and cannot be
    had. Files of the run itself are not changed.
    """
    extra("matplotlib.figure", "matplotlib")
    extra("scipy.stats", "scipy")
    lock = Lock(folder)
    lock.take()
    try:
        return _Job(folder, settings, reporter).run()
    finally:
        split_data.cache_clear()
        lock.release()
        reporter.close()


class _Job:
    """A finished run, and what is to be done with it."""

    def __init__(self, folder: Path, settings: Settings, reporter: Reporter):
        self.folder, self.settings, self.reporter = folder, settings, reporter
        self.options, self.summary = _read_run(folder, settings.device)
        self.rows = self._chosen_rows()
        seeds = self.summary["seeds"]
        if settings.seeds is not None and settings.seeds > len(seeds):
            raise InputError(f"--seeds {settings.seeds}: the run has {len(seeds)}")
        self.seeds: list[int] = seeds[: settings.seeds]
        self.flow: Flow | None = None
        self.why_no_int8: str | None = "left out by --no-int8"
        if settings.int8 is not False:
            self.flow, self.why_no_int8 = chosen_flow(settings.flow)
            if self.flow is None and settings.int8:
                raise InputError(f"--int8: {self.why_no_int8}")
        self.data, validation = split_data(self.options)
        described = {**self.data.description(), "train": len(self.data.train) + len(validation)}
        if described != self.summary["data"]:
            now_and_then = f"{described}, then {self.summary['data']}"
            raise InputError(f"{self.options.data} is not what it was when {folder} was started: {now_and_then}")
        self.scales = searched_scales(folder)

    def _chosen_rows(self) -> list[Recipe]:
        trained = [row for row in self.options.rows if row.name in self.summary["recipes"]]
        if self.settings.rows is None:
            return trained
        names = [row.name for row in trained]
        if not self.settings.rows or not set(self.settings.rows) <= set(names):
            raise InputError(f"--rows must be of {', '.join(names)}, got {','.join(self.settings.rows) or 'none'}")
        return [row for row in trained if row.name in self.settings.rows]

    def run(self) -> dict[str, Any]:
        with repeatable(self.options.threads, self.options.device):
            layer = self._layer()
            self._announce()
            found = {row.name: [self._of_training(row, seed) for seed in self.seeds] for row in self.rows}
            first = {row.name: self._histories(row, self.seeds[0])[layer] for row in self.rows}
        about = {
            "run": self.folder.name,
            "versions": versions(),
            "commit": commit(),
            "data": self.summary["data"],
            "model": self.options.model,
            "device": self.options.device,
            "seeds": self.seeds,
            "settings": self._stored_settings(),
            "layer": layer,
            "flow": self.flow and self.flow.title,
            "why_no_int8": self.why_no_int8,
        }
        return write_report(self.folder, about, self.rows, found, first)

    def _stored_settings(self) -> dict[str, Any]:
        """The settings that figures depend on."""
        s = self.settings
        int8 = {} if self.flow is None else {
            "flow": self.flow.name, "calibration": s.calibration, "qat_epochs": s.qat_epochs,
            "qat_weights": "per channel" if s.qat_per_channel else "per tensor", "qat_rate": _QAT_RATE,
        }  # fmt: skip
        return {"bits": list(s.bits), **int8}

    # ---- networks

    def _restored(self, row: Recipe, seed: int, options: Options, lr: float) -> Trainee:
        """The row's network with its trained weights, and an optimizer at its start."""
        path = self._weights(row, seed)
        try:
            weights = torch.load(path, map_location=options.device, weights_only=True)
        except Exception as error:  # torch.load raises half a dozen unrelated classes.
            raise InputError(f"{path} cannot be read ({type(error).__name__})") from error
        trainee = build(dataclasses.replace(row, sgs=False), options, self.data, self.scales, seed, lr)
        if trainee.structure is not None:
            trainee.structure.take_structure_of(weights)
            trainee.structure.remove()
            trainee.structure = None  # Fine-tuning changes none.
        trainee.model.load_state_dict(weights)
        return trainee

    def _weights(self, row: Recipe, seed: int) -> Path:
        path = kept_weights(self.folder, row.name, seed, self._rate(row))
        if path is None:
            raise InputError(f"{self.folder / WEIGHTS / training_name(row.name, seed)}.pt is not there")
        return path

    def _rate(self, row: Recipe) -> float:
        return self.summary["recipes"][row.name]["learning_rate"]

    def _deployed(self, model: nn.Module) -> nn.Module:
        return csla.merge(model.eval(), fold_norm=True, example=self._example().to(self.options.device))

    def _example(self) -> Tensor:
        """A few test images [n, C, H, W], standardised, on the CPU."""
        x, _ = next(iter(Loader(self.data, self.data.test, _EXAMPLES)))
        return x

    def _histories(self, row: Recipe, seed: int) -> dict[str, KernelHistory]:
        model = self._restored(row, seed, self.options, self._rate(row)).model
        return kernel_histories(model, self._deployed(model))

    def _layer(self) -> str:
        """The convolution whose weights are drawn."""
        names = list(self._histories(self.rows[0], self.seeds[0]))
        if not names:
            raise InputError(f"{self.folder}: the network has no convolution above 1 x 1 whose weights could be shown")
        if self.settings.layer is None:
            return names[len(names) // 2]
        if self.settings.layer not in names:
            raise InputError(
                f"--layer must be a convolution above 1 x 1, as {first_few(names)}; got {self.settings.layer!r}"
            )
        return self.settings.layer

    # ---- figures of one training

    def _file(self, row: Recipe, seed: int) -> Path:
        return self.folder / STATE / f"quantize-{training_name(row.name, seed)}.json"

    def _stored(self, row: Recipe, seed: int) -> dict[str, Any] | None:
        """Figures that were computed before with these settings."""
        path = self._file(row, seed)
        if not path.exists():
            return None
        remedy = "remove it to do this part anew"
        stored = files.read_json(path, remedy)
        try:
            return stored["figures"] if stored["settings"] == self._stored_settings() else None
        except (KeyError, TypeError) as reason:
            raise InputError(f"{path} is damaged ({reason!r}); {remedy}") from None

    def _announce(self) -> None:
        """Say what is ahead, and begin the bar of all training."""
        left = sum(self._stored(row, seed) is None for row in self.rows for seed in self.seeds)
        trained = (
            f"each with {counted(self.settings.qat_epochs, 'epoch')} of training in 8 bits"
            if self.flow
            else self.why_no_int8
        )
        self.reporter.line(
            f"{self.folder}: {left} of {len(self.rows) * len(self.seeds)} networks to quantize, {trained}"
        )
        if self.flow is not None:
            batches = len(Loader(self.data, self.data.train, self.options.batch_size, seed=0))
            self.reporter.start(left * self.settings.qat_epochs * batches, 0)

    def _of_training(self, row: Recipe, seed: int) -> dict[str, Any]:
        name, figures = training_name(row.name, seed), self._stored(row, seed)
        if figures is None:
            self.reporter.doing(name)
            figures = self._figures(row, seed)
            files.write_json(self._file(row, seed), {"settings": self._stored_settings(), "figures": figures})
            self.reporter.line(_line(name, figures))
        return figures

    def _figures(self, row: Recipe, seed: int) -> dict[str, Any]:
        options, test = self.options, self.data.test
        model = self._restored(row, seed, options, self._rate(row)).model
        if not all(bool(t.isfinite().all()) for t in model.state_dict().values()):
            return {"not_finite": True}
        deployed = self._deployed(model)
        figures: dict[str, Any] = {
            "fp32": accuracy(deployed, self.data, test, options.device),
            "rounded": {
                grid: {
                    str(bits): accuracy(rounded_weights(deployed, bits, per_channel), self.data, test, options.device)
                    for bits in self._stored_settings()["bits"]
                }
                for grid, per_channel in (("per tensor", False), ("per channel", True))
            },
            "norms_left": _norms(deployed),
            "spread": _spreads(kernel_histories(model, deployed)),
        }
        if self.flow is None:
            return figures
        try:
            figures["ptq"] = {
                grid: self._after_training(copy.deepcopy(deployed), per_channel, seed)
                for grid, per_channel in (("per tensor", False), ("per channel", True))
            }
            if self.settings.qat_epochs:
                figures["qat"] = self._trained_in_8_bits(row, seed)
        except InputError:
            raise
        except Exception as reason:  # Tracing a network may raise nearly anything.
            if self.settings.int8 or self.settings.flow:
                raise InputError(f"{row.name}: {self.flow.title} cannot convert this network: {reason}") from reason
            figures["why_no_int8"] = f"{type(reason).__name__}: {str(reason).splitlines()[0] if str(reason) else ''}"
        return figures

    def _after_training(self, deployed: nn.Module, per_channel: bool, seed: int) -> float:
        """Accuracy after post-training quantization, which measures activations on some training images."""
        prepared = self.flow.prepare(deployed.cpu(), self._example(), False, per_channel)
        images = min(self.settings.calibration, len(self.data.train))
        size = min(self.options.batch_size, images)
        batches = Loader(self.data, self.data.train, size, seed=derived_seed(seed, _CALIBRATION))
        with torch.no_grad():
            prepared.eval()
            for (x, _), _ in zip(batches, range(math.ceil(images / size))):
                prepared(x)
        return self._accuracy_of_8_bits(prepared)

    def _accuracy_of_8_bits(self, prepared: nn.Module) -> float:
        """Converted networks of FX have CPU kernels alone."""
        prepared.cpu()
        prepared.eval()
        return accuracy(self.flow.convert(prepared), self.data, self.data.test, "cpu")

    def _trained_in_8_bits(self, row: Recipe, seed: int) -> dict[str, Any]:
        """Quantization-aware training from the trained weights, as the row trains: its optimizer, its multipliers."""
        rate = _QAT_RATE * self._rate(row)
        options = dataclasses.replace(
            self.options, warmup=0, schedule="cosine", min_lr=0.0, ema_decay=None, amp=None, compile=False,
            channels_last=False,
        )  # fmt: skip
        trainee = self._restored(row, seed, options, rate)
        if not row.plain_network:
            trainee = self._of_merged(row, trainee.model, options, seed, rate)
        merged_norms = None if row.plain_network else _norms(trainee.model)
        example = self._example().to(options.device)
        trainee.model = self.flow.prepare(trainee.model, example, True, self.settings.qat_per_channel)
        kept = {id(p) for p in trainee.model.parameters()}
        if any(id(p) not in kept for group in trainee.optimizer.param_groups for p in group["params"]):
            raise RuntimeError(f"{self.flow.title} replaced parameters, which the optimizer would lose")
        epochs = self.settings.qat_epochs
        for epoch in range(epochs):
            record = train_epoch(trainee, self.data, options, seed, epoch, epochs, self.reporter.batch)
            if record["train_loss"] is None:
                return {"accuracy": None, "merged_norms": merged_norms, "diverged": epoch + 1}
        self.flow.freeze(trainee.model)
        found = self._accuracy_of_8_bits(trainee.model)
        return {"accuracy": found, "merged_norms": merged_norms, "diverged": None}

    def _of_merged(self, row: Recipe, model: nn.Module, options: Options, seed: int, rate: float) -> Trainee:
        """The merged network, with the norms that stand behind blocks, if any do. No multiplier imitates branches."""
        merged = csla.merge(model)
        plain = dataclasses.replace(
            row, network=lambda *_: merged, scales=None, reinitialize=False, grad_mults=False, sgs=False, structure=None
        )
        return build(plain, options, self.data, None, seed, rate)


def _read_run(folder: Path, device: str | None) -> tuple[Options, dict[str, Any]]:
    """The options and the summary of a finished run."""
    options = stored_options(folder)
    summary = stored_summary(folder)
    if not summary["recipes"]:
        raise InputError(f"{folder} has no trained network")
    if device is not None:
        options = dataclasses.replace(options, device=device)
    options.check()
    return options, summary


def _norms(model: nn.Module) -> int:
    return sum(isinstance(module, _BATCH_NORMS) for module in model.modules())


def _spreads(histories: Mapping[str, KernelHistory]) -> dict[str, Any]:
    """Figures of every convolution, and their means over the convolutions."""
    layers = {name: dict(_moments(history)) for name, history in histories.items()}
    means = {}
    for moment in next(iter(layers.values()), ()):
        of_moment = [moments[moment] for moments in layers.values() if moment in moments]
        means[moment] = {key: statistics.fmean(figures[key] for figures in of_moment) for key in of_moment[0]}
    return {"layers": layers, "mean": means}


def _moments(history: KernelHistory) -> Iterator[tuple[str, dict[str, float]]]:
    for moment, kernel in history.steps().items():
        whole, centre, surround = kernel_spread(kernel)
        found = {"whole": whole, "centre": centre, "surround": surround, "largest_over_std": largest_over_std(kernel)}
        yield moment, found


def _line(name: str, figures: Mapping[str, Any]) -> str:
    if "not_finite" in figures:
        return f"{name}: its weights are not finite"
    per_tensor = (f"{bits} bits {found:.2%}" for bits, found in figures["rounded"]["per tensor"].items())
    parts = [f"fp32 {figures['fp32']:.2%}", f"weights per tensor in {', '.join(per_tensor)}"]
    if "ptq" in figures:
        parts.append(f"PTQ per channel {figures['ptq']['per channel']:.2%}")
    if figures.get("qat", {}).get("accuracy") is not None:
        parts.append(f"QAT {figures['qat']['accuracy']:.2%}")
    return f"{name}: {', '.join(parts)}"
