"""Pictures of what was learned: spatial scalings G, branch scales α, kernels, and accuracy over a setting.

Each function returns a matplotlib Figure, which the caller shows or saves: `figure.savefig("g.png")`. Figures are made
without pyplot, so that no global setting is touched. matplotlib is imported when a function is called, and is not
needed before. Its absence is an ImportError that says what to install.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from gradrep_kernels.branch_scales import BranchScales
from gradrep_kernels.sgs import ScalingUpdate, SpatialGradientScaling

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["kernel_magnitudes", "scales_over_depth", "scaling_history", "spatial_scalings", "sweep_curve"]

BRANCHES = {
    "conv": ("k x k", "#0072B2", "o"),
    "1x1": ("1 x 1", "#D55E00", "s"),
    "identity": ("identity", "#009E73", "^"),
}
_FURTHER_COLOURS = ("#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
_FURTHER_MARKERS = ("D", "v", "P", "X", "*", "<", ">")
_MOST_COLUMNS = 6
_LOG_FROM = 100.0  # Values that span two decades stand on a logarithmic axis.
_MOST_TICKS = 12  # Up to so many values have a tick each.
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


def kernel_magnitudes(
    networks: Mapping[str, nn.Module | Mapping[str, Tensor]], *, layers: str | Iterable[str] = "few"
) -> Figure:
    """Draw the mean absolute kernel of some layers as maps, a row for each network.

    A kernel [O, I, kh, kw] gives the map mean over O and I of |kernel|, divided by its mean over the taps, so that 1 is
    an average tap. The last map is the mean of those of all layers that have the first drawn layer's size. Source: SGS
    paper, A.7 and Figure 6, where the networks are trained with and without spatial gradient scaling. The mean over
    layers is ours.

    Args:
        networks: {label: model or its state dict}, with the same layers. Kernels of 1 x 1 are left out.
        layers:   'few' (the first, the middle and the last), 'all', or names without `.weight`.

    Raises ImportError without matplotlib, and ValueError for no networks, networks without kernels, or layers that one
    of them lacks.
    """
    if not networks:
        raise ValueError("networks holds none")
    magnitudes = {label: _magnitudes(label, network) for label, network in networks.items()}
    names = list(next(iter(magnitudes.values())))
    chosen = _chosen(names, layers)
    for label, maps in magnitudes.items():
        if absent := [name for name in {**dict.fromkeys(chosen), **dict.fromkeys(names)} if name not in maps]:
            raise ValueError(f"layers: {label} has no kernels of {', '.join(absent[:4])}")
    rows = []
    for label, maps in magnitudes.items():
        alike = [g for g in maps.values() if g.shape == maps[chosen[0]].shape]
        whole = {f"mean of {len(alike)} layers": np.mean(alike, axis=0)} if len(names) > 1 else {}
        rows.append((label, {**{name: maps[name] for name in chosen}, **whole}))
    shown = [g for _, maps in rows for g in maps.values()]
    low, high = min(g.min() for g in shown), max(g.max() for g in shown)
    columns = max(len(maps) for _, maps in rows)
    figure = new_figure(2.4 * columns + 1.2, 2.5 * len(rows) + 0.2)
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for row, (label, maps) in enumerate(rows):
        for n, (name, g) in enumerate(maps.items()):
            image = _map(panels[row, n], g, low, high)
            if row == 0:
                panels[row, n].set_title(name, fontsize=10)
        panels[row, 0].set_ylabel(label, fontsize=11)
    figure.colorbar(image, ax=panels, label="mean |kernel| (mean 1)", shrink=0.8)
    return figure


def _magnitudes(label: str, network: nn.Module | Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """{layer: mean |kernel| over its channels, of mean 1 [kh, kw]} of the kernels of more than one tap."""
    tensors = network.state_dict() if isinstance(network, nn.Module) else network
    kernels = {
        name.removesuffix(".weight"): tensor.detach().double().abs().mean((0, 1)).cpu().numpy()
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor) and tensor.ndim == 4 and tensor[0, 0].numel() > 1
    }
    if not kernels:
        raise ValueError(f"networks: {label} has no kernels of more than one tap")
    return {name: kernel / (kernel.mean() or 1.0) for name, kernel in kernels.items()}


def sweep_curve(
    values: Sequence[float],
    means: Mapping[str, Sequence[float] | float],
    half_widths: Mapping[str, Sequence[float] | float] | None = None,
    *,
    name: str = "value",
    measured: str = "test accuracy, %",
    colours: Mapping[str, str] | None = None,
    dashed: Iterable[str] = (),
) -> Figure:
    """Draw a figure of merit over the values of a setting, a curve for each way of training.

    The axis is logarithmic where the values are positive and span two decades. Source: SGS paper, Figure 8.

    Args:
        values:      of the setting, in any order.
        means:       {label: the figure at each value}. NaN where there is none. A label with one number instead of a
                     sequence is a level that does not depend on the setting.
        half_widths: {label: half the width of the interval at each value}, for bars. Labels may be missing.
        name:        of the setting, and `measured` what `means` are.
        colours:     {label: colour}, for those that should have one of their own.
        dashed:      labels whose curves are dashed.

    Raises ImportError without matplotlib, and ValueError for no values, no means, or lengths that differ.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or not values.size or not means:
        raise ValueError(f"values must be numbers and means must have a label, got {values.size} and {len(means)}")
    order, half_widths, colours = np.argsort(values, kind="stable"), half_widths or {}, colours or {}
    figure = new_figure(8, 4.4)
    axes = figure.subplots()
    for n, (label, given) in enumerate(means.items()):
        style = {"color": colours.get(label, f"C{n}"), "linestyle": "--" if label in dashed else "-", "label": label}
        bars = half_widths.get(label)
        if np.ndim(given) == 0:
            axes.axhline(float(given), linewidth=1.4, **style)
            if bars is not None:
                axes.axhspan(given - bars, given + bars, color=style["color"], alpha=0.1, linewidth=0)
            continue
        if len(given) != len(values) or (bars is not None and len(bars) != len(values)):
            raise ValueError(f"means and half_widths must have {len(values)} numbers of {label}, one for each value")
        bars = None if bars is None else np.asarray(bars, dtype=float)[order]
        axes.errorbar(
            values[order], np.asarray(given, dtype=float)[order], bars, marker="o", markersize=5, capsize=3, **style
        )
    if values.min() > 0 and values.max() >= _LOG_FROM * values.min():
        axes.set_xscale("log")
    if len(shown := np.unique(values)) <= _MOST_TICKS:
        axes.set_xticks(shown, [f"{value:g}" for value in shown])
        axes.set_xticks([], minor=True)
    axes.set_xlabel(name)
    axes.set_ylabel(measured)
    tidy(axes)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


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
    drawn = dict(BRANCHES)
    for value in scales.values():
        for branch in value.tensors():
            n = len(drawn) - len(BRANCHES)
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
