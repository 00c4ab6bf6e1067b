"""The report of a job in words: the tables of summary.md and of a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from gradrep_kernels.csla import Equivalence
from gradrep_kernels.messages import counted
from gradrep_kernels.recipes.costs import cost_columns
from gradrep_kernels.recipes.environment import software
from gradrep_kernels.recipes.intervals import expected_misses

__all__ = ["accuracy_cell", "aligned", "closing_lines", "markdown", "markdown_table", "scales_line", "table"]


def _cells(summary: Mapping[str, Any]) -> list[list[str]]:
    """Heading and rows of the table. Columns that no row has a figure for are left out."""
    many = len(summary["seeds"]) > 1
    to_sgd = {difference["row"]: difference for difference in summary["compared"] if difference["other"] == "sgd"}
    columns = {"recipe": [], "lr": [], "test accuracy, % (mean ± std)" if many else "test accuracy, %": []}
    test = list(columns)[-1]
    optional = ("of the weights, %", "validation, %")
    columns |= {name: [] for name in (*optional, "minus sgd", "ms a step", "parameters")}
    forms = {name: cost_columns(f["form_costs"]) for name, f in summary["recipes"].items() if "form_costs" in f}
    of_form = dict.fromkeys(heading for form in forms.values() for heading in form)
    columns |= {name: [] for name in (*of_form, "multipliers, bytes", "SGS, s per epoch")}
    for name, figures in summary["recipes"].items():
        difference, sgs_seconds = to_sgd.get(name), figures["sgs_seconds_per_epoch"]
        of_weights = figures.get("weights_test_accuracy")
        minus = f"{difference['mean']:+.1f} ± {difference['half_width']:.1f}" if difference and many else ""
        row = {
            "recipe": name,
            "lr": f"{figures['learning_rate']:g}",
            test: accuracy_cell(figures["test_accuracy"], figures["diverged"]),
            # The others are those of averages.
            "of the weights, %": f"{100 * statistics.fmean(of_weights):.2f}" if of_weights else "",
            "validation, %": accuracy_cell(figures.get("validation_accuracy") or []),
            "minus sgd": minus,
            "ms a step": f"{1000 * figures['seconds_per_step']:.1f}",
            "parameters": f"{figures['parameters']:,}",
            **{heading: forms.get(name, {}).get(heading, "") for heading in of_form},
            "multipliers, bytes": f"{figures['multiplier_bytes']:,}",
            "SGS, s per epoch": "" if sgs_seconds is None else f"{sgs_seconds:.4f}",
        }
        for heading, cell in row.items():
            columns[heading].append(cell)
    for name in summary["not_trained"]:
        for heading, cells in columns.items():
            cells.append({"recipe": name, test: "the Hyper-Search diverged"}.get(heading, ""))
    shown = {heading: cells for heading, cells in columns.items() if any(cells) or heading not in optional}
    return [list(shown), *map(list, zip(*shown.values()))]


def accuracy_cell(accuracies: Sequence[float], diverged: int = 0) -> str:
    """Mean and standard deviation in percent, and how many of the trainings diverged. Empty for none."""
    if not accuracies:
        return ""
    spread = f" ± {100 * statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
    return f"{100 * statistics.fmean(accuracies):.2f}{spread}" + f" ({diverged} diverged)" * bool(diverged)


def table(summary: Mapping[str, Any]) -> str:
    """The table for a terminal."""
    return aligned(_cells(summary))


def aligned(cells: Sequence[Sequence[str]], left: int = 1) -> str:
    """Lines of text under a heading, the first `left` columns to the left."""
    widths = [max(len(row[n]) for row in cells) for n in range(len(cells[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if n < left else cell.rjust(width) for n, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
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


def seeds_in_words(seeds: Sequence[int]) -> str:
    """'seed 0', 'seeds 0, 1'."""
    return f"seed{'s' * (len(seeds) != 1)} {', '.join(map(str, seeds))}"


def scales_line(summary: Mapping[str, Any]) -> str:
    """How far the scales are from where Hyper-Search starts."""
    scales, search = summary["scales"], summary["search"]
    after = f"after {counted(search['epochs'], 'epoch')} of Hyper-Search" if search else f"of {scales['source']}"
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


def markdown_table(cells: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """The first `left` columns to the left, the others to the right."""
    rule = ["---" if n < left else "---:" for n in range(len(cells[0]))]
    return ["| " + " | ".join(row) + " |" for row in (cells[0], rule, *cells[1:])]


def markdown(summary: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    data, options = summary["data"], summary["options"]
    shape = " x ".join(map(str, data["shape"]))
    images = f"{data['train']} training and {data['test']} test images of {shape}, {data['classes']} classes"
    threads = counted(summary["threads"], "thread")
    where = f"{summary['device']} ({summary['processor']}), {threads}, {software(summary)}"
    model = options["model"] + (f" with {options['branches']} branches" if options["branches"] else "")
    lines = [f"# {summary['run']}", "", f"{model} on {data['name']} ({images}), on {where}.", ""]
    lines += _settings_lines(summary)
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
    lines += ["## Options", "", *markdown_table(option_cells, left=2), ""]
    return "\n".join(lines)


def _settings_lines(summary: Mapping[str, Any]) -> list[str]:
    """The experiment, what all rows share, and what another point of a sweep has trained."""
    settings, lines = summary["settings"], []
    if settings["preset"]:
        lines += [f"{settings['preset']}, but for the options that were given.", ""]
    if summary["recipes"]:
        lines += [f"{settings['shared']}.", ""]
    taken = {name: figures["taken_from"] for name, figures in summary["recipes"].items()}
    taken |= {"the Hyper-Search": (summary["search"] or {}).get("taken_from")}
    parts = [f"{name} from {point}" for name, point in taken.items() if point]
    if parts:
        lines += [f"Taken over from points of the sweep that no differing option touches: {', '.join(parts)}.", ""]
    return lines


def _recipes_section(summary: Mapping[str, Any]) -> list[str]:
    seeds, options = seeds_in_words(summary["seeds"]), summary["options"]
    spread = "." if options["ema_decay"] is None else ", of moving averages of the weights."
    if len(summary["seeds"]) > 1:
        spread = (
            f" (± standard deviation){spread} "
            "*Minus sgd* is the mean difference over the same seeds, ± its 95 % interval."
        )
    return [
        *markdown_table(_cells(summary)),
        "",
        f"Test accuracy after {counted(options['epochs'], 'epoch')}, over {seeds}{spread} *Ms a step* are forward, "
        "backward and optimizer, the rows in turn with nothing else of the job running. Updates of spatial gradient "
        "scaling are in the last column, spread over all epochs. Parameters and multipliers are those in training. "
        "Multiply-adds are those of a forward pass of one image, in training and, with branches merged, deployed.",
        "",
        *_choice_section(summary),
        *(f"- {statement}" for statement in summary["statements"]),
        "",
        _evidence(summary),
        "",
        *_merge_lines(summary),
        "The rows:",
        "",
        *(f"- {name}: {figures['meaning']}" for name, figures in summary["recipes"].items()),
        "",
    ]


def _merge_lines(summary: Mapping[str, Any]) -> list[str]:
    """By how much outputs of merged networks differ from those of their branches."""
    merged = {name: figures.get("merge_difference") for name, figures in summary["recipes"].items()}
    parts = [f"{difference:.1e} ({name})" for name, difference in merged.items() if difference is not None]
    if not parts:
        return []
    return [f"Merged into plain convolutions, outputs differ by at most {', '.join(parts)}.", ""]


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
        *markdown_table(cells),
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
    searched = [name for name, figures in summary["recipes"].items() if figures["shares_search"]]
    shared = f" The seeds of {', '.join(searched)} share one Hyper-Search: no interval tells how searches differ."
    if "repopt-hs-init" not in summary["recipes"]:
        shared += (
            " Whether the search helps is another question: `--ablate hs-init` trains with the scales that it starts "
            "from."
        )
    shared *= bool(searched)
    return (
        f"Intervals are Student's over {seeds} seeds (first weights, order and shifts of the images) on one set of "
        f"{images} test images; {points}, and no interval is narrower. They say nothing about other data or networks. "
        f"{expected_misses(len(summary['compared']))}{shared}"
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
    return [*lines, *markdown_table(cells, left=2), "", "Moved: mean of |α − α₀| / |α₀| over the channels.", ""]
