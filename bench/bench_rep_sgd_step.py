"""Time FusedRepSGD with structured Grad Mults against torch.optim.SGD without any, and against multiplying first.

    python -m pytest bench/bench_rep_sgd_step.py [--quick] [--device cpu|cuda] [--threads 1,2] [--results DIR]

All candidates of a comparison share parameters, gradients and momentum buffers, and take turns (see harness.py). S1 and
S3 have comparisons of their own, with no masks and temporaries beside them. The dense masks hold ones, for they
multiply the gradients in place once a round. A product's time does not depend on its values.
On a CPU only float32 is timed: torch's fused SGD skips work there in bfloat16 and float16 (torch 2.11 to 2.13).
"""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable

import pytest
import torch
from harness import (
    NO_GPU,
    Candidate,
    Comparison,
    Figure,
    Setup,
    compare,
    cuda_calls,
    first_line,
    host_clock,
    thread_count,
    wall_clock,
)
from parameter_sets import SETS, Parameter, Tensors
from published import rep_sgd_loop
from report import Results, Target
from torch.optim import SGD

import gradrep_kernels as gr

BYTES = 20  # per float32 parameter: weight, gradient and momentum are read, weight and momentum written
LOOP_BYTES = 60  # of the loop as published: 36 read, 20 written, 4 fetched before they are written
PROBE_FLOATS = 16 << 20  # per array; three of them are six times an L3 cache of 32 MiB

OURS, PLAIN = "FusedRepSGD, structured Grad Mult", "FusedRepSGD, no multiplier"
FUSED, FOREACH, SINGLE = (
    "SGD(fused=True), no multiplier",
    "SGD(foreach=True), no multiplier",
    "SGD(foreach=False), no multiplier",
)
MULTIPLY = "foreach_mul_(dense M), SGD(fused=True)"
COMPILED = "torch.compile of dense M ⊙ g and SGD"
LOOP = "loop as published, dense M"
PROBE, COPY = "stream probe: 3 reads, 2 writes", "device-to-device copy of as many bytes"
GRAPH_OURS, GRAPH_FUSED = "CUDA graph of " + OURS, "CUDA graph of " + FUSED
BACK_TO_BACK = ", back to back by the wall clock"

JUDGED = ("RepOpt-VGG-B1", "ResNet-18")  # the sets of targets S1 to S3
VS_FUSED = {1: (0.97, 1.0), 2: (1.05, 1.2)}  # S1 by threads: at least, aim
VS_MULTIPLYING = {MULTIPLY: (1.5, 1.7), COMPILED: (1.3, 1.45), LOOP: (4.0, 8.0)}  # S2
G1 = {COPY: (86, 92), FUSED: (1.0, 1.1), MULTIPLY: (1.4, 1.55)}  # RepOpt-VGG-B1: percent of the copy rate; as fast as
HOST_MICROSECONDS = {
    (1, PLAIN): (50, 30),
    (1, OURS): (60, 38),
    (28, PLAIN): (90, 50),
    (28, OURS): (90, 50),
}  # S4 by groups
HOST_VS_FUSED = {1: (1.7, 3.0), 28: (311 / 90, 6.0)}
ON_GPU_MICROSECONDS = {62: (80, 50), 161: (130, 80)}  # G0 by tensors, in 2 groups: those of ResNet-18 and ResNet-50
TAPS = (3, 13, 15, 17, 31)  # T5: sides of kernels; the first is what the others are compared with
TAPS_TIME = {2: (1.10, 1.05)}  # T5 by threads: time over that with the smallest kernels
BY_BACKEND = {"auto": OURS, "triton": OURS + ", Triton"}


# -- S4 before everything else: what comes later may leave work for the host


