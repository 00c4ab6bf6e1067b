"""CUDA graph captures of the Triton ops, without a GPU.

test_triton_rep_sgd_step.py runs this file with TRITON_INTERPRET=1.

The functions through which staging.py meets CUDA are replaced: CPU tensors count as a GPU's, a capture records copies
and launches and does neither, a replay does both. What torch forbids in a capture (from 2.11 on, or in the default
mode) is an error here.
"""

from __future__ import annotations

import gc
import sys
import weakref

import cases
import pytest
import torch
from cases import Problem, assert_same_bits
from cases_optim import SGD, Pair
from cases_pairs import make
from step_tails import Tailed

import gradrep_kernels as gr
from gradrep_kernels.ops import reference
from gradrep_kernels.ops.triton import (
    joint_histogram,
    launching,
    pair_ranges,
    plans,
    rep_grad_norm,
    rep_sgd_step,
    staging,
)
from gradrep_kernels.ops.triton import pair_walk as rule

norm_module = sys.modules["gradrep_kernels.ops.triton.rep_grad_norm"]


class Graph:
    """A context in which a capture runs on a given stream; torch.cuda.graph takes one of its own."""

    def __init__(self, gpu: Gpu, stream: int):
        self.gpu, self.stream, self.nodes, self.copies, self.own = gpu, stream, [], 0, {}

    def __enter__(self):
        self.gpu.graph, self.gpu.stream, self.before = self, self.stream, self.gpu.stream
        return self

    def __exit__(self, *_):
        self.gpu.graph, self.gpu.stream = None, self.before

    def held(self, value):
        """An argument as a graph has it: memory of its own, or an address, which keeps nothing alive."""
        is_own = not isinstance(value, torch.Tensor) or id(value) in self.own or id(value._base) in self.own
        return (lambda: value) if is_own else weakref.ref(value)

    def copy(self, host: torch.Tensor) -> torch.Tensor:
        there, source = torch.full_like(host, -1), weakref.ref(host)
        self.own[id(there)] = there
        self.nodes.append(lambda: there.copy_(source()))
        self.copies += 1
        return there

    def launch(self, run, *arguments, **named) -> None:
        arguments, named = [self.held(a) for a in arguments], {name: self.held(a) for name, a in named.items()}
        self.nodes.append(lambda: run(*(a() for a in arguments), **{name: a() for name, a in named.items()}))

    def replay(self) -> None:
        for node in self.nodes:
            node()


