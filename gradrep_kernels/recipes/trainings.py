"""One training of a job: the Hyper-Search, or a row with a seed and a learning rate.

It can be killed at any moment and resumed. In the folder `state` of the run, NAME.pt holds its state after the last
whole epoch, and NAME.json its figures once it is done. Scales and weights are written before NAME.json says that they
are there.
"""

from __future__ import annotations

import contextlib
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradrep_kernels import csla
from gradrep_kernels.models import StructureChange
from gradrep_kernels.recipes import files, ranks
from gradrep_kernels.recipes.build import Trainee, build, multiplier_bytes, search_model
from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.merged import merged_figures
from gradrep_kernels.recipes.options.resolve import Options
from gradrep_kernels.recipes.runs import SCALES
from gradrep_kernels.recipes.steps import TrainingSteps
from gradrep_kernels.recipes.training import accuracies, averaged, repeatable, train_epoch
from gradrep_kernels.recipes.validation import split_data
from gradrep_kernels.recipes.workers import Listener

__all__ = [
    "CHECK",
    "RANKS",
    "SEARCH",
    "STATE",
    "WEIGHTS",
    "Training",
    "do_training",
    "epochs_so_far",
    "kept_weights",
    "names_of",
    "scale_means",
    "searched_scales",
    "take_structure",
    "training_name",
]

STATE = "state"
"""The folder of what is done, in the folder of a run."""
SEARCH, CHECK = "search", "check"
"""Names of parts of a run in it that are no training of a row: the Hyper-Search, and the check CSLA = GR."""
RANKS = "ranks"
"""Name in it of how many processes train together. Results depend on it."""
WEIGHTS = "weights"
"""The folder of what was trained, beside it."""


@dataclass(frozen=True)
class Training:
    """Which training. `name` names its files."""

    name: str
    recipe: str | None
    """The name of a row, None for the Hyper-Search."""
    seed: int
    lr: float
    epochs: int


def training_name(row: str, seed: int, lr: float | None = None) -> str:
    """The name of a training of a row. `lr`: of several learning rates, among which it chooses."""
    return f"{row}-seed{seed}" if lr is None else f"{row}-lr{lr}-seed{seed}"


def names_of(row: str) -> re.Pattern[str]:
    """What the names of all trainings of a row match."""
    return re.compile(rf"{re.escape(row)}(-lr[\d.e+-]+)?-seed\d+")


def kept_weights(folder: Path, row: str, seed: int, lr: float) -> Path | None:
    """The weights of a row in the folder of a run, at its learning rate, whether it was one of several or not."""
    paths = (folder / WEIGHTS / f"{training_name(row, seed, rate)}.pt" for rate in (None, lr))
    return next((path for path in paths if path.exists()), None)


def searched_scales(folder: Path) -> csla.Scales | None:
    """The scales in the folder of a run, None where there are none."""
    return csla.load_scales(folder / SCALES) if (folder / SCALES).exists() else None


def epochs_so_far(folder: Path, name: str) -> list[dict[str, Any]]:
    """The records of the epochs of a training that is under way, none where it has not begun."""
    current = _current(folder, name)
    return [] if current is None else current["epochs"]


def _current(folder: Path, name: str) -> dict[str, Any] | None:
    path = folder / STATE / f"{name}.pt"
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen unrelated classes.
        reason = f"cannot be read, it is damaged ({type(error).__name__})"
        raise InputError(f"{path}: {reason}; remove it to do this training anew") from error


def do_training(folder: Path, options: Options, training: Training, listener: Listener) -> dict[str, Any]:
    """Do one training, from where it stands, and return its figures.

    A training ends with the first epoch whose loss is not finite. Its figures then hold `diverged`, that epoch. A
    Hyper-Search has diverged too where its scales are not finite, or their squares.

    All ranks return the same figures, but for seconds. Rank 0 alone reads and writes files.
    """
    with repeatable(options.threads, options.device):
        return _train(folder, options, training, listener)


