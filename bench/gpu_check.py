"""Everything that needs a GPU, in one command of under ten minutes: build in place, tests, benches, compute-sanitizer.

    make gpu-check RESULTS=DIR                (or python bench/gpu_check.py --results DIR)
    make gpu-check RESULTS=DIR DRY_RUN=1      the same on a machine without a GPU: what needs none runs, small

For a machine with a CUDA GPU, no network, and torch, Triton, nvcc, pytest and pytest-benchmark already there: nothing is
installed, and what is absent is named and skipped. Each phase has a time limit; one that fails does not stop the others.
Last come the tests of the ops, the optimizer and the networks that need no GPU, as far as time allows: this machine may have
another torch, Python and compiler. Eight files at most:

    DIR/summary.md             what ran, how long, what failed with the end of its output, who serves each op
    DIR/junit.xml              the tests with the marker `gpu`
    DIR/DEVICE/*.json, *.md    the benches; `cp -r DIR/DEVICE bench/results/` keeps them

Exit status: 0 no phase failed; 1 one did; 2 there is no GPU and no --dry-run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEADLINE = 560  # seconds for everything
GRACE = 15  # seconds between the request to end and the end: pytest writes its junit.xml then
BENCHES = ("rep_sgd_step", "joint_histogram", "sgs")
# Seconds at most for what must end. The sanitizer and the other tests share what that leaves of the deadline, 70 seconds or more.
LIMITS = {"build": 130, "small-run": 40, "tests": 130, "rep_sgd_step": 85, "joint_histogram": 60, "sgs": 45}
# Tests that say the same on every machine (what a package, a script or a compiled kernel looks like), or that take minutes.
LEFT_OUT = (
    "bench",
    "cli",
    "compile_gate*",
    "cuda_pairs",
    "distributed",
    "interop",
    "packaging",
    "recipes*",
    "sanitizers",
    "scales",
)
ERRORS_FOUND = 9  # compute-sanitizer's exit status, chosen here
SHOWN = 40  # lines of a failed phase's output in the summary
OPTIONAL = (
    "pytest_benchmark",
    "fast_histogram",
    "skimage",
    "hypothesis",
    "sklearn",
    "matplotlib",
    "accelerate",
    "lightning",
    "timm",
    "xdist",
)


@dataclass(frozen=True)
class Run:
    """A command that ended; status None: it ran into its time limit."""

    status: int | None
    seconds: float
    output: str


@dataclass(frozen=True)
class Outcome:
    phase: str
    state: str  # passed, failed, skipped
    note: str = ""
    seconds: float = 0.0
    output: str = ""

    @classmethod
    def of(cls, phase: str, run: Run, note: str = "") -> Outcome:
        if run.status == 0:
            return cls(phase, "passed", note, run.seconds)
        why = "ran into its time limit" if run.status is None else f"exit status {run.status}"
        return cls(phase, "failed", "; ".join(part for part in (why, note) if part), run.seconds, run.output)


@dataclass
class Check:
    results: Path
    dry_run: bool
    architecture: str | None  # of the GPU: '9.0'
    test_args: Sequence[str]
    until: float = field(default_factory=lambda: time.monotonic() + DEADLINE)

    @property
    def device(self) -> str:
        return "cpu" if self.architecture is None else "cuda"

    def run(self, command: Sequence[str], limit: float, **env: str) -> Run:
        """Run a command in the repository's root. Kernels run on the device: never interpreted, no backend forced."""
        start = time.monotonic()
        limit = min(limit, self.until - start)
        if limit < 1:
            return Run(None, 0.0, f"no time is left of the {DEADLINE} seconds")
        path = os.pathsep.join(
            filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
        )  # the machine's own packages may be there
        environment = {
            **os.environ,
            "PYTHONPATH": path,
            "PYTHONUNBUFFERED": "1",
            "MAX_JOBS": str(os.cpu_count() or 1),
            **env,
        }
        for name in ("TRITON_INTERPRET", "GRADREP_BACKEND"):
            environment.pop(name, None)
        with tempfile.TemporaryFile("w+", errors="replace") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            status = _wait(process, limit)
            log.seek(0)
            return Run(status, time.monotonic() - start, log.read())


def _wait(process: subprocess.Popen, limit: float) -> int | None:
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        pass
    for end in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, end)
            process.wait(GRACE)
        except (subprocess.TimeoutExpired, ProcessLookupError):
            continue
        break
    return None


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


# -- phases


