"""rep_sgd_step in Triton: in the interpreter, its tables for tensors too large to have, and what only a GPU shows.

On a GPU test_rep_sgd_step.py compares its bits with the reference's, among all kernels.
"""

from __future__ import annotations

import importlib
import random
import sys

import cases
import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import interpreter
from cases import Problem, assert_same_bits
from implementations import on_gpu

from gradrep_kernels.ops import reference
from gradrep_kernels.ops.triton import INTERPRETED, addressing, plans, rep_sgd_step, routes, supports
from gradrep_kernels.ops.triton.division import magic_division
from gradrep_kernels.ops.triton.launching import LAUNCHES


def test_in_the_interpreter():
    interpreter.run("interpreted_rep_sgd_step.py")


def test_planned_steps_in_the_interpreter():
    interpreter.run("interpreted_planned_step.py")


def test_captures_in_the_interpreter():
    interpreter.run("interpreted_cuda_graphs.py")


# ---- tables


def quotient(n: int, magic: int, shift: int) -> int:
    """division.quotient with the widths of a GPU."""
    assert 0 <= 2 * n < 2**32
    assert 0 < magic < 2**32
    return (2 * n * magic >> 32) >> shift


def test_magic_division():
    chance = random.Random(0)
    divisors = [
        *range(1, 300),
        *(2**k + d for k in range(9, 31) for d in (-1, 0, 1)),
        *(chance.randrange(1, 2**31) for _ in range(300)),
        2**31 - 1,
    ]
    for divisor in divisors:
        magic, shift = magic_division(divisor)
        multiples = [chance.randrange(2**31 // divisor + 1) * divisor for _ in range(20)]
        for n in (0, 1, divisor - 1, divisor, 2**31 - 1, *multiples, *(m - 1 for m in multiples)):
            if 0 <= n < 2**31:
                assert quotient(n, magic, shift) == n // divisor


NAMES = list(vars(addressing))
COLUMN = {name: getattr(addressing, name).value for name in NAMES[NAMES.index("FIRST_CHUNK") : NAMES.index("GEOMETRY")]}


def multiplier_index(geometry: np.ndarray, place: int) -> tuple[int, int, bool]:
    """What addressing.multiplier reads at a place: index in scale, index in identity, whether the identity is there."""
    row = {name: int(geometry[column]) for name, column in COLUMN.items()}
    divide = {name: (row[name + "_MAGIC"] % 2**32, row[name + "_SHIFT"]) for name in ("ROW", "INNER", "CHANNELS")}
    o = quotient(place, *divide["ROW"])
    rest = place - o * row["ROW"]
    middle = quotient(rest, *divide["INNER"])
    index = (
        o * row["OUTER_STRIDE"] + middle * row["MIDDLE_STRIDE"] + (rest - middle * row["INNER"]) * row["INNER_STRIDE"]
    )
    channel = o + row["PHASE"] - quotient(o + row["PHASE"], *divide["CHANNELS"]) * row["CHANNELS"]
    assert index < 2**31
    return index, o, rest == channel * row["TAP_STEP"] + row["TAP_FIRST"]


HUGE = {  # weight, scale, identity, channels_last
    "vector": ((2**31 + 77,), (), False, False),
    "dense vector": ((2**31 + 77,), (2**31 + 77,), False, False),
    "matrix by rows": ((70_001, 70_003), (70_001, 1), False, False),
    "matrix by columns": ((70_001, 70_003), (70_003,), False, False),
    "dense matrix": ((70_001, 70_003), (70_001, 70_003), False, False),
    "rows too long": ((3, 2**31 + 5), (3, 1), False, False),
    "rows too long, dense": ((3, 2**31 + 5), (3, 2**31 + 5), False, False),
    "rows too long, by column": ((3, 2**31 + 5), (2**31 + 5,), False, False),
    "RepOpt": ((2**15 + 3, 2**13, 3, 3), (2**15 + 3, 1, 3, 3), True, False),
    "RepOpt, channels_last": ((2**15 + 3, 2**13, 3, 3), (2**15 + 3, 1, 3, 3), True, True),
    "depthwise": ((2**28 + 1, 1, 3, 3), (2**28 + 1, 1, 3, 3), True, False),
    "dense, channels_last": ((2**15 + 3, 2**13, 3, 3), (2**15 + 3, 2**13, 3, 3), True, True),
    "kernels too large": ((2, 3, 2**15 + 1, 2**15 + 1), (2, 1, 2**15 + 1, 2**15 + 1), False, True),
}


def described(t: torch.Tensor | None):
    """As plans.describe tells of a tensor where the kernels run."""
    return t if t is None else (t.dtype, -1 if INTERPRETED else 0, t.shape, t.stride())


@pytest.mark.parametrize("name", HUGE)
def test_tensors_beyond_32_bits(name):
    """Parts that 32-bit indices reach, each of which finds its multipliers; on meta tensors, so without memory."""
    shape, scale_shape, identity, channels_last = HUGE[name]
    weight = torch.empty(shape, device="meta", dtype=torch.bfloat16)
    weight = weight.to(memory_format=torch.channels_last) if channels_last else weight
    scale = torch.empty(scale_shape, device="meta")
    parts = [scale, torch.empty(shape[0], device="meta") if identity else None]
    route = routes.route(routes.Entry((described(weight),) * 3, *map(described, parts), 0))
    assert route.scale_copy is None
    assert route.identity_copy is None
    chunks, geometry = addressing.chunk_tables([(piece, 0, None) for piece in route.pieces], 1024)
    assert [piece.start for piece in route.pieces] == list(
        np.cumsum([0] + [piece.numel for piece in route.pieces[:-1]])
    )
    assert sum(piece.numel for piece in route.pieces) == weight.numel()
    assert np.array_equal(np.bincount(chunks), [-(-piece.numel // 1024) for piece in route.pieces])
    padded = (1,) * (len(shape) - len(scale_shape)) + tuple(scale_shape)
    scale_strides = [0] * (len(shape) - len(scale_shape)) + list(scale.stride())
    chance = random.Random(0)
    taps = 0
    for piece, row in zip(route.pieces, geometry):
        assert piece.numel <= 2**30
        assert row[COLUMN["NUMEL"]] == piece.numel
        assert chunks[row[COLUMN["FIRST_CHUNK"]]] == chunks[row[COLUMN["FIRST_CHUNK"]] + (piece.numel - 1) // 1024]
        places = [0, piece.numel - 1, *(chance.randrange(piece.numel) for _ in range(50))]
        if identity:  # and places of the diagonal
            for o in (
                chance.randrange(piece.identity, piece.identity + piece.numel // piece.address.row) for _ in range(20)
            ):
                at = (o, o % shape[1], shape[2] // 2, shape[3] // 2)
                places.append(sum(n * stride for n, stride in zip(at, weight.stride())) - piece.start)
        for place in places:
            at = [(piece.start + place) // stride % size for size, stride in zip(shape, weight.stride())]
            index, o, tap = multiplier_index(row, place)
            assert piece.scale + index == sum(
                n * stride for n, size, stride in zip(at, padded, scale_strides) if size > 1
            )
            if identity:
                assert piece.identity + o == at[0]
                assert tap == (at[1] == at[0] % shape[1] and at[2] == shape[2] // 2 and at[3] == shape[3] // 2)
                taps += tap
    assert taps >= 20 * len(route.pieces) * identity


def test_parts_start_where_128_bit_accesses_can():
    weight = torch.empty(2**15 + 3, 2**13, 3, 3, device="meta", dtype=torch.bfloat16)
    route = routes.route(routes.Entry((described(weight),) * 3, None, None, 0))
    assert len(route.pieces) > 1
    assert all(piece.start * weight.itemsize % 16 == 0 for piece in route.pieces)


def test_where_it_can_be_used():
    assert supports("rep_sgd_step", "cuda") is None or INTERPRETED
    assert "TRITON_INTERPRET=1" in supports("rep_sgd_step", "cpu") or INTERPRETED
    assert supports("rep_sgd_step", "mps") is not None
    assert "no Triton implementation of supports" in supports("supports", "cuda")


@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: the kernels take CPU tensors")
def test_cpu_tensors_among_the_others_go_to_the_reference():
    problem = Problem([(40,), (5, 5, 3, 3)])
    LAUNCHES.clear()
    assert_same_bits(problem.clone().run(rep_sgd_step), problem.clone().run(reference.rep_sgd_step))
    assert not LAUNCHES


def test_without_triton_the_import_says_why(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("gradrep_kernels.ops.triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match="Triton is not installed"):
        importlib.import_module("gradrep_kernels.ops.triton")


# ---- on a GPU

SHAPES = [*cases.SHAPES.values(), (64, 48, 3, 3), (300, 70), (5000,)]
FOUR_GROUPS = [cases.HYPERS[n] for n in (0, 3, 4, 8)]


def on_device(**more) -> Problem:
    return Problem(SHAPES, device="cuda", hypers=FOUR_GROUPS, **more)


def reference_of(problem: Problem, **amp) -> Problem:
    twin = problem.clone("cpu")
    twin.hyper = problem.hyper.cpu()
    return twin.run(reference.rep_sgd_step, **{name: value.cpu() for name, value in amp.items()})


@on_gpu
@pytest.mark.parametrize("dtype", plans.COMPUTE, ids=str)
def test_one_kernel_for_all_parameters_and_groups(dtype):
    problem = on_device(dtype=dtype)
    problem.run(rep_sgd_step)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        problem.run(rep_sgd_step)
        torch.cuda.synchronize()
    kernels = [
        e.name
        for e in profile.events()
        if e.device_type == torch.autograd.DeviceType.CUDA and not e.name.startswith("Mem")
    ]
    assert kernels == ["rep_sgd_step_kernel"]


@on_gpu
@pytest.mark.parametrize("dtype", plans.COMPUTE, ids=str)
def test_tensors_that_are_not_aligned(dtype):
    """Gradients as views into DDP's buckets start anywhere."""
    problem = on_device(dtype=dtype)
    for n, g in enumerate(problem.grads):
        shifted = torch.empty(g.numel() + 1, dtype=dtype, device="cuda")[1:].as_strided(g.shape, g.stride())
        problem.grads[n] = shifted.copy_(g)
    expected = reference_of(problem)
    assert_same_bits(problem.run(rep_sgd_step), expected)


@on_gpu
def test_the_host_waits_for_nothing():
    problem = on_device()
    problem.hyper = problem.hyper.cuda()
    amp = {"grad_scale": torch.tensor(2.0, device="cuda"), "found_inf": torch.zeros(1, device="cuda")}
    problem.run(rep_sgd_step, **amp)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        problem.grads = [g.clone() for g in problem.grads]  # new addresses, so a new table
        problem.run(rep_sgd_step, **amp)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@on_gpu
@pytest.mark.parametrize("warm", [True, False])
def test_a_cuda_graph_reads_live_values(warm):
    """Learning rate, loss scale and overflow change between replays. Tables are uploaded before or in the capture."""
    Problem([(40,)], device="cuda").run(rep_sgd_step)  # a module cannot be loaded inside a capture
    problem = on_device()
    problem.hyper = problem.hyper.cuda()
    amp = {"grad_scale": torch.ones((), device="cuda"), "found_inf": torch.zeros((), device="cuda")}
    Problem([(40,)], device="cuda").run(rep_sgd_step, **amp)
    if warm:
        problem.run(rep_sgd_step, **amp)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        problem.run(rep_sgd_step, **amp)
    for overflow in (0.0, 1.0, 0.0):
        problem.hyper[:, 0] *= 0.7
        amp["grad_scale"].mul_(1.5)
        amp["found_inf"].fill_(overflow)
        expected = reference_of(problem, **amp)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(problem, expected)


def planned(problem: Problem, lr: torch.Tensor):
    """A planned step of the problem with one learning rate, on the device, for all groups."""
    handle = rep_sgd_step.plan(problem.params, problem.buffers, problem.scales, problem.identities, problem.groups)
    assert handle
    columns = problem.hyper.shape[1]
    numbers, places = problem.hyper.flatten().tolist(), list(range(0, problem.hyper.numel(), columns))
    on_device = [lr] * len(places)
    return lambda: rep_sgd_step.plan_step(handle, problem.grads, numbers, on_device, places, None, None)


@on_gpu
def test_a_planned_step_waits_for_nothing():
    """Gradients lie elsewhere in each step, and the learning rate is on the device."""
    problem, lr = on_device(), torch.tensor(0.01, device="cuda")
    step = planned(problem, lr)
    assert step()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            problem.grads = [g.clone() for g in problem.grads]
            lr.mul_(0.7)
            assert step()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@on_gpu
def test_a_cuda_graph_of_a_planned_step_reads_the_learning_rate():
    problem, lr = on_device(), torch.tensor(0.01, device="cuda")
    step = planned(problem, lr)
    assert step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert step()
    for _ in range(3):
        lr.mul_(0.7)
        problem.hyper[:, 0] = lr.item()
        expected = reference_of(problem)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(problem, expected)


@on_gpu
def test_a_cuda_graph_keeps_the_tables_of_the_host():
    Problem([(40,)], device="cuda").run(rep_sgd_step)
    problem = on_device()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        problem.run(rep_sgd_step)
    for n in range(3):
        on_device(form=list(cases.scale_shapes((2, 2, 3, 3)))[n]).run(
            rep_sgd_step
        )  # would take over memory that was let go
        expected = reference_of(problem)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(problem, expected)


@on_gpu
def test_two_streams():
    problems = [on_device() for _ in range(2)]
    expected = [reference_of(reference_of(problem)) for problem in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    for _ in range(2):
        for problem, stream in zip(problems, streams):
            with torch.cuda.stream(stream):
                problem.run(rep_sgd_step)
    torch.cuda.synchronize()
    for problem, wanted in zip(problems, expected):
        assert_same_bits(problem, wanted)


@on_gpu
def test_more_than_2_31_elements():
    shape, end = (2**15 + 3, 2**13, 3, 3), slice(-20, None)
    if torch.cuda.mem_get_info()[0] < 3.5 * 2 * 2**15 * 2**13 * 9:
        pytest.skip("needs 17 GB of GPU memory")
    tensors = [
        torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last).normal_()
        for _ in range(3)
    ]
    scale, identity = torch.rand(shape[0], 1, 3, 3, device="cuda"), torch.rand(shape[0], device="cuda")
    dense = scale[end].expand(20, *shape[1:]).clone()
    o = torch.arange(shape[0], device="cuda")[end]
    dense[torch.arange(20, device="cuda"), o % shape[1], 1, 1] += identity[end]
    last = [t[end].clone(memory_format=torch.preserve_format) for t in tensors]
    hyper = torch.tensor([[0.1, 0.9, 0.1, 0.01, 0, 0]], dtype=torch.float64)
    reference.rep_sgd_step(*([t] for t in last), [dense], [None], [False], [0], hyper)
    rep_sgd_step(*([t] for t in tensors), [scale], [identity], [False], [0], hyper)
    assert all(torch.equal(t[end], wanted) for t, wanted in zip(tensors, last))
