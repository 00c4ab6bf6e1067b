"""Steps in CUDA graphs, and models on two kinds of device. All but the first two need a GPU."""

from __future__ import annotations

import pytest
import torch
from cases_optim import STEADY, Pair, all_equal, assert_close, batch, overflow
from implementations import on_gpu

from gradrep_kernels.ops import backends
from gradrep_kernels.optim import gather, plan, step_counts, tail


@pytest.fixture
def in_a_capture(monkeypatch):
    """Tells the optimizer that a CUDA graph captures what it does, or (False) no longer."""

    def tell(captures: bool) -> None:
        for module in (gather, plan, tail):
            monkeypatch.setattr(module, "capturing", lambda device: captures)

    return tell


def test_no_array_is_made_in_a_capture(case, in_a_capture):
    """Each replay would be a parameter's first step, and momentum would never be."""
    pair = Pair(case)
    before = pair.weights()
    pair.set_grads(0)
    in_a_capture(True)
    with pytest.raises(RuntimeError, match="take one step before the capture"):
        pair.opt.step()
    assert all_equal(before, pair.weights())
    assert not pair.opt.state
    in_a_capture(False)
    pair.train(1)
    in_a_capture(True)
    pair.train(1).assert_equal()


def test_no_plan_is_made_in_a_capture(case, in_a_capture):
    """Its copies of multipliers would be filled at the replays only, and steps outside read them before."""
    pair = Pair(case).train(1)
    in_a_capture(True)
    pair.train(3)
    assert pair.opt._plan is None
    in_a_capture(False)
    pair.train(1).assert_equal()
    assert (pair.opt._plan is not None) == (backends.planner(case.make.update_rule.op, "cpu") is not None)


def test_a_count_on_the_host_is_not_captured(case, monkeypatch):
    """Each replay would take the same number of steps for granted."""
    if not case.counts:
        pytest.skip("it counts no steps")
    for steps in (1, STEADY):  # without a plan and with one
        pair = Pair(case).train(steps)
        before = pair.weights()
        pair.set_grads(0)
        with monkeypatch.context() as patch:
            patch.setattr(step_counts, "capturing", lambda device: True)
            with pytest.raises(RuntimeError, match="make the optimizer with capturable=True"):
                pair.opt.step()
        assert all_equal(before, pair.weights())
        pair.step()
        pair.assert_equal()


def test_no_average_is_made_in_a_capture(case, in_a_capture):
    pair = Pair(case).train(1)
    pair.opt.ema_decay = 0.9
    in_a_capture(True)
    pair.set_grads(0)
    with pytest.raises(RuntimeError, match="parameters need an array 'ema', one of shape"):
        pair.opt.step()
    in_a_capture(False)
    pair.opt.step()
    in_a_capture(True)
    pair.opt.step()


def test_steps_are_counted_through_replays(in_a_capture):
    """The host counts the steps that it takes. In a replay a number on the device goes on."""
    device = torch.device("cpu")  # in the place of a GPU's
    own = tail.TailOptions(ema_decay=0.9)
    in_a_capture(True)
    with pytest.raises(RuntimeError, match="a step whose number counts: take one step before the capture"):
        own._counted(device)
    in_a_capture(False)
    for step in range(1, 4):
        assert own._counted(device) == step
        own.took(device, None)
    in_a_capture(True)
    captured_number = own._counted(device)  # each replay computes it anew, and then counts
    assert float(captured_number) == 4
    for replay in range(3):
        assert float(own._counted(device)) == 4 + replay
        own.took(device, None)
    in_a_capture(False)
    assert float(own._counted(device)) == 7  # an eager step
    own.took(device, None)
    groups = [{}]
    own.save(groups)
    assert groups[0]["step_count"] == 7
    own.restore([{"step_count": 2, "rounding_seed": 5}])
    assert float(own._counted(device)) == 3
    assert own.seed == 5


def on_gpu_to_capture(pair: Pair) -> None:
    """Move ours to the GPU, before its first step. What counts the steps of a parameter is to do so there."""
    pair.ours.cuda()
    for group in pair.opt.param_groups:
        if "capturable" in group:
            group["capturable"] = True


def captured(pair: Pair) -> torch.cuda.CUDAGraph:
    """A graph of one step of ours, on the GPU; arrays and what is derived from the multipliers are made before."""
    on_gpu_to_capture(pair)
    pair.train(3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pair.opt.step()
    return graph


def replay(pair: Pair, graph, steps: int = 3) -> None:
    """With new values in the gradients that were captured."""
    for step in range(steps):
        for p, q in zip(pair.ours.parameters(), pair.twin.parameters()):
            q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(step))
            p.grad.copy_(q.grad)
        graph.replay()
        pair.oracle_step()
    for p, q in zip(pair.ours.parameters(), pair.twin.parameters()):
        assert_close(p.cpu(), q, 1e-6)


@on_gpu
@pytest.mark.parametrize("plain", [True, False])
def test_cuda_graph(case, plain):
    pair = Pair(case, torch.float32, hyper=case.plain if plain else case.hyper)
    replay(pair, captured(pair))


@on_gpu
def test_cuda_graph_follows_a_tensor_lr(case):
    if not case.is_served_by_kernels("cuda"):
        pytest.skip("the reference reads hyper-parameters on the host")
    pair = Pair(case, torch.float32)
    lr = torch.tensor(0.05, device="cuda")
    pair.opt.param_groups[0]["lr"] = lr
    graph = captured(pair)
    for value in (0.05, 0.2, 0.01):
        lr.fill_(value)
        pair.oracle.param_groups[0]["lr"] = value
        replay(pair, graph, steps=2)


