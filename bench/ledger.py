"""Write every figure of bench/results into docs/figures.md, and a few of them into README.md.

    python bench/ledger.py           # or: make figures

Nothing is copied by hand, so that no page can say something else than the files of the benches. Rows that missed their
target, and rows that nothing has measured, stand where the others stand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from harness import ROOT
from report import BUSY, number, table, target_cells

RESULTS = ROOT / "bench" / "results"
PAGE, README = ROOT / "docs" / "figures.md", ROOT / "README.md"
BEGIN, END = "<!-- figures: written by bench/ledger.py -->", "<!-- end of figures -->"


@dataclass(frozen=True)
class Code:
    """What a row of targets asks, in words."""

    title: str
    meaning: str


CODES = {
    "S1": Code(
        "The step with multipliers, against torch's fused step without any",
        "One optimizer step over all parameters of a network. Ours multiplies each gradient by its Grad Mult, "
        "`torch.optim.SGD(fused=True)` multiplies nothing. Above 1, ours is faster.",
    ),
    "S2": Code(
        "The step with multipliers, against other ways to multiply",
        "All of them compute the same weights: one call that multiplies every gradient by a mask of the weight's size "
        "and torch's fused step after it; the same compiled by torch.compile; a Python loop over the tensors, as the "
        "published code has it.",
    ),
    "S3": Code(
        "What multiplying costs",
        "The time of our step with multipliers over that of our step without. At 1, multiplying is free.",
    ),
    "S4": Code(
        "What a step costs before any arithmetic",
        "62 tensors of 1000 floats: what is timed is Python and torch's dispatcher. A detector's optimizer may have 28 "
        "parameter groups, and torch's fused step starts once for each.",
    ),
    "S5": Code(
        "Memory for multipliers",
        "In the structured form, of RepOpt-VGG-B1. The published code keeps masks of weight size.",
    ),
    "T1": Code(
        "The end of a training step: clip, step and average",
        "Gradients are clipped by their norm, the step is taken, and a moving average of the weights is kept. Ours "
        "does it in two reads and with multipliers, torch's three calls without any: `clip_grad_norm_`, "
        "`SGD(fused=True)`, `_foreach_lerp_`. Rows under GradScaler unscale first.",
    ),
    "T2": Code(
        "Momentum in bfloat16",
        "The same, with momentum in half the bytes. Its random bits cost arithmetic, which a machine whose memory is "
        "the limit does not notice.",
    ),
    "T3": Code(
        "What the end of a step costs before any arithmetic",
        "62 tensors of 1000 floats in 1 to 62 parameter groups, one thread. Of 100 µs in one group on an undisturbed "
        "core, 8 go into reading 62 gradients, 10 into finding that nothing else has changed, 5 into version counters, "
        "25 into handing the list to the op and looking at its tensors, 30 into the arithmetic on 62,000 elements.",
    ),
    "T4": Code(
        "Clipping alone",
        "`optimizer.clip_grad_norm_` for loops that clip between backward and step. Torch's multiplies the gradients "
        "whether it clips or not, ours writes nothing where nothing is clipped.",
    ),
    "T5": Code(
        "The step by the size of kernels",
        "The same memory as weights of 3 x 3 to 31 x 31 kernels, each with its Grad Mult: the time of as many bytes "
        "over that with 3 x 3 kernels. RepLKNet and UniRepLKNet have depthwise kernels of such sizes, whose multiplier "
        "is as large as the weight, and is read too.",
    ),
    "T6": Code(
        "AdamW with the scales of branches",
        "FusedRepAdamW adds up the updates of all branches of a weight, `torch.optim.AdamW(fused=True)` knows no "
        "branches. The loop has a mask of the weight's size and multiplies twice, as the published code does. The "
        "host's cost is that of 62 tensors of 1000 floats. Above 1, ours is faster.",
    ),
    "H1": Code(
        "Counting pairs of pixels",
        "The joint histogram of all four displacements of a 3 x 3 kernel over a feature map of 256 images, 64 channels "
        "and 32 x 32 pixels. This is where spatial gradient scaling spends its time.",
    ),
    "H2": Code(
        "Counting pairs on unfriendly data",
        "Times over that of uniform random data in NCHW layout, and the gain of a second thread.",
    ),
    "H3": Code(
        "A whole update of spatial gradient scaling",
        "Ranges, counts, mutual information and the scaling of every layer of VGG-16, from 20 batches of 128 images of "
        "32 x 32, with the forward passes left out. The published algorithm runs on one core.",
    ),
    "G0": Code(
        "What a step costs on the host, on a GPU",
        "The time until `step()` returns, for 62 and 161 tensors of 1000 floats in 2 groups: as many as ResNet-18 and "
        "ResNet-50 have. A network whose work on the GPU is shorter than that waits for the host. The whole tail is "
        "clipping, step and averages.",
    ),
    "G1": Code(
        "The step on a GPU", "The same questions as above, and the share of the rate of a plain copy of as many bytes."
    ),
    "G2": Code(
        "Counting pairs on a GPU, CUDA C++",
        "Ranges and joint histogram of a feature map of 2560 images, 64 channels and 32 x 32 pixels.",
    ),
    "G3": Code("Counting pairs on a GPU, Triton", "The same, by the portable kernels."),
    "G4": Code(
        "Updates of spatial gradient scaling on a GPU",
        "Their time as a share of that of a training of VGG-16 on CIFAR shapes.",
    ),
    "G5": Code(
        "The end of a training step on a GPU",
        "Unscale, clip, step and average, against torch's four calls, and the share of the rate of a plain copy.",
    ),
    "": Code(
        "Updates of spatial gradient scaling on a CPU",
        "Their time as a share of that of a training of VGG-16 on CIFAR shapes. Shown without a target.",
    ),
}


@dataclass(frozen=True)
class Figure:
    """A figure for README: its place in the results, and what it means."""

    bench: str
    row: str
    what: str
    words: str


IN_README = (
    Figure(
        "rep_sgd_step",
        "S1",
        "RepOpt-VGG-B1, 2 threads: as fast as SGD(fused=True), no multiplier",
        "a step with Grad Mults is so many times as fast as torch's fused SGD *without* any",
    ),
    Figure(
        "rep_sgd_step",
        "S3",
        "RepOpt-VGG-B1, 2 threads, contiguous: time with the multiplier over time without",
        "time of our step with Grad Mults over that without: 1 x is free",
    ),
    Figure(
        "rep_sgd_step",
        "S2",
        "RepOpt-VGG-B1, 2 threads: as fast as loop as published, dense M",
        "the same step against the loop of the published code",
    ),
    Figure(
        "step_tail",
        "T1",
        "RepOpt-VGG-B1, 2 threads: as fast as clip_grad_norm_, SGD(fused=True), foreach EMA",
        "clip, step and average, against torch's three calls *without* Grad Mults",
    ),
    Figure(
        "joint_histogram",
        "H1",
        "as fast as fast-histogram per channel and displacement, as published",
        "counting pairs of pixels for SGS, one thread each, against the published way",
    ),
    Figure(
        "sgs",
        "H3",
        "one update, statistics only, VGG-16 shapes, 20 x 128 images, 2 threads: as fast as "
        "published algorithm on 20 batches, fast-histogram, one core",
        "a whole SGS update of VGG-16 on two threads, against the published way on one",
    ),
)


def results() -> dict[str, dict[str, dict]]:
    """The whole runs: device -> bench -> content of its file."""
    found: dict[str, dict[str, dict]] = {}
    for path in sorted(RESULTS.glob("*/*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(content["device"], {})[content["bench"]] = content
    return found


def _name(content: dict) -> str:
    machine = content["machine"]
    if "gpu" in machine:
        return machine["gpu"]["name"]
    words = re.sub(r"\((R|TM)\)|@.*|\bCPU\b|\bProcessor\b", " ", machine["cpu"]).split()
    return f"{' '.join(words)}, {machine['cores']} cores"


def _targets(found: dict[str, dict[str, dict]]) -> Iterator[tuple[dict, dict]]:
    for benches in found.values():
        for content in benches.values():
            yield from ((content, row) for row in content["targets"])


def _section(code: str, found: dict[str, dict[str, dict]]) -> list[str]:
    # The same question on each machine, one below the other. A GPU's rows are the same on every CPU: shown once.
    rows: dict[str, list[list[str]]] = {}
    for content, row in _targets(found):
        if row["row"] == code:
            machine = _name(content) if row["figure"] else ""
            line = [row["what"], machine, *target_cells(row), row["bound"]]
            if line not in rows.setdefault(row["what"], []):
                rows[row["what"]].append(line)
    head = ["what", "machine", "figure", "quartiles, rounds", "at least", "aim", "", "bound by"]
    title = f"{CODES[code].title} ({code})" if code else CODES[code].title
    lines = [line for same in rows.values() for line in same]
    return [f"## {title}", "", CODES[code].meaning, "", *table(head, lines)]


def _counts(found: dict[str, dict[str, dict]]) -> str:
    judged = [row["verdict"] for _, row in _targets(found) if row["figure"] and row["at_least"] is not None]
    open_rows = {(row["row"], row["what"]) for _, row in _targets(found) if not row["figure"]}
    missed = sum("missed" in verdict for verdict in judged)
    return (
        f"Of {len(judged)} figures with a target, {len(judged) - missed} reach it and {missed} miss it. "
        f"{len(open_rows)} more wait for a GPU: none has run these kernels yet."
    )


def _machines(found: dict[str, dict[str, dict]]) -> list[str]:
    rows = []
    for device, benches in found.items():
        for bench, content in benches.items():
            busy = content["machine"].get("cores_busy_with_other_work", 0.0)
            remarks = [] if content["complete"] else ["incomplete"]
            remarks += ["quick form"] if content["quick"] else []
            remarks += [f"{number(busy)} cores were busy with other work"] if busy > BUSY else []
            command = f"`{content['command']}`"
            versions = f"torch {content['versions']['torch']}, Python {content['versions']['python']}"
            where = f"`bench/results/{device}/{bench}.md`"
            rows.append(
                [_name(content), content["date"][:10], content["commit"], versions, command, where, "; ".join(remarks)]
            )
    head = ["machine", "date", "commit", "versions", "command", "whole file", ""]
    return ["## Machines and runs", "", *table(head, rows)]


def _compiled() -> list[str]:
    lines = (RESULTS / "compiled.md").read_text(encoding="utf-8").rstrip().split("\n")
    return [*(f"#{line}" if line.startswith("#") else line for line in lines), ""]


def page() -> str:
    """The text of docs/figures.md."""
    found = results()
    unknown = sorted({row["row"] for _, row in _targets(found)} - set(CODES))
    if unknown:
        raise ValueError(f"bench/ledger.py has no words for the rows {', '.join(unknown)}: add them to CODES")
    present = {row["row"] for _, row in _targets(found)}
    lines = [
        "# Figures",
        "",
        "<!-- Written by bench/ledger.py from bench/results. `make figures` renews it. -->",
        "",
        "Every target of this package and what was measured for it. A figure of `1.5 x` is a median of ratios within "
        "one round, in which all candidates took turns in one process: ratios survive a shared machine's drift, times "
        "do not. *at least* is the target, *aim* what would be better still. Missed rows stay, with what bounds them.",
        "",
        _counts(found),
        "",
        *(line for code in CODES if code in present for line in _section(code, found)),
        *_compiled(),
        *_machines(found),
    ]
    return "\n".join(lines).rstrip() + "\n"


def readme_table() -> str:
    """The figures of README, between its two comments. One that no machine has measured is left out."""
    found = results()
    machines = {device: next(iter(benches.values())) for device, benches in found.items()}
    rows = []
    for figure in IN_README:
        if not any(figure.bench in benches for benches in found.values()):
            continue
        cells, asked = [], ""
        for device in machines:
            if figure.bench not in found[device]:
                cells.append("")
                continue
            row = _row(found[device], figure)
            shown, _, asked, _, verdict = target_cells(row)
            cells.append(f"{shown}, {verdict}" if row["figure"] else verdict)
        rows.append([figure.words, *cells, asked])
    head = ["what", *(_name(content) for content in machines.values()), "asked for"]
    return "\n".join([BEGIN, "", *table(head, rows), END])


def _row(benches: dict[str, dict], figure: Figure) -> dict:
    rows: Sequence[dict] = benches[figure.bench]["targets"]
    for row in rows:
        if (row["row"], row["what"]) == (figure.row, figure.what):
            return row
    raise ValueError(f"no row {figure.row} {figure.what!r} in the results of {figure.bench}: mend IN_README")


def readme(text: str) -> str:
    """README with its figures renewed."""
    new, count = re.subn(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: readme_table(), text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"README.md must have its figures once, between {BEGIN} and {END}; found {count} times")
    return new


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")