@pytest.mark.parametrize("groups", [1, 2, 28, 62], ids="{} groups".format)
def test_host_cost(benchmark, setup: Setup, results: Results, threads: int, groups: int):
    """62 tensors of 1000 floats: what is timed is Python and the dispatcher."""
    tensors = Tensors(SETS["62 x 1000"](), setup.device)
    calls = 5 if setup.quick else 20

    def candidate(name: str, cls: type[SGD], **options) -> Candidate:
        return Candidate(name, tensors.optimizer(cls, groups, **options).step, calls=calls)

    ways = [
        candidate(PLAIN, gr.FusedRepSGD),
        candidate(OURS, gr.FusedRepSGD, grad_mults=tensors.grad_mults),
        candidate(FUSED, SGD, fused=True),
        candidate(FOREACH, SGD, foreach=True),
        candidate(SINGLE, SGD, foreach=False),
    ]
    timed = compare(benchmark, setup, ways, threads=threads, clock=host_clock)
    noun = "group" if groups == 1 else "groups"
    results.add(f"62 x 1000 in {groups} {noun}, host time of a step", timed)
    if threads != 1 or setup.device.type != "cpu":
        return
    for name in (PLAIN, OURS):
        if (groups, name) in HOST_MICROSECONDS:
            target = Target(
                "S4", f"host cost, {groups} {noun}, {name}", "µs", *HOST_MICROSECONDS[groups, name], less_is_better=True
            )
            results.target(target, timed.time(name) * 1e6)
            target = Target(
                "S4", f"host cost, {groups} {noun}, {name}: as fast as {FUSED}", "x", *HOST_VS_FUSED[groups]
            )
            results.target(target, timed.ratio(FUSED, name), bound=f"{FUSED}: {timed.time(FUSED).median * 1e6:.0f} µs")


def _g0(tensors: int, backend: str) -> tuple[Target, Target]:
    what = f"host cost of an eager step, {tensors} tensors in 2 groups, {backend}"
    bounds = ON_GPU_MICROSECONDS[tensors]
    return Target("G0", what, "µs", *bounds, less_is_better=True), Target("G0", f"{what}: as fast as {FUSED}", "x", 1.0)


def _host_ways(tensors: Tensors, calls: int) -> list[Candidate]:
    """Steps until the host has queued them, and graphs of them. The queue holds 1024 launches: it never fills."""

    def steps(backend: str) -> Callable[[], None]:
        step = tensors.optimizer(gr.FusedRepSGD, 2, grad_mults=tensors.grad_mults).step

        def run() -> None:
            with gr.use_backend(backend):
                for _ in range(calls):
                    step()

        return run

    ours = tensors.optimizer(gr.FusedRepSGD, 2, grad_mults=tensors.grad_mults)
    fused = tensors.optimizer(SGD, 2, fused=True)
    return [
        *(Candidate(name, steps(backend), share=calls, optional=True) for backend, name in BY_BACKEND.items()),
        Candidate(FUSED, fused.step, calls=calls),
        Candidate(GRAPH_OURS, graph_of(ours.step), calls=calls, optional=True),
        Candidate(GRAPH_FUSED, graph_of(fused.step), calls=calls, optional=True),
    ]


@pytest.mark.parametrize("count", ON_GPU_MICROSECONDS, ids="{} tensors".format)
def test_host_cost_on_gpu(benchmark, setup: Setup, results: Results, count: int):
    if setup.device.type == "cpu":
        pytest.skip("for a GPU")
    tensors = Tensors(SETS[f"{count} x 1000"](), setup.device)
    timed = compare(benchmark, setup, _host_ways(tensors, 5 if setup.quick else 20), clock=host_clock)
    results.add(f"{count} x 1000 in 2 groups, host time of a step on a GPU", timed)
    _judge_host(results, timed, count)
    step = tensors.optimizer(gr.FusedRepSGD, 2, grad_mults=tensors.grad_mults).step
    count_launches(results, f"kernels that an eager step launches, {count} tensors in 2 groups", step)


def count_launches(results: Results, what: str, step: Callable[[], object], row: str = "G0") -> None:
    target = Target(row, what, "launches", less_is_better=True)
    try:
        for _ in range(3):  # until the optimizer has made its plan
            step()
        found = cuda_calls(step)
    except Exception as error:  # a profiler may be missing
        results.target(target, None, why_not=first_line(error))
    else:
        more = f"{found['copies']} copies and fills, {found['waits']} waits for the GPU"
        results.target(target, float(found["launches"]), bound=more)


def _judge_host(results: Results, timed: Comparison, count: int) -> None:
    for backend, name in BY_BACKEND.items():
        seconds, ratio = _g0(count, backend)
        why_not = timed.skipped.get(name, "")
        bound = f"{FUSED}: {timed.time(FUSED).median * 1e6:.0f} µs"
        time = timed.time(name)
        results.target(seconds, time and time * 1e6, bound=bound, why_not=why_not)
        results.target(ratio, timed.ratio(FUSED, name), why_not=why_not)


