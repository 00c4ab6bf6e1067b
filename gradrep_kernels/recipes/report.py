"""What a finished job leaves for people (summary.md, pictures) and for programs (summary.json)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradrep_kernels.csla import Scales
from gradrep_kernels.recipes import files, plots
from gradrep_kernels.recipes.build import Row
from gradrep_kernels.recipes.data import Data
from gradrep_kernels.recipes.environment import versions
from gradrep_kernels.recipes.equivalence import TOLERANCE
from gradrep_kernels.recipes.options import ABLATIONS, RECIPES, Options

__all__ = ["check_line", "scales_line", "table", "write_report"]

_BRANCHES = ("conv", "1x1", "identity")


def write_report(
    folder: Path,
    options: Options,
    data: Data,
    rows: Sequence[Row],
    seeds: Sequence[int],
    state: Mapping[str, Any],
    scales: Scales | None,
    initial: Scales | None,
) -> dict[str, Any]:
    """Write summary.json, summary.md and the pictures of a finished job's `state` into `folder`; returns the summary."""
    trainings = {row.label: [state["finished"][f"{row.label}-seed{seed}"] for seed in seeds] for row in rows}
    search = state["finished"].get("search")
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
        "recipes": {row.label: _figures(row, trainings[row.label]) for row in rows},
        "seconds": state["seconds"],
    }
    pictures = _pictures(folder, trainings, seeds, scales, initial)
    files.write_text(folder / "summary.md", _markdown(summary, pictures))
    files.write_json(folder / "summary.json", summary)
    return summary


