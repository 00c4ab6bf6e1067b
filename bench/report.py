"""Results of one bench on one device: a JSON file for machines, a Markdown file for readers; history by commit."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from harness import Comparison, Figure, OtherWork, Setup, commit, machine, slug, versions

from gradrep_kernels.ops import backends

KEPT = 10  # runs in the history
BUSY = 0.2  # cores; more other work than that is told
_DIGITS = 3
_RATES = {"gb_per_s": "GB/s", "ns_per_pair": "ns per pair", "ns_per_pair_and_thread": "ns per pair and thread"}


@dataclass(frozen=True)
class Target:
    """A row of the table of targets.

    `at_least` and `aim` are upper bounds where less is better. A row that has neither is shown, not judged.
    """

    row: str
    what: str
    unit: str
    at_least: float | None = None
    aim: float | None = None
    less_is_better: bool = False

    def verdict(self, value: float) -> str:
        def reached(bound: float | None) -> bool:
            return bound is not None and (value <= bound if self.less_is_better else value >= bound)

        if reached(self.aim):
            return "aim reached"
        if self.at_least is None:
            return "" if self.aim is None else "aim missed"
        return "reached" if reached(self.at_least) else "missed"


class Results:
    """Gathers what a bench measures.

    `save` may be called after each comparison, so that a run cut short leaves what it had.
    """

    def __init__(self, bench: str, setup: Setup):
        self.folder = setup.folder / slug(setup.device)
        self.path = self.folder / f"{bench}.json"
        self._others = OtherWork()
        self._content = {
            "bench": bench,
            "device": slug(setup.device),
            "quick": setup.quick,
            "complete": False,
            "machine": machine(setup.device),
            "versions": versions(),
            "commit": commit(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": setup.command,
            "served_by": {row["op"]: row["serves"] for row in backends.report((setup.device.type,))},
            "targets": [],
            "measurements": [],
            "skipped": {},
            "failed": [],
            "history": self._history(),
        }

    def _history(self) -> list[dict]:
        """Earlier runs' target figures, the last of them that of the file which this run replaces."""
        try:
            last = json.loads(self.path.read_text())
            figures = {
                f"{row['row']} {row['what']}": row["figure"]["median"] for row in last["targets"] if row["figure"]
            }
            summary = {key: last[key] for key in ("commit", "date", "quick", "served_by")}
            return [*last["history"], {**summary, "torch": last["versions"]["torch"], "figures": figures}][-KEPT:]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def add(self, group: str, comparison: Comparison, notes: Sequence[str] = ()) -> None:
        """All figures of a comparison; what was skipped, with its reason."""
        for name, candidate in comparison.candidates.items():
            time = comparison.time(name)
            row = {"group": group, "way": name, "threads": comparison.threads_of(name), "seconds": asdict(time)}
            if candidate.bytes is not None:
                row["gb_per_s"] = candidate.bytes / time.median / 1e9
            if candidate.pairs is not None:
                key, threads = (
                    ("ns_per_pair", 1)
                    if "gpu" in self._content["machine"]
                    else ("ns_per_pair_and_thread", comparison.threads_of(name))
                )
                row[key] = time.median * threads / candidate.pairs * 1e9
            notes_of = [note for note in (candidate.note, *notes) if note]
            self._content["measurements"].append({**row, "note": "; ".join(notes_of)})
        self._content["skipped"].update({f"{group}: {name}": why for name, why in comparison.skipped.items()})

    def target(self, target: Target, figure: Figure | float | None, *, bound: str = "", why_not: str = "") -> None:
        """Add a row to the table.

        `bound` says what bounds a figure that misses its target, `why_not` why there is no figure.
        """
        if isinstance(figure, float):
            figure = Figure(figure, figure, figure, 1)
        row = {**asdict(target), "figure": None if figure is None else asdict(figure), "bound": bound}
        row["verdict"] = (
            f"not measured: {why_not or 'a part was skipped'}" if figure is None else target.verdict(figure.median)
        )
        self._content["targets"].append(row)

    def fail(self, test: str) -> None:
        self._content["failed"].append(test)

    def finish(self, whole: bool) -> None:
        self._content["complete"] = whole and not self._content["failed"]
        self.save()

    @property
    def is_empty(self) -> bool:
        return not (self._content["targets"] or self._content["measurements"])

    def markdown(self) -> str:
        return markdown(self._content)

    def save(self) -> None:
        if not self.is_empty:
            self._content["machine"]["cores_busy_with_other_work"] = self._others.cores()
            self.folder.mkdir(parents=True, exist_ok=True)
            _replace(self.path, json.dumps(self._content, indent=1, ensure_ascii=False) + "\n")
            _replace(self.path.with_suffix(".md"), self.markdown())


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(text)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


