"""The host's work of planned steps in Triton, with launches that launch nothing.

tests/optim/test_host_work.py runs this file with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import host_work
import pytest
import torch
from step_tails import Tailed

import gradrep_kernels as gr
from gradrep_kernels.ops.triton import launching, rep_sgd_plan_step

TAIL = 550
"""Bytecodes that the whole tail adds to a planned step, at most. They are 458."""


@pytest.mark.parametrize("way", host_work.GRADIENTS)
def test_the_work_does_not_grow_with_the_parameters(way, monkeypatch):
    launched = []
    monkeypatch.setattr(launching, "launch", lambda *arguments, **named: launched.append(arguments))
    with gr.use_backend("triton"):
        host_work.check(way)
    assert launched


def test_the_work_of_the_tail(monkeypatch):
    """Three launches: the norm, what follows from it, and the step. The count of steps is new each time."""
    launched = []
    monkeypatch.setattr(launching, "launch", lambda *arguments, **named: launched.append(arguments))

    def work(parameters: int, with_tail: bool) -> host_work.Work:
        shapes = [(6, 6, 3, 3), (6,)] * (parameters // 2)
        narrow = range(parameters) if with_tail else ()
        ours = Tailed(shapes, averaged=narrow, narrow=narrow)
        handle, hyper = ours.planned(), ours.hyper.flatten().tolist()
        norm, scale, found_inf = torch.zeros(()), torch.tensor(2.0), torch.zeros(1)

        def step():
            if with_tail:
                tail = ours.tail.tolist()
                assert rep_sgd_plan_step(handle, ours.grads, hyper, [], [], scale, found_inf, tail, 1.0, norm)
            else:
                assert rep_sgd_plan_step(handle, ours.grads, hyper, [], [], None, None)

        for _ in range(3):
            ours.new_step(gradients=False)
            del launched[:]
            counted = host_work.counted(step)
        assert len(launched) == (3 if with_tail else 1)
        return counted

    (plain, _), (full, same) = ([work(n, with_tail) for n in (62, 160)] for with_tail in (False, True))
    assert full == same
    assert full.bytecodes - plain.bytecodes <= TAIL
