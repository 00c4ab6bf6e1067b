"""Compare candidates side by side: each runs once a round, rounds rotate who goes first, ratios are within a round.

Shared machines drift by tens of percent within seconds, so two medians taken one after the other say nothing about each
other; the median of ratios within a round does.
"""

from __future__ import annotations

import functools
import gc
import itertools
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from gradrep_kernels.recipes import environment
from gradrep_kernels.recipes.cores import cores, processor

ROOT = Path(__file__).resolve().parent.parent
NO_GPU = "no GPU has run it"
MIN_ROUNDS, MAX_ROUNDS = 5, 60  # 3 where one round takes longer than the comparison may
_FLUSH_BYTES = 256 << 20  # four times the L2 cache of an H200
_RUN_AHEAD_CYCLES = (
    10_000_000  # ~5 ms: the host queues a whole call before the device starts it, so launch gaps do not count
)


@dataclass(frozen=True)
class Setup:
    """What the command line asked for."""

    device: torch.device
    quick: bool
    seconds: float  # for each comparison, about
    folder: Path  # results go to folder/DEVICE
    command: str


@dataclass(frozen=True)
class Figure:
    """Median and quartiles of n measurements."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
        return cls(statistics.median(values), low, high, len(values))

    def __mul__(self, factor: float) -> Figure:
        return Figure(self.median * factor, self.low * factor, self.high * factor, self.n)


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way of doing the work of a comparison.

    Args:
        run:      does it once
        calls:    how often it runs between two readings of the clock
        threads:  of torch; None: the comparison's
        share:    of the whole work that `run` does; times are divided by it (slow baselines run on a sub-sample)
        bytes, pairs: of the whole work, for rates
        optional: a baseline, which is skipped with its reason if its first call raises
        clock:    reads its times; None: the comparison's
        note:     shown beside the figures
    """

    name: str
    run: Callable[[], object]
    calls: int = 1
    threads: int | None = None
    share: float = 1.0
    bytes: float | None = None
    pairs: float | None = None
    optional: bool = False
    clock: Callable[[Callable[[], object], int], float] | None = None
    note: str = ""


@dataclass
class Comparison:
    """Seconds per whole work of each candidate, round by round."""

    threads: int
    candidates: dict[str, Candidate] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def threads_of(self, name: str) -> int:
        return self.candidates[name].threads or self.threads

    def time(self, name: str) -> Figure | None:
        """None where the candidate was skipped."""
        return Figure.of(self.seconds[name]) if name in self.seconds else None

    def ratio(self, over: str, under: str) -> Figure | None:
        """How many times longer `over` takes than `under`, round by round; None where either was skipped."""
        if over not in self.seconds or under not in self.seconds:
            return None
        return Figure.of([a / b for a, b in zip(self.seconds[over], self.seconds[under])])

    def rate_ratio(self, fast: str, slow: str) -> Figure | None:
        """Bytes per second of `fast` over those of `slow`."""
        ratio = self.ratio(slow, fast)
        return None if ratio is None else ratio * (self.candidates[fast].bytes / self.candidates[slow].bytes)


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.zeros(_FLUSH_BYTES // 4, dtype=torch.float32, device="cuda")


def host_clock(run: Callable[[], object], calls: int) -> float:
    """Seconds per call until `run` returns; what it left on a GPU is waited for afterwards."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    seconds = (time.perf_counter() - start) / calls
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return seconds


def wall_clock(run: Callable[[], object], calls: int) -> float:
    """Seconds per call until a GPU, if there is one, is done.

    For work on the host, or where host and GPU wait for each other, as in an update of SGS. device_clock hides the
    host's first 5 ms.
    """
    if not torch.cuda.is_available():
        return host_clock(run, calls)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def device_clock(run: Callable[[], object], calls: int) -> float:
    """Seconds per call on the GPU, between two events, with a cold L2 cache and all calls queued before the first."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flush_buffer().sum()  # reads: lines that were written would be written back while the clock runs
    torch.cuda._sleep(_RUN_AHEAD_CYCLES)
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


_CUDA_CALLS = {  # names of the CUDA runtime's and driver's functions, as torch's profiler gives them
    "launches": re.compile(r"cu(da)?(LaunchKernel|GraphLaunch)"),
    "copies": re.compile(r"cu(da)?Mem(cpy|set)"),
    "waits": re.compile(r"cu(da)?(Stream|Event)Synchronize"),
}


def cuda_calls(run: Callable[[], object]) -> dict[str, int]:
    """How often `run` launches a kernel, copies or fills memory, and waits for the GPU."""
    activities = torch.profiler.ProfilerActivity
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[activities.CPU, activities.CUDA]) as profile:
        run()
    names = [event.name for event in profile.events()]
    return {what: sum(map(bool, map(pattern.match, names))) for what, pattern in _CUDA_CALLS.items()}


