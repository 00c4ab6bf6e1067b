"""The pictures of a report, as files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradrep_kernels import plots
from gradrep_kernels.csla import Scales
from gradrep_kernels.plots import new_figure, tidy
from gradrep_kernels.recipes import files
from gradrep_kernels.recipes.errors import extra
from gradrep_kernels.recipes.intervals import half_width

__all__ = ["accuracy_against_cost", "curves", "scales_over_depth", "spatial_scalings"]

# A row has its colour in every job. People who are colour-blind tell the first eight apart (Okabe and Ito).
_COLOURS = {
    "sgd": "#0072B2", "sgs": "#D55E00", "repopt": "#009E73", "repopt+sgs": "#56B4E9", "csla": "#CC79A7",
    "repvgg": "#E69F00", "repopt-init": "#444444", "repopt-grad": "#F0E442", "repopt-ones": "#7B68EE",
    "repopt-hs-init": "#8B4513", "repopt-channel-mean": "#AA4499", "sgs-grid": "#999933", "acb": "#117733",
    "dbb": "#882255", "dyrep": "#332288", "qarepvgg": "#DDCC77",
}  # fmt: skip


def _write(path: Path, draw: Callable, *args: Any) -> None:
    """Write the figure that `draw(*args)` returns.

    Raises InputError where there is no matplotlib, for the command shows that in one line.
    """
    extra("matplotlib.figure", "matplotlib")
    figure = draw(*args)
    with files.whole(path) as temporary:
        figure.savefig(temporary, format="png")


def spatial_scalings(path: Path, start: Mapping[str, Sequence], end: Mapping[str, Sequence]) -> None:
    """Write the picture of G of the first, middle and last layer, at the start and at the end."""
    _write(path, plots.spatial_scalings, end, start)


def scales_over_depth(path: Path, scales: Scales, initial: Scales) -> None:
    """Write the picture of the mean scale of each branch of each layer."""
    _write(path, plots.scales_over_depth, scales, initial)


def curves(path: Path, epochs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> None:
    """Write the picture of training loss and test accuracy over epochs.

    `epochs`: {recipe: per seed the records of its epochs}.
    """
    _write(path, _curves, epochs)


def _curves(epochs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]):
    figure = new_figure(11, 4.6)
    panels = figure.subplots(1, 2)
    for label, runs in epochs.items():
        colour = _COLOURS[label]
        for axes, key, factor in zip(panels, ("train_loss", "test_accuracy"), (1, 100)):
            at, values = _measured(runs, key)
            mean = factor * values.mean(0)
            axes.plot(at, mean, color=colour, label=label, linewidth=1.6, marker="o" if len(at) == 1 else None)
            if len(runs) > 1:
                std = factor * values.std(0, ddof=1)
                axes.fill_between(at, mean - std, mean + std, color=colour, alpha=0.12, linewidth=0)
    for axes, name in zip(panels, ("training loss", "test accuracy, %")):
        axes.set_xlabel("epoch")
        axes.set_ylabel(name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        tidy(axes)
    if any((_measured(runs, "train_loss")[1] > 0).any() for runs in epochs.values()):  # not if all diverged
        panels[0].set_yscale("log")
    accuracies = [100 * _measured(runs, "test_accuracy")[1] for runs in epochs.values()]
    accuracies = [values for values in accuracies if values.size]
    top = max((values.max() for values in accuracies), default=100.0)
    # The axis starts at the accuracy of half-time, because the first half would flatten the rest.
    low = min((values[:, values.shape[1] // 2].min() for values in accuracies), default=0.0)
    panels[1].set_ylim(max(0, low - 0.15 * (top - low) - 0.5), min(100.5, top + 0.15 * (top - low) + 0.5))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def _measured(runs: Sequence[Sequence[Mapping[str, Any]]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """The epochs [n] (from 1) in which every seed has a figure, and the figures [seeds, n]."""
    figures = [[record.get(key) for record in run] for run in runs]
    at = [n for n, of_epoch in enumerate(zip(*figures)) if None not in of_epoch]
    values = [[of_seed[n] for n in at] for of_seed in figures]
    return np.array(at, dtype=int) + 1, np.array(values, dtype=float).reshape(len(runs), len(at))


def accuracy_against_cost(path: Path, recipes: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the picture of test accuracy against the time of a training step.

    `recipes`: {recipe: its figures in the summary}.
    """
    _write(path, _accuracy_against_cost, recipes)


def _accuracy_against_cost(recipes: Mapping[str, Mapping[str, Any]]):
    figure = new_figure(7, 4.6)
    axes = figure.subplots()
    for label, figures in recipes.items():
        colour = _COLOURS[label]
        cost, percent = 1000 * figures["seconds_per_step"], [100 * a for a in figures["test_accuracy"]]
        axes.plot([cost] * len(percent), percent, ".", color=colour, alpha=0.35, markersize=5)
        bar = half_width(percent) if len(percent) > 1 else 0.0
        mean = 100 * figures["test_accuracy_mean"]
        axes.errorbar(cost, mean, bar, fmt="o", color=colour, capsize=3, label=label)
        axes.annotate(label, (cost, mean), (6, 4), textcoords="offset points", color=colour, fontsize=9)
    axes.set_xlabel("time of a training step, ms")
    axes.set_ylabel("test accuracy, %")
    axes.set_xlim(left=0)
    axes.set_ylim(top=min(101.0, axes.get_ylim()[1]))
    tidy(axes)
    return figure