def build(check: Check) -> list[Outcome]:
    """Both modules in place; if that fails, the CPU's alone, so that the other phases have it."""
    command = _python("setup.py", "build_ext", "--inplace")
    if check.architecture is None:
        return [
            Outcome.of(
                "build",
                check.run(command, LIMITS["build"], GRADREP_BUILD="require", GRADREP_CUDA="0"),
                "CPU kernels only: there is no GPU",
            )
        ]
    both = check.run(
        command, LIMITS["build"], GRADREP_BUILD="require", GRADREP_CUDA="1", TORCH_CUDA_ARCH_LIST=check.architecture
    )
    if both.status == 0:
        return [Outcome.of("build", both)]
    cpu = check.run(command, 60, GRADREP_BUILD="require", GRADREP_CUDA="0")
    return [Outcome.of("build", both), Outcome.of("build without CUDA", cpu)]


def small_run(check: Check) -> list[Outcome]:
    run = check.run(_python("bench/small_run.py", check.device), LIMITS["small-run"])
    return [Outcome.of("small run", run, (run.output.strip().splitlines() or [""])[-1])]


def _pytest(check: Check, limit: float, *chosen: str) -> Run:
    command = _python("-m", "pytest", "-p", "no:cacheprovider", "-rfE", *chosen, *check.test_args)
    if importlib.util.find_spec("xdist") and not check.test_args:  # xdist hides what is wrong with an argument
        command += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]
    return check.run(command, limit, OMP_NUM_THREADS="2")


def tests(check: Check) -> list[Outcome]:
    """Those that run on a GPU."""
    junit = check.results / "junit.xml"
    run = _pytest(check, LIMITS["tests"], f"--junitxml={junit}", "-m", "gpu")
    counts, passed, skipped = _read_junit(junit)
    found = [Outcome.of("tests on the GPU", run, counts)]
    if run.status == 0 and not passed:
        state = "skipped" if check.architecture is None else "failed"
        found = [Outcome("tests on the GPU", state, f"none ran: {counts}", run.seconds, run.output)]
    if skipped:
        found.append(Outcome("tests on the GPU that were skipped", "skipped", "; ".join(skipped)))
    return found


def other_tests(check: Check) -> list[Outcome]:
    """Not done in time, they say less, but nothing is wrong."""
    left_out = [f"--ignore-glob=*/test_{name}.py" for name in LEFT_OUT]
    run = _pytest(check, DEADLINE, "-m", "not gpu", "-k", "not interpreter", *left_out)
    last_line = (run.output.strip().splitlines() or [""])[-1]
    if run.status is None and not re.search(r"^(FAILED|ERROR)\b", run.output, re.MULTILINE):
        return [
            Outcome(
                "other tests", "skipped", f"no time for all of them, none failed until then: {last_line}", run.seconds
            )
        ]
    return [Outcome.of("other tests", run, last_line)]


def _read_junit(junit: Path) -> tuple[str, int, list[str]]:
    """(counts, how many passed, why tests were skipped)"""
    try:
        cases = list(ET.parse(junit).iter("testcase"))
    except (OSError, ET.ParseError):
        return "no junit.xml", 0, []
    counts = dict.fromkeys(("passed", "failure", "error", "skipped"), 0)
    reasons = set()
    for case in cases:
        states = {child.tag: child.get("message") or "" for child in case if child.tag in counts}
        counts[next(iter(states), "passed")] += 1
        reasons |= {states["skipped"]} if "skipped" in states else set()
    return ", ".join(f"{n} {state}" for state, n in counts.items() if n), counts["passed"], sorted(reasons)


def benches(check: Check) -> list[Outcome]:
    if importlib.util.find_spec("pytest_benchmark") is None:
        return [Outcome("bench", "skipped", "pytest_benchmark is not installed")]
    options = [
        "--device",
        check.device,
        "--results",
        str(check.results),
        *(["--quick"] if check.dry_run else ["--seconds", "1"]),
    ]
    return [
        Outcome.of(
            f"bench {name}", check.run(_python("-m", "pytest", f"bench/bench_{name}.py", *options), LIMITS[name])
        )
        for name in BENCHES
    ]


