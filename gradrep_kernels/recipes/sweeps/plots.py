"""The pictures of a sweep: curves over a number, maps over two, else a panel of points."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradrep_kernels.plots import new_figure, sweep_curve, tidy
from gradrep_kernels.recipes import plots
from gradrep_kernels.recipes.intervals import half_width
from gradrep_kernels.recipes.options.resolve import OPTIONS, Options

__all__ = ["draw_sweep"]

_PARTS = {"test_accuracy": "test", "validation_accuracy": "validation"}


def draw_sweep(
    folder: Path, swept: Sequence[str], points: Mapping[str, Options], figures: Mapping[str, Mapping[str, Any]]
) -> dict[str, str]:
    """Draw the pictures into `folder` and return {file name: caption}.

    Args:
        swept: the options in which points differ.
        points: the options of each point by its name.
        figures: of each point, those that sweep.json holds.
    """
    path, numbers = folder / "sweep.png", [_number(points, option) for option in swept]
    bars = "Bars are 95 % intervals of the mean over the seeds, not of differences"
    if len(points) < 2 or not any(point["recipes"] for point in figures.values()):
        return {}
    if len(swept) == 1 and numbers[0] is not None:
        plots.write(path, _curves, _flag(swept[0]), numbers[0], figures)
        return {path.name: f"Accuracy over `{OPTIONS[swept[0]].flag}`. {bars}"}
    if len(swept) == 2 and None not in numbers and _is_grid(*numbers):
        plots.write(path, _maps, [_flag(option) for option in swept], numbers, figures)
        return {path.name: "Mean test accuracy over the grid, in %. The table says which differences are shown"}
    plots.write(path, _panel, figures)
    return {path.name: f"Test accuracy of each point. {bars}"}


def _flag(option: str) -> str:
    return OPTIONS[option].flag.removeprefix("--")


def _number(points: Mapping[str, Options], option: str) -> list[float] | None:
    """The value of an option at each point, None where one of them is no number."""
    values = []
    for options in points.values():
        value = getattr(options, option)
        if isinstance(value, tuple) and len(value) == 1:
            (value,) = value  # a learning rate
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        values.append(float(value))
    return values


def _is_grid(first: Sequence[float], second: Sequence[float]) -> bool:
    sides = len(set(first)), len(set(second))
    return min(sides) > 1 and len(set(zip(first, second))) == len(first) == sides[0] * sides[1]


def _rows(figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row for point in figures.values() for row in point["recipes"]))


def _mean(point: Mapping[str, Any], row: str, part: str = "test_accuracy") -> float:
    values = point["recipes"].get(row, {}).get(part)
    return 100 * statistics.fmean(values) if values else np.nan


def _bar(point: Mapping[str, Any], row: str) -> float:
    values = point["recipes"].get(row, {}).get("test_accuracy") or []
    return 100 * half_width(values) if len(values) > 1 else 0.0


def _taken(row: str, figures: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether one training of the row holds for all points."""
    return sum(not point["recipes"].get(row, {}).get("taken_from") for point in figures.values()) == 1


def _curves(name: str, values: Sequence[float], figures: Mapping[str, Mapping[str, Any]]):
    means: dict[str, Any] = {}
    bars: dict[str, Any] = {}
    colours, dashed = {}, []
    for row in _rows(figures):
        for part, word in _PARTS.items():
            of_points = [_mean(point, row, part) for point in figures.values()]
            if np.isnan(of_points).all():
                continue
            label = row if word == "test" else f"{row}, {word}"
            means[label] = of_points[0] if _taken(row, figures) else of_points
            if word == "test":  # Bars of both parts would hide each other.
                widths = [_bar(point, row) for point in figures.values()]
                bars[label] = widths[0] if _taken(row, figures) else widths
            colours[label] = plots.COLOURS[row]
            dashed += [label] * (word != "test")
    figure = sweep_curve(values, means, bars, name=name, measured="accuracy, %", colours=colours, dashed=dashed)
    low, high = figure.axes[0].get_ylim()  # Intervals of two seeds reach far beyond.
    figure.axes[0].set_ylim(max(-1.0, low), min(101.0, high))
    return figure


def _maps(names: Sequence[str], numbers: Sequence[Sequence[float]], figures: Mapping[str, Mapping[str, Any]]):
    rows = [row for row in _rows(figures) if not _taken(row, figures)] or _rows(figures)
    down, along = (sorted(set(values)) for values in numbers)
    grids = {row: np.full((len(down), len(along)), np.nan) for row in rows}
    for point, y, x in zip(figures.values(), *numbers):
        for row, grid in grids.items():
            grid[down.index(y), along.index(x)] = _mean(point, row)
    figure = new_figure((0.75 * len(along) + 2) * len(rows), 0.6 * len(down) + 1.4)
    panels = figure.subplots(1, len(rows), squeeze=False)[0]
    low, high = (of(list(grids.values())) for of in (np.nanmin, np.nanmax))
    for axes, (row, grid) in zip(panels, grids.items()):
        image = axes.imshow(grid, cmap="viridis", aspect="auto", vmin=low, vmax=high)
        for (y, x), value in np.ndenumerate(grid):
            colour = "white" if value < low + 0.6 * (high - low) else "black"
            axes.text(x, y, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=9)
        axes.set_xticks(range(len(along)), [f"{value:g}" for value in along])
        axes.set_yticks(range(len(down)), [f"{value:g}" for value in down])
        axes.set_xlabel(names[1])
        axes.set_ylabel(names[0])
        axes.set_title(row)
    figure.colorbar(image, ax=panels, label="test accuracy, %")
    return figure


def _panel(figures: Mapping[str, Mapping[str, Any]]):
    rows = _rows(figures)
    figure = new_figure(max(6.0, 0.35 * len(figures) * max(1, len(rows) / 2) + 2), 4.6)
    axes = figure.subplots()
    for n, row in enumerate(rows):
        shift = min(0.12, 0.6 / len(rows)) * (n - (len(rows) - 1) / 2)
        at = [m + shift for m in range(len(figures))]
        means, bars = ([of(point, row) for point in figures.values()] for of in (_mean, _bar))
        axes.errorbar(at, means, bars, fmt="o", color=plots.COLOURS[row], markersize=5, capsize=3, label=row)
    axes.set_xticks(range(len(figures)), list(figures), rotation=30, ha="right", fontsize=8)
    axes.set_ylabel("test accuracy, %")
    tidy(axes)
    axes.legend(frameon=False)
    return figure
