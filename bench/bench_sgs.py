"""Spatial gradient scaling: one update of VGG-16 against the published algorithm, and what updates cost in a training.

    python -m pytest bench/bench_sgs.py [--quick] [--device cpu|cuda] [--threads 1,2] [--results DIR]

The maps are the inputs of VGG-16's convolutions, untrained, on smooth 32 x 32 images. "Statistics only": the maps lie
ready, and the whole of `SpatialGradientScaling.update` runs on them (ranges, counts, NMI, G, told to the optimizer)
except the network's own layers. Slow ways run on a sub-sample, which their note states, and their times are scaled.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from feature_maps import KINDS, conv_inputs, half_displacements, pairs
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
from published import Histogram2d, fast_histogram2d, numpy_histogram2d
from published import spatial_gradient_scaling as published_scaling
from report import Results, Target
from torch import Tensor, nn
from torch.nn import functional as F

import gradrep_kernels as gr
from gradrep_kernels.ops import backends

BATCHES, BATCH = 20, 128  # of an update: the paper's for CIFAR and VGG-16
EPOCH_IMAGES = 50_000  # CIFAR's training set
AS_FAST = (20.0, 30.0)  # H3, on two CPU threads: at least, aim
POOL = 4  # different batches, taken in turns: four of them are twelve times an L3 cache of 32 MiB

OURS, REFERENCE = "update of 20 batches, statistics only", "update of 20 batches, statistics only, reference"
FAST, NUMPY = (
    "published algorithm on 20 batches, fast-histogram, one core",
    "published algorithm on 20 batches, np.histogram2d, one core",
)
GATHER, LEARN = "forward pass, a layer", "forward pass and the step that learns, a layer"
TRAIN, TRAIN_WITH = "training step", "training step, update in every step"
WHOLE_2, WHOLE_20 = "update of 2 batches, forward passes included", "update of 20 batches, forward passes included"

# G4, in percent of a training: at least, aim. An epoch is 391 steps of about three forward passes each, 1170 in all.
# A whole update has 40 (two passes over 20 batches). In every epoch they are 3.4 %, whatever the kernels do.
# So it is judged at every 30 epochs, where they are 0.11 %.
SHARES = {(OURS, 1): (0.5, 0.1), (WHOLE_20, 30): (0.3, 0.15)}
IN_EVERY_STEP = (None, 5.0)


class Replay(nn.Module):
    """Convolutions that get recorded inputs and compute nothing, so that an update costs its statistics only."""

    def __init__(self, batches: list[list[tuple[nn.Conv2d, Tensor]]]):
        super().__init__()
        self.taps = nn.ModuleList(
            _Tap(c.in_channels, 1, c.kernel_size, padding=c.padding, bias=False) for c, _ in batches[0]
        )
        self.to(batches[0][0][1].device)
        self.maps = [[x for _, x in batch] for batch in batches]

    def forward(self, n: int) -> None:
        for tap, x in zip(self.taps, self.maps[n % len(self.maps)]):
            tap(x)

    def pairs(self) -> int:
        """Of one batch."""
        return sum(pairs(tuple(x.shape), tap.kernel_size[0], tap.padding[0]) for tap, x in zip(self.taps, self.maps[0]))


class _Tap(nn.Conv2d):
    def forward(self, x: Tensor) -> None:
        return None


def _images(n: int, device: torch.device) -> Tensor:
    return KINDS["smooth"]((n, 3, 32, 32), device)


def _replay(setup: Setup, images: int, pool: int) -> Replay:
    model = gr.models.vgg16().to(setup.device)
    return Replay([conv_inputs(model, _images(images, setup.device)) for _ in range(pool)])


def _controller(model: nn.Module, batches: int, **options) -> gr.SpatialGradientScaling:
    return gr.SpatialGradientScaling(
        model, gr.FusedRepSGD(model.parameters(), lr=1e-4, momentum=0.9), batches=batches, **options
    )


def _served(setup: Setup) -> str:
    return next(row["serves"] for row in backends.report((setup.device.type,)) if row["op"] == "joint_histogram")


# -- H3


def test_update(benchmark, setup: Setup, results: Results, threads: int):
    images = 4 if setup.quick else BATCH
    replay = _replay(setup, images, 2 if setup.quick else POOL)
    served = _served(setup)
    ways = [
        _update(OURS, replay, _batches(setup)),
        *([] if served == "reference" else [_update(REFERENCE, replay, 2, backend="reference")]),
        *_published(replay, one_in=64 if setup.quick else 8),
    ]
    timed = compare(benchmark, setup, ways, threads=threads, clock=wall_clock)
    what = f"VGG-16 shapes, {BATCHES} x {images} images, {thread_count(threads)}"
    results.add(f"one update, {what}", timed)
    baseline = FAST if FAST in timed.seconds else NUMPY
    rate = timed.time(OURS).median / (replay.pairs() * BATCHES) * threads * 1e9
    target = Target(
        "H3",
        f"one update, statistics only, {what}: as fast as {baseline}",
        "x",
        *(AS_FAST if setup.device.type == "cpu" and threads == 2 else ()),
    )
    results.target(
        target,
        timed.ratio(baseline, OURS),
        bound=f"{rate:.2g} ns a pair and thread; maps of 2 x 2 and 4 x 4 cost more a pair than large ones",
    )


def _batches(setup: Setup) -> int:
    """How many batches of an update are run: all, unless that takes longer than a bench may."""
    return 1 if setup.quick or _served(setup) == "reference" else BATCHES


def _update(name: str, replay: Replay, batches: int, backend: str = "auto") -> Candidate:
    controller = _controller(replay, batches)

    def run() -> None:
        with gr.use_backend(backend):
            controller.update(range(batches), forward=lambda model, n: model(n))

    note = f"{batches} of {BATCHES} batches, scaled" if batches < BATCHES else ""
    return Candidate(name, run, pairs=replay.pairs() * BATCHES, share=batches / BATCHES, note=note)


def _published(replay: Replay, one_in: int) -> list[Candidate]:
    """The published algorithm on every `one_in`-th channel, with maps in host memory.

    The cost of a channel does not depend on the others.
    """
    layers = [[x.cpu().numpy() for x in maps] for maps in zip(*replay.maps)]

    def candidate(name: str, histogram2d: Histogram2d, one_in: int) -> Candidate:
        chosen = [range(0, maps[0].shape[1], one_in) for maps in layers]

        def run() -> None:
            for tap, maps, channels in zip(replay.taps, layers, chosen):
                gathered = [maps[n % len(maps)][:, channels] for n in range(BATCHES)]
                published_scaling(
                    gathered, tap.kernel_size, tap.padding[0], half_displacements(tap.kernel_size[0]), histogram2d
                )

        taken = sum(pairs((maps[0].shape[0], len(c), *maps[0].shape[2:]), 3, 1) for c, maps in zip(chosen, layers))
        note = f"one channel in {one_in}, scaled by pairs"
        return Candidate(
            name, run, threads=1, pairs=replay.pairs() * BATCHES, share=taken / replay.pairs(), optional=True, note=note
        )

    return [candidate(FAST, fast_histogram2d, one_in), candidate(NUMPY, numpy_histogram2d, 16 * one_in)]


# -- G4


def _training_batches(replay: Replay) -> list[Candidate]:
    """Updates from training batches: with the step that learns, and in the forward pass alone. Times of a layer."""
    optimizer = gr.FusedRepSGD(replay.parameters(), lr=1e-4)
    gr.SpatialGradientScaling(replay.train(), optimizer, every_steps=1)  # lives in the hooks it sets
    batches = itertools.count()

    def gather() -> None:
        replay(next(batches))

    def learn() -> None:
        gather()
        optimizer.step()

    def after_an_update(run: Callable[[], object], calls: int) -> float:
        """As in a training, nothing has been gathered yet."""
        learn()
        wall_clock(int, 1)  # waits for the GPU
        return host_clock(run, calls)

    learn()  # from here on there are ranges to count within
    more = {"share": len(replay.taps), "clock": after_an_update, "note": f"of {len(replay.taps)}"}
    return [Candidate(LEARN, learn, **more), Candidate(GATHER, gather, **more)]


def test_training_batches(benchmark, setup: Setup, results: Results, max_threads: int):
    images = 4 if setup.quick else BATCH
    ways = _training_batches(_replay(setup, images, 2))
    timed = compare(benchmark, setup, ways, threads=max_threads)
    where = f"VGG-16 shapes, {images} images"
    results.add(f"update from a training batch, {where}, {thread_count(max_threads)}: host time", timed)
    for way in ways:
        ways[0].run()
        _show_host(setup, results, timed, way, where)


def _show_host(setup: Setup, results: Results, timed: Comparison, way: Candidate, where: str) -> None:
    what = f"{where}, update from a training batch, {way.name}"
    host = Target("G4", f"{what}: host time", "µs", less_is_better=True)
    launches = Target("G4", f"{what}: launches", "launches", less_is_better=True)
    if setup.device.type == "cpu":
        for target in (host, launches):
            results.target(target, None, why_not=NO_GPU)
        return
    results.target(host, timed.time(way.name) * 1e6, bound=f"served by {_served(setup)}")
    try:
        found = cuda_calls(way.run)
    except Exception as error:  # a profiler may be missing
        results.target(launches, None, why_not=first_line(error))
        return
    copies, waits = (found[name] / way.share for name in ("copies", "waits"))
    results.target(launches, found["launches"] / way.share, bound=f"{copies:.3g} copies and fills, {waits:.3g} waits")


def test_cost_in_training(benchmark, setup: Setup, results: Results, max_threads: int):
    images = 4 if setup.quick else BATCH
    batch = (_images(images, setup.device), torch.randint(10, (images,), device=setup.device))
    model = gr.models.vgg16().to(setup.device)
    loader = [batch[0]] * BATCHES
    replay = _replay(setup, images, 2)
    calls = 4 if setup.device.type == "cuda" else 1  # steps of a training queue up: the wait for the device counts once
    ways = [
        Candidate(TRAIN, _training_step(setup, batch), calls=calls),
        Candidate(TRAIN_WITH, _training_step(setup, batch, every_steps=1), calls=calls),
        _whole_update(WHOLE_2, model, loader[:2]),
        _update(OURS, replay, _batches(setup)),
        _published(replay, one_in=64 if setup.quick else 32)[0],
    ]
    if setup.device.type == "cuda":  # on a CPU its 40 forward passes take longer than a bench may
        ways.append(_whole_update(WHOLE_20, model, loader))
    timed = compare(benchmark, setup, ways, threads=max_threads, clock=wall_clock)
    results.add(f"VGG-16, CIFAR shapes, batches of {images}, float32, {thread_count(max_threads)}", timed)
    _show_shares(setup, results, timed, images)


def _whole_update(name: str, model: nn.Module, loader: list[Tensor]) -> Candidate:
    controller = _controller(model, len(loader))
    return Candidate(name, lambda: controller.update(loader))


def _training_step(setup: Setup, batch: tuple[Tensor, Tensor], every_steps: int | None = None) -> Callable[[], None]:
    model = gr.models.vgg16().to(setup.device)
    optimizer = gr.FusedRepSGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4)
    if every_steps is not None:
        gr.SpatialGradientScaling(model, optimizer, every_steps=every_steps)  # lives in the hooks it sets
    x, y = batch

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return run


def _show_shares(setup: Setup, results: Results, timed: Comparison, images: int) -> None:
    """What updates add to the time of a training, in percent of the same training without; G4 on a GPU."""
    on_gpu = setup.device.type == "cuda"
    steps = EPOCH_IMAGES / images
    served = f"served by {_served(setup)}"

    def show(what: str, figure: Figure, at_least: float | None = None, aim: float | None = None) -> None:
        if on_gpu or aim is None:
            target = Target("G4" if on_gpu else "", what, "%", at_least, aim, less_is_better=True)
            results.target(target, figure, bound=served)
            return
        bound = served if figure.low > 0 else "smaller than what rounds differ by"
        results.target(Target("", what, "%", less_is_better=True), figure, bound=bound)
        results.target(Target("G4", f"{what}, on a GPU", "%", at_least, aim, less_is_better=True), None, why_not=NO_GPU)

    for name in (OURS, WHOLE_20, WHOLE_2, FAST):
        for epochs in (30, 5, 1) if name in timed.seconds else ():
            cost = timed.ratio(name, TRAIN) * (100 / steps / epochs)
            every = "epoch" if epochs == 1 else f"{epochs} epochs"
            show(f"share of a training: {name}, every {every}", cost, *SHARES.get((name, epochs), ()))
    if not on_gpu:
        what = f"share of a training: {WHOLE_20}, every 30 epochs, on a GPU"
        bounds = SHARES[WHOLE_20, 30]
        results.target(Target("G4", what, "%", *bounds, less_is_better=True), None, why_not=NO_GPU)
    ratio = timed.ratio(TRAIN_WITH, TRAIN)
    more = Figure(*(100 * (end - 1) for end in (ratio.median, ratio.low, ratio.high)), ratio.n)
    show("share of a training: update in every step, from the training batch", more, *IN_EVERY_STEP)
