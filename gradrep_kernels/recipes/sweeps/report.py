"""The report of a sweep: sweep.md, sweep.json and its picture, from the summaries of its points."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradrep_kernels.messages import counted, first_few
from gradrep_kernels.recipes import files
from gradrep_kernels.recipes.intervals import Difference, expected_misses, paired_difference
from gradrep_kernels.recipes.options.declare import shown
from gradrep_kernels.recipes.options.resolve import OPTIONS, Options
from gradrep_kernels.recipes.report_text import accuracy_cell, aligned, markdown_table, seeds_in_words
from gradrep_kernels.recipes.sweeps.plots import draw_sweep

__all__ = ["sweep_lines", "write_sweep"]

Summaries = Mapping[str, Mapping[str, Any]]


def write_sweep(
    folder: Path, swept: Sequence[str], base: str, points: Mapping[str, Options], summaries: Summaries
) -> dict[str, Any]:
    """Write sweep.json, sweep.md and the pictures, and return what sweep.json holds.

    Args:
        swept: the options in which points differ.
        base: the point that the others are compared with.
        points: the options of each point by its name. `summaries`: what its summary.json holds.
    """
    compared = list(_compared(base, summaries))
    sweep = {
        "sweep": folder.name,
        "swept": list(swept),
        "base": base,
        "points": {
            name: {
                "options": {option: points[name].to_json()[option] for option in swept},
                "seeds": summaries[name]["seeds"],
                "recipes": {row: _figures(figures) for row, figures in summaries[name]["recipes"].items()},
                "not_trained": summaries[name]["not_trained"],
                "search_taken_from": (summaries[name]["search"] or {}).get("taken_from"),
                "csla_equals_gr": summaries[name]["csla_equals_gr"],
                "seconds": summaries[name]["seconds"],
            }
            for name in points
        },
        "compared": [{**place, **dataclasses.asdict(found)} for place, found in compared if found.seeds > 1],
    }
    best = _best(sweep["points"])
    sweep["best"] = {row: names[0] for row, names in best.items() if len(names) == 1}
    differences = [difference for _, difference in compared]
    sweep["statements"] = [*_statements(differences, summaries), *_best_lines(sweep, best)]
    pictures = draw_sweep(folder, swept, points, sweep["points"])
    files.write_text(folder / "sweep.md", _markdown(sweep, summaries, pictures))
    files.write_json(folder / "sweep.json", sweep)
    return sweep


def _figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a row of a point that its table has."""
    kept = ("learning_rate", "test_accuracy", "validation_accuracy", "diverged", "taken_from", "seconds_per_step")
    return {name: figures.get(name) for name in kept}


def _compared(base: str, summaries: Summaries) -> Iterator[tuple[dict[str, str], Difference]]:
    """Each row against itself at the base point, and rows of a point as its summary has them.

    What was taken over is compared once, at the point that trained it.
    """
    first = summaries[base]
    for name, summary in summaries.items():
        for row, figures in summary["recipes"].items():
            other = first["recipes"].get(row)
            if name == base or other is None or summary["data"] != first["data"]:
                continue
            if not figures.get("taken_from") and other.get("taken_from") != name:
                accuracies = _paired(summary["seeds"], figures, first["seeds"], other)
                names = f"{row} at {name}", f"{row} at {base}"
                if accuracies[0]:
                    yield _place(name, row), paired_difference(*names, *accuracies, summary["data"]["test"])
    for name, summary in summaries.items():
        for found in summary["compared"]:
            rows = [summary["recipes"].get(found[side]) for side in ("row", "other")]
            if not all(figures is not None and figures.get("taken_from") for figures in rows):
                alone = (
                    len(summaries) > 1
                    and _everywhere(found["row"], summaries)
                    and _everywhere(found["other"], summaries)
                )
                named = {} if alone else {"row": f"{found['row']} at {name}"}
                yield _place(name, found["row"]), Difference(**{**found, **named})


