"""Histograms of kernels, as files. Source: RepOptimizers, Figures 3 and 5."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from gradrep_kernels.branches.spread import KernelHistory, kernel_spread
from gradrep_kernels.plots import new_figure, tidy
from gradrep_kernels.recipes import files
from gradrep_kernels.recipes.errors import extra

__all__ = ["kernels", "locations"]

_BINS = 61  # Odd, so that one bin lies around 0.
_CENTRE, _SURROUND, _WHOLE = "#D55E00", "#0072B2", "#444444"


def kernels(path: Path, histories: Mapping[str, KernelHistory]) -> None:
    """Write the picture of the deployed kernels of each row, side by side on one scale."""
    shown = {name: _taps(history.deployed) for name, history in histories.items()}
    edges = _edges(shown.values())
    extra("matplotlib.figure", "matplotlib")
    figure = new_figure(3.2 * len(shown) + 0.6, 3.2)
    panels = figure.subplots(1, len(shown), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (name, taps) in zip(panels, shown.items()):
        axes.hist(taps.ravel(), edges, color=_WHOLE)
        std = kernel_spread(histories[name].deployed).whole
        axes.set_title(f"{name}: std {std:.4f}", fontsize=10)
        axes.set_xlabel("weight")
        tidy(axes)
    figure.supylabel("weights")
    _finish(figure, panels[0], path)


def locations(path: Path, histories: Mapping[str, KernelHistory], moments: Mapping[str, str]) -> None:
    """Write the picture of the weights at the centre and around it, a line of panels for each row.

    `moments`: {field of KernelHistory: its words}, a column each.
    """
    extra("matplotlib.figure", "matplotlib")
    columns = [m for m in moments if any(getattr(history, m) is not None for history in histories.values())]
    edges = _edges(_taps(kernel) for history in histories.values() for kernel in history if kernel is not None)
    figure = new_figure(3.2 * len(columns) + 1.4, 2.4 * len(histories) + 0.6)
    panels = figure.subplots(len(histories), len(columns), sharex=True, sharey=True, squeeze=False)
    for line, (name, history) in zip(panels, histories.items()):
        for axes, moment in zip(line, columns):
            kernel = getattr(history, moment)
            if kernel is None:
                axes.set_axis_off()
                continue
            taps = _taps(kernel)
            middle = taps.shape[2] // 2
            around = np.delete(taps, middle, axis=2)
            axes.hist(around.ravel(), edges, density=True, color=_SURROUND, alpha=0.6, label="surround")
            axes.hist(taps[:, :, middle].ravel(), edges, density=True, color=_CENTRE, alpha=0.6, label="centre")
            axes.set_title(f"{name}, {moments[moment]}", fontsize=9)
            axes.set_xlabel("weight")
            axes.tick_params(labelbottom=True)  # Panels below may be empty.
            tidy(axes)
    drawn = next(axes for axes in panels.flat if axes.get_legend_handles_labels()[0])
    figure.legend(*drawn.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.supylabel("density of the weights")
    _finish(figure, panels[0, 0], path)


def _taps(kernel: Tensor) -> np.ndarray:
    """[O, I, kh kw]"""
    return kernel.detach().cpu().double().flatten(2).numpy()


def _edges(arrays) -> np.ndarray:
    """Edges of the bins, symmetric around 0."""
    largest = max(float(np.abs(array).max()) for array in arrays) or 1.0
    return np.linspace(-largest, largest, _BINS + 1)


def _finish(figure, axes, path: Path) -> None:
    """Counts go over decades, because the largest weights are few."""
    axes.set_yscale("log")  # The panels share it.
    with files.whole(path) as temporary:
        figure.savefig(temporary, format="png")
