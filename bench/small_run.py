"""Run each op on each backend of a device against the reference on the CPU: small, odd sizes, all multipliers.

    python bench/small_run.py cpu|cuda [--backend NAME] [--needs OP ...]

What `gpu_check.py` runs alone and under compute-sanitizer. Exit status 1 where a result differs, no kernel of a GPU
ran, or an op that is needed has no compiled kernel for the device.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

import gradrep_kernels as gr
from gradrep_kernels.ops import backends
from gradrep_kernels.ops.registry import NAMESPACE, OPS

BACKENDS = {"cpu": ("cpp",), "cuda": ("triton", "cuda")}
DISPLACEMENTS = ((0, 1), (1, -1), (1, 0), (1, 1))
SHAPES = ((8, 5, 3, 3), (7, 7, 3, 3), (64, 64, 3, 3), (13, 1, 5, 5), (1031,), (1,), (1024,), (48, 32, 3, 3), (5000,))
CHANNELS_LAST, WITH_IDENTITY, DENSE = (2,), (1, 2, 7), (4,)  # positions in SHAPES
UNALIGNED = (7, 8)  # gradients of a block and more that start one element after an aligned place
TOLERANCE = {
    torch.float32: 1e-5,
    torch.float64: 1e-12,
    torch.bfloat16: 5e-2,
    torch.float16: 5e-3,
}  # weights are about 1, five steps

Case = tuple[str, Tensor, Tensor, float]  # what, found, expected, tolerance


def _parts(device: str, dtype: torch.dtype) -> tuple[list[dict], dict[Tensor, gr.BranchScales | gr.GradMult]]:
    """(parameter groups, what the parameters have: the scales of branches, and a dense multiplier)"""
    generator = torch.Generator().manual_seed(1)

    def new(n: int) -> Tensor:
        layout = torch.channels_last if n in CHANNELS_LAST else torch.contiguous_format
        return torch.randn(SHAPES[n], generator=generator, dtype=torch.float64).to(device, dtype, memory_format=layout)

    params, mults = [], {}
    for n, shape in enumerate(SHAPES):
        p = new(n).requires_grad_()
        g = new(n)
        p.grad = torch.cat([g.new_zeros(1), g.flatten()])[1:].view(shape) if n in UNALIGNED else g
        params.append(p)
        if len(shape) == 4:
            scales = torch.rand(2, shape[0], generator=generator)
            mults[p] = gr.BranchScales(*scales, identity=n in WITH_IDENTITY)
        elif n in DENSE:
            mults[p] = gr.GradMult(torch.rand(shape, generator=generator))
    return [{"params": params[::2]}, {"params": params[1::2], "lr": 0.01}], mults


def _optimizer(device: str, dtype: torch.dtype, **options) -> gr.FusedRepSGD:
    groups, given = _parts(device, dtype)
    groups[1]["nesterov"] = True
    mults = {p: v.grad_mult(p.shape[2:]) if isinstance(v, gr.BranchScales) else v for p, v in given.items()}
    return gr.FusedRepSGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-3, grad_mults=mults, **options)


def _adamw(device: str, dtype: torch.dtype) -> gr.FusedRepAdamW:
    """With three branches where the others have two, and with amsgrad in one group."""
    groups, given = _parts(device, dtype)
    groups[1]["amsgrad"] = True
    scales = {p: v for p, v in given.items() if isinstance(v, gr.BranchScales)}
    for p, v in scales.items():
        if p.shape[-1] == 5:
            scales[p] = gr.BranchScales(v.kxk, v.one_by_one, others=[gr.Branch(-v.kxk, 3, dilation=2)])
    return gr.FusedRepAdamW(groups, lr=0.02, branch_scales=scales)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().cpu().flatten() for t in tensors])


def _both(device: str, backend: str) -> tuple[tuple[str, str], tuple[str, str]]:
    return (device, backend), ("cpu", "reference")


def steps(device: str, backend: str) -> Iterator[Case]:
    return _steps_of(_optimizer, device, backend)


def adamw_steps(device: str, backend: str) -> Iterator[Case]:
    return _steps_of(_adamw, device, backend)


def _steps_of(make: Callable[[str, torch.dtype], torch.optim.Optimizer], device: str, backend: str) -> Iterator[Case]:
    for dtype, tolerance in TOLERANCE.items():
        ends = []
        for where, name in _both(device, backend):
            optimizer = make(where, dtype)
            with gr.use_backend(name):
                for _ in range(5):  # the last with a plan
                    optimizer.step()
            ends.append(_flat(_parameters(optimizer)))
        yield str(dtype), *ends, tolerance


def tails(device: str, backend: str) -> Iterator[Case]:
    """Clipping, averages and momentum in bfloat16 at once. The norm of a GPU rounds otherwise than the reference's."""
    for dtype, tolerance in TOLERANCE.items():
        found: dict[str, list[Tensor]] = {"weights": [], "averages": [], "momentum": [], "norm": []}
        for where, name in _both(device, backend):
            options = {"max_grad_norm": 20.0, "ema_decay": 0.9, "momentum_dtype": torch.bfloat16}
            optimizer = _optimizer(where, dtype, **options)
            with gr.use_backend(name):
                for _ in range(5):
                    optimizer.step()
            params = _parameters(optimizer)
            found["weights"].append(_flat(params))
            found["averages"].append(_flat([optimizer.ema(p) for p in params]))
            found["momentum"].append(_flat([optimizer.state[p]["momentum_buffer"] for p in params]))
            found["norm"].append(_flat([optimizer.last_grad_norm]))
        # One unit in the last place of a momentum in bfloat16, which a bit of the norm may turn: 2**-8 of at most 4.
        allowed = {"momentum": max(tolerance, 2**-6), "norm": 1e-3}
        for what, ends in found.items():
            yield f"{what}, {dtype}", *ends, allowed.get(what, max(tolerance, 2**-8))