class Gpu:
    def __init__(self, monkeypatch):
        self.graph, self.stream, self.uploads, self.blocks = None, 1, 0, []
        for name, function in {
            "on_gpu": lambda device: True,
            "capturing": lambda device: self.graph is not None,
            "stream": lambda device: self.stream,
            "pinned": self.pinned,
            "send": self.send,
            "room": staging.PinnedRoom(),
            "captured": [],
        }.items():
            monkeypatch.setattr(staging, name, function)
        monkeypatch.setattr(rep_sgd_step, "plans", plans.Plans("rep_sgd_step", plans.BLOCK, writes=True))
        monkeypatch.setattr(rep_sgd_step, "hyper_tables", {})
        monkeypatch.setattr(norm_module, "memory", plans.Plans("rep_grad_norm", norm_module.memory.chunk, writes=False))
        monkeypatch.setattr(rule, "displacement_tables", {})
        launch, launch_pairs = launching.launch, rule.launch

        def launch_or_record(*arguments, **named):
            return launch(*arguments, **named) if self.graph is None else self.graph.launch(launch, *arguments, **named)

        def scratch(shape, dtype, device):
            made = torch.full(shape, -1, dtype=dtype)
            if self.graph is not None:  # memory of the graph
                self.graph.own[id(made)] = made
            return made

        def launch_pairs_or_record(op, kernel, work, options, **more):
            if self.graph is None:
                return launch_pairs(op, kernel, work, options, **more)
            for made in more.values():  # results, and what the op derives from the map: memory of the graph
                self.graph.own[id(made)] = made
            return self.graph.launch(
                lambda **named: kernel[(work.programs,)](**named, **options), **work.arguments, **more
            )

        copy = plans.readable_copy

        def copy_or_record(*arguments):
            made = copy(*arguments)
            if self.graph is not None:  # it is there at a replay only
                value, there = made.clone(), weakref.ref(made)
                self.graph.nodes.append(lambda: there().copy_(value))
                made.fill_(float("nan"))
            return made

        monkeypatch.setattr(plans, "readable_copy", copy_or_record)

        def recorded(compute):
            """Operations of torch, whose result is memory of the graph."""

            def run(*arguments):
                made = compute(*arguments)
                if self.graph is not None:
                    self.graph.own[id(made)] = made
                    self.graph.nodes.append(lambda: made.copy_(compute(*arguments)))
                return made

            return run

        for name in ("completed", "pack"):
            monkeypatch.setattr(rep_sgd_step, name, recorded(getattr(rep_sgd_step, name)))
        monkeypatch.setattr(launching, "launch", launch_or_record)
        monkeypatch.setattr(staging, "scratch", scratch)
        monkeypatch.setattr(rule, "launch", launch_pairs_or_record)

    def pinned(self, nbytes: int) -> torch.Tensor:
        assert self.graph is None, "memory is pinned inside a capture"
        self.blocks.append(torch.full((nbytes,), 0xCC, dtype=torch.uint8))
        return self.blocks[-1]

    def send(self, table: torch.Tensor, device: torch.device, wait: bool) -> torch.Tensor:
        if self.graph is None:
            self.uploads += 1
            return table.clone()
        where = table.data_ptr()
        assert any(b.data_ptr() <= where < b.data_ptr() + len(b) for b in self.blocks), (
            "a copy from memory that is not pinned inside a capture"
        )
        assert not wait, "a wait inside a capture"
        return self.graph.copy(table)

    def capture(self, stream: int = 2) -> Graph:
        return Graph(self, stream)

    def forget(self) -> None:
        """What the ops remember may be dropped at any time; a graph must not need it."""
        for memory in (
            rep_sgd_step.plans.plans,
            rep_sgd_step.plans.calls,
            rep_sgd_step.hyper_tables,
            rule.displacement_tables,
        ):
            memory.clear()
        gc.collect()


@pytest.fixture
def gpu(monkeypatch) -> Gpu:
    return Gpu(monkeypatch)


def problem(shapes=((6, 5, 3, 3), (4, 4, 3, 3), (70,)), **more) -> Problem:
    return Problem(shapes, hypers=(cases.HYPERS[6], cases.HYPERS[3]), **more)


def assert_replays(graph: Graph, of: Problem) -> None:
    for _ in range(2):
        for g in of.grads:
            g.mul_(-0.7)
        expected = of.clone().run(reference.rep_sgd_step)
        graph.replay()
        assert_same_bits(of, expected)


class PlannedProblem:
    """Steps of a problem by a plan, as the optimizer takes them."""

    def __init__(self, of: Problem):
        self.of = of
        self.handle = rep_sgd_step.plan(of.params, of.buffers, of.scales, of.identities, of.groups)
        assert self.handle

    def step(self) -> Problem:
        hyper = self.of.hyper.flatten().tolist()
        assert rep_sgd_step.plan_step(self.handle, self.of.grads, hyper, [], [], None, None)
        return self.of


STREAMS = pytest.mark.parametrize("stream", [1, 2], ids=["on the stream of the steps", "on another"])


@STREAMS
def test_a_step_that_was_taken_before_is_a_kernel_alone(gpu, stream):
    ours = problem().run(rep_sgd_step)
    with gpu.capture(stream) as graph:
        ours.run(rep_sgd_step)
    gpu.forget()
    assert len(graph.nodes) == 1
    assert_replays(graph, ours)