def test_memory(results: Results):
    parameters = SETS["RepOpt-VGG-B1"]()
    generator = torch.Generator().manual_seed(0)
    mults = [(p, p.grad_mult(generator)) for p in parameters]
    structured = sum(mult.nbytes for _, mult in mults if mult is not None)
    dense = sum(4 * torch.Size(p.shape).numel() for p, mult in mults if mult is not None)
    target = Target("S5", "extra memory for multipliers, RepOpt-VGG-B1", "MB", 1.0, less_is_better=True)
    results.target(target, structured / 1e6, bound=f"dense masks: {dense / 1e6:.0f} MB")


# -- S1 to S3, G1


def test_without_a_gpu(setup: Setup, results: Results):
    if setup.device.type == "cuda":
        pytest.skip("there is one")
    for count, backend in itertools.product(ON_GPU_MICROSECONDS, BY_BACKEND):
        for target in _g0(count, backend):
            results.target(target, None, why_not=NO_GPU)
    for other, bounds in G1.items():
        what, unit = ("share of the measured copy rate", "%") if other == COPY else (f"as fast as {other}", "x")
        results.target(Target("G1", f"RepOpt-VGG-B1: {what}", unit, *bounds), None, why_not=NO_GPU)


def _compiled(tensors: Tensors, masks: list[torch.Tensor]) -> Candidate:
    grads = [p.grad for p in tensors.grad_mults]
    on_gpu = grads[0].is_cuda
    optimizer = tensors.optimizer(
        SGD, foreach=on_gpu
    )  # on a CPU Inductor gains nothing from foreach, and takes 3 times as long

    @torch.compile
    def step() -> None:
        torch._foreach_mul_(grads, masks)
        optimizer.step()

    def run() -> None:
        if (
            not on_gpu
            and shutil.which("c++") is None
            and shutil.which("g++") is None
            and shutil.which("clang++") is None
        ):
            raise RuntimeError("torch.compile needs a C++ compiler here")
        step()

    return Candidate(COMPILED, run, optional=True)


def graph_of(step: Callable[[], object]) -> Callable[[], object]:
    """`step` captured in a CUDA graph at the first call."""
    graphs: list[torch.cuda.CUDAGraph] = []

    def run() -> None:
        if not graphs:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            graphs.append(graph)
        graphs[0].replay()

    return run


