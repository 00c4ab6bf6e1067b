"""Pictures of what was learned: spatial scalings G and branch scales α.

Each function returns a matplotlib Figure, which the caller shows or saves: `figure.savefig("g.png")`. Figures are made
without pyplot, so that no global setting is touched. matplotlib is imported when a function is called, and is not
needed before. Its absence is an ImportError that says what to install.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gradrep_kernels.branch_scales import BranchScales
from gradrep_kernels.sgs import ScalingUpdate, SpatialGradientScaling

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["scales_over_depth", "scaling_history", "spatial_scalings"]

_BRANCHES = {
    "conv": ("k x k", "#0072B2", "o"),
    "1x1": ("1 x 1", "#D55E00", "s"),
    "identity": ("identity", "#009E73", "^"),
}
_FURTHER_COLOURS = ("#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
_FURTHER_MARKERS = ("D", "v", "P", "X", "*", "<", ">")
_MOST_COLUMNS = 6
_MOST_NUMBERS = 25  # Numbers stand in the cells of a map up to 5 x 5.


def new_figure(width: float, height: float) -> Figure:
    """Make a Figure of `width` x `height` inches.

    Raises ImportError, saying what to install, where there is no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as reason:
        raise ImportError(
            f"pictures need matplotlib: pip install matplotlib, or 'gradrep_kernels[recipes]' ({reason})"
        ) from reason
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def tidy(axes: Axes) -> None:
    """Leave out the upper and right frame, and draw a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)


def spatial_scalings(
    scalings: SpatialGradientScaling | Mapping[str, Sequence],
    start: Mapping[str, Sequence] | None = None,
    *,
    layers: str | Iterable[str] = "few",
) -> Figure:
    """Draw the learned G of some layers as maps, beside those of an earlier time.

    Source: SGS paper, Figures 4 and 5. All maps share one colour scale. Those up to 5 x 5 show their numbers.

    Args:
        scalings: a SpatialGradientScaling, or {layer: G [kh, kw]} as its `.scalings` are (tensors, arrays or lists).
        start:    {layer: G} of an earlier time, drawn above, such as `sgs.history[0].scalings`. None: one row.
        layers:   'few' (the first, the middle and the last), 'all', or names.

    Raises ImportError without matplotlib, and ValueError for no layers, names that are not there, or a G that is not a
    matrix.
    """
    scalings = scalings.scalings if isinstance(scalings, SpatialGradientScaling) else scalings
    rows = {"": _maps("scalings", scalings)} if start is None else {
        "start": _maps("start", start), "end": _maps("scalings", scalings)
    }  # fmt: skip
    chosen = _chosen(list(next(iter(rows.values()))), layers)
    for when, maps in rows.items():
        if absent := [name for name in chosen if name not in maps]:
            raise ValueError(f"layers: there is no G of {', '.join(absent)}" + (f" at the {when}" if when else ""))
    shown = [g for maps in rows.values() for name, g in maps.items() if name in chosen]
    low, high = min(g.min() for g in shown), max(g.max() for g in shown)
    columns = min(len(chosen), _MOST_COLUMNS)
    bands = math.ceil(len(chosen) / columns)  # Many layers are wrapped like the lines of a text.
    figure = new_figure(2.6 * columns + 1.2, 2.6 * bands * len(rows) + 0.2)
    panels = figure.subplots(bands * len(rows), columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for row, (when, maps) in enumerate(rows.items()):
        for n, name in enumerate(chosen):
            axes = panels[n // columns * len(rows) + row, n % columns]
            image = _map(axes, maps[name], low, high)
            if row == 0:
                axes.set_title(name, fontsize=10)
            if n % columns == 0:
                axes.set_ylabel(when, fontsize=11)
    figure.colorbar(image, ax=panels, label="G (mean 1)", shrink=0.8)
    return figure


def _maps(name: str, scalings: Mapping[str, Sequence]) -> dict[str, np.ndarray]:
    if not isinstance(scalings, Mapping):
        raise TypeError(f"{name} must map layers to G [kh, kw], got {type(scalings).__name__}")
    maps = {layer: np.asarray(g, dtype=float) for layer, g in scalings.items()}
    if not maps:
        raise ValueError(f"{name} holds no layers; .skipped of the controller says why")
    for layer, g in maps.items():
        if g.ndim != 2 or g.size == 0:
            raise ValueError(f"{name}: {layer} must be a matrix [kh, kw], got {list(g.shape)}")
    return maps


def _chosen(names: list[str], layers: str | Iterable[str]) -> list[str]:
    if layers == "few":
        return [names[n] for n in sorted({0, len(names) // 2, len(names) - 1})]
    if layers == "all":
        return names
    chosen = [layers] if isinstance(layers, str) else list(layers)
    if not chosen:
        raise ValueError("layers must be 'few', 'all' or names, got none")
    return chosen


def _map(axes: Axes, g: np.ndarray, low: float, high: float):
    axes.set_axis_on()
    image = axes.imshow(g, cmap="viridis", vmin=low, vmax=high)
    if g.size <= _MOST_NUMBERS:
        for (y, x), value in np.ndenumerate(g):
            dark = value < low + 0.6 * (high - low)
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", color="white" if dark else "black", fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
    return image


def scaling_history(history: SpatialGradientScaling | Sequence[ScalingUpdate]) -> Figure:
    """Draw how G at the centre of each layer changed from update to update.

    G has mean 1, so that 1 is no scaling, and the more the centre has, the less is left for the taps around it. The
    horizontal axis has epochs, or steps of the optimizer, or else counts the updates.

    Args:
        history: a SpatialGradientScaling, or its `.history`, or a part of that.

    Raises ImportError without matplotlib, and ValueError before the first update.
    """
    entries = history.history if isinstance(history, SpatialGradientScaling) else list(history)
    if not entries:
        raise ValueError("history is empty: there was no update yet")
    names = list(entries[-1].scalings)
    unit, at = _times(entries)
    figure = new_figure(7.5, 4.2)
    axes = figure.subplots()
    colours = _shades(len(names))
    for name, colour in zip(names, colours):
        values = [float(g[g.shape[0] // 2, g.shape[1] // 2]) for g in (entry.scalings[name] for entry in entries)]
        axes.plot(at, values, color=colour, label=name, linewidth=1.4, marker="o", markersize=3)
    axes.axhline(1, color="grey", linestyle="--", linewidth=1)
    axes.set_xlabel(unit)
    axes.set_ylabel("G at the centre (mean 1)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    tidy(axes)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, ncols=math.ceil(len(names) / 20))
    return figure


def _times(entries: Sequence[ScalingUpdate]) -> tuple[str, list[int]]:
    """Return what the updates are counted in, and the number of each."""
    for unit in ("step", "epoch"):
        at = [getattr(entry, unit) for entry in entries]
        if None not in at and len(set(at)) == len(at):
            return unit, at
    return "update", [entry.number for entry in entries]


def _shades(n: int) -> Any:
    """Return colours from the first layer (dark) to the last (light)."""
    from matplotlib import colormaps

    return colormaps["viridis"](np.linspace(0, 0.9, n))


def scales_over_depth(scales: Mapping[str, BranchScales], initial: Mapping[str, BranchScales] | None = None) -> Figure:
    """Draw the mean scale α of each branch of each layer.

    Source: RepOptimizers, Figure 7. Bars show the standard deviation over channels. Curves join layers with an identity
    branch, and stop where a layer has none. Further branches have their names of `BranchScales.tensors`.

    Args:
        scales:  {name: BranchScales} in the order of the layers, as `gr.csla.extract_scales` gives them.
        initial: those of before the Hyper-Search, drawn dashed. None: no dashed lines.

    Raises ImportError without matplotlib, TypeError for other values than BranchScales, and ValueError for no scales,
    or for layers or branches that `initial` lacks.
    """
    _check_scales("scales", scales)
    if initial is not None:
        _check_scales("initial", initial)
        lacking = [
            f"{name} ({branch})"
            for name, value in scales.items()
            for branch in value.tensors()
            if name not in initial or branch not in initial[name].tensors()
        ]
        if lacking:
            raise ValueError(f"initial has no scales of {', '.join(lacking[:4])}")
    names = list(scales)
    figure = new_figure(max(6.0, 0.28 * len(names) + 3), 4.2)
    axes = figure.subplots()
    for branch, (label, colour, marker) in _drawn(scales).items():
        for run in _runs(scales):
            at = [n for n in run if branch in scales[names[n]].tensors()]
            if not at:
                continue
            if initial is not None:
                lone = {"marker": "_"} if len(at) == 1 else {}
                means = [float(initial[names[n]].tensors()[branch].double().mean()) for n in at]
                axes.plot(at, means, color=colour, linestyle="--", linewidth=1, alpha=0.6, **lone)
            now = [scales[names[n]].tensors()[branch].double() for n in at]
            axes.errorbar(
                at,
                [float(t.mean()) for t in now],
                [float(t.std(correction=0)) for t in now],
                color=colour,
                marker=marker,
                markersize=5,
                linewidth=1.8,
                elinewidth=0.8,
                capsize=2,
            )
        if any(branch in value.tensors() for value in scales.values()):
            axes.plot([], [], color=colour, marker=marker, label=label)
    if initial is not None:
        axes.plot([], [], color="grey", linestyle="--", linewidth=1, label="initial")
    axes.set_xticks(
        range(len(names)),
        [name.removesuffix(".conv") for name in names],
        rotation=90 if len(names) > 8 else 0,
        fontsize=8,
    )
    axes.set_xlabel("layer")
    axes.set_ylabel("mean scale")
    tidy(axes)
    axes.legend(frameon=False)
    return figure


def _drawn(scales: Mapping[str, BranchScales]) -> dict[str, tuple[str, str, str]]:
    """Return label, colour and marker of each branch, those of the paper first."""
    drawn = dict(_BRANCHES)
    for value in scales.values():
        for branch in value.tensors():
            n = len(drawn) - len(_BRANCHES)
            colour, marker = _FURTHER_COLOURS[n % len(_FURTHER_COLOURS)], _FURTHER_MARKERS[n % len(_FURTHER_MARKERS)]
            drawn.setdefault(branch, (branch, colour, marker))
    return drawn


def _check_scales(name: str, scales: Mapping[str, BranchScales]) -> None:
    if not isinstance(scales, Mapping) or not all(isinstance(value, BranchScales) for value in scales.values()):
        raise TypeError(f"{name} must map names to BranchScales, as gr.csla.extract_scales gives them")
    if not scales:
        raise ValueError(f"{name} holds no layers")


def _runs(scales: Mapping[str, BranchScales]) -> list[list[int]]:
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
