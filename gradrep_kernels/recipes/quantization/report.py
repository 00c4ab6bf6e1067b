"""The report of `quantize`: quantize.md and pictures, and quantize.json for programs."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradrep_kernels.branches.spread import KernelHistory
from gradrep_kernels.messages import counted
from gradrep_kernels.recipes import files
from gradrep_kernels.recipes.environment import software
from gradrep_kernels.recipes.intervals import Difference, paired_difference
from gradrep_kernels.recipes.quantization import plots
from gradrep_kernels.recipes.report_text import seeds_in_words
from gradrep_kernels.recipes.table import Recipe

__all__ = ["closing_lines", "write_report"]

_GRIDS = ("per tensor", "per channel")
_MOMENTS = {"trained": "as trained", "fused": "after BN fusion", "added": "after branch addition"}
_FP32 = "its fp32"
_SPREAD = {"whole": "whole", "centre": "centre", "surround": "surround", "largest_over_std": "largest / std"}


def write_report(
    folder: Path,
    about: Mapping[str, Any],
    rows: Sequence[Recipe],
    found: Mapping[str, Sequence[Mapping[str, Any]]],
    kernels: Mapping[str, KernelHistory],
) -> dict[str, Any]:
    """Write quantize.json, quantize.md and the pictures, and return what quantize.json holds.

    Args:
        about: the run, the settings, and `layer`, the convolution that is drawn.
        found: {row: figures of each seed}.
        kernels: {row: of that convolution, with the first seed}.
    """
    summary: dict[str, Any] = {**about, "rows": {}, "not_finite": {}}
    for row in rows:
        finite = [(seed, f) for seed, f in zip(about["seeds"], found[row.name]) if "not_finite" not in f]
        if len(finite) < len(found[row.name]):
            kept = [seed for seed, _ in finite]
            summary["not_finite"][row.name] = [seed for seed in about["seeds"] if seed not in kept]
        if finite:
            summary["rows"][row.name] = _figures(row, finite, about["layer"])
    images = about["data"]["test"]
    differences = [*_to_fp32(summary["rows"], images), *_between_rows(rows, summary["rows"], images)]
    summary["compared"] = [dataclasses.asdict(difference) for difference in differences if difference.seeds > 1]
    summary["statements"] = [difference.sentence() for difference in differences if difference.shown]
    finite_kernels = {name: kernels[name] for name in summary["rows"] if bool(kernels[name].deployed.isfinite().all())}
    pictures = _pictures(folder, summary, finite_kernels)
    files.write_text(folder / "quantize.md", _markdown(summary, pictures))
    files.write_json(folder / "quantize.json", summary)
    return summary


def _figures(row: Recipe, finite: Sequence[tuple[int, Mapping[str, Any]]], layer: str) -> dict[str, Any]:
    """Of one row, a list over its seeds for each accuracy."""
    seeds, runs = [seed for seed, _ in finite], [figures for _, figures in finite]
    bits = list(runs[0]["rounded"][_GRIDS[0]])
    figures: dict[str, Any] = {
        "meaning": row.meaning,
        "seeds": seeds,
        "fp32": [run["fp32"] for run in runs],
        "rounded": {grid: {n: [run["rounded"][grid][n] for run in runs] for n in bits} for grid in _GRIDS},
        "ptq": None,
        "qat": None,
        "qat_merged_norms": None,
        "why_no_int8": next((run["why_no_int8"] for run in runs if "why_no_int8" in run), None),
        "norms_left": runs[0]["norms_left"],
        "spread": _mean_spread([run["spread"]["mean"] for run in runs]),
        "spread_of_layer": runs[0]["spread"]["layers"][layer],
        "spread_of_layers": [run["spread"]["layers"] for run in runs],
    }
    if all("ptq" in run for run in runs):
        figures["ptq"] = {grid: [run["ptq"][grid] for run in runs] for grid in _GRIDS}
    if all("qat" in run for run in runs):
        figures["qat"] = [run["qat"]["accuracy"] for run in runs]
        figures["qat_merged_norms"] = runs[0]["qat"]["merged_norms"]
    return figures


def _mean_spread(of_seeds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        moment: {key: statistics.fmean(of_seed[moment][key] for of_seed in of_seeds) for key in _SPREAD}
        for moment in of_seeds[0]
    }


def _to_fp32(rows: Mapping[str, Mapping[str, Any]], test_images: int) -> list[Difference]:
    """Every accuracy in few bits minus that of fp32, of the same seeds. Trainings that diverged have none."""
    return [
        paired_difference(f"{name}, {what},", _FP32, accuracies, figures["fp32"], test_images)
        for name, figures in rows.items()
        for what, accuracies in _columns(figures)
        if None not in accuracies
    ]


def _between_rows(rows: Sequence[Recipe], found: Mapping[str, Mapping[str, Any]], test_images: int) -> list[Difference]:
    """What few bits cost one row against another: each accuracy less its fp32, of the seeds that both have."""
    differences = []
    for row in rows:
        for other in row.compared_with:
            if row.name not in found or other not in found:
                continue
            seeds = [seed for seed in found[row.name]["seeds"] if seed in found[other]["seeds"]]
            losses, others = (_losses(found[name], seeds) for name in (row.name, other))
            differences += [
                paired_difference(f"{row.name}, {what}, each less its fp32,", other, loss, others[what], test_images)
                for what, loss in losses.items()
                if what in others and seeds
            ]
    return differences


def _losses(figures: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, list[float]]:
    places = [figures["seeds"].index(seed) for seed in seeds]
    return {
        what: [accuracies[n] - figures["fp32"][n] for n in places]
        for what, accuracies in _columns(figures)
        if None not in accuracies
    }


def _columns(figures: Mapping[str, Any]) -> list[tuple[str, list[float | None]]]:
    """[what it is, accuracies over the seeds] of a row, beside fp32."""
    columns = [(_rounded(n, grid), accuracies) for grid in _GRIDS for n, accuracies in figures["rounded"][grid].items()]
    if figures["ptq"]:
        columns += [(f"PTQ {grid}", figures["ptq"][grid]) for grid in _GRIDS]
    return columns + ([("QAT", figures["qat"])] if figures["qat"] else [])


def _rounded(bits: str, grid: str) -> str:
    return f"{bits} bits {grid}"


def _pictures(folder: Path, summary: Mapping[str, Any], kernels: Mapping[str, KernelHistory]) -> dict[str, str]:
    """Draw, and return {file name: caption}."""
    if not kernels:
        return {}
    plots.kernels(folder / "quantize_kernels.png", kernels)
    plots.locations(folder / "quantize_locations.png", kernels, _MOMENTS)
    which = f"{summary['layer']}, seed {summary['seeds'][0]}"
    return {
        "quantize_kernels.png": f"Distribution of the weights of {which}, as deployed (RepOptimizers, Figure 3)",
        "quantize_locations.png": f"The weights of {which} at the centre and around it (RepOptimizers, Figure 5)",
    }


# ---- text


def _percent(accuracies: Sequence[float | None], difference: Mapping[str, Any] | None) -> str:
    """Mean ± standard deviation, and in brackets the difference to fp32 ± its 95 % interval."""
    known = [100 * accuracy for accuracy in accuracies if accuracy is not None]
    lost = len(accuracies) - len(known)
    text = f"{statistics.fmean(known):.2f}" if known else "-"
    if len(known) > 1:
        text += f" ± {statistics.stdev(known):.2f}"
    if difference is not None:
        text += f" ({difference['mean']:+.1f} ± {difference['half_width']:.1f})"
    return text + (f" ({lost} diverged)" if lost else "")


def _tables(summary: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """{title: heading and rows}."""
    compared = {found["row"]: found for found in summary["compared"] if found["other"] == _FP32}
    rows = summary["rows"]

    def cell(name: str, what: str, accuracies: Sequence[float | None]) -> str:
        return _percent(accuracies, compared.get(f"{name}, {what},"))

    tables = {}
    bits = [str(n) for n in summary["settings"]["bits"]]
    for grid in _GRIDS:
        tables[f"Weights rounded {grid}"] = [
            ["recipe", "fp32", *(f"{n} bits" for n in bits)],
            *(
                [
                    name,
                    _percent(figures["fp32"], None),
                    *(cell(name, _rounded(n, grid), figures["rounded"][grid][n]) for n in bits),
                ]
                for name, figures in rows.items()
            ),
        ]
    if any(figures["ptq"] for figures in rows.values()):
        heading = ["recipe", "fp32", *(f"PTQ, weights {grid}" for grid in _GRIDS)]
        trains = summary["settings"]["qat_epochs"] > 0
        if trains:
            heading += [f"QAT, weights {summary['settings']['qat_weights']}", "QAT begins"]
        tables["Weights and activations in 8 bits"] = [
            heading,
            *([name, _percent(figures["fp32"], None), *_int8_cells(name, figures, cell, trains)]
              for name, figures in rows.items()),
        ]  # fmt: skip
    tables["Standard deviation of the weights, mean over the convolutions"] = _spread_table(rows, "spread")
    tables[f"Standard deviation of the weights of {summary['layer']}"] = _spread_table(rows, "spread_of_layer")
    return tables


def _int8_cells(name: str, figures: Mapping[str, Any], cell: Any, trains: bool) -> list[str]:
    if figures["ptq"] is None:
        return ["-"] * (4 if trains else 2)
    cells = [cell(name, f"PTQ {grid}", figures["ptq"][grid]) for grid in _GRIDS]
    if not trains:
        return cells
    if figures["qat"] is None:
        return [*cells, "-", "-"]
    norms = figures["qat_merged_norms"]
    begins = "as trained" if norms is None else f"merged, {norms or 'no'} norms left"
    return [*cells, cell(name, "QAT", figures["qat"]), begins]


def _spread_table(rows: Mapping[str, Mapping[str, Any]], key: str) -> list[list[str]]:
    return [
        ["recipe", "kernel", *_SPREAD.values()],
        *(
            [name, _MOMENTS[moment], *(f"{found[part]:.4f}" for part in list(_SPREAD)[:3]),
             f"{found['largest_over_std']:.1f}"]
            for name, figures in rows.items()
            for moment, found in figures[key].items()
        ),
    ]  # fmt: skip


def closing_lines(summary: Mapping[str, Any]) -> list[str]:
    """The end of the command on a terminal: the tables, and what they allow to say."""
    lines = []
    for title, cells in _tables(summary).items():
        if not title.startswith("Standard deviation of the weights of"):
            left = 2 if cells[0][1] == "kernel" else 1
            widths = [max(len(row[n]) for row in cells) for n in range(len(cells[0]))]
            padded = [
                "  ".join(c.ljust(w) if n < left else c.rjust(w) for n, (c, w) in enumerate(zip(row, widths))).rstrip()
                for row in cells
            ]
            lines += [f"{title}:", padded[0], "-" * max(map(len, padded)), *padded[1:], ""]
    return [*lines, *summary["statements"], *_remarks(summary)]


def _remarks(summary: Mapping[str, Any]) -> list[str]:
    """What is missing, and why."""
    lines = [
        f"{name}: the weights of seed {', '.join(map(str, seeds))} are not finite, and are left out."
        for name, seeds in summary["not_finite"].items()
    ]
    if summary["why_no_int8"]:
        lines.append(f"There are no columns of PTQ and QAT: {summary['why_no_int8']}.")
    for name, figures in summary["rows"].items():
        if figures["why_no_int8"]:
            lines.append(f"{name} has no PTQ and QAT: {figures['why_no_int8']}.")
        if figures["norms_left"]:
            lines.append(f"{name}: {figures['norms_left']} norms follow no convolution and stay in float.")
    return lines


def _markdown(summary: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    settings, seeds = summary["settings"], summary["seeds"]
    data = summary["data"]
    lines = [
        f"# {summary['run']} in few bits",
        "",
        f"{summary['model']} on {data['name']}, test accuracy in % over {data['test']} images and "
        f"{seeds_in_words(seeds)}, {software(summary)}. Branches are merged and norms folded.",
    ]
    if len(seeds) > 1:
        lines.append(
            "Each cell is the mean ± standard deviation over the seeds, and in brackets the mean difference to fp32 "
            "over the same seeds ± its 95 % interval, none narrower than one test image."
        )
    if summary["flow"]:
        lines.append(
            f"8 bits are by {summary['flow']}. PTQ measured activations on {settings['calibration']} training images. "
            f"QAT trained {counted(settings['qat_epochs'], 'epoch')} at {settings['qat_rate']:g} of the training's "
            "learning rate, with the row's optimizer and multipliers. The paper gives no QAT of a merged network "
            "without norms."
        )
    lines.append("")
    for title, cells in _tables(summary).items():
        left = 2 if cells[0][1] == "kernel" else 1
        rule = ["---" if n < left else "---:" for n in range(len(cells[0]))]
        lines += [f"## {title}", "", *("| " + " | ".join(row) + " |" for row in (cells[0], rule, *cells[1:])), ""]
        if title == f"Weights rounded {_GRIDS[1]}":
            lines += [*(f"- {statement}" for statement in summary["statements"]), ""] if summary["statements"] else []
    lines += [f"- {remark}" for remark in _remarks(summary)]
    for name, caption in pictures.items():
        lines += ["", f"![{caption}]({name})", "", f"{caption}."]
    return "\n".join(lines) + "\n"