def _train(folder: Path, options: Options, training: Training, listener: Listener) -> dict[str, Any]:
    data, validation = split_data(options)
    current, scales = ranks.from_first(lambda: (_current(folder, training.name), searched_scales(folder)))
    if training.recipe is None:
        options = options.of_search()
        trainee = search_model(options, data)
    else:
        row = next(row for row in options.rows if row.name == training.recipe)
        trainee = build(row, options, data, scales, training.seed, training.lr)
    steps = TrainingSteps(trainee, options)
    if current is None:
        current = {"epochs": [], "first_scalings": None}
    else:
        if trainee.structure is not None:
            trainee.structure.load_state_dict(current["structure"])
        trainee.model.load_state_dict(current["model"])
        trainee.optimizer.load_state_dict(current["optimizer"])
        if trainee.sgs is not None:
            trainee.sgs.load_state_dict(current["sgs"])
        if steps.scaler is not None:
            steps.scaler.load_state_dict(current["scaler"])
    epochs = current["epochs"]
    while len(epochs) < training.epochs and not _diverged(epochs):
        record = train_epoch(trainee, data, options, training.seed, len(epochs), training.epochs, listener.batch, steps)
        due = (len(epochs) + 1) % options.evaluate_every == 0 or len(epochs) + 1 == training.epochs
        if due or record["train_loss"] is None:
            record |= accuracies(trainee, data, data.test, options, training.seed, "test_accuracy")
        if training.recipe is None:
            record |= scale_means(trainee.model)
        epochs.append(record)
        if trainee.sgs is not None:
            if record["sgs_updated"] and current["first_scalings"] is None:
                current["first_scalings"] = _as_lists(trainee.sgs.scalings)
            current["sgs"] = trainee.sgs.state_dict()
        if trainee.structure is not None:
            current["structure"] = trainee.structure.state_dict()
        if steps.scaler is not None:
            current["scaler"] = steps.scaler.state_dict()
        if ranks.first():
            current["model"], current["optimizer"] = trainee.model.state_dict(), trainee.optimizer.state_dict()
            files.save_tensors(folder / STATE / f"{training.name}.pt", current)
        listener.epoch(training.name, len(epochs), training.epochs, record)
    figures = {
        "lr": training.lr,
        "epochs": epochs,
        "diverged": len(epochs) if _diverged(epochs) else None,
        "parameters": sum(p.numel() for p in trainee.model.parameters() if p.requires_grad),
        "multiplier_bytes": multiplier_bytes(trainee),
    }
    if figures["diverged"] is None:
        figures |= merged_figures(trainee.model, data, options.device)
    if trainee.structure is not None:
        figures["structure"] = _as_json(trainee.structure.history)
    if len(validation):
        figures |= accuracies(trainee, data, validation, options, training.seed, "validation_accuracy")
    if training.recipe is not None:
        with averaged(trainee, data, options, training.seed) if trainee.averages else contextlib.nullcontext():
            if ranks.first():
                _keep_weights(folder, training.name, trainee)
    elif not _diverged(epochs) and not _keep_scales(folder, trainee):
        figures["diverged"] = len(epochs)
    if trainee.sgs is not None:
        figures["scalings"] = {"start": current["first_scalings"], "end": _as_lists(trainee.sgs.scalings)}
    if ranks.first():
        files.write_json(folder / STATE / f"{training.name}.json", figures)
        (folder / STATE / f"{training.name}.pt").unlink(missing_ok=True)
    return figures


def scale_means(model: nn.Module) -> dict[str, Any]:
    """The mean scale of each branch of a network of the Hyper-Search (RepOptimizers, Figures 6 and 7).

    `scale_means` is {branch: mean over the layers that have it of each layer's mean}, `layer_scale_means` is {layer:
    {branch: mean}}. Nothing where a scale is not finite.
    """
    try:
        scales = csla.extract_scales(model)
    except ValueError:
        return {}
    layers = {
        name: {branch: float(tensor.double().mean()) for branch, tensor in value.tensors().items()}
        for name, value in scales.items()
    }
    branches = dict.fromkeys(branch for means in layers.values() for branch in means)
    over_layers = {
        branch: statistics.fmean(means[branch] for means in layers.values() if branch in means) for branch in branches
    }
    return {"scale_means": over_layers, "layer_scale_means": layers}


def _diverged(epochs: list[dict[str, Any]]) -> bool:
    return bool(epochs) and epochs[-1]["train_loss"] is None


def _keep_weights(folder: Path, name: str, trainee: Trainee) -> None:
    (folder / WEIGHTS).mkdir(exist_ok=True)
    weights = {key: tensor.detach().cpu() for key, tensor in trainee.model.state_dict().items()}
    files.save_tensors(folder / WEIGHTS / f"{name}.pt", weights)


def _as_json(history: Sequence[StructureChange]) -> list[dict[str, Any]]:
    return [{"epoch": c.epoch, "name": c.name, "grown": list(c.grown), "cut": list(c.cut)} for c in history]


def take_structure(folder: Path, trainee: Trainee, row: str, seed: int, lr: float) -> None:
    """Give a row at its start the structure that its network had at the end of the training, where it has one."""
    if trainee.structure is None:
        return

    def read() -> dict[str, torch.Tensor] | None:
        path = kept_weights(folder, row, seed, lr)
        return None if path is None else torch.load(path, map_location="cpu", weights_only=True)

    weights = ranks.from_first(read)
    if weights is not None:
        trainee.structure.take_structure_of(weights)


def _keep_scales(folder: Path, trainee: Trainee) -> bool:
    """Write the scales, and return whether they can be used. They may overflow before the loss does.

    Rank 0 alone writes.
    """
    if not all(bool(p.square().isfinite().all()) for p in trainee.model.parameters()):
        return False
    if ranks.first():
        with files.writing(folder / SCALES):
            csla.save_scales(csla.extract_scales(trainee.model), folder / SCALES)
    return True


def _as_lists(scalings: Mapping[str, torch.Tensor]) -> dict[str, list[list[float]]]:
    return {name: g.tolist() for name, g in scalings.items()}
