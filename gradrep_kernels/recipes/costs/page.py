"""costs.md: the tables of costs.json for people, and the columns that other reports may show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradrep_kernels.messages import counted

__all__ = ["cost_columns", "costs_page"]

_MISSING = "-"
_WIDE = 0.3  # Quartiles of a step, on a machine that is free, lie some 10 % apart.


def cost_columns(figures: Mapping[str, Any]) -> dict[str, str]:
    """Heading and cell of each column that the costs of a row give.

    Takes what `form_costs` returns, or a row of costs.json, which has more columns.
    """
    columns = {
        "multiply-adds, M": _millions(figures["macs"]),
        "deployed, M": _millions(figures["deployed_macs"]),
        "parameters deployed": f"{figures['deployed_parameters']:,}",
    }
    if "images_per_second" in figures:
        columns["images/s"] = _number(figures["images_per_second"]["median"])
        columns["peak memory, MB"] = _megabytes(figures["peak_memory"])
    return columns


def costs_page(costs: Mapping[str, Any]) -> str:
    """The text of costs.md."""
    rows = {name: row for name, row in costs["recipes"].items() if "not_measured" not in row}
    lines = [f"# Costs of {costs['run']}", "", _where(costs), ""]
    if rows:
        lines += ["## Training", "", *_table(_training(rows)), "", *_training_notes(costs, rows)]
        reasons = {row["largest_batch"].get("not_measured") for row in rows.values()}
        if len(reasons) == 1 and None not in reasons:  # A table of dashes would say no more.
            lines += [f"The largest batch was not measured: {reasons.pop()}.", ""]
        else:
            lines += ["## The largest batch", "", *_table(_largest(rows)), "", *_largest_notes(costs)]
        lines += ["## Deployed", "", *_table(_deployed(rows)), "", *_deployed_notes(costs)]
    left_out = {name: row["not_measured"] for name, row in costs["recipes"].items() if name not in rows}
    if left_out:
        lines += ["## Not measured", "", *(f"- {name}: {reason}" for name, reason in left_out.items()), ""]
    return "\n".join(lines)


def _where(costs: Mapping[str, Any]) -> str:
    threads = counted(costs["threads"], "thread")
    place = f"{costs['processor']}, {threads}" if costs["gpu"] is None else f"{costs['gpu']}, {costs['processor']}"
    versions = costs["versions"]
    software = f"torch {versions['torch']}, gradrep_kernels {versions['gradrep_kernels']}, commit {costs['commit']}"
    channels, height, width = costs["image"]
    return f"{place}. {software}. {costs['model']}, images of {channels} x {height} x {width}."


def _training(rows: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    first = next(iter(rows))
    heading = ["recipe", "images/s", "quartiles", "ms a step", f"times {first}", "optimizer", "SGS", "peak memory, MB"]
    cells = [[*heading, "multiply-adds, M", "parameters", "multipliers, bytes"]]
    for name, row in rows.items():
        rate, seconds = row["images_per_second"], row["seconds_per_step"]["median"]
        cells.append(
            [
                name,
                _number(rate["median"]),
                _between(rate),
                f"{1000 * seconds:.2f}",
                f"{row['times_first']['median']:.2f}",
                f"{row['optimizer_seconds']['median'] / seconds:.1%}",
                _MISSING if row["sgs_share"] is None else f"{row['sgs_share']:.1%}",
                _megabytes(row["peak_memory"]),
                _millions(row["macs"]),
                f"{row['parameters']:,}",
                f"{row['multiplier_bytes']:,}",
            ]
        )
    return cells


def _training_notes(costs: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    settings = costs["settings"]
    chosen = [f"batches of {next(iter(rows.values()))['batch_size']} images"]
    chosen += [settings["amp"]] * bool(settings["amp"]) + ["channels_last"] * bool(settings["channels_last"])
    chosen += ["torch.compile"] * bool(settings["compile"])
    lines = [
        f"With {', '.join(chosen)}, in turns, without forced determinism; batches lie ready on the device. Times "
        f"{next(iter(rows))}: the median of ratios within a round. Optimizer: its step alone, as a share of the whole. "
        "SGS: an update of spatial gradient scaling, as a share of the time from one to the next.",
        "",
        f"Peak memory: {costs['memory_counts']}.",
        "",
        "Multiply-adds of convolutions and matrix products in a forward pass of one image; papers call them FLOPs.",
        "",
    ]
    rates = [row["seconds_per_step"] for row in rows.values()]
    spread = max((rate["high"] - rate["low"]) / rate["median"] for rate in rates)
    if spread > _WIDE:
        busy = f"The machine was busy: quartiles of a step lie up to {spread:.0%} apart, so do not trust its time."
        lines += [f"**{busy}**", ""]
    return lines


def _largest(rows: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    cells = [["recipe", "images", "images/s", "quartiles", "learning rate"]]
    for name, row in rows.items():
        found = row["largest_batch"]
        images, rate, lr = (found.get(key) for key in ("images", "images_per_second", "learning_rate"))
        cells.append(
            [
                name,
                _MISSING if images is None else str(images),
                _MISSING if rate is None else _number(rate["median"]),
                found["not_measured"] if rate is None else _between(rate),
                _MISSING if lr is None else f"{lr:.3g}",
            ]
        )
    return cells


def _largest_notes(costs: Mapping[str, Any]) -> list[str]:
    memory = costs["settings"]["memory"]
    room = (
        "in the memory of the device, to 1 in 64" if memory is None else f"in {memory / 2**30:g} GiB, as counted above"
    )
    return [
        f"The largest batch whose steps fit {room}. Each row is alone in memory. The learning rate is the run's, "
        "scaled with the batch.",
        "",
    ]


def _deployed(rows: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    kinds = [(entry["batch_size"], entry["dtype"]) for entry in next(iter(rows.values()))["inference"]]
    cells = [["recipe", "multiply-adds, M", "parameters", *(f"images/s, batch {n}, {dtype}" for n, dtype in kinds)]]
    for name, row in rows.items():
        rates = [_number(entry["images_per_second"]["median"]) for entry in row["inference"]]
        cells.append([name, _millions(row["deployed_macs"]), f"{row['deployed_parameters']:,}", *rates])
    return cells


def _deployed_notes(costs: Mapping[str, Any]) -> list[str]:
    _, height, width = costs["test_image"]
    how = (
        f"Images of {height} x {width}, in inference mode and not compiled, in turns. The dtype is that of weights and "
    )
    return [f"Branches merged, norms folded where they can be. {how}images.", ""]


def _table(cells: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(cells[0]) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (cells[0], rule, *cells[1:])]


def _between(rates: Mapping[str, float]) -> str:
    return f"{_number(rates['low'])} to {_number(rates['high'])}"


def _number(value: float) -> str:
    """Three digits at least, thousands with commas."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f}" if count >= 1e7 else f"{count / 1e6:.2f}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f}"
