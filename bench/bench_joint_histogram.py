"""Joint histograms: gr.joint_histogram (ranges, bins, counts) against what else counts pairs of pixels.

    python -m pytest bench/bench_joint_histogram.py [--quick] [--device cpu|cuda] [--threads 1,2] [--results DIR]

A pair is one that is counted: p and its displaced neighbour inside the padded map, for half of the kernel's
displacements.
Slow baselines run on a sub-sample of the channels, which their note states; their times are scaled to all.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import feature_maps
import numpy as np
import pytest
import torch
from feature_maps import KINDS, RESNET18_IMAGENET, VGG16_CIFAR, Layer, half_displacements
from harness import NO_GPU, Candidate, Setup, compare, thread_count, wall_clock
from published import Histogram2d, channel_counts, fast_histogram2d, numpy_histogram2d
from report import Results, Target
from torch import Tensor
from torch.nn import functional as F

import gradrep_kernels as gr
from gradrep_kernels.ops import backends

OURS = "joint_histogram"
FAST = "fast-histogram per channel and displacement, as published"
FLOATS, INT16 = "quantise, torch.bincount", "torch.bincount of int16 bin numbers"
GRAYCOMATRIX, NUMPY = "skimage.graycomatrix of uint8 bin numbers", "np.histogram2d per channel and displacement"
REFERENCE = OURS + ", reference"
COPY = "device-to-device copy of two reads of the map"

FASTER_THAN = {FAST: (6.0, 8.0), FLOATS: (5.0, 8.0), INT16: (2.0, None)}  # H1
WORST_DATA = ("constant", "ReLU, 90 % zeros")
ANGLES = (0.0, math.pi / 4, math.pi / 2, 3 * math.pi / 4)  # of graycomatrix: the four directions of 3 x 3
IMAGES = {"VGG-16 (CIFAR)": 128, "ResNet-18 (ImageNet)": 16}  # on a CPU: a batch; a part of 2 x 256, for time
ON_GPU = {3: (1.0, 0.6), 7: (4.5, 1.5)}  # G2, ms by kernel size


def _ours(x: Tensor, kernel: int, padding: int, backend: str = "auto", **options) -> Callable[[], Tensor]:
    displacements = half_displacements(kernel)

    def run() -> Tensor:
        with gr.use_backend(backend):
            return gr.joint_histogram(x, displacements, "sturges", padding=padding, **options)

    return run


def _sturges(shape: tuple[int, ...]) -> int:
    n, _, h, w = shape
    return (
        1 + (n * (h + 2) * (w + 1) - 1).bit_length()
    )  # of displacement (0, 1); with padding 1 one number suits all four


# -- baselines: 3 x 3, padding 1


def _per_channel(x: np.ndarray, channels: int, histogram2d: Histogram2d) -> Callable[[], object]:
    displacements = half_displacements(3)

    def run() -> None:
        for c in range(channels):
            channel_counts(np.pad(x[:, c], ((0, 0), (1, 1), (1, 1))), displacements, histogram2d)

    return run


def _bin_numbers(x: Tensor, bins: int) -> Tensor:
    """int16 [C, N, H + 2, W + 2], one quantisation per channel, zeros around"""
    x = F.pad(x.transpose(0, 1), (1, 1, 1, 1))
    lo, hi = (end.view(-1, 1, 1, 1) for end in (x.amin((1, 2, 3)), x.amax((1, 2, 3))))
    return ((x - lo) * (bins / (hi - lo))).clamp_(max=bins - 1).to(torch.int16)


def _bincounts(numbers: Tensor, bins: int) -> list[Tensor]:
    """[bins * bins] for each channel and displacement"""
    height, width = numbers.shape[-2:]
    found = []
    for channel in numbers:
        rows = channel * bins
        for di, dj in half_displacements(3):
            left, right = max(0, -dj), width - max(0, dj)
            cells = rows[:, : height - di, left:right] + channel[:, di:, left + dj : right + dj]
            found.append(torch.bincount(cells.flatten(), minlength=bins * bins))
    return found


def _graycomatrices(numbers: Tensor, bins: int, channels: int) -> Callable[[], list[np.ndarray]]:
    """All images of a channel as one tall image, with a row of a level of its own between."""
    tall = F.pad(numbers[:channels], (0, 0, 0, 1), value=bins).flatten(1, 2).to(torch.uint8).cpu().numpy()

    def run() -> list[np.ndarray]:
        from skimage.feature import graycomatrix

        return [graycomatrix(image, [1], ANGLES, levels=bins + 1) for image in tall]

    return run


def _baselines(x: Tensor, pairs: int, bins: int, quick: bool) -> list[Candidate]:
    host, numbers = x.cpu().numpy(), _bin_numbers(x, bins)
    channels = x.shape[1]
    few, fewer = min(8, channels), 1 if quick else min(2, channels)
    part = {n: {"share": n / channels, "note": f"{n} of {channels} channels, scaled"} for n in (few, fewer)}
    return [
        Candidate(FAST, _per_channel(host, few, fast_histogram2d), threads=1, pairs=pairs, optional=True, **part[few]),
        Candidate(FLOATS, lambda: _bincounts(_bin_numbers(x, bins), bins), pairs=pairs),
        Candidate(INT16, lambda: _bincounts(numbers, bins), pairs=pairs),
        Candidate(
            GRAYCOMATRIX, _graycomatrices(numbers, bins, fewer), threads=1, pairs=pairs, optional=True, **part[fewer]
        ),
        Candidate(NUMPY, _per_channel(host, fewer, numpy_histogram2d), threads=1, pairs=pairs, **part[fewer]),
    ]


# -- H1 to H3


def _shape(setup: Setup) -> tuple[int, int, int, int]:
    return (16, 4, 16, 16) if setup.quick else (256, 64, 32, 32)


def test_against_others(benchmark, setup: Setup, results: Results):
    shape = _shape(setup)
    x = KINDS["uniform"](shape, setup.device)
    pairs = feature_maps.pairs(shape, 3, 1)
    ways = [
        Candidate(OURS, _ours(x, 3, 1), pairs=pairs),
        Candidate(REFERENCE, _ours(x, 3, 1, "reference"), pairs=pairs),
        *_baselines(x, pairs, _sturges(shape), setup.quick),
    ]
    timed = compare(benchmark, setup, ways, threads=1, clock=wall_clock)  # some of them work on the host
    results.add(f"{shape}, 3 x 3, uniform data", timed)
    if setup.device.type == "cuda":
        return
    served = f"served by {_served(setup)}; the store of a count, one a cycle"
    unpadded = pairs / feature_maps.pairs(shape, 3, 0)
    whole = timed.time(OURS) * (1e9 / pairs)
    bound = f"served by {_served(setup)}; {whole.median * unpadded:.3g} ns per pair of the map without padding"
    results.target(
        Target("H1", f"whole call, {shape}, 3 x 3, per thread", "ns/pair", 0.60, 0.45, less_is_better=True),
        whole,
        bound=bound,
    )
    for other, (at_least, aim) in FASTER_THAN.items():
        target = Target("H1", f"as fast as {other}", "x", at_least, aim)
        results.target(target, timed.ratio(other, OURS), bound=served, why_not=timed.skipped.get(other, ""))


def _served(setup: Setup) -> str:
    return next(row["serves"] for row in backends.report((setup.device.type,)) if row["op"] == "joint_histogram")


def test_data_and_layout(benchmark, setup: Setup, results: Results, max_threads: int):
    shape = _shape(setup)
    pairs = feature_maps.pairs(shape, 3, 1)
    on_cpu = setup.device.type == "cpu"
    one = 1 if on_cpu else None
    maps = {name: kind(shape, setup.device) for name, kind in KINDS.items()}
    ways = [Candidate(name, _ours(x, 3, 1), threads=one, pairs=pairs) for name, x in maps.items()]
    last = {name: maps[name].contiguous(memory_format=torch.channels_last) for name in ("uniform", "ReLU, 60 % zeros")}
    ways += [Candidate(f"{name}, channels_last", _ours(x, 3, 1), threads=one, pairs=pairs) for name, x in last.items()]
    ways += [
        Candidate(f"uniform, {dtype}", _ours(maps["uniform"].to(dtype), 3, 1), threads=one, pairs=pairs)
        for dtype in (torch.bfloat16, torch.float64)
    ]
    ways.append(
        Candidate("uniform, remove_near", _ours(maps["uniform"], 3, 1, remove_near=True), threads=one, pairs=pairs)
    )
    together = "uniform, all threads"
    if on_cpu and max_threads > 1:
        ways.append(Candidate(together, _ours(maps["uniform"], 3, 1), threads=max_threads, pairs=pairs))
    timed = compare(benchmark, setup, ways)
    results.add(f"{shape}, 3 x 3, data, layouts, dtypes", timed)
    if not on_cpu:
        return
    for name in WORST_DATA:
        target = Target("H2", f"{name}: time over that of uniform data", "x", 1.5, 1.1, less_is_better=True)
        results.target(
            target, timed.ratio(name, "uniform"), bound="an increment waits for the one before it in the same cell"
        )
    target = Target("H2", "channels_last: time over that of NCHW", "x", 1.4, 1.2, less_is_better=True)
    results.target(target, timed.ratio("uniform, channels_last", "uniform"), bound="the transpose of floats to planes")
    target = Target("H2", "2 threads: as fast as 1", "x", 1.6, 1.8)
    results.target(
        target,
        timed.ratio("uniform", together) if max_threads == 2 else None,
        why_not=f"run with at most {max_threads}",
    )


# -- layers of real networks


@pytest.mark.parametrize(
    ("network", "layers", "remove_near"),
    [("VGG-16 (CIFAR)", VGG16_CIFAR, False), ("ResNet-18 (ImageNet)", RESNET18_IMAGENET, True)],
)
def test_layers(
    benchmark, setup: Setup, results: Results, threads: int, network: str, layers: tuple[Layer, ...], remove_near: bool
):
    images = 256 if setup.device.type == "cuda" else IMAGES[network] // (8 if _served(setup) == "reference" else 1)
    if setup.quick:
        images, layers = 2, layers[-1:]
    ways = []
    for layer in layers:
        shape = layer.shape(images)
        x = KINDS["ReLU, 60 % zeros"](shape, setup.device)
        run = _ours(x, layer.kernel, layer.padding, remove_near=remove_near)
        pairs = feature_maps.pairs(shape, layer.kernel, layer.padding)
        ways.append(Candidate(str(layer), run, pairs=pairs, bytes=2 * x.nbytes, note=f"{layer.count} in the network"))
    timed = compare(benchmark, setup, ways, threads=threads)
    what = ", remove_near" if remove_near else ""
    results.add(f"{network}, {images} images, ReLU with 60 % zeros{what}, {thread_count(threads)}", timed)


# -- G2, G3


def _gpu_targets(shape: tuple[int, ...], kernel: int) -> dict[str, Target]:
    """By backend."""
    bounds = {"cuda": ("G2", *ON_GPU[kernel])} | ({"triton": ("G3", 9.0, 6.5)} if kernel == 3 else {})
    what = f"pair ranges and joint histogram, {shape}, {kernel} x {kernel}"
    return {
        backend: Target(row, f"{what}, {backend}", "ms", at_least, aim, less_is_better=True)
        for backend, (row, at_least, aim) in bounds.items()
    }


def _gpu_shape(setup: Setup) -> tuple[int, int, int, int]:
    return (64, 8, 32, 32) if setup.quick else (2560, 64, 32, 32)


def test_without_a_gpu(setup: Setup, results: Results):
    if setup.device.type == "cuda":
        pytest.skip("there is one")
    for kernel in ON_GPU:
        for target in _gpu_targets(_gpu_shape(setup), kernel).values():
            results.target(target, None, why_not=NO_GPU)


@pytest.mark.parametrize("kernel", ON_GPU)
def test_on_gpu(benchmark, setup: Setup, results: Results, kernel: int):
    if setup.device.type == "cpu":
        pytest.skip("for a GPU")
    shape = _gpu_shape(setup)
    x = KINDS["uniform"](shape, setup.device)
    target = torch.empty_like(x)
    moved = {
        "pairs": feature_maps.pairs(shape, kernel, kernel // 2),
        "bytes": 2 * x.nbytes,
    }  # read once for the ranges, once for the counts
    ways = [Candidate(COPY, lambda: target.copy_(x), bytes=2 * x.nbytes)]
    ways += [
        Candidate(f"{OURS}, {name}", _ours(x, kernel, kernel // 2, name), optional=True, **moved)
        for name in ("cuda", "triton", "auto")
    ]
    if kernel == 3:
        relu, last = KINDS["ReLU, 90 % zeros"](shape, setup.device), x.contiguous(memory_format=torch.channels_last)
        for what, y in (("90 % zeros", relu), ("channels_last", last), ("constant", torch.full_like(x, 0.5))):
            ways += [
                Candidate(f"{OURS}, {name}, {what}", _ours(y, kernel, kernel // 2, name), optional=True, **moved)
                for name in ("cuda", "triton")
            ]
    timed = compare(benchmark, setup, ways)
    results.add(f"{shape}, {kernel} x {kernel}, uniform data", timed)
    for backend, judged in _gpu_targets(shape, kernel).items():
        name = f"{OURS}, {backend}"
        share = timed.rate_ratio(name, COPY)
        figure, bound = (
            (None, "") if share is None else (timed.time(name) * 1e3, f"{share.median:.0%} of the copy rate")
        )
        results.target(judged, figure, bound=bound, why_not=timed.skipped.get(name, ""))