@STREAMS
@pytest.mark.parametrize("double", [False, True], ids=["scales as they are", "scales that are copied"])
def test_a_planned_step_that_was_taken_before(gpu, stream, double):
    """Copies of scales are made in the graph, and those of eager steps are not used there, nor the other way round."""
    ours = problem()
    if double:
        ours.scales = [None if s is None else s.double() for s in ours.scales]
    planned = PlannedProblem(ours)
    planned.step()
    graphs = []
    for _ in range(2):
        with gpu.capture(stream) as graph:
            planned.step()
        graphs.append(graph)
        expected = ours.clone().run(reference.rep_sgd_step)
        assert_same_bits(planned.step(), expected)
        assert graph.copies == 2 * double  # pointers, and the hyper-parameters of a call that is new
    rep_sgd_step.plan_free(ours.params[0], planned.handle)
    gpu.forget()
    for graph in graphs * 2:
        assert_replays(graph, ours)


def test_planned_steps_with_gradients_that_are_new_in_the_capture(gpu):
    ours = problem()
    planned = PlannedProblem(ours)
    planned.step()
    graphs = []
    for _ in range(2):
        ours.grads = ours.clone().grads
        with gpu.capture() as graph:
            planned.step()
        assert graph.copies == 2  # pointers, hyper-parameters
        graphs.append((graph, ours.grads))
        ours.grads = ours.clone().grads
        planned.step()
    rep_sgd_step.plan_free(ours.params[0], planned.handle)
    gpu.forget()
    for graph, ours.grads in graphs * 2:
        assert_replays(graph, ours)


def test_planned_steps_on_two_streams_have_tables_of_their_own(gpu):
    planned = PlannedProblem(problem())
    planned.step()
    before = gpu.uploads
    for gpu.stream in (1, 2, 1, 2):
        planned.step()
    assert gpu.uploads == before + 2  # pointers, hyper-parameters


@pytest.mark.parametrize("warm", [True, False], ids=["a norm before", "none before"])
@STREAMS
def test_a_planned_step_with_a_tail_counts_on_the_device(gpu, stream, warm):
    """Clipped by its norm, with averages and states in bfloat16: each replay has random bits of its own."""
    ours = Tailed([(6, 5, 3, 3), (70,), (4, 4, 3, 3)])
    handle, norm, count = ours.planned(), torch.zeros(()), torch.zeros((), dtype=torch.float64)
    hyper, tail = ours.hyper.flatten().tolist(), [*ours.tail.tolist()[:3], 0.0]

    def step():
        place = [len(hyper) + 3]
        assert rep_sgd_step.plan_step(handle, ours.grads, hyper, [count], place, None, None, tail, 2.0, norm)

    if warm:
        step()
    else:
        ours.run(rep_sgd_step)
    with gpu.capture(stream) as graph:
        step()
    rep_sgd_step.plan_free(ours.params[0], handle)
    gpu.forget()
    for n in (7, 8):
        count.fill_(n)
        ours.tail[3] = n
        twin = ours.clone()
        graph.replay()
        assert float(norm) == pytest.approx(float(reference.rep_grad_norm(ours.grads, *ours.lists()[3:5])), rel=1e-6)
        ours.assert_same_bits(twin.run(reference.rep_sgd_step, clip=torch.clamp(2.0 / (norm + 1e-6), max=1.0)))


def test_no_plan_is_made_in_a_capture(gpu):
    """Its tables would be there at a replay only, and eager steps would read them too."""
    ours = problem().run(rep_sgd_step)
    columns = ours.params, ours.buffers, ours.scales, ours.identities, ours.groups
    with gpu.capture() as graph:
        assert rep_sgd_step.plan(*columns) == 0
    assert not graph.nodes
    assert rep_sgd_step.plan(*columns)


def test_gradients_that_are_new_in_the_capture(gpu):
    """As where the backward pass is captured too: two graphs of one optimizer, with eager steps around them."""
    ours, graphs = problem().run(rep_sgd_step), []
    for _ in range(2):
        twin = ours.clone()
        ours.grads = twin.grads
        with gpu.capture() as graph:
            ours.run(rep_sgd_step)
        graphs.append((graph, ours.grads))
        ours.grads = ours.clone().grads
        ours.run(rep_sgd_step)
    gpu.forget()
    for graph, ours.grads in graphs * 2:
        assert_replays(graph, ours)
        ours.clone().run(rep_sgd_step)