def copy_of(moved: int, device: torch.device) -> Candidate:
    source = torch.empty(moved // 2, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return Candidate(COPY, lambda: target.copy_(source), bytes=moved)


def _limit(setup: Setup, numel: int) -> Candidate:
    """How fast this machine moves as many bytes with nothing to compute."""
    if setup.device.type == "cuda":
        return copy_of(numel * BYTES, setup.device)
    floats = min(PROBE_FLOATS, 1 << 20) if setup.quick else PROBE_FLOATS
    p, g, v = (torch.zeros(floats) for _ in range(3))

    def stream() -> (
        None
    ):  # the step's accesses in two passes, neither of which reads anything twice; in place: no write-allocate
        p.add_(g)
        v.mul_(0.5)

    return Candidate(PROBE, stream, bytes=floats * BYTES)


def _steps(setup: Setup, tensors: Tensors) -> list[Candidate]:
    """One pass each: what the step costs, and what the multiplier adds."""
    ours, fused = tensors.optimizer(gr.FusedRepSGD, grad_mults=tensors.grad_mults), tensors.optimizer(SGD, fused=True)
    moved = {"bytes": tensors.numel * BYTES}
    ways = [
        Candidate(OURS, ours.step, **moved),
        Candidate(PLAIN, tensors.optimizer(gr.FusedRepSGD).step, **moved),
        Candidate(FUSED, fused.step, **moved),
        _limit(setup, tensors.numel),
    ]
    if setup.device.type == "cuda":
        # The device's clock starts when the host has queued everything: a step that waits for the host shows here only.
        ways += [
            Candidate(name + BACK_TO_BACK, step, calls=20, clock=wall_clock, **moved)
            for name, step in ((OURS, ours.step), (FUSED, fused.step))
        ]
        ways += [  # last: a capture that fails may leave the allocator in disorder
            Candidate(GRAPH_OURS, graph_of(ours.step), optional=True, **moved),
            Candidate(GRAPH_FUSED, graph_of(fused.step), optional=True, **moved),
        ]
    return ways


def _rivals(tensors: Tensors, compiled: bool) -> list[Candidate]:
    """What one would use otherwise, beside ours."""
    masks = tensors.dense_ones()
    multiplied = [p.grad for p in tensors.grad_mults]
    by_param = dict(zip(tensors.grad_mults, masks))
    fused = tensors.optimizer(SGD, fused=True)

    def multiply_first() -> None:
        torch._foreach_mul_(multiplied, masks)
        fused.step()

    def loop() -> None:
        rep_sgd_loop(tensors.params, by_param, tensors.buffers, lr=1e-4, momentum=0.9, weight_decay=1e-4)

    ways = [
        Candidate(
            OURS, tensors.optimizer(gr.FusedRepSGD, grad_mults=tensors.grad_mults).step, bytes=tensors.numel * BYTES
        ),
        Candidate(MULTIPLY, multiply_first),
        Candidate(LOOP, loop, note=f"moves {LOOP_BYTES} bytes a parameter"),
        Candidate(FOREACH, tensors.optimizer(SGD, foreach=True).step),
        Candidate(SINGLE, tensors.optimizer(SGD, foreach=False).step),
    ]
    return [*ways, _compiled(tensors, masks)] if compiled else ways


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["ResNet-18", "ResNet-50", "RepOpt-VGG-B1"])
def test_step(benchmark, setup: Setup, results: Results, name: str, layout: str, threads: int):
    tensors = tensors_of(setup, name, layout)
    timed = compare(benchmark, setup, _steps(setup, tensors), threads=threads, settle=True)
    where = f"{name}, {layout}"
    results.add(f"{where}, {thread_count(threads)}" if setup.device.type == "cpu" else where, timed)
    if name in JUDGED:
        judge = _judge_gpu if setup.device.type == "cuda" else _judge_cpu
        judge(results, timed, name, layout, threads)


@pytest.mark.parametrize("name", JUDGED)
def test_rivals(benchmark, setup: Setup, results: Results, max_threads: int, name: str):
    tensors = tensors_of(setup, name, "contiguous")
    torch._dynamo.reset()  # Inductor bakes the number of threads into what it compiles
    timed = compare(benchmark, setup, _rivals(tensors, compiled=not setup.quick), threads=max_threads, settle=True)
    on_gpu = setup.device.type == "cuda"
    where = name if on_gpu else f"{name}, {thread_count(max_threads)}"
    results.add(f"{where}, against what one would use otherwise", timed)
    for other, bounds in VS_MULTIPLYING.items():
        number = "S2"
        if on_gpu:
            judged = (name, other) == ("RepOpt-VGG-B1", MULTIPLY)
            number, bounds = "G1", G1[MULTIPLY] if judged else (None, None)
        bound = (
            f"{LOOP_BYTES} bytes a parameter against {BYTES}: {LOOP_BYTES / BYTES:.1f} x where memory is the limit"
            if other == LOOP
            else ""
        )
        why_not = timed.skipped.get(other, "not in the quick form")
        results.target(
            Target(number, f"{where}: as fast as {other}", "x", *bounds),
            timed.ratio(other, OURS),
            bound=bound,
            why_not=why_not,
        )


# -- T5


