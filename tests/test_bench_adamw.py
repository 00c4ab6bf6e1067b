# ruff: noqa: E402 - the benches are no package: their folder goes on the path first
"""The bench of FusedRepAdamW, and that of the step by the size of kernels."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gradrep_kernels as gr

BENCH = Path(__file__).resolve().parent.parent / "bench"
if not BENCH.is_dir():
    pytest.skip("the benches are not here", allow_module_level=True)
pytest.importorskip("pytest_benchmark")
sys.path.insert(0, str(BENCH))

import bench_rep_adamw_step as bench
import bench_rep_sgd_step
import harness
import parameter_sets
import report

CPU = torch.device("cpu")


@pytest.fixture
def results(tmp_path) -> report.Results:
    return report.Results("rep_adamw_step", harness.Setup(CPU, True, 0.01, tmp_path, "command"))


def rows_of(results: report.Results) -> list[dict]:
    return results._content["targets"]


def timed(seconds: dict[str, float]) -> harness.Comparison:
    ways = {way: harness.Candidate(way, lambda: None, bytes=100.0) for way in seconds}
    return harness.Comparison(1, ways, {way: [time] for way, time in seconds.items()})


def new_tensors() -> parameter_sets.Tensors:
    torch.manual_seed(0)
    parameters = [parameter_sets.Parameter((6, 6, 3, 3), shortcut=True), parameter_sets.Parameter((500,))]
    return parameter_sets.Tensors(parameters, CPU)


def ends(tensors: parameter_sets.Tensors) -> list[Tensor]:
    return [*(p.detach() for p in tensors.params), *tensors.buffers, *tensors._squares]


# -- what is timed


def test_without_scales_all_ways_compute_the_same():
    found = {}
    for name in (bench.PLAIN, bench.FUSED, bench.FOREACH, bench.LOOP):
        tensors = new_tensors()
        tensors.branch_scales = tensors.grad_mults = {}
        if name == bench.LOOP:
            step = bench.published(tensors)
            for group in tensors._groups(1):
                assert group["weight_decay"] == 1e-4
        else:
            step = bench.steps(tensors)[name]
        before = [t.clone() for t in ends(tensors)]
        for _ in range(4):
            step()
        found[name] = ends(tensors)
        assert not any(torch.equal(a, b) for a, b in zip(found[name], before))
    for name, tensors in found.items():
        for a, b in zip(tensors, found[bench.FUSED]):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9, msg=name)


def test_the_published_loop_is_right_for_one_branch():
    """Its mask is α then."""
    of_ours, of_loop = new_tensors(), new_tensors()
    for tensors in (of_ours, of_loop):
        tensors.branch_scales = {tensors.params[0]: gr.BranchScales(torch.linspace(0.5, 1.5, 6))}
        (p,) = tensors.branch_scales
        tensors.grad_mults = {p: tensors.branch_scales[p].grad_mult(3)}
    of_loop.dense_ones = lambda: [torch.linspace(0.5, 1.5, 6).view(-1, 1, 1, 1).expand(6, 6, 3, 3)]
    step, loop = bench.ours(of_ours), bench.published(of_loop)
    for _ in range(4):
        step()
        loop()
    torch.testing.assert_close(of_ours.params[0], of_loop.params[0], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("groups", [1, 28])
def test_optimizers_of_a_comparison_share_both_moments(groups):
    tensors = parameter_sets.Tensors(parameter_sets.small_tensors(), CPU)
    bench.steps(tensors, groups)[bench.FUSED]()
    for optimizer in (tensors.adamw(gr.FusedRepAdamW, groups), tensors.adamw(torch.optim.AdamW, groups)):
        assert len(optimizer.param_groups) == groups
        for _ in range(3):
            optimizer.step()
        for p, average, square in zip(tensors.params, tensors.buffers, tensors._squares):
            assert optimizer.state[p]["exp_avg"] is average
            assert optimizer.state[p]["exp_avg_sq"] is square
            assert float(optimizer.state[p]["step"]) == 3


@pytest.mark.parametrize("kind", ["depthwise", "dense"])
def test_kernels_of_all_sizes_lie_in_the_same_memory(kind):
    floats = 1 << 19
    memory = parameter_sets.Tensors([parameter_sets.Parameter((floats,))], CPU)
    for side in bench_rep_sgd_step.TAPS:
        parameter = bench_rep_sgd_step.kernels(floats, side, kind)
        tensors = memory.seen_as([parameter])
        (p,) = tensors.params
        assert p.shape[2:] == (side, side)
        assert 0.95 * floats < p.numel() <= floats
        assert (p.shape[1] == 1) is (kind == "depthwise")
        for own, whole in ((p, memory.params[0]), (p.grad, memory.params[0].grad), (tensors.buffers, memory.buffers)):
            own, whole = (t[0] if isinstance(t, list) else t for t in (own, whole))
            assert own.data_ptr() == whole.data_ptr()
        assert tensors.grad_mults[p].scale.shape == (p.shape[0], 1, side, side)
        tensors.optimizer(gr.FusedRepSGD, grad_mults=tensors.grad_mults).step()


# -- how it is judged


SECONDS = {bench.OURS: 1.0, bench.PLAIN: 0.8, bench.FUSED: 1.02, bench.FOREACH: 3.0, bench.PROBE: 0.5}


@pytest.mark.parametrize(
    ("name", "threads", "verdict"), [("RepOpt-VGG-B1", 2, "reached"), ("RepOpt-VGG-B1", 1, ""), ("ResNet-18", 2, "")]
)
def test_steps_are_judged_on_two_threads(results, name, threads, verdict):
    bench.judge(results, timed(SECONDS), "here", name, threads)
    found = {row["what"]: (row["figure"]["median"], row["verdict"]) for row in rows_of(results)}
    assert found == {
        f"here: as fast as {bench.FUSED}": (1.02, verdict),
        f"here: as fast as {bench.FOREACH}": (3.0, ""),
        "here: time with branch scales over time without": (1.25, ""),
    }
    assert rows_of(results)[0]["bound"] == "50% of the stream probe, 0 GB/s; torch's 49%"


def test_steps_on_a_gpu_show_their_copy_rate(results):
    back = {way + bench.BACK_TO_BACK: time for way, time in ((bench.OURS, 2.0), (bench.FUSED, 3.0))}
    bench.judge(results, timed({**SECONDS, bench.COPY: 0.9, **back}), "ResNet-18", "ResNet-18", None)
    found = {row["what"]: row["figure"]["median"] for row in rows_of(results)}
    assert found["ResNet-18 on a GPU: share of the measured copy rate"] == pytest.approx(90)
    assert found[f"ResNet-18: back to back by the wall clock: as fast as {bench.FUSED}"] == 1.5
    assert {row["verdict"] for row in rows_of(results)} == {""}


@pytest.mark.parametrize(("threads", "verdicts"), [(2, ["aim reached", "reached", "missed"]), (1, [""] * 3)])
def test_kernels_are_judged_on_two_threads(results, threads, verdicts):
    first, *others = map(bench_rep_sgd_step._of_taps, bench_rep_sgd_step.TAPS)
    seconds = dict(zip(others, (1.04, 1.08, 1.2, 1.0)))
    bench_rep_sgd_step._judge_taps(results, timed({first: 1.0, **seconds, bench_rep_sgd_step.PROBE: 0.5}), "x", threads)
    rows = rows_of(results)
    assert [row["verdict"] for row in rows][:3] == verdicts
    assert [row["figure"]["median"] for row in rows] == pytest.approx(list(seconds.values()))
    assert rows[0]["what"] == "x, 13 x 13, 169 taps: time over that of 3 x 3, 9 taps"