def test_two_steps_in_one_capture(gpu):
    """Each with tables of its own."""
    ours, other = problem().run(rep_sgd_step), problem(shapes=((3, 3, 3, 3), (9,)))
    other.run(rep_sgd_step)
    for one in (ours, other):
        one.grads = one.clone().grads
    with gpu.capture() as graph:
        ours.run(rep_sgd_step)
        other.run(rep_sgd_step)
    expected = [one.clone().run(reference.rep_sgd_step) for one in (ours, other)]
    graph.replay()
    assert_same_bits(ours, expected[0])
    assert_same_bits(other, expected[1])


def test_hyper_parameters_are_those_of_the_capture(gpu):
    """On the host a scheduler cannot reach them, and neither can eager steps with others."""
    ours = problem().run(rep_sgd_step)
    hyper, graphs = ours.hyper, []
    for factor in (1.0, 0.5):
        ours.hyper = hyper * torch.tensor([factor, 1, 1, 1, 1, 1])
        with gpu.capture() as graph:
            ours.run(rep_sgd_step)
        assert graph.copies == (factor != 1.0)
        graphs.append((graph, ours.hyper))
        ours.hyper = hyper * torch.tensor([3.0, 1, 1, 1, 1, 1])
        ours.run(rep_sgd_step)
    gpu.forget()
    for graph, ours.hyper in graphs * 2:
        assert_replays(graph, ours)


def test_another_optimizers_hyper_table_may_not_have_arrived(gpu):
    """Equal values, uploaded on a stream that whoever replays the graph has no reason to wait for."""
    ours = problem().run(rep_sgd_step)
    problem().run(rep_sgd_step)
    ours.grads = ours.clone().grads
    with gpu.capture() as graph:
        ours.run(rep_sgd_step)
    assert graph.copies == 2  # pointers and hyper-parameters


def test_without_a_step_before_the_capture_the_error_says_what_to_do(gpu):
    ours = problem()
    with gpu.capture() as graph, pytest.raises(RuntimeError, match="take one step before the capture"):
        ours.run(rep_sgd_step)
    assert not graph.nodes
    ours.run(rep_sgd_step)
    ours.grads = ours.clone().grads
    with gpu.capture() as graph:
        ours.run(rep_sgd_step)
    assert_replays(graph, ours)


def test_shapes_that_are_new_in_the_capture(gpu):
    """Any earlier step of any tensors pins enough for a small model."""
    problem(shapes=((40,),)).run(rep_sgd_step)
    ours = problem()
    with gpu.capture() as graph:
        ours.run(rep_sgd_step)
    assert graph.copies == 4  # chunks, geometry, pointers, hyper-parameters
    gpu.forget()
    assert_replays(graph, ours)


def test_any_number_of_captures_with_a_step_between(gpu, monkeypatch):
    """The step between uploads nothing, yet pins what the captures have taken."""
    monkeypatch.setattr(staging, "ROOM", 1)
    ours, graphs = problem(shapes=[(7,)]).run(rep_sgd_step), []
    eager, uploads = ours.grads, gpu.uploads
    for _ in range(20):
        ours.grads = ours.clone().grads
        with gpu.capture() as graph:
            ours.run(rep_sgd_step)
        graphs.append((graph, ours.grads))
        ours.grads = eager
        ours.run(rep_sgd_step)
    assert gpu.uploads == uploads
    for graph, ours.grads in graphs[::9]:
        assert_replays(graph, ours)


def test_a_first_call_in_inference_mode(gpu):
    """What it pins is written to outside that mode, which torch permits through a view only."""
    with torch.inference_mode():
        pair_ranges(make("relu", (2, 2, 4, 4), torch.float32), [0, 1], [1, 1], False)
    ours = problem()
    with gpu.capture() as graph:
        ours.run(rep_sgd_step)
    assert_replays(graph, ours)


def test_eager_steps_pin_nothing_but_new_tables(gpu):
    ours = problem().run(rep_sgd_step)
    before = len(gpu.blocks)
    for _ in range(3):
        ours.run(rep_sgd_step)
    assert len(gpu.blocks) == before == 3  # room for captures; pointers; hyper-parameters


