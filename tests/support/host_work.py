"""What a step costs the host, counted in bytecodes and calls of Python, which do not depend on the machine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

import gradrep_kernels as gr

BYTECODES = 1550
"""Of a planned step, at most. A step of C++ takes 447, one of Triton 1,150, and 1,499 where a table is new."""

CALLS = 75
"""Of Python functions, at most. They are 16, 51 and 58."""

MODELS = (62, 161)
"""Numbers of parameters."""


class Work(NamedTuple):
    bytecodes: int
    calls: int


def counted(run: Callable[[], object]) -> Work:
    """Count the bytecodes and the Python functions that `run` takes, in all frames. `run` itself is left out."""
    bytecodes = calls = 0

    def trace(frame, event, _):
        nonlocal bytecodes, calls
        if event == "call":
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            calls += 1
        elif event == "opcode":
            bytecodes += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return Work(bytecodes, calls)


def model(parameters: int) -> list[nn.Parameter]:
    """Convolutions of which every second has an identity in its Grad Mult, and vectors between them."""
    shapes = ((6, 6, 3, 3), (6,))
    return [nn.Parameter(torch.randn(shapes[n % 2])) for n in range(parameters)]


def optimizer(params: list[nn.Parameter]) -> gr.FusedRepSGD:
    """Two groups: convolutions with weight decay and Grad Mults, vectors without."""
    mults = {
        p: gr.GradMult(torch.rand(6, 1, 3, 3), torch.rand(6) if n % 2 else None) for n, p in enumerate(params[::2])
    }
    groups = [{"params": params[::2], "weight_decay": 1e-4}, {"params": params[1::2], "weight_decay": 0.0}]
    return gr.FusedRepSGD(groups, lr=0.1, momentum=0.9, nesterov=True, grad_mults=mults)


def gradients(params: list[nn.Parameter], sets: int) -> list[list[torch.Tensor]]:
    return [[torch.randn_like(p.detach()) for p in params] for _ in range(sets)]


def give(params: list[nn.Parameter], grads: list[torch.Tensor]) -> None:
    for p, grad in zip(params, grads):
        p.grad = grad


GRADIENTS = {  # the places in memory of the gradients, step by step; the last step is counted
    "where they were": [0] * 6,
    "in two places that take turns": [0, 1] * 3,
    "where none were": list(range(6)),
}


def work_of_a_step(parameters: int, places: list[int]) -> Work:
    """The work of the last of some steps, which must be planned."""
    params = model(parameters)
    opt, grads = optimizer(params), gradients(params, len(places))
    for place in places[:-1]:
        give(params, grads[place])
        opt.step()
    plan = opt._plan
    assert plan is not None
    give(params, grads[places[-1]])
    work = counted(opt.step)
    assert opt._plan is plan, "the counted step was not planned"
    return work


def check(way: str) -> None:
    """The work of a step is bounded, and the same for all MODELS."""
    works = [work_of_a_step(parameters, GRADIENTS[way]) for parameters in MODELS]
    assert len(set(works)) == 1, works
    assert works[0].bytecodes <= BYTECODES, works
    assert works[0].calls <= CALLS, works