@on_gpu
def test_two_captures_before_there_is_a_plan(case):
    """The multipliers are read from copies. Those of the second graph are its own."""
    if not case.is_served_by_kernels("cuda"):
        pytest.skip("the reference reads hyper-parameters on the host")
    pair = Pair(case)
    on_gpu_to_capture(pair)
    pair.train(2)  # the next step would make the plan
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    for graph in graphs:
        with torch.cuda.graph(graph):
            pair.opt.step()
    for graph in reversed(graphs):
        replay(pair, graph)


class WholeStep:
    """Forward, backward and step of a Pair on the GPU, in one graph.

    float64, for convolutions in float32 may use TF32.
    """

    def __init__(self, pair: Pair, images: int = 4, by_hand: bool = False):
        self.pair, self.x = pair, batch(torch.float64, images=images).cuda()
        on_gpu_to_capture(pair)
        side = torch.cuda.Stream()  # the capture is on yet another one
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.ours()
                self.theirs()
        torch.cuda.current_stream().wait_stream(side)
        self.capture(by_hand)

    def ours(self) -> None:
        self.pair.opt.zero_grad()
        self.pair.ours(self.x).square().mean().backward()
        self.pair.opt.step()

    def theirs(self) -> None:
        self.pair.oracle.zero_grad()
        self.pair.twin(self.x.cpu()).square().mean().backward()
        self.pair.oracle_step()

    def capture(self, by_hand: bool = False) -> None:
        self.pair.opt.zero_grad()  # so that the gradients are in the graph's memory
        self.graph = torch.cuda.CUDAGraph()
        if not by_hand:
            with torch.cuda.graph(self.graph):
                self.ours()
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.graph.capture_begin()
            self.ours()
            self.graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)

    def replay(self, seed: int) -> None:
        self.x.copy_(batch(torch.float64, seed, images=len(self.x)))
        self.graph.replay()
        self.theirs()

    def check(self) -> None:
        for p, q in zip(self.pair.ours.parameters(), self.pair.twin.parameters()):
            assert_close(p.cpu(), q, 1e-10)


@on_gpu
@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("plain", [True, False])
def test_cuda_graph_of_the_whole_training_step(case, plain, by_hand):
    """After a warm-up on another stream; the gradients' addresses are new in the capture."""
    whole = WholeStep(Pair(case, hyper=case.plain if plain else case.hyper), by_hand=by_hand)
    for seed in range(3):
        whole.replay(seed)
    whole.check()


@on_gpu
def test_two_cuda_graphs_of_one_optimizer_in_turns(case):
    pair = Pair(case)
    graphs = [WholeStep(pair, images) for images in (4, 3)]
    for seed in range(4):
        graphs[seed % 2].replay(seed)
    graphs[0].check()


@on_gpu
def test_spatial_scalings_set_between_cuda_graphs(case):
    """Nothing comes between the setting and the capture, not even a step; the first graph keeps its multipliers."""
    if not case.is_served_by_kernels("cuda"):
        pytest.skip("the reference keeps no multipliers for a graph once others are set")
    whole = WholeStep(Pair(case))
    graphs = []
    for scaling in (torch.rand(3, 3), torch.rand(3, 3)):
        whole.pair.set_scaling(0, scaling)
        whole.capture()
        graphs.append((whole.graph, dict(whole.pair.masks), dict(whole.pair.scalings)))
    for seed, (whole.graph, whole.pair.masks, whole.pair.scalings) in enumerate(graphs * 2):
        whole.replay(seed)
    whole.check()


@on_gpu
def test_models_on_two_kinds_of_device(case):
    """Some parameters on the CPU, some on the GPU, one scaler."""
    pair = Pair(case, torch.float32, fused=True)
    pair.ours[:4].cuda()
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
    for step in range(STEADY):
        pair.set_grads(step)
        scaler.scale(torch.zeros((), device="cuda"))
        for p in pair.ours.parameters():
            p.grad.mul_(8.0)
        scaler.step(pair.opt)
        scaler.update()
        pair.oracle_step()
    pair.set_grads(0)
    overflow(pair)
    before = pair.weights()
    scaler.step(pair.opt)
    assert all_equal(before, pair.weights())
    for p, q in zip(pair.ours.parameters(), pair.twin.parameters()):
        assert_close(p.cpu(), q, 1e-6)


@on_gpu
@pytest.mark.parametrize("narrow", [False, True])
def test_a_replay_clips_averages_and_draws_new_bits(case, narrow):
    """Against eager steps on the CPU, whose bits are those of the specification."""
    pair, twin = Pair(case), Pair(case)
    options = {"max_grad_norm": 0.3, "ema_decay": 0.9}
    if narrow and "momentum_buffer" in case.states:
        options["momentum_dtype"] = torch.bfloat16
    pair.ours.cuda()
    for each in (pair, twin):
        each.opt = case.make(each.ours.parameters(), **{"lr": 0.05, **case.hyper}, **options)
        for seed in range(3):
            each.set_grads(seed)
            each.opt.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pair.opt.step()
    for _ in range(3):
        graph.replay()
        twin.opt.step()
    assert pair.opt.state_dict()["param_groups"][0]["step_count"] == 6
    for p, q in zip(pair.ours.parameters(), twin.ours.parameters()):
        assert_close(p.cpu(), q)
        assert_close(pair.opt.ema(p).cpu(), twin.opt.ema(q))