def test_multipliers_outlive_their_optimizer_in_a_graph(gpu):
    ours = problem()
    ours.scales = [None if s is None else s.clone() for s in ours.scales]
    ours.run(rep_sgd_step)
    with gpu.capture():
        ours.run(rep_sgd_step)
    seen = [weakref.ref(part) for part in ours.scales + ours.identities if part is not None]
    ours.scales[:] = ours.identities[:] = []  # the lists are the caller's
    gpu.forget()
    assert all(ref() is not None for ref in seen)


def test_multipliers_outlive_their_plan_in_a_graph(gpu):
    ours = problem()
    ours.scales = [None if s is None else s.clone() for s in ours.scales]
    planned = PlannedProblem(ours)
    planned.step()
    with gpu.capture():
        planned.step()
    seen = [weakref.ref(part) for part in ours.scales + ours.identities if part is not None]
    rep_sgd_step.plan_free(ours.params[0], planned.handle)
    ours.scales = ours.identities = []
    del planned
    gpu.forget()
    assert seen
    assert all(ref() is not None for ref in seen)


@STREAMS
def test_a_scale_that_is_read_from_a_copy(gpu, stream):
    """float64 for float32 weights: the conversion is part of the graph, so it is not the one that eager steps use."""
    ours = problem()
    ours.scales = [None if s is None else s.double() for s in ours.scales]
    ours.run(rep_sgd_step)
    with gpu.capture(stream) as graph:
        ours.run(rep_sgd_step)
    assert graph.copies == 2
    assert_replays(graph, ours)


@pytest.mark.parametrize("on_host", [False, True], ids=["set before a step", "set before the capture"])
def test_spatial_scalings_set_between_captures_of_an_optimizer(gpu, monkeypatch, on_host):
    """A product of multipliers is made when one is set: made in the capture it would be a copy from the host."""
    product = gr.GradMult.__mul__

    def made(self, other):
        assert gpu.graph is None, "a product inside a capture"
        return product(self, other)

    monkeypatch.setattr(gr.GradMult, "__mul__", made)
    with gr.use_backend("triton"):
        pair = Pair(SGD, torch.float32, hyper={"momentum": 0.9})
        pair.train(2)
        weight, twin = next(pair.ours.parameters()), next(pair.twin.parameters())
        plain, graphs = pair.masks[twin], []
        for scaling in (torch.rand(3, 3), torch.rand(3, 3)):
            pair.opt.set_spatial_scaling(weight, scaling)
            pair.masks[twin] = plain * scaling
            if not on_host:
                pair.opt.step()
                pair.oracle_step()
            with gpu.capture() as graph:
                pair.opt.step()
            graphs.append((graph, pair.masks[twin]))
        gpu.forget()
        for graph, pair.masks[twin] in graphs * 2:
            graph.replay()
            pair.oracle_step()
    pair.assert_equal(1e-6)


@STREAMS
def test_the_norm_has_a_table_of_its_own(gpu, monkeypatch, stream):
    """An op that only reads: no replay has to wait for an earlier call of it.

    The reference's norm of nothing is on the CPU, so it must not be asked.
    """
    monkeypatch.setattr(reference, "rep_grad_norm", None)
    ours = problem()
    columns = ours.grads, ours.scales, ours.identities
    rep_grad_norm(*columns)
    with gpu.capture(stream) as graph:
        rep_grad_norm(*columns)
    gpu.forget()
    assert graph.copies == 1
    graph.replay()


@STREAMS
def test_maps(gpu, stream):
    """Ops that only read, too."""
    x, displacements = make("relu", (5, 2, 6, 6), torch.float32), [0, 1, 1, 0]
    ranges, _ = reference.pair_ranges(x, displacements, [1, 1], False)
    bins = torch.full((2, 2), 7, dtype=torch.int32)
    arguments = x, displacements, ranges, bins, 7, [1, 1], False
    for op, given in ((joint_histogram, arguments), (pair_ranges, (x, displacements, [1, 1], False))):
        op(*given)
        with gpu.capture(stream) as graph:
            found = op(*given)
        gpu.forget()
        assert graph.copies == 1
        graph.replay()
        if op is joint_histogram:
            assert torch.equal(found, reference.joint_histogram(*arguments))