def _place(point: str, recipe: str) -> dict[str, str]:
    return {"point": point, "recipe": recipe}


def _paired(seeds: Sequence[int], figures: Mapping, others: Sequence[int], other: Mapping) -> tuple[list, list]:
    """Accuracies of the seeds that both have."""
    a, b = dict(zip(seeds, figures["test_accuracy"])), dict(zip(others, other["test_accuracy"]))
    both = [seed for seed in seeds if seed in b]
    return [a[seed] for seed in both], [b[seed] for seed in both]


def _best(points: Mapping[str, Any]) -> dict[str, list[str]]:
    """{row: the points that are best on the validation part}, of rows that differ between points and have one.

    Points with fewer seeds that diverged come first. They are several where they are equal. Test images have no say.
    """
    found = {}
    for row in _rows(points):
        own = {name: point["recipes"][row] for name, point in points.items() if _trained_here(point, row)}
        if len(own) > 1 and all(figures["validation_accuracy"] for figures in own.values()):
            merit = {n: (-f["diverged"], statistics.fmean(f["validation_accuracy"])) for n, f in own.items()}
            found[row] = [name for name in own if merit[name] == max(merit.values())]
    return found


def _rows(points: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(row for point in points.values() for row in point["recipes"]))


def _everywhere(row: str, points: Mapping[str, Any]) -> bool:
    """Whether one training of the row holds for all points."""
    return all(row in point["recipes"] for point in points.values()) and (
        sum(not point["recipes"][row].get("taken_from") for point in points.values()) == 1
    )


def _trained_here(point: Mapping[str, Any], row: str) -> bool:
    return row in point["recipes"] and not point["recipes"][row]["taken_from"]


def _best_lines(sweep: Mapping[str, Any], best: Mapping[str, Sequence[str]]) -> list[str]:
    lines = []
    for row, (name, *others) in best.items():
        if others:
            lines.append(f"{row} is as good on the validation part at {first_few([name, *others], between=', ')}.")
            continue
        figures = sweep["points"][name]["recipes"][row]
        validation, test = (
            f"{100 * statistics.fmean(figures[part]):.2f} %" for part in ("validation_accuracy", "test_accuracy")
        )
        lines.append(f"{row} is best on the validation part at {name}: {validation} there, {test} on the test images.")
    return lines


def _statements(differences: Sequence[Difference], summaries: Summaries) -> list[str]:
    """The differences that are shown, in words, and how many there were."""
    told = [difference for difference in differences if difference.seeds > 1]
    if not told:
        return ["One seed allows no statement about a difference."] if differences else []
    shown = [difference for difference in told if difference.shown]
    count = f"Of {len(told)} differences {len(shown) or 'none'} {'are' if len(shown) > 1 else 'is'} shown."
    lines = [*(difference.sentence() for difference in shown), f"{count} {expected_misses(len(told))}"]
    rows = [figures for summary in summaries.values() for figures in summary["recipes"].values()]
    if any(figures.get("shares_search") for figures in rows):
        lines.append("All seeds of a row share the Hyper-Search of their point: no interval tells how searches differ.")
    return lines


