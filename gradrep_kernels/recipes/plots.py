"""The pictures of a report, as files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from gradrep_kernels import plots
from gradrep_kernels.csla import Scales
from gradrep_kernels.plots import new_figure, tidy
from gradrep_kernels.recipes import files
from gradrep_kernels.recipes.errors import extra
from gradrep_kernels.recipes.intervals import half_width

__all__ = [
    "COLOURS",
    "accuracy_against_cost",
    "curves",
    "identity_ratios",
    "kernels",
    "scale_means",
    "scales_over_depth",
    "spatial_scalings",
    "write",
]

# A row has its colour in every job. People who are colour-blind tell the first eight apart (Okabe and Ito).
COLOURS = {
    "sgd": "#0072B2", "sgs": "#D55E00", "repopt": "#009E73", "repopt+sgs": "#56B4E9", "csla": "#CC79A7",
    "repvgg": "#E69F00", "repopt-init": "#444444", "repopt-grad": "#F0E442", "repopt-ones": "#7B68EE",
    "repopt-hs-init": "#8B4513", "repopt-channel-mean": "#AA4499", "sgs-grid": "#999933", "acb": "#117733",
    "dbb": "#882255", "dyrep": "#332288", "qarepvgg": "#DDCC77",
}  # fmt: skip


def write(path: Path, draw: Callable, *args: Any) -> None:
    """Write the figure that `draw(*args)` returns to a PNG file.

    Raises InputError where there is no matplotlib, for the command shows that in one line.
    """
    extra("matplotlib.figure", "matplotlib")
    figure = draw(*args)
    with files.whole(path) as temporary:
        figure.savefig(temporary, format="png")


def spatial_scalings(path: Path, start: Mapping[str, Sequence], end: Mapping[str, Sequence]) -> None:
    """Write the picture of G of the first, middle and last layer, at the start and at the end."""
    write(path, plots.spatial_scalings, end, start)


def scales_over_depth(path: Path, scales: Scales, initial: Scales) -> None:
    """Write the picture of the mean scale of each branch of each layer."""
    write(path, plots.scales_over_depth, scales, initial)


def curves(path: Path, epochs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> None:
    """Write the picture of training loss and test accuracy over epochs.

    `epochs`: {recipe: per seed the records of its epochs}.
    """
    write(path, _curves, epochs)


def _curves(epochs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]):
    figure = new_figure(11, 4.6)
    panels = figure.subplots(1, 2)
    for label, runs in epochs.items():
        colour = COLOURS[label]
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
        if axes.get_xlim()[1] - axes.get_xlim()[0] < 1:  # one epoch
            axes.set_xlim(0, 2)
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
    write(path, _accuracy_against_cost, recipes)


def _accuracy_against_cost(recipes: Mapping[str, Mapping[str, Any]]):
    figure = new_figure(7, 4.6)
    axes = figure.subplots()
    for label, figures in recipes.items():
        colour = COLOURS[label]
        cost, percent = 1000 * figures["seconds_per_step"], [100 * a for a in figures["test_accuracy"]]
        axes.plot([cost] * len(percent), percent, ".", color=colour, alpha=0.35, markersize=5)
        bar = half_width(percent) if len(percent) > 1 else 0.0
        mean = 100 * figures["test_accuracy_mean"]
        axes.errorbar(cost, mean, bar, fmt="o", color=colour, capsize=3, label=label)
        axes.annotate(label, (cost, mean), (6, 4), textcoords="offset points", color=colour, fontsize=9)
    axes.set_xlabel("time of a training step, ms")
    axes.set_ylabel("test accuracy, %")
    axes.set_xlim(0, 1.25 * 1000 * max(figures["seconds_per_step"] for figures in recipes.values()))
    low, high = axes.get_ylim()
    axes.set_ylim(max(-1.0, low), min(101.0, high))
    tidy(axes)
    return figure


def kernels(path: Path, networks: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write the picture of the mean absolute kernel of the first, middle and last layer of each network.

    `networks`: {label: its state dict}.
    """
    write(path, plots.kernel_magnitudes, networks)


def scale_means(path: Path, epochs: Sequence[Mapping[str, Mapping[str, float]]]) -> None:
    """Write the picture of the mean scales after each epoch of the Hyper-Search.

    `epochs`: {layer: {branch: mean}} after each.
    """
    write(path, _scale_means, epochs)


def _scale_means(epochs: Sequence[Mapping[str, Mapping[str, float]]]):
    layers = list(epochs[0])
    shortcuts = [name for name in layers if "identity" in epochs[0][name]]
    panels = {f"mean of all {len(layers)} layers": layers}
    if shortcuts:  # The paper draws one block, in which all three branches are.
        panels[f"{shortcuts[-1].removesuffix('.conv')}, the last with a shortcut"] = shortcuts[-1:]
    figure = new_figure(5 * len(panels) + 1, 4.2)
    at = range(1, len(epochs) + 1)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, chosen) in zip(all_axes, panels.items()):
        for branch in dict.fromkeys(branch for layer in chosen for branch in epochs[0][layer]):
            of_branch = [[means[layer][branch] for layer in chosen if branch in means[layer]] for means in epochs]
            label, colour, _ = plots.BRANCHES.get(branch, (branch, None, None))
            marker = "o" if len(epochs) == 1 else None
            axes.plot(at, [np.mean(values) for values in of_branch], label=label, color=colour, marker=marker)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch of the Hyper-Search")
        axes.set_ylabel("mean scale")
        axes.xaxis.get_major_locator().set_params(integer=True)
        tidy(axes)
        axes.legend(frameon=False)
    return figure


def identity_ratios(path: Path, ratios: Mapping[str, Mapping[str, float]]) -> None:
    """Write the picture of the identity variance ratio over depth.

    `ratios`: {where the scales start: {block: ratio}}.
    """
    write(path, _identity_ratios, ratios)


def _identity_ratios(ratios: Mapping[str, Mapping[str, float]]):
    blocks = list(next(iter(ratios.values())))
    figure = new_figure(max(6.0, 0.28 * len(blocks) + 3), 4.2)
    axes = figure.subplots()
    for (start, values), marker in zip(ratios.items(), "os^"):
        axes.plot(range(len(blocks)), [values[block] for block in blocks], marker=marker, markersize=5, label=start)
    names = [block.removesuffix(".conv") for block in blocks]
    axes.set_xticks(range(len(blocks)), names, rotation=90 if len(blocks) > 8 else 0, fontsize=8)
    axes.set_xlabel("block with an identity")
    axes.set_ylabel("Var(identity) / Var(sum)")
    axes.set_ylim(bottom=0)
    tidy(axes)
    axes.legend(title="scales start at", frameon=False)
    return figure
