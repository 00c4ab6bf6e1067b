"""Time FusedRepAdamW with branch scales against torch.optim.AdamW without any, and against a loop as published.

    python -m pytest bench/bench_rep_adamw_step.py [--quick] [--device cpu|cuda] [--threads 1,2] [--results DIR]

All candidates of a comparison share parameters, gradients and both moments, and take turns (see harness.py). The loop
has a comparison of its own, with its masks and temporaries, and its dense masks hold ones. Blocks have a k x k, a 1 x 1
and an identity branch, as those of RepOpt-VGG.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from bench_rep_sgd_step import BACK_TO_BACK, COPY, copy_of, count_launches, rate, tensors_of
from bench_step_tail import PROBE, stream_probe
from harness import NO_GPU, Candidate, Comparison, Setup, compare, host_clock, thread_count, wall_clock
from parameter_sets import SETS, Tensors
from published import rep_adamw_loop
from report import Results, Target
from torch.optim import AdamW

import gradrep_kernels as gr

BYTES = 28  # per float32 parameter: weight, gradient and both moments are read, all but the gradient written

OURS, PLAIN = "FusedRepAdamW, branch scales", "FusedRepAdamW, no scales"
FUSED, FOREACH = "AdamW(fused=True), no scales", "AdamW(foreach=True), no scales"
LOOP = "loop as published, dense masks"

VS_FUSED = {2: (1.0, 1.05)}  # T6 by threads, RepOpt-VGG-B1: at least, aim
ON_GPU = (62, 161)  # tensors in 2 groups, for the host's time on a GPU


def ours(tensors: Tensors, groups: int = 1) -> Callable[[], object]:
    return tensors.adamw(gr.FusedRepAdamW, groups, branch_scales=tensors.branch_scales).step


def steps(tensors: Tensors, groups: int = 1) -> dict[str, Callable[[], object]]:
    return {
        OURS: ours(tensors, groups),
        PLAIN: tensors.adamw(gr.FusedRepAdamW, groups).step,
        FUSED: tensors.adamw(AdamW, groups, fused=True).step,
        FOREACH: tensors.adamw(AdamW, groups, foreach=True).step,
    }


def published(tensors: Tensors) -> Callable[[], None]:
    masks = dict(zip(tensors.grad_mults, tensors.dense_ones()))
    states = tensors.adamw(AdamW).state
    averages, squares = ([states[p][key] for p in tensors.params] for key in ("exp_avg", "exp_avg_sq"))
    counter = itertools.count(1)

    def loop() -> None:
        rep_adamw_loop(tensors.params, masks, averages, squares, next(counter), lr=1e-4, weight_decay=1e-4)

    return loop


# -- the host's cost before everything else: what comes later may leave work for the host


@pytest.mark.parametrize("groups", [1, 28], ids="{} groups".format)
def test_host_cost(benchmark, setup: Setup, results: Results, threads: int, groups: int):
    """62 tensors of 1000 floats: what is timed is Python and the dispatcher."""
    if setup.device.type == "cuda":
        pytest.skip("test_host_cost_on_gpu has the host's time there")
    tensors = Tensors(SETS["62 x 1000"](), setup.device)
    calls = 5 if setup.quick else 20
    ways = [Candidate(name, step, calls=calls) for name, step in steps(tensors, groups).items()]
    timed = compare(benchmark, setup, ways, threads=threads, clock=host_clock)
    many = f"{groups} group{'s' * (groups > 1)}"
    results.add(f"62 x 1000 in {many}, host time of a step", timed)
    if threads == 1:
        judge_host(results, timed, f"host cost, {many}")


@pytest.mark.parametrize("count", ON_GPU, ids="{} tensors".format)
def test_host_cost_on_gpu(benchmark, setup: Setup, results: Results, count: int):
    if setup.device.type == "cpu":
        pytest.skip("for a GPU")
    tensors = Tensors(SETS[f"{count} x 1000"](), setup.device)
    calls = 5 if setup.quick else 20
    ways = [Candidate(name, step, calls=calls) for name, step in steps(tensors, 2).items()]
    timed = compare(benchmark, setup, ways, clock=host_clock)
    results.add(f"{count} x 1000 in 2 groups, host time of a step on a GPU", timed)
    judge_host(results, timed, f"host cost on a GPU, {count} tensors in 2 groups")
    count_launches(results, f"kernels that a step launches, {count} tensors in 2 groups", ours(tensors, 2), row="T6")


def judge_host(results: Results, timed: Comparison, what: str) -> None:
    for name in (PLAIN, OURS):
        results.target(Target("T6", f"{what}, {name}", "µs", less_is_better=True), timed.time(name) * 1e6)
        for other in (FUSED, FOREACH):
            bound = f"{other}: {timed.time(other).median * 1e6:.0f} µs"
            target = Target("T6", f"{what}, {name}: as fast as {other}", "x")
            results.target(target, timed.ratio(other, name), bound=bound)


# -- T6


@pytest.mark.parametrize("name", ["ResNet-18", "RepOpt-VGG-B1"])
def test_step(benchmark, setup: Setup, results: Results, name: str, threads: int):
    tensors = tensors_of(setup, name, "contiguous")
    moved, on_gpu = tensors.numel * BYTES, setup.device.type == "cuda"
    runs = steps(tensors)
    ways = [Candidate(way, step, bytes=moved) for way, step in runs.items()]
    ways.append(copy_of(moved, setup.device) if on_gpu else stream_probe(setup))
    if on_gpu:  # a step that waits for the host shows here only
        for way in (OURS, FUSED):
            ways.append(Candidate(way + BACK_TO_BACK, runs[way], calls=20, clock=wall_clock, bytes=moved))
    timed = compare(benchmark, setup, ways, threads=threads, settle=True)
    where = name if on_gpu else f"{name}, {thread_count(threads)}"
    results.add(where, timed)
    judge(results, timed, where, name, None if on_gpu else threads)


def judge(results: Results, timed: Comparison, where: str, name: str, threads: int | None) -> None:
    """On a GPU there are no `threads`."""
    limit = PROBE if threads else COPY
    shares = {way: f"{timed.rate_ratio(way, limit).median:.0%}" for way in (OURS, FUSED)}
    bound = f"{shares[OURS]} of the {limit.partition(':')[0]}, {rate(timed, limit):.0f} GB/s; torch's {shares[FUSED]}"
    nothing = (None, None)
    for other in (FUSED, FOREACH):
        judged = name == "RepOpt-VGG-B1" and other == FUSED
        bounds = VS_FUSED.get(threads, nothing) if judged else nothing
        target = Target("T6", f"{where}: as fast as {other}", "x", *bounds)
        results.target(target, timed.ratio(other, OURS), bound=bound)
    target = Target("T6", f"{where}: time with branch scales over time without", "x", less_is_better=True)
    results.target(target, timed.ratio(OURS, PLAIN), bound=bound)
    if threads is None:
        results.target(share_of_copy(name), timed.rate_ratio(OURS, COPY) * 100, bound=bound)
        eager = timed.ratio(FUSED + BACK_TO_BACK, OURS + BACK_TO_BACK)
        results.target(Target("T6", f"{where}: back to back by the wall clock: as fast as {FUSED}", "x"), eager)


@pytest.mark.parametrize("name", ["ResNet-18", "RepOpt-VGG-B1"])
def test_published_loop(benchmark, setup: Setup, results: Results, max_threads: int, name: str):
    tensors = tensors_of(setup, name, "contiguous")
    ways = [Candidate(OURS, ours(tensors), bytes=tensors.numel * BYTES), Candidate(LOOP, published(tensors))]
    timed = compare(benchmark, setup, ways, threads=max_threads, settle=True)
    where = name if setup.device.type == "cuda" else f"{name}, {thread_count(max_threads)}"
    results.add(f"{where}, against the published way", timed)
    results.target(Target("T6", f"{where}: as fast as {LOOP}", "x"), timed.ratio(LOOP, OURS))


# -- what waits for a GPU


def share_of_copy(name: str) -> Target:
    return Target("T6", f"{name} on a GPU: share of the measured copy rate", "%")


def test_without_a_gpu(setup: Setup, results: Results):
    if setup.device.type == "cuda":
        pytest.skip("there is one")
    results.target(share_of_copy("RepOpt-VGG-B1"), None, why_not=NO_GPU)