def kernels(floats: int, side: int, kind: str) -> Parameter:
    """A convolution's weight that takes at most so many floats, and is no smaller than it must be."""
    channels = floats // side**2
    inputs = 1 if kind == "depthwise" else math.isqrt(channels)
    return Parameter((channels // inputs, inputs, side, side))


@pytest.mark.parametrize("kind", ["depthwise", "dense"])
def test_taps(benchmark, setup: Setup, results: Results, kind: str, threads: int):
    """The same memory as weights of kernels of 9 to 961 taps. Times are those of as many floats."""
    count, floats = (2, 1 << 16) if setup.quick else (16, 1 << 19)
    memory = Tensors([Parameter((floats,))] * count, setup.device)
    ways = []
    for side in TAPS:
        tensors = memory.seen_as([kernels(floats, side, kind)] * count)
        step = tensors.optimizer(gr.FusedRepSGD, grad_mults=tensors.grad_mults).step
        ways.append(Candidate(_of_taps(side), step, share=tensors.numel / memory.numel, bytes=memory.numel * BYTES))
    timed = compare(benchmark, setup, [*ways, _limit(setup, memory.numel)], threads=threads, settle=True)
    on_gpu = setup.device.type == "cuda"
    where = f"{kind} weights" if on_gpu else f"{kind} weights, {thread_count(threads)}"
    results.add(f"{where}, by taps of a kernel", timed)
    _judge_taps(results, timed, where, None if on_gpu else threads)


def _of_taps(side: int) -> str:
    return f"{side} x {side}, {side**2} taps"


def _judge_taps(results: Results, timed: Comparison, where: str, threads: int | None) -> None:
    first, *others = map(_of_taps, TAPS)
    limit = PROBE if threads else COPY
    for way in others:
        shares = [f"{timed.rate_ratio(of, limit).median:.0%}" for of in (way, first)]
        bound = f"{shares[0]} of the {limit.partition(':')[0]}; {first} {shares[1]}"
        bounds = TAPS_TIME.get(threads, (None, None))
        target = Target("T5", f"{where}, {way}: time over that of {first}", "x", *bounds, less_is_better=True)
        results.target(target, timed.ratio(way, first), bound=bound)


def tensors_of(setup: Setup, name: str, layout: str) -> Tensors:
    if setup.quick and name != "ResNet-18":
        pytest.skip("not in the quick form: RepOpt-VGG-B1 takes 0.8 GB")
    if name == "ResNet-50" and layout == "channels_last":
        pytest.skip("the other two show what the layout does")
    return Tensors(SETS[name](), setup.device, channels_last=layout == "channels_last")


def _judge_cpu(results: Results, timed: Comparison, name: str, layout: str, threads: int) -> None:
    shares = {way: timed.rate_ratio(way, PROBE).median for way in (OURS, FUSED)}
    bound = f"{shares[OURS]:.0%} of the stream probe, {rate(timed, PROBE):.0f} GB/s"
    where = f"{name}, {thread_count(threads)}"
    if layout == "contiguous":
        at_least, aim = VS_FUSED.get(threads, (None, None))
        target = Target("S1", f"{where}: as fast as {FUSED}", "x", at_least, aim)
        results.target(target, timed.ratio(FUSED, OURS), bound=f"{bound}; torch's {shares[FUSED]:.0%}")
    target = Target(
        "S3", f"{where}, {layout}: time with the multiplier over time without", "x", 1.05, 1.02, less_is_better=True
    )
    results.target(target, timed.ratio(OURS, PLAIN), bound=bound)


def _judge_gpu(results: Results, timed: Comparison, name: str, layout: str, threads: int) -> None:
    judged = name == "RepOpt-VGG-B1" and layout == "contiguous"
    share = timed.rate_ratio(OURS, COPY)
    bound = f"{share.median:.0%} of the copy rate, {rate(timed, COPY):.0f} GB/s"
    why_not = "; ".join(timed.skipped.values())

    def show(what: str, unit: str, figure: Figure | None, bounds: tuple = (None, None), less: bool = False) -> None:
        target = Target("G1", f"{name}, {layout}: {what}", unit, *bounds, less_is_better=less)
        results.target(target, figure, bound=bound, why_not=why_not)

    show("share of the measured copy rate", "%", share * 100, G1[COPY] if judged else (None, None))
    show(f"as fast as {FUSED}", "x", timed.ratio(FUSED, OURS), G1[FUSED] if judged else (None, None))
    show(f"CUDA graph: as fast as {GRAPH_FUSED}", "x", timed.ratio(GRAPH_FUSED, GRAPH_OURS))
    eager = timed.ratio(FUSED + BACK_TO_BACK, OURS + BACK_TO_BACK)
    show(f"back to back by the wall clock: as fast as {FUSED}", "x", eager)
    waits = timed.ratio(OURS + BACK_TO_BACK, OURS)
    show("back to back by the wall clock: time over that on the GPU alone", "x", waits, less=True)


def rate(timed: Comparison, name: str) -> float:
    time: Figure = timed.time(name)
    return timed.candidates[name].bytes / time.median / 1e9
