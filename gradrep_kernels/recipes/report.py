"""The report of a finished job: summary.md and pictures, and summary.json for programs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradrep_kernels.csla import Scales
from gradrep_kernels.recipes import files, plots
from gradrep_kernels.recipes.data import Data
from gradrep_kernels.recipes.environment import versions
from gradrep_kernels.recipes.equivalence import TOLERANCE
from gradrep_kernels.recipes.options import Options
from gradrep_kernels.recipes.table import Recipe

__all__ = ["check_line", "scales_line", "table", "write_report"]


def write_report(
    folder: Path,
    options: Options,
    data: Data,
    rows: Sequence[Recipe],
    seeds: Sequence[int],
    state: Mapping[str, Any],
    scales: Scales | None,
    initial: Scales | None,
) -> dict[str, Any]:
    """Write summary.json, summary.md and the pictures, and return the summary.

    `state` is that of a finished job, as its checkpoint holds it. Hyper-Search starts from the `initial` scales.
    """
    finished = state["finished"]
    trainings = {recipe.name: [finished[f"{recipe.name}-seed{seed}"] for seed in seeds] for recipe in rows}
    search = finished.get("search")
    summary = {
        "run": folder.name,
        "versions": versions(),
        "device": options.device,
        "threads": options.threads,
        "seeds": list(seeds),
        "options": options.to_json(),
        "data": data.description(),
        "search": None if search is None else _search(search),
        "scales": None if scales is None else {"source": options.scales or "searched", **_movement(scales, initial)},
        "csla_equals_gr": state["check"],
        "recipes": {recipe.name: _figures(recipe, trainings[recipe.name]) for recipe in rows},
        "seconds": state["seconds"],
    }
    pictures = _pictures(folder, trainings, seeds, scales, initial)
    files.write_text(folder / "summary.md", _markdown(summary, pictures))
    files.write_json(folder / "summary.json", summary)
    return summary


def _figures(recipe: Recipe, trainings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    accuracies = [training["epochs"][-1]["test_accuracy"] for training in trainings]
    epochs = [record for training in trainings for record in training["epochs"]]
    figures = {
        "meaning": recipe.meaning,
        "test_accuracy": accuracies,
        "test_accuracy_mean": statistics.fmean(accuracies),
        "test_accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "seconds_per_epoch": statistics.median(record["seconds"] for record in epochs),
        "parameters": trainings[0]["parameters"],
        "multiplier_bytes": trainings[0]["multiplier_bytes"],
        "sgs_seconds_per_epoch": None,
        "sgs_updates": None,
    }
    if recipe.sgs:
        figures["sgs_seconds_per_epoch"] = statistics.fmean(record["sgs_seconds"] for record in epochs)
        figures["sgs_updates"] = sum(record["sgs_updated"] for record in trainings[0]["epochs"])
        figures["scalings"] = trainings[0]["scalings"]  # of the first seed
    return figures


def _search(search: Mapping[str, Any]) -> dict[str, Any]:
    epochs = search["epochs"]
    return {
        "epochs": len(epochs),
        "test_accuracy": epochs[-1]["test_accuracy"],
        "seconds_per_epoch": statistics.median(record["seconds"] for record in epochs),
        "parameters": search["parameters"],
    }


def _movement(scales: Scales, initial: Scales) -> dict[str, Any]:
    """Statistics of the scales α per layer and branch.

    `moved` is the mean of |α - α₀| / |α₀| over the channels.
    """
    layers: dict[str, dict[str, dict[str, float]]] = {}
    for name, value in scales.items():
        starts = initial[name].tensors()
        layers[name] = {}
        for branch, tensor in value.tensors().items():
            now, start = tensor.double(), starts[branch].double()
            layers[name][branch] = {
                "initial": float(start.mean()),
                "mean": float(now.mean()),
                "std": float(now.std(correction=0)),
                "min": float(now.min()),
                "max": float(now.max()),
                "moved": float(((now - start).abs() / start.abs()).mean()),
            }
    moved = [figures["moved"] for branches in layers.values() for figures in branches.values()]
    return {
        "moved_mean": statistics.fmean(moved),
        "moved_least": min(moved),
        "moved_most": max(moved),
        "layers": layers,
    }


def _cells(summary: Mapping[str, Any]) -> list[list[str]]:
    """Heading and rows of the table."""
    many = len(summary["seeds"]) > 1
    accuracy = "test accuracy, % (mean ± std)" if many else "test accuracy, %"
    cells = [["recipe", accuracy, "s per epoch", "parameters", "multipliers, bytes", "SGS, s per epoch"]]
    for name, figures in summary["recipes"].items():
        spread = f" ± {100 * figures['test_accuracy_std']:.2f}" if many else ""
        sgs_seconds = figures["sgs_seconds_per_epoch"]
        row = [
            name,
            f"{100 * figures['test_accuracy_mean']:.2f}{spread}",
            f"{figures['seconds_per_epoch']:.3f}",
            f"{figures['parameters']:,}",
            f"{figures['multiplier_bytes']:,}",
            "" if sgs_seconds is None else f"{sgs_seconds:.4f}",
        ]
        cells.append(row)
    return cells


def table(summary: Mapping[str, Any]) -> str:
    """The table for a terminal."""
    cells = _cells(summary)
    widths = [max(len(row[n]) for row in cells) for n in range(len(cells[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def scales_line(summary: Mapping[str, Any]) -> str:
    """How far the scales are from where Hyper-Search starts."""
    scales, search = summary["scales"], summary["search"]
    after = f"after {search['epochs']} epochs of Hyper-Search" if search else f"of {scales['source']}"
    span = f"{scales['moved_least']:.1%} to {scales['moved_most']:.1%} between branches"
    return f"Scales {after} lie {scales['moved_mean']:.1%} from their initial values on average ({span})."


def check_line(summary: Mapping[str, Any]) -> str:
    """CSLA = GR in one sentence."""
    check = summary["csla_equals_gr"]
    return (
        f"CSLA = GR in float64 over {check['steps']} steps: outputs differ by at most {check['outputs']:.1e}, "
        f"weights by {check['weights']:.1e} ({'within' if check['agrees'] else 'NOT within'} {TOLERANCE:.0e})."
    )


def _markdown_table(cells: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """The first `left` columns to the left, the others to the right."""
    rule = ["---" if n < left else "---:" for n in range(len(cells[0]))]
    return ["| " + " | ".join(row) + " |" for row in (cells[0], rule, *cells[1:])]


def _markdown(summary: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    data, options = summary["data"], summary["options"]
    shape = " x ".join(map(str, data["shape"]))
    images = f"{data['train']} training and {data['test']} test images of {shape}, {data['classes']} classes"
    threads = f"{summary['threads']} thread{'s' * (summary['threads'] > 1)}"
    where = f"{summary['device']}, {threads}, torch {summary['versions']['torch']}"
    lines = [f"# {summary['run']}", "", f"{options['model']} on {data['name']} ({images}), on {where}.", ""]
    if summary["recipes"]:
        lines += _recipes_section(summary)
    if summary["csla_equals_gr"]:
        lines += [check_line(summary), ""]
    if summary["scales"]:
        lines += _scales_section(summary)
    for name, caption in pictures.items():
        lines += [f"![{caption}]({name})", "", f"{caption}.", ""]
    option_cells = [["option", "value"], *([name, str(value)] for name, value in options.items())]
    lines += ["## Options", "", *_markdown_table(option_cells, left=2), ""]
    return "\n".join(lines)


def _recipes_section(summary: Mapping[str, Any]) -> list[str]:
    seeds = ", ".join(map(str, summary["seeds"]))
    return [
        *_markdown_table(_cells(summary)),
        "",
        f"Test accuracy after {summary['options']['epochs']} epochs, over seeds {seeds} (standard deviation of the "
        "sample). Seconds are the median over all epochs, without evaluation; the last column spreads the updates of "
        "the spatial gradient scaling over all epochs. Parameters and multipliers are those in training.",
        "",
        _evidence(summary),
        "",
        *(f"- {name}: {figures['meaning']}" for name, figures in summary["recipes"].items()),
        "",
    ]


def _evidence(summary: Mapping[str, Any]) -> str:
    """What the differences between the rows show, for so many seeds and test images."""
    seeds, points = len(summary["seeds"]), f"{100 / summary['data']['test']:.2f} points"
    if seeds == 1:
        return f"With one seed no difference between rows is evidence; one test image is {points}."
    return (
        f"Differences within one standard deviation are not evidence, and with {seeds} seeds larger ones are a hint at "
        f"most; one test image is {points}. What the table shows is that the recipes train, and what they cost."
    )


def _scales_section(summary: Mapping[str, Any]) -> list[str]:
    lines = ["## Scales", "", scales_line(summary), ""]
    search = summary["search"]
    if search:
        lines += [
            f"The Hyper-Search model has {search['parameters']:,} parameters and took "
            f"{search['seconds_per_epoch']:.3f} s per epoch; its test accuracy is {search['test_accuracy']:.2%}.",
            "",
        ]
    columns = ["initial", "mean", "std", "min", "max"]
    cells = [["layer", "branch", *columns, "moved"]]
    for layer, branches in summary["scales"]["layers"].items():
        for branch, figures in branches.items():
            cells.append([layer, branch, *(f"{figures[key]:.3f}" for key in columns), f"{figures['moved']:.1%}"])
    return [*lines, *_markdown_table(cells, left=2), "", "Moved: mean of |α − α₀| / |α₀| over the channels.", ""]


def _pictures(
    folder: Path,
    trainings: Mapping[str, list[dict[str, Any]]],
    seeds: Sequence[int],
    scales: Scales | None,
    initial: Scales | None,
) -> dict[str, str]:
    """Draw the pictures into `folder` and return {file name: caption}."""
    captions: dict[str, str] = {}
    if trainings:
        epochs = {name: [training["epochs"] for training in runs] for name, runs in trainings.items()}
        plots.curves(folder / "curves.png", epochs)
        captions["curves.png"] = (
            "Training loss and test accuracy: mean over the seeds, and one standard deviation either side"
        )
    for name, runs in trainings.items():
        scalings = runs[0].get("scalings")
        if scalings and scalings["start"]:
            file_name = f"spatial_scaling_{name.replace('+', '_')}.png"
            plots.spatial_scalings(folder / file_name, scalings["start"], scalings["end"])
            captions[file_name] = (
                f"G of the first, middle and last layer under {name}, seed {seeds[0]}, "
                "after its first update and at the end"
            )
    if scales is not None:
        plots.scales_over_depth(folder / "scales.png", scales, initial)
        captions["scales.png"] = (
            "Mean scales over depth with the standard deviation over channels; curves join layers with a shortcut; "
            "dashed: initial values"
        )
    return captions
