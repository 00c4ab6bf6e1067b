"""The report of a finished job: summary.md and pictures, and summary.json for programs."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradrep_kernels.csla import Equivalence, Scales
from gradrep_kernels.recipes import files
from gradrep_kernels.recipes.cores import processor
from gradrep_kernels.recipes.data import Data
from gradrep_kernels.recipes.environment import versions
from gradrep_kernels.recipes.intervals import Difference, paired_difference
from gradrep_kernels.recipes.options import Options
from gradrep_kernels.recipes.pictures import draw_pictures
from gradrep_kernels.recipes.table import Recipe

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
        "processor": processor(),
        "device": options.device,
        "threads": options.threads,
        "seeds": list(seeds),
        "options": options.to_json(),
        "data": description,
        "search": None if search is None else _search(search),
        "scales": None if scales is None else {"source": options.scales or "searched", **_movement(scales, initial)},
        "csla_equals_gr": results.get("check"),
        "recipes": {
            row.name: _figures(row, trainings[row.name], results["speed"][row.name])
            for row in rows
            if row.name in trainings
        },
        "not_trained": [row.name for row in rows if row.name not in trainings],
        "seconds": results["seconds"],
    }
    differences = _differences(rows, summary["recipes"], description["test"])
    summary["compared"] = [dataclasses.asdict(difference) for difference in differences if difference.seeds > 1]
    summary["statements"] = [*(difference.sentence() for difference in differences), *_costs(summary["recipes"])]
    pictures = draw_pictures(folder, summary, chosen, seeds, scales, initial)
    files.write_text(folder / "summary.md", _markdown(summary, pictures))
    files.write_json(folder / "summary.json", summary)
    return summary


def _figures(
    row: Recipe, by_rate: Mapping[float, Sequence[Mapping[str, Any]]], step_quartiles: Sequence[float]
) -> dict[str, Any]:
    runs = next(iter(by_rate.values()))
    accuracies = _accuracies(runs)
    epochs = [record for training in runs for record in training["epochs"]]
    figures = {
        "meaning": row.meaning,
        "learning_rate": runs[0]["lr"],
        "by_rate": {str(lr): _of_rate(by_rate[lr]) for lr in sorted(by_rate)},
        "test_accuracy": accuracies,
        "test_accuracy_mean": statistics.fmean(accuracies),
        "test_accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "diverged": sum(training["diverged"] is not None for training in runs),
        "seconds_per_step": step_quartiles[1],
        "seconds_per_step_quartiles": list(step_quartiles),
        "seconds_per_epoch": statistics.median(record["seconds"] for record in epochs),
        "parameters": runs[0]["parameters"],
        "multiplier_bytes": runs[0]["multiplier_bytes"],
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
    heading = ["recipe", "lr", accuracy, "minus sgd", "ms a step", "parameters", "multipliers, bytes"]
    cells = [[*heading, "SGS, s per epoch"]]
    to_sgd = {difference["row"]: difference for difference in summary["compared"] if difference["other"] == "sgd"}
    for name, figures in summary["recipes"].items():
        spread = f" ± {100 * figures['test_accuracy_std']:.2f}" if many else ""
        diverged = f" ({figures['diverged']} diverged)" if figures["diverged"] else ""
        difference, sgs_seconds = to_sgd.get(name), figures["sgs_seconds_per_epoch"]
        row = [
            name,
            f"{figures['learning_rate']:g}",
            f"{100 * figures['test_accuracy_mean']:.2f}{spread}{diverged}",
            f"{difference['mean']:+.1f} ± {difference['half_width']:.1f}" if difference and many else "",
            f"{1000 * figures['seconds_per_step']:.1f}",
            f"{figures['parameters']:,}",
            f"{figures['multiplier_bytes']:,}",
            "" if sgs_seconds is None else f"{sgs_seconds:.4f}",
        ]
        cells.append(row)
    cells += [[name, "", "the Hyper-Search diverged", *[""] * 5] for name in summary["not_trained"]]
    of_weights = [figures.get("weights_test_accuracy") for figures in summary["recipes"].values()]
    if any(of_weights):  # the others are those of averages
        shown = [f"{100 * statistics.fmean(accuracies):.2f}" for accuracies in of_weights]
        column = ["of the weights, %", *shown, *[""] * len(summary["not_trained"])]
        cells = [[*row[:3], cell, *row[3:]] for row, cell in zip(cells, column)]
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


def closing_lines(summary: Mapping[str, Any]) -> list[str]:
    """The end of a job on a terminal: the table, what it allows to say, the scales, CSLA = GR."""
    return [
        table(summary),
        *summary["statements"],
        *([scales_line(summary)] if summary["scales"] else []),
        *([_check_line(summary)] if summary["csla_equals_gr"] else []),
    ]


def scales_line(summary: Mapping[str, Any]) -> str:
    """How far the scales are from where Hyper-Search starts."""
    scales, search = summary["scales"], summary["search"]
    after = (
        f"after {search['epochs']} epoch{'s' * (search['epochs'] > 1)} of Hyper-Search"
        if search
        else f"of {scales['source']}"
    )
    span = f"{scales['moved_least']:.1%} to {scales['moved_most']:.1%} between branches"
    return f"Scales {after} lie {scales['moved_mean']:.1%} from their initial values on average ({span})."


def _check_line(summary: Mapping[str, Any]) -> str:
    """CSLA = GR, and where the check was another than the job's training."""
    check = summary["csla_equals_gr"]
    if check["outputs"] is None or check["weights"] is None:
        return f"CSLA = GR in float64 over {check['steps']} steps: not finite, a lower --search-lr may help."
    lines = [f"{Equivalence(check['steps'], check['outputs'], check['weights'])}."]
    options = summary["options"]
    if check.get("lr", options["search_lr"]) != options["search_lr"]:  # runs of before have none
        lines.append(
            f"This is at learning rate {check['lr']:g}. At {options['search_lr']:g} the training magnifies rounding "
            f"from step to step, and outputs differ by {check['at_search_lr']:.1e}."
        )
    if check.get("weight_decay", options["weight_decay"]) != options["weight_decay"]:
        lines.append("It is without weight decay, which takes hold of constant branches in the merged kernel alone.")
    return " ".join(lines)


