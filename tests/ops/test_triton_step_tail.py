"""Steps with a tail in Triton: in the interpreter, and what only a GPU shows."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import interpreter
from implementations import on_gpu
from step_tails import Tailed

from gradrep_kernels.ops import reference
from gradrep_kernels.ops.triton import plans, rep_sgd_step, scale_gradients_
from gradrep_kernels.optim.tail import clip_factor

SHAPES = [(5000,), (64, 48, 3, 3), (), (7, 6, 1, 1), (0, 3), (12, 4, 3, 3), (300, 70)]


def test_in_the_interpreter():
    interpreter.run("interpreted_step_tail.py")


@on_gpu
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype", plans.COMPUTE, ids=str)
def test_the_references_bits(dtype, aligned):
    ours = Tailed(SHAPES, dtype, device="cuda")
    if not aligned:
        ours.at_odd_places()
    amp = {"grad_scale": torch.tensor(3.0), "clip": torch.tensor(0.3)}
    twin = ours.clone("cpu")
    ours.run(rep_sgd_step, **{name: number.cuda() for name, number in amp.items()})
    ours.assert_same_bits(twin.run(reference.rep_sgd_step, **amp))
    for n in range(2):
        ours.new_step()
        ours.assert_planned_step(0.5 if n else 1e6, on_device=("ema_decay", "step") if n else ())


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cuda_graph_counts_on_the_device(dtype):
    ours = Tailed(SHAPES, dtype, device="cuda")
    handle, norm, count = ours.planned(), torch.zeros((), device="cuda"), torch.ones((), device="cuda")
    hyper, tail = ours.hyper.flatten().tolist(), [*ours.tail.tolist()[:3], 0.0]

    def step():
        place = [len(hyper) + 3]
        assert rep_sgd_step.plan_step(handle, ours.grads, hyper, [count], place, None, None, tail, 2.0, norm)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for n in (7, 8):
        count.fill_(n)
        ours.tail[3] = n
        twin = ours.clone("cpu")
        graph.replay()
        torch.cuda.synchronize()
        clip = clip_factor(norm.cpu(), 2.0)
        ours.assert_same_bits(twin.run(reference.rep_sgd_step, clip=clip))


@on_gpu
def test_the_host_waits_for_nothing():
    ours = Tailed(SHAPES, device="cuda")
    handle, norm, factor = ours.planned(), torch.zeros((), device="cuda"), torch.tensor(0.5, device="cuda")
    assert ours.planned_step(handle, 1.0, norm)
    scale_gradients_(ours.grads, factor)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            ours.new_step()
            assert ours.planned_step(handle, 1.0, norm)
            scale_gradients_(ours.grads, factor)
    finally:
        torch.cuda.set_sync_debug_mode(before)
