"""Run every kernel of a GPU once between cudaProfilerStart and Stop, warmed before. For Nsight Compute:

    ncu --nvtx --profile-from-start off ... python bench/profile_once.py    (bench/first_gpu_run.sh has the whole line)
    python bench/profile_once.py --device cpu --quick                       the same calls on small CPU tensors

Each call stands in an NVTX range of its name, and the names are printed in the order of the calls. An op that a backend
does not have here is named with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from feature_maps import KINDS, half_displacements
from parameter_sets import SETS, Tensors
from torch import Tensor, nn

import gradrep_kernels as gr
from gradrep_kernels.ops import backends
from gradrep_kernels.ops.reference.pair_rule import sturges

BACKENDS = {"cuda": ("cuda", "triton"), "cpu": ("cpp", "reference")}  # the first one counts every kind of map
COUNTED_BY_ALL = ("uniform, 3 x 3", "ReLU, 60 % zeros")
Call = tuple[str, Callable[[], object]]


@dataclass(frozen=True)
class Map:
    name: str
    x: Tensor
    kernel: int = 3
    remove_near: bool = False

    @property
    def pairs(self) -> tuple[list[int], list[int]]:
        """(displacements, padding) as the ops take them. Pairs with a zero do not count where near ones are removed."""
        padding = 0 if self.remove_near else self.kernel // 2
        return [n for pair in half_displacements(self.kernel) for n in pair], [padding] * 2


def maps(device: torch.device, quick: bool) -> list[Map]:
    large, deep = ((4, 3, 8, 8), (2, 8, 4, 4)) if quick else ((2560, 64, 32, 32), (2560, 512, 4, 4))
    uniform, relu = KINDS["uniform"](large, device), KINDS["ReLU, 60 % zeros"](large, device)
    return [
        Map("uniform, 3 x 3", uniform),
        Map("uniform, 7 x 7", uniform, kernel=7),
        Map("ReLU, 60 % zeros", relu),
        Map("ReLU, bfloat16", relu.bfloat16()),
        Map("uniform, channels_last", uniform.contiguous(memory_format=torch.channels_last)),
        Map("ReLU, remove_near", relu, remove_near=True),
        Map("ReLU, 512 x 4 x 4", KINDS["ReLU, 60 % zeros"](deep, device)),
    ]


def counting(found: Map, backend: str) -> Iterator[Call]:
    x, (displacements, padding), near = found.x, found.pairs, found.remove_near
    with gr.use_backend(backend):
        ranges_of, count = (backends.implementation(op, x.device.type) for op in ("pair_ranges", "joint_histogram"))
    ranges, n = ranges_of(x, displacements, padding, near)
    bins = sturges(n)
    most = int(bins.max())
    yield f"pair_ranges, {backend}, {found.name}", lambda: ranges_of(x, displacements, padding, near)
    yield (
        f"joint_histogram, {backend}, {found.name}",
        lambda: count(x, displacements, ranges, bins, most, padding, near),
    )


def training_batch(x: Tensor, backend: str) -> Call:
    """What an update from the training batches does for one layer and batch, in the forward pass and in the step."""
    model = nn.Conv2d(x.shape[1], 1, 3, padding=1, device=x.device)
    optimizer = gr.FusedRepSGD(model.parameters(), lr=0.1)
    gr.SpatialGradientScaling(model, optimizer, every_steps=1)  # lives in the hooks it sets

    @gr.use_backend(backend)
    def run() -> None:
        model(x)
        optimizer.step()

    run()  # from here on there are ranges to count within
    return f"update from a training batch, {backend}", run


def steps(tensors: Tensors, backend: str) -> Iterator[Call]:
    ours = {
        "structured Grad Mult": tensors.optimizer(gr.FusedRepSGD, grad_mults=tensors.grad_mults),
        "no multiplier": tensors.optimizer(gr.FusedRepSGD),
        "whole tail": tensors.optimizer(
            gr.FusedRepSGD,
            grad_mults=tensors.grad_mults,
            max_grad_norm=0.1,
            ema_decay=0.999,
            momentum_dtype=torch.bfloat16,
        ),
    }
    for what, optimizer in ours.items():
        yield f"rep_sgd_step, {backend}, {what}", gr.use_backend(backend)(optimizer.step)
    clip = ours["structured Grad Mult"].clip_grad_norm_
    yield f"rep_grad_norm, {backend}", gr.use_backend(backend)(lambda: clip(1e9))
    yield f"scale_gradients_, {backend}, after its norm", gr.use_backend(backend)(lambda: clip(1.0))


def adamw_steps(tensors: Tensors, backend: str) -> Iterator[Call]:
    for what, scales in {"branch scales": tensors.branch_scales, "no scales": None}.items():
        step = tensors.adamw(gr.FusedRepAdamW, branch_scales=scales).step
        yield f"rep_adamw_step, {backend}, {what}", gr.use_backend(backend)(step)


def calls(device: torch.device, quick: bool) -> Iterator[Call]:
    """What is available here. What is not is printed with its reason."""
    report = {row["op"]: row for row in backends.report((device.type,))}
    best, *others = BACKENDS[device.type]
    every_map = maps(device, quick)
    tensors = Tensors(SETS["62 x 1000" if quick else "RepOpt-VGG-B1"](), device)
    for backend in (best, *others):
        missing = {op: row[backend] for op, row in report.items() if row[backend] != "available"}
        for op, reason in missing.items():
            print(f"not called: {op}, {backend}: {reason}")
        if not missing.keys() & {"rep_sgd_step", "rep_grad_norm", "scale_gradients_"}:
            yield from steps(tensors, backend)
        if "rep_adamw_step" not in missing:
            yield from adamw_steps(tensors, backend)
        if missing.keys() & {"pair_ranges", "joint_histogram", "joint_histogram_"}:
            continue
        for found in every_map:
            if backend == best or found.name in COUNTED_BY_ALL:
                yield from counting(found, backend)
        yield training_batch(every_map[2].x[:128], backend)
    fused = tensors.optimizer(torch.optim.SGD, fused=True)
    yield "torch.optim.SGD(fused=True), no multiplier", fused.step
    yield "torch.optim.AdamW(fused=True), no scales", tensors.adamw(torch.optim.AdamW, fused=True).step


def run(device: torch.device, quick: bool, seconds: float) -> int:
    """Make all calls twice, and once more for the profiler, as many as `seconds` allow. Returns how many it saw.

    A profiler that is killed may lose what it has, so the calls end in time.
    """
    start, on_gpu = time.monotonic(), device.type == "cuda"
    todo = list(calls(device, quick))
    for _ in range(2):
        for _, call in todo:
            call()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    seen = 0
    for name, call in todo:
        if time.monotonic() - start > seconds:
            print(f"no time for {name} and what follows")
            break
        seen += 1
        print(f"{seen:3} {name}", flush=True)
        with torch.cuda.nvtx.range(name) if on_gpu else contextlib.nullcontext():
            call()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    return seen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=tuple(BACKENDS), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small tensors")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="begin no call after so many (default: no limit)"
    )
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("profile_once: torch sees no GPU here; --device cpu --quick makes the same calls without one")
    run(torch.device(options.device), options.quick, options.seconds)