def compare(
    benchmark,
    setup: Setup,
    candidates: Sequence[Candidate],
    *,
    threads: int | None = None,
    clock: Callable | None = None,
    settle: bool = False,
) -> Comparison:
    """Time the candidates in turns for about `setup.seconds`, as rounds of pytest-benchmark's `benchmark`.

    With `settle` each runs once unseen before the clock is read. Then the L3 cache no longer holds what another left,
    which is up to 15 % of a step of ResNet-18.
    """
    clock = clock or (device_clock if setup.device.type == "cuda" else host_clock)
    comparison = Comparison(threads or torch.get_num_threads())

    def measure(candidate: Candidate) -> float:
        with torch_threads(candidate.threads or comparison.threads):
            if settle:
                candidate.run()
            return (candidate.clock or clock)(candidate.run, candidate.calls) / candidate.share

    for candidate in candidates:
        try:
            with torch_threads(candidate.threads or comparison.threads):
                candidate.run()  # also compiles, and allocates what stays
        except Exception as error:
            if not candidate.optional:
                raise
            comparison.skipped[candidate.name] = first_line(error)
        else:
            comparison.candidates[candidate.name] = candidate
    turn = itertools.count()

    def one_round() -> None:
        names = list(comparison.candidates)
        first = next(turn) % len(names)
        for name in names[first:] + names[:first]:
            comparison.seconds.setdefault(name, []).append(measure(comparison.candidates[name]))

    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        one_round()
        rounds = int(setup.seconds / (time.perf_counter() - start))
        comparison.seconds.clear()
        least = 2 if setup.quick else MIN_ROUNDS if rounds else 3
        benchmark.pedantic(one_round, rounds=max(least, min(rounds, MAX_ROUNDS)), iterations=1)
    finally:
        if collects:
            gc.enable()
    benchmark.extra_info.update({name: comparison.time(name).median for name in comparison.seconds})
    return comparison


def thread_count(n: int) -> str:
    return "1 thread" if n == 1 else f"{n} threads"


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]


# -- where, what, when -------------------------------------------------------------------------------------------------


def slug(device: torch.device) -> str:
    """A folder's name for the machine: cpu-amd-epyc-2c, nvidia-h200."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"cpu {re.sub(r'[(](R|TM)[)]|@.*|CPU|Processor', ' ', processor(), flags=re.IGNORECASE)} {cores()}c"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


class OtherWork:
    """How many cores other processes kept busy since this object was made: work beside a bench spoils its figures."""

    def __init__(self):
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds: (wall clock, this process and its ended children, the whole machine with what its host took away)"""
        own = sum(os.times()[:4])
        try:
            ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
            everyone = sum(ticks[:3] + ticks[5:8]) / os.sysconf("SC_CLK_TCK")  # without idle and iowait
        except (OSError, ValueError):
            everyone = own
        return time.monotonic(), own, everyone

    def cores(self) -> float:
        elapsed, own, everyone = (after - before for before, after in zip(self._start, self._now()))
        return round(max(0.0, everyone - own) / max(elapsed, 1e-9), 2)


def machine(device: torch.device) -> dict[str, object]:
    found: dict[str, object] = {
        "cpu": processor(),
        "cores": cores(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
        }
    return found


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in (
        "torch",
        "triton",
        "numpy",
        "gradrep_kernels",
        "fast_histogram",
        "scikit-image",
        "pytest-benchmark",
    ):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["torch"] = torch.__version__
    if found["gradrep_kernels"] is None:  # built in place, not installed
        from gradrep_kernels import __version__

        found["gradrep_kernels"] = __version__
    return found


def commit() -> str:
    """Of the checkout, -dirty where something else than results differs; without one, what GRADREP_COMMIT says."""
    return environment.commit(ROOT, but="bench/results")