def _figures(row: Row, trainings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    accuracies = [training["epochs"][-1]["test_accuracy"] for training in trainings]
    epochs = [record for training in trainings for record in training["epochs"]]
    found = {
        "meaning": RECIPES[row.recipe] if row.ablation is None else f"RepOpt, {ABLATIONS[row.ablation]}",
        "test_accuracy": accuracies,
        "test_accuracy_mean": statistics.fmean(accuracies),
        "test_accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "seconds_per_epoch": statistics.median(record["seconds"] for record in epochs),
        "parameters": trainings[0]["parameters"],
        "multiplier_bytes": trainings[0]["multiplier_bytes"],
        "sgs_seconds_per_epoch": statistics.fmean(record["sgs_seconds"] for record in epochs) if row.uses_sgs else None,
        "sgs_updates": sum(record["sgs_updated"] for record in trainings[0]["epochs"]) if row.uses_sgs else None,
    }
    if row.uses_sgs:
        found["scalings"] = trainings[0]["scalings"]  # of the first seed
    return found


def _search(search: Mapping[str, Any]) -> dict[str, Any]:
    epochs = search["epochs"]
    return {
        "epochs": len(epochs),
        "test_accuracy": epochs[-1]["test_accuracy"],
        "seconds_per_epoch": statistics.median(record["seconds"] for record in epochs),
        "parameters": search["parameters"],
    }


def _movement(scales: Scales, initial: Scales) -> dict[str, Any]:
    """Per layer and branch: where the scales began, where they are, and mean |α - α₀| / |α₀| over the channels (`moved`)."""
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
    cells = [
        [
            "recipe",
            f"test accuracy, %{' (mean ± std)' if many else ''}",
            "s per epoch",
            "parameters",
            "multipliers, bytes",
            "SGS, s per epoch",
        ]
    ]
    for label, found in summary["recipes"].items():
        accuracy = f"{100 * found['test_accuracy_mean']:.2f}" + (
            f" ± {100 * found['test_accuracy_std']:.2f}" if many else ""
        )
        sgs = "" if found["sgs_seconds_per_epoch"] is None else f"{found['sgs_seconds_per_epoch']:.4f}"
        cells.append(
            [
                label,
                accuracy,
                f"{found['seconds_per_epoch']:.3f}",
                f"{found['parameters']:,}",
                f"{found['multiplier_bytes']:,}",
                sgs,
            ]
        )
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
    found = summary["scales"]
    after = (
        f"after {summary['search']['epochs']} epochs of Hyper-Search" if summary["search"] else f"of {found['source']}"
    )
    span = f"{found['moved_least']:.1%} to {found['moved_most']:.1%} between branches"
    return f"Scales {after} lie {found['moved_mean']:.1%} from their initial values on average ({span})."


def check_line(summary: Mapping[str, Any]) -> str:
    """CSLA = GR in one sentence."""
    found = summary["csla_equals_gr"]
    return (
        f"CSLA = GR in float64 over {found['steps']} steps: outputs differ by at most {found['outputs']:.1e}, "
        f"weights by {found['weights']:.1e} ({'within' if found['agrees'] else 'NOT within'} {TOLERANCE:.0e})."
    )


def _markdown_table(cells: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """The first `left` columns to the left, the others to the right."""
    rule = ["---" if n < left else "---:" for n in range(len(cells[0]))]
    return ["| " + " | ".join(row) + " |" for row in (cells[0], rule, *cells[1:])]


def _markdown(summary: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    data, options = summary["data"], summary["options"]
    images = f"{data['train']} training and {data['test']} test images of {' x '.join(map(str, data['shape']))}, {data['classes']} classes"
    where = f"{summary['device']}, {summary['threads']} thread{'s' * (summary['threads'] > 1)}, torch {summary['versions']['torch']}"
    lines = [f"# {summary['run']}", "", f"{options['model']} on {data['name']} ({images}), on {where}.", ""]
    if summary["recipes"]:
        lines += _markdown_table(_cells(summary))
        lines += [
            "",
            f"Test accuracy after {options['epochs']} epochs, over seeds {', '.join(map(str, summary['seeds']))} (standard deviation of the sample). "
            "Seconds are the median over all epochs, without evaluation; the last column spreads the updates of the spatial gradient scaling over all epochs. "
            "Parameters and multipliers are those in training.",
            "",
            _what_it_shows(summary),
            "",
            *(f"- {label}: {found['meaning']}" for label, found in summary["recipes"].items()),
            "",
        ]
    if summary["csla_equals_gr"]:
        lines += [check_line(summary), ""]
    if summary["scales"]:
        lines += ["## Scales", "", scales_line(summary), ""]
        if summary["search"]:
            search = summary["search"]
            lines += [
                f"The Hyper-Search model has {search['parameters']:,} parameters and took {search['seconds_per_epoch']:.3f} s per epoch; "
                f"its test accuracy is {search['test_accuracy']:.2%}.",
                "",
            ]
        cells = [["layer", "branch", "initial", "mean", "std", "min", "max", "moved"]]
        for layer, branches in summary["scales"]["layers"].items():
            for branch, found in branches.items():
                cells.append(
                    [
                        layer,
                        branch,
                        *(f"{found[key]:.3f}" for key in ("initial", "mean", "std", "min", "max")),
                        f"{found['moved']:.1%}",
                    ]
                )
        lines += [*_markdown_table(cells, left=2), "", "Moved: mean of |α − α₀| / |α₀| over the channels.", ""]
    for name, caption in pictures.items():
        lines += [f"![{caption}]({name})", "", f"{caption}.", ""]
    lines += [
        "## Options",
        "",
        *_markdown_table([["option", "value"], *([name, str(value)] for name, value in options.items())], left=2),
        "",
    ]
    return "\n".join(lines)


def _what_it_shows(summary: Mapping[str, Any]) -> str:
    seeds, images = len(summary["seeds"]), summary["data"]["test"]
    if seeds == 1:
        return f"With one seed no difference between rows is evidence; one test image is {100 / images:.2f} points."
    return (
        f"Differences within one standard deviation are not evidence, and with {seeds} seeds larger ones are a hint at most; "
        f"one test image is {100 / images:.2f} points. What the table shows is that the recipes train, and what they cost."
    )


def _pictures(
    folder: Path,
    trainings: Mapping[str, list[dict[str, Any]]],
    seeds: Sequence[int],
    scales: Scales | None,
    initial: Scales | None,
) -> dict[str, str]:
    """Draw them; {file name: caption}."""
    found: dict[str, str] = {}
    if trainings:
        plots.curves(
            folder / "curves.png",
            {label: [training["epochs"] for training in runs] for label, runs in trainings.items()},
        )
        found["curves.png"] = (
            "Training loss and test accuracy: mean over the seeds, and one standard deviation either side"
        )
    for label, runs in trainings.items():
        scalings = runs[0].get("scalings")
        if scalings and scalings["start"]:
            name = f"spatial_scaling_{label.replace('+', '_')}.png"
            plots.spatial_scalings(folder / name, scalings["start"], scalings["end"])
            found[name] = (
                f"G of the first, middle and last layer under {label}, seed {seeds[0]}, after its first update and at the end"
            )
    if scales is not None:
        plots.scales_over_depth(folder / "scales.png", scales, initial)
        found["scales.png"] = (
            "Mean scales over depth with the standard deviation over channels; curves join layers with a shortcut; dashed: initial values"
        )
    return found