def _markdown_table(cells: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """The first `left` columns to the left, the others to the right."""
    rule = ["---" if n < left else "---:" for n in range(len(cells[0]))]
    return ["| " + " | ".join(row) + " |" for row in (cells[0], rule, *cells[1:])]


def _markdown(summary: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    data, options = summary["data"], summary["options"]
    shape = " x ".join(map(str, data["shape"]))
    images = f"{data['train']} training and {data['test']} test images of {shape}, {data['classes']} classes"
    threads = f"{summary['threads']} thread{'s' * (summary['threads'] > 1)}"
    where = f"{summary['device']} ({summary['processor']}), {threads}, torch {summary['versions']['torch']}"
    model = options["model"] + (f" with {options['branches']} branches" if options["branches"] else "")
    lines = [f"# {summary['run']}", "", f"{model} on {data['name']} ({images}), on {where}.", ""]
    if "cost.png" in pictures:
        lines += [f"![{pictures['cost.png']}](cost.png)", "", f"{pictures['cost.png']}.", ""]
    if summary["recipes"] or summary["not_trained"]:
        lines += _recipes_section(summary)
    if summary["csla_equals_gr"]:
        lines += [_check_line(summary), ""]
    for name, caption in pictures.items():
        if name != "cost.png":
            lines += [f"![{caption}]({name})", "", f"{caption}.", ""]
    if summary["scales"]:
        lines += _scales_section(summary)
    option_cells = [["option", "value"], *([name, str(value)] for name, value in options.items())]
    lines += ["## Options", "", *_markdown_table(option_cells, left=2), ""]
    return "\n".join(lines)


def _recipes_section(summary: Mapping[str, Any]) -> list[str]:
    seeds, options = ", ".join(map(str, summary["seeds"])), summary["options"]
    spread = "." if options["ema_decay"] is None else ", of moving averages of the weights."
    if len(summary["seeds"]) > 1:
        spread = (
            f" (± standard deviation){spread} "
            "*Minus sgd* is the mean difference over the same seeds, ± its 95 % interval."
        )
    return [
        *_markdown_table(_cells(summary)),
        "",
        f"Test accuracy after {options['epochs']} epochs, over seeds {seeds}{spread} *Ms a step* are forward, "
        "backward and optimizer, the rows in turn with nothing else of the job running. Updates of spatial gradient "
        "scaling are in the last column, spread over all epochs. Parameters and multipliers are those in training.",
        "",
        *_choice_section(summary),
        *(f"- {statement}" for statement in summary["statements"]),
        "",
        _evidence(summary),
        "",
        "The rows:",
        "",
        *(f"- {name}: {figures['meaning']}" for name, figures in summary["recipes"].items()),
        "",
    ]


def _choice_section(summary: Mapping[str, Any]) -> list[str]:
    options = summary["options"]
    if len(options["lr"]) == 1:
        return []
    rates = [str(rate) for rate in options["lr"]]
    cells = [["validation / test, %", *(f"lr {rate}" for rate in rates)]]
    for name, figures in summary["recipes"].items():
        if len(figures["by_rate"]) > 1:
            cells.append([name, *(_both(figures["by_rate"][rate]) for rate in rates)])
    choosing = min(options["lr_seeds"], len(summary["seeds"]))
    return [
        f"Each recipe was trained with each learning rate and {choosing} of the seeds, the first. It has the rate that "
        f"was then best on the validation part, on average: {options['validation']:.0%} of the training images, on "
        "which nothing was trained. The test images had no say. The seeds that chose count in the table as the others "
        "do, and below means are over all seeds of a rate. A row that is not listed takes the rate of repopt.",
        "",
        *_markdown_table(cells),
        "",
    ]


def _both(of_rate: Mapping[str, Any]) -> str:
    means = (100 * statistics.fmean(of_rate[part]) for part in ("validation_accuracy", "test_accuracy"))
    diverged = f" ({of_rate['diverged']} diverged)" if of_rate["diverged"] else ""
    return " / ".join(f"{mean:.1f}" for mean in means) + diverged


def _evidence(summary: Mapping[str, Any]) -> str:
    """What intervals over so many seeds and test images can show."""
    seeds, images = len(summary["seeds"]), summary["data"]["test"]
    points = f"one test image is {100 / images:.2f} points"
    if seeds == 1:
        return f"With one seed no difference between rows is evidence; {points}."
    return (
        f"Intervals are Student's over {seeds} seeds (first weights, order and shifts of the images) on one set of "
        f"{images} test images; {points}, and no interval is narrower. They say nothing about other data or networks, "
        "and of twenty such intervals one is expected to miss. Whether the search helps is another question: `--ablate "
        "hs-init` trains with the scales that it starts from."
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