def _cells(sweep: Mapping[str, Any]) -> list[list[str]]:
    """Heading and rows of the table, row by row of the recipes, each at every point that trained it."""
    points, base = sweep["points"], sweep["base"]
    validated = any(f["validation_accuracy"] for point in points.values() for f in point["recipes"].values())
    swept = _swept_columns(sweep)
    flags = [OPTIONS[name].flag.removeprefix("--") for name in swept]
    columns = ["validation, %"] * validated + [f"minus {base}", "minus sgd"]
    cells = [["recipe", *flags, "lr", "test accuracy, %", *columns]]
    found = {(d["point"], d["recipe"], d["other"]): d for d in sweep["compared"]}
    for row in _rows(points):
        for name, point in points.items():
            if not _trained_here(point, row):
                continue
            figures, values = point["recipes"][row], [_value(point["options"][name]) for name in swept]
            if len(points) > 1 and _everywhere(row, points):
                values = ["any"] * len(values)
            validation = figures["validation_accuracy"] or []
            cells.append(
                [
                    row,
                    *values,
                    f"{figures['learning_rate']:g}",
                    accuracy_cell(figures["test_accuracy"], figures["diverged"]),
                    *([accuracy_cell(validation) + " (best)" * (sweep["best"].get(row) == name)] * validated),
                    _difference_cell(found.get((name, row, f"{row} at {base}"))),
                    _difference_cell(found.get((name, row, "sgd"))),
                ]
            )
    for point in points.values():
        values = [_value(point["options"][name]) for name in swept]
        rate = "" if len(swept) == len(sweep["swept"]) else _value(point["options"]["lr"])
        rest = [""] * (len(cells[0]) - len(values) - 3)
        cells += [[row, *values, rate, "the Hyper-Search diverged", *rest] for row in point["not_trained"]]
    return cells


def _swept_columns(sweep: Mapping[str, Any]) -> list[str]:
    """The options that have a column. The learning rate has one already, where each point has one."""
    chosen = any(len(point["options"].get("lr", ())) > 1 for point in sweep["points"].values())
    return [name for name in sweep["swept"] if name != "lr" or chosen]


def _value(value: Any) -> str:
    """The value of an option in the table."""
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(map(_value, value)) if isinstance(value, list) else shown(value)


def _difference_cell(difference: Mapping[str, Any] | None) -> str:
    return "" if difference is None else f"{difference['mean']:+.1f} ± {difference['half_width']:.1f}"


def sweep_lines(sweep: Mapping[str, Any]) -> list[str]:
    """The end of a sweep on a terminal: the table, and what it allows to say."""
    return [aligned(_cells(sweep), left=1 + len(_swept_columns(sweep))), *sweep["statements"]]


def _markdown(sweep: Mapping[str, Any], summaries: Summaries, pictures: Mapping[str, str]) -> str:
    points = sweep["points"]
    first = summaries[sweep["base"]]
    seeds = sorted({seed for point in points.values() for seed in point["seeds"]})
    flags = ", ".join(f"`{OPTIONS[name].flag}`" for name in sweep["swept"])
    model = first["options"]["model"]
    lines = [
        f"# {sweep['sweep']}",
        "",
        f"{counted(len(points), 'point')} of {flags}: {model} on {first['data']['name']}, {seeds_in_words(seeds)}. "
        "Every point is a run of its own in the folder of its name, with its options, weights and summary.md.",
        "",
        *markdown_table(_cells(sweep), left=1 + len(_swept_columns(sweep))),
        "",
        f"± behind an accuracy is the standard deviation over seeds. *Minus {sweep['base']}* and *minus sgd* are mean "
        "differences over the same seeds, ± their 95 % interval. The same seed is the same order of images, and the "
        "same first weights where the network is the same.",
        "",
        *(f"- {statement}" for statement in sweep["statements"]),
        "",
    ]
    lines += _taken_lines(points)
    for name, caption in pictures.items():
        lines += [f"![{caption}]({name})", "", f"{caption}.", ""]
    return "\n".join(lines)


def _taken_lines(points: Mapping[str, Any]) -> list[str]:
    """Which trainings were done once, because the swept options do not touch them."""
    once = dict.fromkeys(
        (row, figures["taken_from"])
        for point in points.values()
        for row, figures in point["recipes"].items()
        if figures["taken_from"]
    )
    searches = dict.fromkeys(point["search_taken_from"] for point in points.values() if point["search_taken_from"])
    parts = [*(f"{row} at {name}" for row, name in once), *(f"the Hyper-Search at {name}" for name in searches)]
    if not parts:
        return []
    return [f"Trained once and taken over where no option that touches it differs: {', '.join(parts)}.", ""]