def sanitizer(check: Check) -> list[Outcome]:
    if check.architecture is None:
        return [Outcome("sanitizer", "skipped", "there is no GPU")]
    tool = shutil.which("compute-sanitizer") or next(
        map(str, Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None
    )
    if tool is None:
        return [Outcome("sanitizer", "skipped", "compute-sanitizer is not installed")]
    found = []
    for mode in ("memcheck", "racecheck"):
        command = [tool, "--tool", mode, "--error-exitcode", str(ERRORS_FOUND), *_python("bench/small_run.py", "cuda")]
        # Without torch's caching allocator each tensor has bounds of its own.
        run = check.run(command, 60, PYTORCH_NO_CUDA_MEMORY_CACHING="1", CUDA_MODULE_LOADING="LAZY")
        unusable = re.search(
            r"^=+ .*(not supported|unable to|could not|internal sanitizer error).*$",
            run.output,
            re.IGNORECASE | re.MULTILINE,
        )
        if run.status is None or (unusable and run.status != ERRORS_FOUND):
            why = f"does not work here: {unusable[0].strip('= ')}" if unusable else "ran into its time limit"
            found.append(Outcome(f"sanitizer {mode}", "skipped", why, run.seconds))
        else:
            found.append(Outcome.of(f"sanitizer {mode}", run))
    return found


PHASES: dict[str, Callable[[Check], list[Outcome]]] = {
    "build": build, "small-run": small_run, "tests": tests, "bench": benches, "sanitizer": sanitizer, "other-tests": other_tests,
}  # fmt: skip


# -- the whole


def gpu_architecture() -> str | None:
    """'9.0' of the first GPU; None without one."""
    code = "import torch; print('%d.%d' % torch.cuda.get_device_capability() if torch.cuda.is_available() else '')"
    return subprocess.run(_python("-c", code), stdout=subprocess.PIPE, text=True).stdout.strip() or None


def environment(check: Check) -> str:
    return f"```\n{check.run(_python('-m', 'gradrep_kernels', 'env'), 60).output.strip()}\n```"


def summary(check: Check, outcomes: Sequence[Outcome], about: str) -> str:
    absent = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    lines = [
        "# gpu-check",
        "",
        f"**{f'{len(failed)} of {len(outcomes)} failed.' if failed else 'Nothing failed.'}**",
        "",
    ]
    if check.architecture is None:
        lines += ["**There is no GPU here: nothing below ran on one (dry run).**", ""]
    lines += ["| phase | | seconds | |", "|---|---|---|---|"]
    lines += [
        f"| {o.phase} | {o.state} | {o.seconds:.0f} | {o.note.replace('|', '/')} |".replace("\n", " ") for o in outcomes
    ]
    lines += [
        "",
        f"Packages that are absent; what needs them was skipped: {', '.join(absent) or 'none'}.",
        "",
        about,
        "",
    ]
    for outcome in failed:
        lines += [f"## {outcome.phase}", "", "```", *outcome.output.rstrip().splitlines()[-SHOWN:], "```", ""]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--results", type=Path, required=True, help="folder of the result files (made if it is missing)"
    )
    parser.add_argument("--dry-run", action="store_true", help="run small; without a GPU: what needs none")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=tuple(PHASES),
        default=tuple(PHASES),
        metavar="PHASE",
        help=f"some of: {', '.join(PHASES)}",
    )
    parser.add_argument("--test-args", default="", help="for pytest, in one string (a file, -k EXPRESSION)")
    options = parser.parse_args(argv)
    architecture = gpu_architecture()
    if architecture is None:
        print(
            "gpu-check: torch sees no GPU here" + ("; a dry run of what needs none" if options.dry_run else ""),
            file=sys.stderr,
            flush=True,
        )
        if not options.dry_run:
            print("gpu-check: --dry-run (make gpu-check RESULTS=DIR DRY_RUN=1) runs what needs none", file=sys.stderr)
            return 2
    options.results.mkdir(parents=True, exist_ok=True)
    check = Check(options.results.resolve(), options.dry_run, architecture, options.test_args.split())
    outcomes: list[Outcome] = []
    about = ""
    for name, phase in PHASES.items():
        if name not in options.only:
            continue
        try:
            ended = phase(check)
        except Exception as error:  # the other phases still run
            ended = [Outcome(name, "failed", f"{type(error).__name__}: {error}")]
        for outcome in ended:
            print(
                f"gpu-check: {outcome.phase}: {outcome.state}" + (f": {outcome.note}" if outcome.note else ""),
                flush=True,
            )
        outcomes += ended
        about = environment(check) if name == "build" or not about else about
        (check.results / "summary.md").write_text(summary(check, outcomes, about))
    return 1 if any(outcome.state == "failed" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