# -- Markdown ----------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0:
        return "0"
    text = f"{value:.{_DIGITS}g}"
    return f"{float(text):.0f}" if "e+" in text else f"{value:.6f}".rstrip("0") if "e-" in text else text


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds / 1e-9)} ns"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, and an empty one."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return [lines[0], "|" + "---|" * len(head), *lines[1:], ""]


def target_cells(row: dict) -> list[str]:
    """What a row of targets shows: figure, spread, both bounds, verdict."""
    sign = "≤ " if row["less_is_better"] else "≥ "
    bounds = [f"{sign}{number(row[key])} {row['unit']}" if row[key] is not None else "" for key in ("at_least", "aim")]
    figure = row["figure"]
    shown = f"{number(figure['median'])} {row['unit']}" if figure else ""
    spread = f"{number(figure['low'])}–{number(figure['high'])}, {figure['n']}" if figure and figure["n"] > 1 else ""
    verdict = f"**{row['verdict']}**" if row["verdict"] == "missed" else row["verdict"]
    return [shown, spread, *bounds, verdict]


def markdown(content: dict) -> str:
    """The page of one result file, from its JSON content."""
    machine, versions = content["machine"], content["versions"]
    gpu = machine.get("gpu")
    where = (
        f"{gpu['name']} ({gpu['memory_gib']} GiB, sm_{gpu['capability'].replace('.', '')}); host {machine['cpu']}"
        if gpu
        else machine["cpu"]
    )
    lines = [
        f"# {content['bench']} on {content['device']}",
        "",
        f"{where}, {machine['cores']} cores. "
        + ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        + f". Commit {content['commit']}, {content['date']}. `{content['command']}`",
        "",
        "Served by: " + ", ".join(f"{op} {serves}" for op, serves in content["served_by"].items()) + ".",
        "",
    ]
    busy = machine.get("cores_busy_with_other_work", 0.0)
    if busy > BUSY:
        lines += [
            f"**Other work kept {number(busy)} of {machine['cores']} cores busy during this run: "
            "times and ratios suffer.**",
            "",
        ]
    if content["quick"]:
        lines += ["**Quick form: it shows that the bench runs. Its figures mean nothing.**", ""]
    if not content["complete"]:
        lines += [
            "**Incomplete run.**" + (f" Failed: {', '.join(content['failed'])}." if content["failed"] else ""),
            "",
        ]
    if content["targets"]:
        rows = [[row["row"], row["what"], *target_cells(row), row["bound"]] for row in content["targets"]]
        lines += table(["#", "what", "figure", "quartiles, rounds", "at least", "aim", "", "bound by"], rows)
    for group in dict.fromkeys(row["group"] for row in content["measurements"]):
        rows = []
        members = [row for row in content["measurements"] if row["group"] == group]
        extra = [(key, head) for key, head in _RATES.items() if any(key in row for row in members)]
        for row in members:
            seconds = row["seconds"]
            spread = f"{duration(seconds['low'])} – {duration(seconds['high'])}, {seconds['n']}"
            rates = [number(row[key]) if key in row else "" for key, _ in extra]
            rows.append([row["way"], str(row["threads"]), duration(seconds["median"]), spread, *rates, row["note"]])
        lines += [
            f"## {group}",
            "",
            *table(["way", "threads", "median", "quartiles, rounds", *(head for _, head in extra), "note"], rows),
        ]
    if content["skipped"]:
        lines += ["## Skipped", "", *(f"- {name}: {why}" for name, why in content["skipped"].items()), ""]
    if content["history"]:
        lines += ["## Earlier runs", ""]
        lines += _history_table(content["history"])
    return "\n".join(lines).rstrip() + "\n"


def _history_table(history: list[dict]) -> list[str]:
    names = dict.fromkeys(name for run in history for name in run["figures"])
    heads = [f"{run['commit']} {run['date'][:10]}" + (" quick" if run["quick"] else "") for run in history]
    rows = [
        [name, *(number(run["figures"][name]) if name in run["figures"] else "" for run in history)] for name in names
    ]
    return table(["figure", *heads], rows)
