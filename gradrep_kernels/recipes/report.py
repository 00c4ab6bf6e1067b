"""The report of a finished job: summary.md and pictures, and summary.json for programs."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradrep_kernels.csla import Scales
from gradrep_kernels.optim.param_groups import DECAY_RULES
from gradrep_kernels.recipes import files
from gradrep_kernels.recipes.build import build
from gradrep_kernels.recipes.cores import processor
from gradrep_kernels.recipes.costs import form_costs
from gradrep_kernels.recipes.data.load import Data
from gradrep_kernels.recipes.data.loader import Loader
from gradrep_kernels.recipes.environment import commit, versions
from gradrep_kernels.recipes.identity import identity_ratios
from gradrep_kernels.recipes.intervals import Difference, paired_difference
from gradrep_kernels.recipes.options.presets import PRESETS
from gradrep_kernels.recipes.options.resolve import Options
from gradrep_kernels.recipes.pictures import draw_pictures
from gradrep_kernels.recipes.report_text import closing_lines, markdown, scales_line, table
from gradrep_kernels.recipes.runs import SUMMARY
from gradrep_kernels.recipes.table import OPTIMIZERS, Recipe
from gradrep_kernels.recipes.training import repeatable
from gradrep_kernels.recipes.trainings import take_structure

__all__ = ["closing_lines", "scales_line", "table", "write_report"]


_WIDE = 0.3  # Quartiles of a step, on a machine that is free, lie some 10 % apart.


def write_report(
    folder: Path,
    options: Options,
    data: Data,
    trainings: Mapping[str, Mapping[float, Sequence[Mapping[str, Any]]]],
    seeds: Sequence[int],
    results: Mapping[str, Any],
    scales: Scales | None,
    initial: Scales | None,
) -> dict[str, Any]:
    """Write summary.json, summary.md and the pictures, and return the summary.

    `trainings` are {row: {learning rate, the chosen one first: figures of each seed}} of the rows that were trained,
    and `results` those of the other parts by their names. Hyper-Search starts from the `initial` scales.
    """
    rows, search = options.rows, results.get("search")
    chosen = {name: next(iter(by_rate.values())) for name, by_rate in trainings.items()}
    description = data.description()
    summary = {
        "run": folder.name,
        "versions": versions(),
        "commit": commit(),
        "processor": processor(),
        "device": options.device,
        "threads": options.threads,
        "seeds": list(seeds),
        "options": options.to_json(),
        "settings": _settings(options),
        "data": description,
        "search": None if search is None else _search(search),
        "scales": None if scales is None else {"source": options.scales or "searched", **_movement(scales, initial)},
        "csla_equals_gr": results.get("check"),
        "recipes": {
            row.name: _figures(row, options, trainings[row.name], results["speed"][row.name])
            for row in rows
            if row.name in trainings
        },
        "not_trained": [row.name for row in rows if row.name not in trainings],
        "seconds": results["seconds"],
    }
    rates = {name: figures["learning_rate"] for name, figures in summary["recipes"].items()}
    for name, costs in _form_costs(folder, options, data, scales, rates).items():
        summary["recipes"][name]["form_costs"] = costs
    differences = _differences(rows, summary["recipes"], description["test"])
    summary["compared"] = [dataclasses.asdict(difference) for difference in differences if difference.seeds > 1]
    summary["statements"] = [*(difference.sentence() for difference in differences), *_costs(summary["recipes"])]
    summary["statements"] += [f"Note that {line}." for line in options.unlikely()]
    summary["identity_ratio"] = identity_ratios(options, data) if search is not None else {}
    pictures = draw_pictures(folder, summary, chosen, seeds, scales, initial, search["epochs"] if search else ())
    files.write_text(folder / "summary.md", markdown(summary, pictures))
    files.write_json(folder / SUMMARY, summary)
    return summary


def _form_costs(
    folder: Path, options: Options, data: Data, scales: Scales | None, rates: Mapping[str, float]
) -> dict[str, dict[str, int]]:
    """Multiply-adds and parameters of each row in `rates` ({name: learning rate}), in training and deployed.

    Rows whose scales are not there, or whose network cannot be counted, are left out.
    """
    found = {}
    options = dataclasses.replace(options, device="cpu")
    with repeatable(options.threads, "cpu"):
        (image, _), (test_image, _) = (next(iter(Loader(data, part, 1))) for part in (data.train, data.test))
        for row in options.rows:
            if row.name in rates and (scales is not None or not row.needs_search):
                trainee = build(row, options, data, scales, options.seed, rates[row.name])
                take_structure(folder, trainee, row.name, options.seed, rates[row.name])
                with contextlib.suppress(ValueError, RuntimeError):  # A network of other code may not be countable.
                    found[row.name] = form_costs(trainee.model, image.shape[1:], test_image.shape[1:])
    return found


def _figures(
    row: Recipe,
    options: Options,
    by_rate: Mapping[float, Sequence[Mapping[str, Any]]],
    step_quartiles: Sequence[float],
) -> dict[str, Any]:
    runs = next(iter(by_rate.values()))
    accuracies = _accuracies(runs)
    epochs = [record for training in runs for record in training["epochs"]]
    figures = {
        "meaning": _meaning(row, options),
        "learning_rate": runs[0]["lr"],
        "by_rate": {str(lr): _of_rate(by_rate[lr]) for lr in sorted(by_rate)},
        "test_accuracy": accuracies,
        "test_accuracy_mean": statistics.fmean(accuracies),
        "test_accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "validation_accuracy": [t["validation_accuracy"] for t in runs] if options.validation else None,
        "diverged": sum(training["diverged"] is not None for training in runs),
        "seconds_per_step": step_quartiles[1],
        "seconds_per_step_quartiles": list(step_quartiles),
        "seconds_per_epoch": statistics.median(record["seconds"] for record in epochs),
        "parameters": runs[0]["parameters"],
        "multiplier_bytes": runs[0]["multiplier_bytes"],
        "shares_search": row.needs_search and options.scales is None,
        "taken_from": runs[0].get("taken_from"),
        "sgs_seconds_per_epoch": None,
        "sgs_updates": None,
    }
    if "weights_test_accuracy" in epochs[-1]:  # the others are those of averages
        figures["weights_test_accuracy"] = _accuracies(runs, "weights_test_accuracy")
    merged = [training for training in runs if training.get("merge_difference") is not None]
    if merged:
        figures["parameters_deployed"] = merged[0]["parameters_deployed"]
        figures["merge_difference"] = max(training["merge_difference"] for training in merged)
    if "structure" in runs[0]:
        figures["structure"] = runs[0]["structure"]  # of the first seed
    if row.sgs:
        figures["sgs_seconds_per_epoch"] = statistics.fmean(record["sgs_seconds"] for record in epochs)
        figures["sgs_updates"] = sum(record["sgs_updated"] for record in runs[0]["epochs"])
        figures["scalings"] = runs[0]["scalings"]  # of the first seed
    return figures


def _meaning(row: Recipe, options: Options) -> str:
    """What the row is, with the name of the optimizer that was used."""
    rule = OPTIMIZERS[options.optimizer]
    plain = (rule.extended if options.beyond_torch else rule.plain).make.__name__
    if row.name == "sgd":
        return f"plain {plain}"
    return row.meaning.replace("that with", f"{plain} with", 1) if row.meaning.startswith("that with") else row.meaning


def _settings(options: Options) -> dict[str, str]:
    """The preset, and what all rows share, in words."""
    own = [f"{name} {getattr(options, name):g}" for name in ("momentum",) if options.optimizer in ("sgd", "rmsprop")]
    nesterov = ["Nesterov"] * (options.nesterov and options.optimizer == "sgd")
    optimizer = OPTIMIZERS[options.optimizer].plain.make.__name__ + f" ({', '.join([*own, *nesterov])})" * bool(own)
    preset = options.preset and f"Settings are those of `{options.preset}` ({PRESETS[options.preset].source})"
    decay = f"weight decay {options.weight_decay:g} of the set `{options.decay}` ({DECAY_RULES[options.decay]})"
    return {"preset": preset, "shared": f"All rows train with {optimizer} and {decay}"}


def _accuracies(runs: Sequence[Mapping[str, Any]], of: str = "test_accuracy") -> list[float]:
    return [training["epochs"][-1][of] for training in runs]


def _of_rate(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "validation_accuracy": [training.get("validation_accuracy") for training in runs],
        "test_accuracy": _accuracies(runs),
        "diverged": sum(training["diverged"] is not None for training in runs),
    }


def _differences(
    rows: Sequence[Recipe], recipes: Mapping[str, Mapping[str, Any]], test_images: int
) -> list[Difference]:
    between_rows = [
        paired_difference(
            row.name, other, recipes[row.name]["test_accuracy"], recipes[other]["test_accuracy"], test_images
        )
        for row in rows
        for other in row.compared_with
        if row.name in recipes and other in recipes
    ]
    of_averages = [
        paired_difference(
            f"{name} (averages)", "its weights", figures["test_accuracy"], figures["weights_test_accuracy"], test_images
        )
        for name, figures in recipes.items()
        if "weights_test_accuracy" in figures
    ]
    return between_rows + of_averages


def _costs(recipes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A step of each row over one of plain SGD, in one sentence."""
    if "sgd" not in recipes or len(recipes) == 1:
        return []
    plain = recipes["sgd"]["seconds_per_step"]
    costs = [
        f"{figures['seconds_per_step'] / plain:.2f} ({name})" for name, figures in recipes.items() if name != "sgd"
    ]
    lines = [f"A training step takes as many times that of sgd: {', '.join(costs)}."]
    spread = max(
        (high - low) / middle for low, middle, high in (f["seconds_per_step_quartiles"] for f in recipes.values())
    )
    if spread > _WIDE:
        lines.append(
            f"The machine was busy: quartiles of a step lie up to {spread:.0%} apart, so do not trust its time."
        )
    return lines


def _search(search: Mapping[str, Any]) -> dict[str, Any]:
    epochs = search["epochs"]
    return {
        "diverged": search["diverged"],
        "epochs": len(epochs),
        "test_accuracy": epochs[-1]["test_accuracy"],
        "seconds_per_epoch": statistics.median(record["seconds"] for record in epochs),
        "parameters": search["parameters"],
        "taken_from": search.get("taken_from"),
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
