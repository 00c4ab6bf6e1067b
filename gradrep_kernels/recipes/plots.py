"""The pictures of a report, after the figures of the papers.

They are drawn without pyplot, so that no global setting is touched.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradrep_kernels.csla import Scales
from gradrep_kernels.recipes import files
from gradrep_kernels.recipes.errors import extra

__all__ = ["curves", "scales_over_depth", "spatial_scalings"]

# As many as there can be rows. People who are colour-blind tell the first eight apart (Okabe and Ito).
_COLOURS = [
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444", "#F0E442",
    "#7B68EE", "#8B4513", "#AA4499",
]  # fmt: skip
_BRANCHES = {
    "conv": ("k x k", "#0072B2", "o"),
    "1x1": ("1 x 1", "#D55E00", "s"),
    "identity": ("identity", "#009E73", "^"),
}


def _figure(width: float, height: float):
    return extra("matplotlib.figure", "matplotlib").Figure(figsize=(width, height), dpi=120, layout="constrained")


def _save(figure, path: Path) -> None:
    with files.whole(path) as temporary:
        figure.savefig(temporary, format="png")


def _plain(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)


def curves(path: Path, epochs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> None:
    """Draw training loss and test accuracy over epochs.

    `epochs`: {recipe: per seed the records of its epochs}.
    """
    figure = _figure(11, 4.6)
    panels = figure.subplots(1, 2)
    for (label, runs), colour in zip(epochs.items(), itertools.cycle(_COLOURS)):
        at = np.arange(1, len(runs[0]) + 1)
        for axes, key, factor in zip(panels, ("train_loss", "test_accuracy"), (1, 100)):
            values = factor * np.array(
                [[np.nan if record[key] is None else record[key] for record in run] for run in runs]
            )  # [seeds, epochs]
            mean = values.mean(0)
            axes.plot(at, mean, color=colour, label=label, linewidth=1.6, marker="o" if len(at) == 1 else None)
            if len(runs) > 1:
                std = values.std(0, ddof=1)
                axes.fill_between(at, mean - std, mean + std, color=colour, alpha=0.12, linewidth=0)
    for axes, name in zip(panels, ("training loss", "test accuracy, %")):
        axes.set_xlabel("epoch")
        axes.set_ylabel(name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        _plain(axes)
    panels[0].set_yscale("log")
    top = max(record["test_accuracy"] for runs in epochs.values() for run in runs for record in run) * 100
    # The axis starts at the accuracy of half-time, because the first half would flatten the rest.
    low = min(run[len(run) // 2]["test_accuracy"] for runs in epochs.values() for run in runs) * 100
    panels[1].set_ylim(max(0, low - 0.15 * (top - low) - 0.5), min(100.5, top + 0.15 * (top - low) + 0.5))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    _save(figure, path)


def spatial_scalings(path: Path, start: Mapping[str, Sequence], end: Mapping[str, Sequence]) -> None:
    """Draw G of the first, middle and last layer, at the start and at the end.

    Source: SGS paper, Figures 4 and 5.
    """
    names = list(start)
    chosen = [names[n] for n in sorted({0, len(names) // 2, len(names) - 1})]
    rows = {"start": start, "end": end}
    maps = {(when, name): np.array(scalings[name]) for when, scalings in rows.items() for name in chosen}
    low, high = min(g.min() for g in maps.values()), max(g.max() for g in maps.values())
    figure = _figure(2.6 * len(chosen) + 1.2, 5.4)
    panels = figure.subplots(2, len(chosen), squeeze=False)
    for axes, ((when, name), g) in zip(panels.flat, maps.items()):
        image = axes.imshow(g, cmap="viridis", vmin=low, vmax=high)
        if g.size <= 25:
            for (y, x), value in np.ndenumerate(g):
                dark = value < low + 0.6 * (high - low)
                axes.text(
                    x, y, f"{value:.2f}", ha="center", va="center", color="white" if dark else "black", fontsize=9
                )
        axes.set_xticks([])
        axes.set_yticks([])
        if when == "start":
            axes.set_title(name, fontsize=10)
        if name == chosen[0]:
            axes.set_ylabel(when, fontsize=11)
    figure.colorbar(image, ax=panels, label="G (mean 1)", shrink=0.8)
    _save(figure, path)


def scales_over_depth(path: Path, scales: Scales, initial: Scales) -> None:
    """Draw the mean scale of each branch of each layer (RepOptimizers, Figure 7).

    Curves stop where a layer has no identity branch.
    """
    names = list(scales)
    figure = _figure(max(6.0, 0.28 * len(names) + 3), 4.2)
    axes = figure.subplots()
    for branch, (label, colour, marker) in _BRANCHES.items():
        for run in _runs(scales):
            at = [n for n in run if branch in scales[names[n]].tensors()]
            if not at:
                continue
            now, start = ([values[names[n]].tensors()[branch].double() for n in at] for values in (scales, initial))
            axes.plot(
                at,
                [float(t.mean()) for t in start],
                color=colour,
                linestyle="--",
                linewidth=1,
                alpha=0.6,
                marker="_" if len(at) == 1 else None,
            )
            spread = [float(t.std(correction=0)) for t in now]
            axes.errorbar(
                at,
                [float(t.mean()) for t in now],
                spread,
                color=colour,
                marker=marker,
                markersize=5,
                linewidth=1.8,
                elinewidth=0.8,
                capsize=2,
            )
        axes.plot([], [], color=colour, marker=marker, label=label)
    axes.plot([], [], color="grey", linestyle="--", linewidth=1, label="initial")
    axes.set_xticks(
        range(len(names)),
        [name.removesuffix(".conv") for name in names],
        rotation=90 if len(names) > 8 else 0,
        fontsize=8,
    )
    axes.set_xlabel("layer")
    axes.set_ylabel("mean scale")
    _plain(axes)
    axes.legend(frameon=False)
    _save(figure, path)


def _runs(scales: Scales) -> list[list[int]]:
    """Group the positions of the layers into runs.

    Consecutive layers with an identity branch are one run, each layer without one is a run of its own.
    """
    runs: list[list[int]] = []
    joined = False
    for n, value in enumerate(scales.values()):
        if value.has_identity and joined:
            runs[-1].append(n)
        else:
            runs.append([n])
        joined = value.has_identity
    return runs
