"""Replay an overflow under mixed precision, and tell what it leaves of a training, by optimizer and torch version.

    python bench/overflow.py [--device cpu|cuda] [--results bench/results]

GradScaler finds an overflow of float16 gradients, has the step skipped and lowers its scale. The training should go on
as if the batch had not been there, so each training is held against one by the same optimizer on the other batches, to
the bit. A last situation has weights in bfloat16 and no overflow.

Memory that torch leaves uninitialised is filled with NaN (torch.use_deterministic_algorithms), so that an optimizer
that reads it shows that in every run. Without it the values are whatever lay there. Runs with several versions of torch
stand side by side in overflow.json and overflow.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from harness import ROOT, commit
from report import number, table
from torch import Tensor, nn

import gradrep_kernels as gr
from gradrep_kernels.recipes import files


class Way(NamedTuple):
    """An optimizer, and the GradScaler that it is used with."""

    make: Callable[..., torch.optim.Optimizer]
    scaler: type[torch.amp.GradScaler] = torch.amp.GradScaler


WAYS = {
    "SGD(fused=True)": Way(partial(torch.optim.SGD, fused=True)),
    "SGD(foreach=True)": Way(partial(torch.optim.SGD, foreach=True)),
    "FusedRepSGD(fused=True)": Way(partial(gr.FusedRepSGD, fused=True)),
    "FusedRepSGD()": Way(gr.FusedRepSGD),
    "FusedRepSGD(fused=True), clipping and averaging, gr.GradScaler": Way(
        partial(gr.FusedRepSGD, fused=True, max_grad_norm=1e6, ema_decay=0.9), gr.GradScaler
    ),
}
JUDGE = Way(partial(torch.optim.SGD, foreach=False))
STEPS, LATER = 8, 4  # batches, and the number of the one that overflows late
TOO_HIGH, FITTING = 2.0**16, 2.0**7  # scales of the loss. GradScaler begins with the first
AS_WITHOUT, BROKEN = "as if the batch had not been there", "NaN in all weights from the next step on"


def _network(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 10)).to(device)


def _batches(device: torch.device) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(32, 24, generator=generator).to(device), 20 * torch.randn(32, 10, generator=generator).to(device))
        for _ in range(STEPS)
    ]


def _train(way: Way, device: torch.device, overflows: int | None, left_out: int | None = None) -> list[Tensor]:
    """Weights and averages after a training in mixed precision, with an overflow in a batch or without that batch."""
    model = _network(device)
    optimizer = way.make(model.parameters(), lr=0.01, momentum=0.9)
    scales = [TOO_HIGH if n == overflows else FITTING for n in range(STEPS + 1)]
    scaler = way.scaler(device.type, init_scale=scales[0])
    for n, (x, y) in enumerate(_batches(device)):
        if n == left_out:
            continue
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16):
            loss = (model(x) - y).square().sum(1).mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        skipped = all(torch.equal(p, old) for p, old in zip(model.parameters(), before))
        if n == overflows and not skipped:
            raise RuntimeError(f"the step of batch {n} was not skipped: a scale of {TOO_HIGH:g} did not overflow")
        scaler.update(scales[n + 1])
    averages = [optimizer.ema(p) for p in model.parameters()] if getattr(optimizer, "ema_decay", None) else []
    return [*(p.detach() for p in model.parameters()), *averages]


def after_overflow(way: Way, device: torch.device, batch: int) -> str:
    """What becomes of the weights when the gradients of one batch overflow."""
    found, expected = _train(way, device, overflows=batch), _train(way, device, overflows=None, left_out=batch)
    if not all(w.isfinite().all() for w in found):
        return BROKEN if all(w.isnan().all() for w in found) else "NaN in some weights or averages"
    off = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected))
    return AS_WITHOUT if off == 0 else f"off by {number(off)} of the greatest weight"


def in_bfloat16(way: Way, device: torch.device) -> str:
    """How far weights in bfloat16 are off after some steps, beside what torch's loop over the tensors is off."""
    generator = torch.Generator().manual_seed(2)
    start, *grads = torch.randn(STEPS + 1, 1000, generator=generator).to(device, torch.bfloat16)

    def end(way: Way, dtype: torch.dtype) -> Tensor:
        weight = nn.Parameter(start.to(dtype, copy=True))
        optimizer = way.make([weight], lr=0.1, momentum=0.9)
        for grad in grads:
            weight.grad = grad.to(dtype, copy=True)
            optimizer.step()
        return weight.detach().double()

    exact = end(JUDGE, torch.float64)
    off, judged = (float((end(one, torch.bfloat16) - exact).abs().max()) for one in (way, JUDGE))
    return "right" if off <= 2 * judged else f"wrong: off by {number(off)}, rounding alone by {number(judged)}"


SITUATIONS: dict[str, Callable[[Way, torch.device], str]] = {
    "an overflow on the first step": partial(after_overflow, batch=0),
    "an overflow on a later step": partial(after_overflow, batch=LATER),
    "weights in bfloat16, no overflow": in_bfloat16,
}


@contextlib.contextmanager
def uninitialised_memory_is_nan() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def replay(device: torch.device) -> dict[str, dict[str, str]]:
    """Situation -> optimizer -> what came of it."""
    with uninitialised_memory_is_nan(), torch.random.fork_rng():
        return {name: {way: run(made, device) for way, made in WAYS.items()} for name, run in SITUATIONS.items()}


def add(results: Path, device: torch.device) -> str:
    """Replay, and write what came of it beside the runs of other versions. Returns the page."""
    path = results / "overflow.json"
    runs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    run = {
        "torch": torch.__version__.partition("+")[0],
        "device": device.type,
        "commit": commit(),
        "outcomes": replay(device),
    }
    runs = [other for other in runs if (other["torch"], other["device"]) != (run["torch"], run["device"])] + [run]
    runs.sort(key=lambda run: (run["device"], [int(part) for part in run["torch"].split(".")[:3] if part.isdigit()]))
    results.mkdir(parents=True, exist_ok=True)
    files.write_json(path, runs)
    files.write_text(path.with_suffix(".md"), page(runs))
    return page(runs)


def page(runs: Sequence[dict]) -> str:
    """The Markdown of all runs: a row for each situation and optimizer, with the versions behind each outcome."""
    rows = []
    for situation in SITUATIONS:
        for way in WAYS:
            versions: dict[str, list[str]] = {}
            for run in runs:
                outcome = run["outcomes"][situation].get(way)
                if outcome is None:  # a run before there was this optimizer
                    continue
                where = run["torch"] if run["device"] == "cpu" else f"{run['torch']} {run['device']}"
                versions.setdefault(outcome, []).append(where)
            for outcome, which in versions.items():
                rows.append([situation, f"`{way}`", outcome, ", ".join(which)])
    commits = ", ".join(dict.fromkeys(run["commit"] for run in runs))
    lines = table(["situation", "optimizer", "what came of it", "torch"], rows)
    return "\n".join([*lines, f"`python bench/overflow.py` with each version of torch, commit {commits}.", ""])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="default: %(default)s")
    given = parser.parse_args(argv)
    print(add(given.results, torch.device(given.device)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
