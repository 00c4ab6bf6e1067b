"""Everything that needs a GPU, in one command of under ten minutes: build in place, tests, benches, compute-sanitizer.

    make gpu-check RESULTS=DIR                (or python bench/gpu_check.py --results DIR)
    make gpu-check RESULTS=DIR DRY_RUN=1      the same on a machine without a GPU: what needs none runs, small
    make gpu-check RESULTS=DIR CARRIED=1      modules in gradrep_kernels/, built for this commit, are used

For a machine with a CUDA GPU, no network, and torch, Triton, nvcc, pytest and pytest-benchmark already there. Nothing
is installed, and what is absent is named and skipped. Each phase has a time limit, and one that fails does not stop the
others.
A CUDA error that sticks ends the tests' process (tests/conftest.py); the tests that are left run in another.
Last come the tests of the ops, the optimizer and the networks that need no GPU, as far as time allows: this machine may
have another torch, Python and compiler. Eight files at most:

    DIR/summary.md             what ran, how long, what failed with the end of its output, who serves each op
    DIR/junit.xml              the tests with the marker `gpu`
    DIR/DEVICE/*.json, *.md    the benches; `cp -r DIR/DEVICE bench/results/` keeps them

Exit status: 0 no phase failed; 1 one did; 2 there is no GPU and no --dry-run.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEADLINE = 560  # seconds for everything, from the start of the process
GRACE = 15  # seconds between the request to end and the end: pytest writes its junit.xml then
BENCHES = ("rep_sgd_step", "rep_adamw_step", "step_tail", "joint_histogram", "sgs")
# Seconds at most for what must end. The sanitizer and the other tests share what that leaves of the deadline: 60
# seconds or more. The build's compilers run side by side. The small run compiles Triton's kernels.
LIMITS = {
    "build": 105,
    "small-run": 70,
    "tests": 100,
    "rep_sgd_step": 65,
    "rep_adamw_step": 35,
    "step_tail": 40,
    "joint_histogram": 45,
    "sgs": 40,
}
# Tests that say the same on every machine (what a package, a script or a compiled kernel looks like), or that take
# minutes.
LEFT_OUT = (
    "bench*",
    "cli",
    "compile_gate*",
    "cuda_pairs",
    "distributed",
    "first_gpu_run",
    "house",
    "interop",
    "packaging",
    "recipes*",
    "sanitizers",
    "scales",
)
DEVICE_LOST = 86  # tests/conftest.py: a CUDA error ended the tests
RESTARTS = 5  # of the tests' process after such errors
KERNELS = {"_C": ("cpu", "cpp", "*_cpu.cpp"), "_C_cuda": ("cuda", "cuda", "*_cuda.cu")}  # device, backend, sources
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
    carried: bool = False  # modules that are there already are used if they serve
    commit: str = ""
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
        if self.commit:
            environment["GRADREP_COMMIT"] = self.commit
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
    except BaseException:  # Ctrl-C ends this process alone: the command is in a session of its own
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise
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
    """Modules that are not carried, in place; if CUDA fails, the CPU's alone, so that the other phases have it."""
    start = time.monotonic()
    names = ["_C"] if check.architecture is None else ["_C", "_C_cuda"]
    unusable = dict.fromkeys(names, "")
    if check.carried:
        with ThreadPoolExecutor(len(names)) as pool:  # each starts a Python that imports torch
            unusable = dict(zip(names, pool.map(functools.partial(_why_not_carried, check), names)))
    notes = ["CPU kernels only: there is no GPU"] if check.architecture is None else []
    if check.carried:
        notes.append(f"carried: {', '.join(name for name in names if not unusable[name]) or 'none'}")
        notes.append(f"built: {', '.join(f'{name} ({why})' for name, why in unusable.items() if why) or 'none'}")
    left = [name for name in names if unusable[name] or not check.carried]
    if not left:
        return [Outcome("build", "passed", "; ".join(notes), time.monotonic() - start)]
    cuda = {"_C": "0", "_C_cuda": "only", "_C _C_cuda": "1"}[" ".join(left)]
    switches = {"GRADREP_BUILD": "require", "GRADREP_CUDA": cuda}
    if check.architecture is not None:
        switches["TORCH_CUDA_ARCH_LIST"] = check.architecture
    command = _python("setup.py", "build_ext", "--inplace")
    run = check.run(command, LIMITS["build"] - (time.monotonic() - start), **switches)
    found = [Outcome.of("build", run, "; ".join(notes))]
    if run.status != 0 and len(left) == 2:
        cpu = check.run(command, 60, GRADREP_BUILD="require", GRADREP_CUDA="0")
        found.append(Outcome.of("build without CUDA", cpu))
    return found


