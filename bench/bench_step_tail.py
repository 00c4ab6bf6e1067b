"""Time the end of a training step: FusedRepSGD that clips, steps and averages, against torch's calls for that.

    python -m pytest bench/bench_step_tail.py [--quick] [--device cpu|cuda] [--threads 1,2] [--results DIR]

Torch's calls are clip_grad_norm_, SGD(fused=True) and _foreach_lerp_ over averages, without any multiplier, and in the
rows that say so GradScaler.unscale_ before them. The candidates of a comparison share parameters, gradients, averages
and float32 momenta, and take turns (see harness.py). Ours has Grad Mults and clips in every step. Torch's clipping
multiplies whether its factor is 1 or not, so its time does not depend on that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from bench_rep_sgd_step import COPY, PROBE_FLOATS, copy_of, count_launches, graph_of, rate, tensors_of
from harness import NO_GPU, Candidate, Comparison, Setup, compare, host_clock, thread_count
from parameter_sets import SETS, Tensors
from report import Results, Target
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD

import gradrep_kernels as gr

MAX_NORM, DECAY = 0.1, 0.999  # the gradients of the sets have norms of 30 and more
OURS, BF16 = "whole tail by FusedRepSGD", "whole tail by FusedRepSGD, momentum in bfloat16"
TORCH = "clip_grad_norm_, SGD(fused=True), foreach EMA"
SCALED, SCALED_TORCH = OURS + ", under gr.GradScaler", "GradScaler.unscale_, " + TORCH
GRAPH = "CUDA graph of " + OURS
PROBE = "stream probe: 4 reads, 3 writes"
CLIP, TORCH_CLIP = "clip_grad_norm_ of FusedRepSGD", "torch.nn.utils.clip_grad_norm_"

# Bytes that are moved for each float32 parameter. The norm reads the gradient. The step reads weight, gradient,
# momentum and average, and writes all but the gradient. Under GradScaler it writes that too, and looks for an overflow
# in the read that takes the norm.
MOVED = {OURS: 4 + 28, BF16: 4 + 24, SCALED: 4 + 32, TORCH: 4 + 8 + 20 + 12, SCALED_TORCH: 8 + 4 + 8 + 20 + 12}
CLIP_MOVED = {"clipping": 4 + 8, "clipping nothing": 4}
PROBE_BYTES = 28  # for each element of an array of the probe

JUDGED = ("RepOpt-VGG-B1", "ResNet-18")
VS_TORCH = {2: (1.5, 1.9)}  # T1 by threads: at least, aim
BF16_TIME = {2: (1.0, 0.87)}  # T2 by threads: time over that with momentum in float32
HOST = {1: (110, 80), 28: (110, 80)}  # T3 by groups: microseconds
HOST_VS_TORCH = (5.0, 8.0)
CLIP_VS_TORCH = (1.0, 2.0)  # T4, RepOpt-VGG-B1
SHRINK = 0.9999  # of the gradients in each call that clips: after a thousand of them 0.9 is left
ON_GPU_MICROSECONDS = {62: (80, 50), 161: (130, 80)}  # G0 by tensors, in 2 groups
G5 = {COPY: (80, 88), SCALED_TORCH: (1.5, 1.8)}  # RepOpt-VGG-B1: percent of the copy rate; as fast as


# -- what is timed


def ours(tensors: Tensors, groups: int = 1, **options) -> gr.FusedRepSGD:
    tail = {"max_grad_norm": MAX_NORM, "ema_decay": DECAY, "grad_mults": tensors.grad_mults}
    return tensors.optimizer(gr.FusedRepSGD, groups, **tail, **options)


def torchs(tensors: Tensors, groups: int = 1) -> Callable[[], None]:
    optimizer, averages = tensors.optimizer(SGD, groups, fused=True), tensors.averages()

    def run() -> None:
        clip_grad_norm_(tensors.params, MAX_NORM)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, tensors.params, 1 - DECAY)

    return run


def _scaler(tensors: Tensors, cls: type[torch.amp.GradScaler]) -> torch.amp.GradScaler:
    """One whose scale stays 1, so that the gradients that all share stay what they are."""
    device = tensors.params[0].device
    scaler = cls(device.type, init_scale=1.0, growth_interval=2**31 - 1)
    scaler.scale(torch.zeros((), device=device))  # it makes its tensors with the first loss
    return scaler


def ours_scaled(tensors: Tensors) -> Callable[[], None]:
    optimizer, scaler = ours(tensors, fused=True), _scaler(tensors, gr.GradScaler)

    def run() -> None:
        scaler.step(optimizer)
        scaler.update()

    return run


def torchs_scaled(tensors: Tensors) -> Callable[[], None]:
    optimizer, averages = tensors.optimizer(SGD, fused=True), tensors.averages()
    scaler = _scaler(tensors, torch.amp.GradScaler)

    def run() -> None:
        scaler.unscale_(optimizer)
        clip_grad_norm_(tensors.params, MAX_NORM)
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            torch._foreach_lerp_(averages, tensors.params, 1 - DECAY)

    return run


def _limit(setup: Setup, numel: int) -> Candidate:
    """How fast this machine moves the bytes of the whole tail with nothing to compute."""
    return copy_of(numel * MOVED[SCALED], setup.device) if setup.device.type == "cuda" else stream_probe(setup)


def stream_probe(setup: Setup) -> Candidate:
    """Four arrays read and three of them written on a CPU, with nothing to compute."""
    floats = min(PROBE_FLOATS, 1 << 20) if setup.quick else PROBE_FLOATS
    p, g, v, e = (torch.zeros(floats) for _ in range(4))

    def stream() -> None:  # in place, so that nothing is fetched before it is written
        p.add_(g)
        v.mul_(0.5)
        e.mul_(0.5)

    return Candidate(PROBE, stream, bytes=floats * PROBE_BYTES)


def tails(setup: Setup, tensors: Tensors) -> list[Candidate]:
    runs = {
        OURS: ours(tensors).step,
        BF16: ours(tensors, momentum_dtype=torch.bfloat16).step,
        TORCH: torchs(tensors),
        SCALED: ours_scaled(tensors),
        SCALED_TORCH: torchs_scaled(tensors),
    }
    ways = [Candidate(name, run, bytes=tensors.numel * MOVED[name]) for name, run in runs.items()]
    ways.append(_limit(setup, tensors.numel))
    if setup.device.type == "cuda":  # last: a capture that fails may leave the allocator in disorder
        step = graph_of(ours(tensors).step)
        ways.append(Candidate(GRAPH, step, optional=True, bytes=tensors.numel * MOVED[OURS]))
    return ways


# -- T3 before everything else: what comes later may leave work for the host


@pytest.mark.parametrize("groups", [1, 3, 28, 62], ids="{} groups".format)
def test_host_cost(benchmark, setup: Setup, results: Results, threads: int, groups: int):
    """62 tensors of 1000 floats: what is timed is Python and the dispatcher."""
    if setup.device.type == "cuda":
        pytest.skip("test_host_cost_on_gpu has the host's time there")
    tensors = Tensors(SETS["62 x 1000"](), setup.device)
    calls = 2 if setup.quick else 20
    ways = [
        Candidate(OURS, ours(tensors, groups).step, calls=calls),
        Candidate(BF16, ours(tensors, groups, momentum_dtype=torch.bfloat16).step, calls=calls),
        Candidate(TORCH, torchs(tensors, groups), calls=calls),
    ]
    timed = compare(benchmark, setup, ways, threads=threads, clock=host_clock)
    many = f"{groups} group{'s' * (groups > 1)}"
    results.add(f"62 x 1000 in {many}, host time of the whole tail", timed)
    if threads == 1:
        what = f"host cost of the whole tail, {many}"
        bounds, ratio = HOST.get(groups, (None, None)), HOST_VS_TORCH if groups in HOST else (None, None)
        results.target(Target("T3", what, "µs", *bounds, less_is_better=True), timed.time(OURS) * 1e6)
        bound = f"torch's {timed.time(TORCH).median * 1e6:.0f} µs"
        results.target(Target("T3", f"{what}: as fast as {TORCH}", "x", *ratio), timed.ratio(TORCH, OURS), bound=bound)


def _g0(count: int) -> tuple[Target, Target]:
    what = f"host cost of the whole tail, {count} tensors in 2 groups"
    bounds = ON_GPU_MICROSECONDS[count]
    return Target("G0", what, "µs", *bounds, less_is_better=True), Target("G0", f"{what}: as fast as {TORCH}", "x", 1.0)


@pytest.mark.parametrize("count", ON_GPU_MICROSECONDS, ids="{} tensors".format)
def test_host_cost_on_gpu(benchmark, setup: Setup, results: Results, count: int):
    if setup.device.type == "cpu":
        pytest.skip("for a GPU")
    tensors = Tensors(SETS[f"{count} x 1000"](), setup.device)
    step, calls = ours(tensors, 2).step, 5 if setup.quick else 20
    ways = [
        Candidate(OURS, step, calls=calls),
        Candidate(TORCH, torchs(tensors, 2), calls=calls),
        Candidate(SCALED, ours_scaled(tensors), calls=calls),
        Candidate(SCALED_TORCH, torchs_scaled(tensors), calls=calls),
    ]
    timed = compare(benchmark, setup, ways, clock=host_clock)
    results.add(f"{count} x 1000 in 2 groups, host time of the whole tail on a GPU", timed)
    judge_host(results, timed, count)
    count_launches(results, f"kernels that the whole tail launches, {count} tensors in 2 groups", step)


def judge_host(results: Results, timed: Comparison, count: int) -> None:
    seconds, ratio = _g0(count)
    bound = f"torch's {timed.time(TORCH).median * 1e6:.0f} µs"
    results.target(seconds, timed.time(OURS) * 1e6, bound=bound)
    results.target(ratio, timed.ratio(TORCH, OURS), bound=bound)


# -- T1, T2, G5


@pytest.mark.parametrize("name", ["ResNet-18", "ResNet-50", "RepOpt-VGG-B1"])
def test_tail(benchmark, setup: Setup, results: Results, name: str, threads: int):
    if setup.device.type == "cuda" and name == "ResNet-18":
        pytest.skip("on a GPU the other two show what the size does")
    tensors = tensors_of(setup, name, "contiguous")
    timed = compare(benchmark, setup, tails(setup, tensors), threads=threads, settle=True)
    if setup.device.type == "cuda":
        results.add(f"{name}, the whole tail", timed)
        judge_gpu(results, timed, name)
    else:
        results.add(f"{name}, the whole tail, {thread_count(threads)}", timed)
        judge_cpu(results, timed, name, threads)


def judge_cpu(results: Results, timed: Comparison, name: str, threads: int) -> None:
    where = f"{name}, {thread_count(threads)}"
    nothing = (None, None)

    def share(way: str) -> str:
        return f"{timed.rate_ratio(way, PROBE).median:.0%}"

    def bound(way: str, other: str) -> str:
        return f"{share(way)} of the stream probe, {rate(timed, PROBE):.0f} GB/s; the other {share(other)}"

    judged = name in JUDGED
    target = Target("T1", f"{where}: as fast as {TORCH}", "x", *(VS_TORCH.get(threads, nothing) if judged else nothing))
    results.target(target, timed.ratio(TORCH, OURS), bound=bound(OURS, TORCH))
    target = Target("T1", f"{where}: as fast as {SCALED_TORCH}", "x")
    results.target(target, timed.ratio(SCALED_TORCH, SCALED), bound=bound(SCALED, SCALED_TORCH))
    bounds = BF16_TIME.get(threads, nothing) if judged else nothing
    target = Target("T2", f"{where}: time with momentum in bfloat16 over float32", "x", *bounds, less_is_better=True)
    results.target(target, timed.ratio(BF16, OURS), bound=bound(BF16, OURS))


def judge_gpu(results: Results, timed: Comparison, name: str) -> None:
    judged = name == "RepOpt-VGG-B1"
    bound = f"copy {rate(timed, COPY):.0f} GB/s"
    why_not = "; ".join(timed.skipped.values())
    shares = {way: timed.rate_ratio(way, COPY) for way in (SCALED, OURS, BF16, GRAPH)}
    for way, share in shares.items():
        bounds = G5[COPY] if judged and way == SCALED else (None, None)
        target = Target("G5", f"{name}, {way}: share of the measured copy rate", "%", *bounds)
        results.target(target, share and share * 100, bound=bound, why_not=why_not)
    for way, other in ((SCALED, SCALED_TORCH), (OURS, TORCH)):
        bounds = G5[other] if judged and other in G5 else (None, None)
        target = Target("G5", f"{name}: as fast as {other}", "x", *bounds)
        results.target(target, timed.ratio(other, way), bound=bound)
    target = Target("G5", f"{name}: time with momentum in bfloat16 over float32", "x", less_is_better=True)
    results.target(target, timed.ratio(BF16, OURS), bound=bound)


def test_bytes_of_a_parameter(results: Results):
    """Counted on the tensors that an optimizer of each kind keeps."""
    for name, options in ((OURS, {}), (BF16, {"momentum_dtype": torch.bfloat16})):
        tensors = Tensors(SETS["ResNet-18"](), torch.device("cpu"))
        optimizer = gr.FusedRepSGD(tensors.params, lr=1e-4, momentum=0.9, ema_decay=DECAY, **options)
        optimizer.step()
        kept = sum(p.nbytes + state_bytes(optimizer.state[p]) for p in tensors.params) / tensors.numel
        what = f"bytes a parameter, {name}: "
        results.target(Target("T2", f"{what}weight, momentum and average", "B", less_is_better=True), float(kept))
        results.target(Target("T2", f"{what}moved in a step", "B", less_is_better=True), float(MOVED[name]))


def state_bytes(state: dict) -> int:
    return sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor) and value.numel() > 1)


# -- T4


@pytest.mark.parametrize("clips", CLIP_MOVED)
@pytest.mark.parametrize("name", JUDGED)
def test_clipping(benchmark, setup: Setup, results: Results, threads: int, name: str, clips: str):
    on_gpu = setup.device.type == "cuda"
    if on_gpu and name == "ResNet-18":
        pytest.skip("on a GPU the larger set is enough")
    tensors = tensors_of(setup, name, "contiguous")
    ways = clippings(tensors, clips == "clipping")
    moved = tensors.numel * CLIP_MOVED[clips]
    candidates = [Candidate(CLIP, ways[CLIP], bytes=moved), Candidate(TORCH_CLIP, ways[TORCH_CLIP])]
    timed = compare(benchmark, setup, [*candidates, _limit(setup, tensors.numel)], threads=threads, settle=True)
    where = name if on_gpu else f"{name}, {thread_count(threads)}"
    results.add(f"{where}, {clips}", timed)
    limit = COPY if on_gpu else PROBE
    bound = (
        f"{timed.rate_ratio(CLIP, limit).median:.0%} of the {limit.partition(':')[0]}, {rate(timed, limit):.0f} GB/s"
    )
    judged = name == "RepOpt-VGG-B1" and not on_gpu
    target = Target("T4", f"{where}, {clips}: as fast as {TORCH_CLIP}", "x", *(CLIP_VS_TORCH if judged else ()))
    results.target(target, timed.ratio(TORCH_CLIP, CLIP), bound=bound)


def clippings(tensors: Tensors, clip: bool) -> dict[str, Callable[[], object]]:
    """Both functions on the same gradients. Each call that clips takes a limit below the norm of the moment."""
    optimizer = tensors.optimizer(gr.FusedRepSGD, grad_mults=tensors.grad_mults)
    for _ in range(3):  # until it has made its plan
        optimizer.step()
    functions = {CLIP: optimizer.clip_grad_norm_, TORCH_CLIP: lambda norm: clip_grad_norm_(tensors.params, norm)}
    norms = {name: float(function(float("inf"))) for name, function in functions.items()}
    left = itertools.accumulate(itertools.repeat(SHRINK), lambda a, b: a * b)

    def of(name: str) -> Callable[[], object]:
        function, norm = functions[name], norms[name]
        return (lambda: function(norm * next(left))) if clip else (lambda: function(2 * norm))

    return {name: of(name) for name in functions}


# -- what waits for a GPU


def test_without_a_gpu(setup: Setup, results: Results):
    if setup.device.type == "cuda":
        pytest.skip("there is one")
    targets: Sequence[Target] = [target for count in ON_GPU_MICROSECONDS for target in _g0(count)]
    for target in [
        *targets,
        Target("G5", f"RepOpt-VGG-B1, {SCALED}: share of the measured copy rate", "%", *G5[COPY]),
        Target("G5", f"RepOpt-VGG-B1: as fast as {SCALED_TORCH}", "x", *G5[SCALED_TORCH]),
    ]:
        results.target(target, None, why_not=NO_GPU)