def norms(device: str, backend: str) -> Iterator[Case]:
    found = []
    for where, name in _both(device, backend):
        optimizer = _optimizer(where, torch.float32)
        params = _parameters(optimizer)
        mults = [optimizer.grad_mult(p) for p in params]
        parts = [(None, None) if mult is None else mult.parts() for mult in mults]
        columns = ([part if part is None else part.to(where) for part in column] for column in zip(*parts))
        with gr.use_backend(name):
            norm = backends.implementation("rep_grad_norm", torch.device(where).type)
            found.append(norm([p.grad for p in params], *columns))
    yield "float32", *found, 1e-3  # of about 150


def scalings(device: str, backend: str) -> Iterator[Case]:
    """Gradients that are clipped, and others that a limit above their norm leaves alone."""
    for dtype, tolerance in TOLERANCE.items():
        for max_norm in (1.0, 1e9):
            found = []
            for where, name in _both(device, backend):
                optimizer = _optimizer(where, dtype)
                with gr.use_backend(name):
                    optimizer.clip_grad_norm_(max_norm)
                found.append(_flat([p.grad for p in _parameters(optimizer)]))
            yield f"{dtype}, limit {max_norm:g}", *found, tolerance


def counts(device: str, backend: str) -> Iterator[Case]:
    for shape in ((3, 5, 9, 7), (2, 33, 16, 16), (1, 1, 1, 1), (5, 2, 40, 33)):
        x = torch.randn(shape).relu_()
        for layout in (torch.contiguous_format, torch.channels_last):
            for remove_near in (False, True):
                found = []
                for where, name in _both(device, backend):
                    with gr.use_backend(name):
                        y = x.to(where, memory_format=layout)
                        found.append(
                            gr.joint_histogram(y, DISPLACEMENTS, "sturges", padding=1, remove_near=remove_near)
                        )
                yield f"{shape}, {layout}, remove_near={remove_near}", *found, 0


def updates(device: str, backend: str) -> Iterator[Case]:
    """G of two convolutions on the same maps, after updates from three training batches."""
    found = []
    for where, name in _both(device, backend):
        generator = torch.Generator().manual_seed(2)
        convs = nn.ModuleList(nn.Conv2d(6, 6, kernel, padding=kernel // 2) for kernel in (3, 5)).to(where)
        optimizer = gr.FusedRepSGD(convs.parameters(), lr=0.1)
        sgs = gr.SpatialGradientScaling(convs, optimizer, every_steps=1)
        with gr.use_backend(name):
            for _ in range(3):
                x = torch.randn(4, 6, 11, 9, generator=generator).relu_().to(where)
                for conv in convs:
                    conv(x)
                optimizer.step()
        found.append(torch.cat([g.flatten() for g in sgs.scalings.values()]))
    yield "updates from training batches", *found, 1e-6


def run(device: str, only: str | None = None, needs: Sequence[str] = ()) -> int:
    report = {row["op"]: row for row in backends.report((device,))}
    torch.manual_seed(0)
    agree = problems = 0
    has = torch._C._dispatch_has_kernel_for_dispatch_key  # raises for an op that torch does not know
    absent = [op for op in needs if op not in OPS or not has(f"{NAMESPACE}::{op}", device.upper())]
    if absent:
        print(f"no compiled kernel for {device}: {', '.join(absent)}")
        return 1
    needed = {
        steps: {"rep_sgd_step"},
        adamw_steps: {"rep_adamw_step"},
        tails: {"rep_sgd_step", "rep_grad_norm"},
        norms: {"rep_grad_norm"},
        scalings: {"rep_grad_norm", "scale_gradients_"},
        counts: {"pair_ranges", "joint_histogram"},
        updates: {"pair_ranges", "pair_ranges_", "joint_histogram_"},
    }
    for backend in BACKENDS[device] if only is None else (only,):
        unavailable = {op: row[backend] for op, row in report.items() if row[backend] != "available"}
        for op, reason in unavailable.items():
            print(f"{op}, {backend}: not available: {reason}")
        for cases, ops in needed.items():
            for what, found, expected, tolerance in () if ops & unavailable.keys() else cases(device, backend):
                difference = float((found.cpu().double() - expected.double()).abs().max())
                if difference <= tolerance:
                    agree += 1
                else:
                    problems += 1
                    print(f"{cases.__name__}, {backend}, {what}: differs by {difference} from the reference")
    print(f"{agree} cases agree with the reference, {problems} differ")
    return 1 if problems or (device == "cuda" and not agree) else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("device", choices=tuple(BACKENDS))
    parser.add_argument("--backend", choices=("cpp", "triton", "cuda"), help="this one alone")
    parser.add_argument("--needs", nargs="+", default=(), metavar="OP", help="ops that must have a compiled kernel")
    options = parser.parse_args()
    sys.exit(run(options.device, options.backend, options.needs))