def _why_not_carried(check: Check, name: str) -> str:
    """Why a module does not serve; empty if it has all ops, which agree with the reference."""
    device, backend, _ = KERNELS[name]
    if not list(ROOT.glob(f"gradrep_kernels/{name}.*")):
        return "is not there"
    command = _python("bench/small_run.py", device, "--backend", backend, "--needs", *_ops(name))
    run = check.run(command, LIMITS["build"] / 4)
    if run.status is None:
        return "ran into its time limit"
    return "" if run.status == 0 else (run.output.strip().splitlines() or [f"exit status {run.status}"])[-1][:200]


def _ops(name: str) -> list[str]:
    """What the sources of a module register for its device."""
    device, _, sources = KERNELS[name]
    text = "".join(path.read_text() for path in sorted(ROOT.glob(f"csrc/{sources}")))
    blocks = re.findall(rf"STABLE_TORCH_LIBRARY_IMPL\(\w+, {device.upper()}, m\) {{(.*?)}}", text, re.DOTALL)
    return re.findall(r'm\.impl\("(\w+)"', "".join(blocks))


def small_run(check: Check) -> list[Outcome]:
    run = check.run(_python("bench/small_run.py", check.device), LIMITS["small-run"])
    return [Outcome.of("small run", run, (run.output.strip().splitlines() or [""])[-1])]


def _pytest(check: Check, limit: float, *chosen: str, **env: str) -> Run:
    command = _python("-m", "pytest", "-p", "no:cacheprovider", "-rfE", "--continue-on-collection-errors")
    command += [*chosen, *check.test_args]
    if _in_parallel(check):
        workers = max(1, min(8, (os.cpu_count() or 1) // 2))
        command += ["-n", str(workers), f"--max-worker-restart={RESTARTS}"]
    return check.run(command, limit, OMP_NUM_THREADS="2", **env)


def _in_parallel(check: Check) -> bool:
    """Where arguments are given, they are not: xdist hides what is wrong with one."""
    return importlib.util.find_spec("xdist") is not None and not check.test_args


def _gpu_tests(check: Check, junit: Path) -> tuple[Run, str]:
    """pytest, again for the tests that are left when a CUDA error ended it; (the runs as one, a note on how often)"""
    runs: list[Run] = []
    junit.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        parts = [Path(folder, f"{n}.xml") for n in range(RESTARTS + 1)]
        # xdist starts another worker itself.
        env = {} if _in_parallel(check) else {"GRADREP_TESTS_DONE": str(Path(folder, "done"))}
        for part in parts:
            limit = LIMITS["tests"] - sum(run.seconds for run in runs)
            runs.append(_pytest(check, limit, f"--junitxml={part}", "-m", "gpu", **env))
            if runs[-1].status != DEVICE_LOST:
                break
        _merge(parts, junit)
    last = runs[-1]
    if len(runs) == 1 and last.status != DEVICE_LOST:
        return last, ""
    lost = sum(run.status == DEVICE_LOST for run in runs)
    note = f"a CUDA error ended pytest {lost} times"
    if last.status == DEVICE_LOST:
        note += "; what was left did not run"
    shown = [line for run in runs for line in run.output.rstrip().splitlines()[-(SHOWN // len(runs)) :]]
    return Run(None if last.status is None else 1, sum(run.seconds for run in runs), "\n".join(shown)), note


def _merge(parts: Sequence[Path], junit: Path) -> None:
    whole = ET.Element("testsuites")
    for part in parts:
        with contextlib.suppress(OSError, ET.ParseError):
            whole.extend(ET.parse(part).getroot().iter("testsuite"))
    if len(whole):
        ET.ElementTree(whole).write(junit, encoding="utf-8", xml_declaration=True)


def tests(check: Check) -> list[Outcome]:
    """Those that run on a GPU."""
    junit = check.results / "junit.xml"
    run, note = _gpu_tests(check, junit)
    counts, passed, skipped = _read_junit(junit)
    found = [Outcome.of("tests on the GPU", run, "; ".join(filter(None, (counts, note))))]
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
    "build": build,
    "small-run": small_run,
    "tests": tests,
    "bench": benches,
    "sanitizer": sanitizer,
    "other-tests": other_tests,
}


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
        *([f"Commit {check.commit}.", ""] if check.commit else []),
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
    until = time.monotonic() + DEADLINE  # asking torch for the GPU counts: 10 s where its files are not in memory
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
    parser.add_argument("--carried", action="store_true", help="build only modules that are not there or do not serve")
    parser.add_argument("--commit", default="", help="of these sources, where there is no git checkout to ask")
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
    results, test_args = options.results.resolve(), options.test_args.split()
    check = Check(results, options.dry_run, architecture, test_args, options.carried, options.commit, until)
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
