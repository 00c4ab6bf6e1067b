# ruff: noqa: E402 - the benches are no package: their folder goes on the path first
"""The benches: baselines compute what the package does, the harness measures what it says, the quick form runs."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import gradrep_kernels as gr
from gradrep_kernels.ops import backends
from gradrep_kernels.ops.registry import NAMESPACE, OPS

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
if not BENCH.is_dir():
    pytest.skip("the benches are not here", allow_module_level=True)
pytest.importorskip("pytest_benchmark")
sys.path.insert(0, str(BENCH))

import bench_joint_histogram
import bench_rep_sgd_step
import bench_sgs
import feature_maps
import gpu_check
import harness
import ledger
import parameter_sets
import published
import report
import test_lost_device

TARGET_ROWS = {  # of the quick form on a CPU, where those of a GPU are named as not measured
    "rep_sgd_step": {"S1", "S2", "S3", "S4", "S5", "T5", "G0", "G1"},
    "rep_adamw_step": {"T6"},
    "step_tail": {"T1", "T2", "T3", "T4", "G0", "G5"},
    "joint_histogram": {"H1", "H2", "G2", "G3"},
    "sgs": {"H3", "", "G4"},
}


@pytest.fixture
def setup(tmp_path) -> harness.Setup:
    return harness.Setup(torch.device("cpu"), True, 0.01, tmp_path, "command")


# -- what is timed


@pytest.mark.parametrize(
    ("name", "tensors", "millions", "shortcuts"),
    [("RepOpt-VGG-B1", 86, 51.84, 23), ("ResNet-18", 62, 11.69, 13), ("ResNet-50", 161, 25.56, 13)],
)
def test_parameter_sets_are_those_of_the_networks(name, tensors, millions, shortcuts):
    parameters = parameter_sets.SETS[name]()
    assert len(parameters) == tensors
    assert (
        sum(p.shortcut for p in parameters) == shortcuts
    )  # k x k convolutions that change neither the channels nor the size
    assert round(sum(torch.Size(p.shape).numel() for p in parameters) / 1e6, 2) == millions


def test_b1_is_the_models_b1():
    with torch.device("meta"):
        model = gr.models.repopt_vgg_b1()
    parameters = parameter_sets.repopt_vgg_b1()
    assert [p.shape for p in parameters] == [tuple(p.shape) for p in model.parameters()]


@pytest.mark.parametrize("groups", [1, 28])
def test_optimizers_of_a_comparison_are_past_their_first_step_and_share_state(groups):
    tensors = parameter_sets.Tensors(parameter_sets.small_tensors(), torch.device("cpu"))
    optimizers = [tensors.optimizer(cls, groups) for cls in (gr.FusedRepSGD, torch.optim.SGD)]
    for optimizer in optimizers:
        assert len(optimizer.param_groups) == groups
        assert all(
            optimizer.state[p]["momentum_buffer"] is buffer for p, buffer in zip(tensors.params, tensors.buffers)
        )
        optimizer.step()
        assert all(
            optimizer.state[p]["momentum_buffer"] is buffer for p, buffer in zip(tensors.params, tensors.buffers)
        )


def test_published_loop_takes_the_same_step():
    ends = []
    for published_way in (False, True):
        torch.manual_seed(0)
        tensors = parameter_sets.Tensors(
            [parameter_sets.Parameter((6, 6, 3, 3), shortcut=True), parameter_sets.Parameter((6,))], torch.device("cpu")
        )
        masks = {p: mult.dense(p.shape) for p, mult in tensors.grad_mults.items()}
        assert len(masks) == 1
        for _ in range(3):
            if published_way:
                published.rep_sgd_loop(tensors.params, masks, tensors.buffers, lr=1e-4, momentum=0.9, weight_decay=1e-4)
            else:
                tensors.optimizer(gr.FusedRepSGD, grad_mults=tensors.grad_mults).step()
        ends.append([*tensors.params, *tensors.buffers])
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("remove_near", [False, True])
def test_published_algorithm_gives_the_same_scaling(remove_near):
    batches = [feature_maps.KINDS["smooth"]((4, 3, 9, 7), torch.device("cpu")).double() for _ in range(2)]
    found = published.spatial_gradient_scaling(
        [x.numpy() for x in batches],
        (3, 3),
        1,
        feature_maps.half_displacements(3),
        published.numpy_histogram2d,
        remove_near=remove_near,
    )
    expected = gr.spatial_gradient_scaling(torch.cat(batches), 3, padding=1, remove_near=remove_near)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_histogram_baselines_count_the_same_pairs():
    shape, bins = (5, 3, 8, 6), 9
    x = feature_maps.KINDS["uniform"](shape, torch.device("cpu"))
    expected = gr.joint_histogram(x, feature_maps.half_displacements(3), bins, padding=1)
    assert int(expected.sum()) == feature_maps.pairs(shape, 3, 1)
    numbers = bench_joint_histogram._bin_numbers(x, bins)
    assert torch.equal(torch.stack(bench_joint_histogram._bincounts(numbers, bins)).view_as(expected), expected)


def test_graycomatrix_baseline_counts_the_same_pairs():
    pytest.importorskip("skimage")
    shape, bins = (5, 3, 8, 6), 9
    x = feature_maps.KINDS["uniform"](shape, torch.device("cpu"))
    expected = gr.joint_histogram(x, [(0, 1), (1, 1), (1, 0), (1, -1)], bins, padding=1)  # in the order of the angles
    found = bench_joint_histogram._graycomatrices(bench_joint_histogram._bin_numbers(x, bins), bins, 3)()
    for c, counts in enumerate(found):
        assert np.array_equal(counts[:bins, :bins, 0].transpose(2, 0, 1), expected[c].numpy())


@pytest.mark.parametrize(
    ("layers", "images", "billions"),
    [(feature_maps.VGG16_CIFAR, 20 * 128, 2.43), (feature_maps.RESNET18_IMAGENET, 2 * 256, 5.67)],
    ids=["VGG-16", "ResNet-18"],
)
def test_layers_are_those_of_the_networks(layers, images, billions):
    total = sum(layer.count * feature_maps.pairs(layer.shape(images), layer.kernel, layer.padding) for layer in layers)
    assert round(total / 1e9, 2) == billions


def test_vgg16_layers_are_the_models():
    found = [tuple(x.shape[1:]) for _, x in feature_maps.conv_inputs(gr.models.vgg16(), torch.zeros(1, 3, 32, 32))]
    assert found == [layer.shape(1)[1:] for layer in feature_maps.VGG16_CIFAR for _ in range(layer.count)]


# -- how it is timed


class _Benchmark:
    """What `compare` uses of pytest-benchmark's fixture."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, target, rounds, iterations):
        for _ in range(rounds):
            target()


def test_ratios_are_taken_within_rounds():
    timed = harness.Comparison(1, seconds={"a": [1.0, 2.0, 9.0], "b": [1.0, 4.0, 3.0]})
    assert timed.ratio("a", "b") == harness.Figure(1.0, 0.75, 2.0, 3)  # of 1, 0.5 and 3; the medians' ratio is 0.5


def test_every_way_runs_once_a_round_and_they_take_turns_to_be_first(setup):
    order = []

    def clock(run, calls):
        order.append(run())
        return run()

    ways = [harness.Candidate("a", lambda: 6.0), harness.Candidate("b", lambda: 2.0, share=0.5)]
    timed = harness.compare(_Benchmark(), setup, ways, clock=clock)
    assert order[:6] == [6.0, 2.0, 2.0, 6.0, 6.0, 2.0]
    assert (
        len(timed.seconds["a"]) == len(timed.seconds["b"]) == len(order) // 2 - 1
    )  # the first round only tells how many there may be
    assert timed.ratio("a", "b").median == 1.5  # b runs on half of the work


def test_optional_ways_are_skipped_with_their_reason_and_others_are_not(setup):
    def absent():
        raise ModuleNotFoundError("No module named 'fast_histogram'")

    ways = [harness.Candidate("here", lambda: 1.0), harness.Candidate("absent", absent, optional=True)]
    timed = harness.compare(_Benchmark(), setup, ways)
    assert timed.skipped == {"absent": "ModuleNotFoundError: No module named 'fast_histogram'"}
    assert timed.ratio("absent", "here") is None
    with pytest.raises(ModuleNotFoundError):
        harness.compare(_Benchmark(), setup, [harness.Candidate("absent", absent)])


def test_threads_are_set_for_a_run_and_put_back(setup):
    before, seen = torch.get_num_threads(), []
    ways = [
        harness.Candidate("own", lambda: seen.append(torch.get_num_threads()), threads=3),
        harness.Candidate("all", lambda: seen.append(torch.get_num_threads())),
    ]
    timed = harness.compare(_Benchmark(), setup, ways, threads=2)
    assert seen[:2] == [3, 2]
    assert set(seen) == {2, 3}
    assert (timed.threads_of("own"), timed.threads_of("all"), torch.get_num_threads()) == (3, 2, before)


def test_a_way_may_have_a_clock_of_its_own(setup):
    ways = [
        harness.Candidate("own", lambda: None, clock=lambda run, calls: 3.0 * calls, calls=2, share=2),
        harness.Candidate("the comparison's", lambda: None),
    ]
    timed = harness.compare(_Benchmark(), setup, ways, clock=lambda run, calls: 1.0)
    assert timed.ratio("own", "the comparison's").median == 3.0


def test_calls_of_cuda_are_counted_by_kind(monkeypatch):
    names = ["aten::add", "cudaLaunchKernel", "cuLaunchKernelEx", "cudaLaunchKernelExC", "cudaGraphLaunch"]
    names += ["cudaMemcpyAsync", "cudaMemsetAsync", "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMalloc"]
    profile = SimpleNamespace(events=lambda: [SimpleNamespace(name=name) for name in names])
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: contextlib.nullcontext(profile))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    ran = []
    assert harness.cuda_calls(lambda: ran.append(1)) == {"launches": 4, "copies": 2, "waits": 1}
    assert ran == [1]


# -- what only a GPU measures, as far as it runs without one


def _rows(results: report.Results) -> dict[str, dict]:
    return {f"{row['row']} {row['what']}": row for row in results._content["targets"]}


@pytest.mark.parametrize("count", [62, 161])
def test_host_cost_of_a_step_on_a_gpu(setup, count):
    tensors = parameter_sets.Tensors(parameter_sets.SETS[f"{count} x 1000"](), setup.device)
    assert {(p.numel(), len(tensors.params)) for p in tensors.params} == {(1000, count)}
    ways = bench_rep_sgd_step._host_ways(tensors, 3)
    timed = harness.compare(_Benchmark(), setup, ways, clock=harness.host_clock)
    ours, triton = bench_rep_sgd_step.BY_BACKEND.values()
    assert set(timed.seconds) == {ours, bench_rep_sgd_step.FUSED}
    assert set(timed.skipped) == {triton, bench_rep_sgd_step.GRAPH_OURS, bench_rep_sgd_step.GRAPH_FUSED}
    timed.seconds = {ours: [60e-6, 60e-6], bench_rep_sgd_step.FUSED: [90e-6, 90e-6]}
    results = report.Results("rep_sgd_step", setup)
    bench_rep_sgd_step._judge_host(results, timed, count)
    rows = _rows(results)
    what = f"G0 host cost of an eager step, {count} tensors in 2 groups, "
    assert len(rows) == 4
    assert rows[what + "auto"]["figure"]["median"] == pytest.approx(60)
    assert rows[what + "auto"]["verdict"] == {62: "reached", 161: "aim reached"}[count]
    assert rows[f"{what}auto: as fast as {bench_rep_sgd_step.FUSED}"]["figure"]["median"] == pytest.approx(1.5)
    assert rows[what + "triton"]["verdict"].startswith("not measured: Unavailable")


@pytest.mark.parametrize(("name", "judged"), [("RepOpt-VGG-B1", True), ("ResNet-18", False)])
def test_steps_on_a_gpu_are_judged_by_their_copy_rate_and_shown_by_the_wall_clock(setup, name, judged):
    bench = bench_rep_sgd_step
    seconds = {bench.OURS: 1.0, bench.FUSED: 1.2, bench.COPY: 0.9, bench.OURS + bench.BACK_TO_BACK: 1.5}
    seconds[bench.FUSED + bench.BACK_TO_BACK] = 3.0
    ways = {way: harness.Candidate(way, lambda: None, bytes=100.0) for way in seconds}
    timed = harness.Comparison(1, ways, {way: [time] for way, time in seconds.items()}, {bench.GRAPH_OURS: "no graph"})
    results = report.Results("rep_sgd_step", setup)
    bench._judge_gpu(results, timed, name, "contiguous", 1)
    found = {what: (row["verdict"], row["figure"] and row["figure"]["median"]) for what, row in _rows(results).items()}
    what = f"G1 {name}, contiguous: "
    assert found == {
        f"{what}share of the measured copy rate": ("reached" if judged else "", pytest.approx(90)),
        f"{what}as fast as {bench.FUSED}": ("aim reached" if judged else "", pytest.approx(1.2)),
        f"{what}CUDA graph: as fast as {bench.GRAPH_FUSED}": ("not measured: no graph", None),
        f"{what}back to back by the wall clock: as fast as {bench.FUSED}": ("", 2.0),
        f"{what}back to back by the wall clock: time over that on the GPU alone": ("", 1.5),
    }


def test_updates_from_training_batches_are_timed_from_an_update_on(setup):
    replay = bench_sgs._replay(setup, 2, 2)
    learn, gather = bench_sgs._training_batches(replay)
    assert (learn.share, gather.share) == (13, 13)
    (controller,) = {hook.updates for tap in replay.taps for hook in tap._forward_pre_hooks.values()}
    before = controller.steps
    assert gather.clock(gather.run, 1) > 0
    assert controller.steps == before + 1  # the update before the clock is read
    assert len(controller._ranges._pairs) == 13
    tables = [controller._tables._arrays.all_of(layer) for layer in controller._ranges._pairs]
    assert all((table > 0).any() for (table,) in tables)


def test_every_row_has_its_words():
    assert set().union(*TARGET_ROWS.values()) == set(ledger.CODES)


def test_whole_updates_are_judged_at_every_30_epochs():
    assert bench_sgs.SHARES == {(bench_sgs.OURS, 1): (0.5, 0.1), (bench_sgs.WHOLE_20, 30): (0.3, 0.15)}


# -- how it is told


@pytest.mark.parametrize(
    ("bounds", "value", "verdict"),
    [
        ((1.05, 1.2, False), 1.2, "aim reached"),
        ((1.05, 1.2, False), 1.1, "reached"),
        ((1.05, 1.2, False), 1.0, "missed"),
        ((1.05, 1.02, True), 1.02, "aim reached"),
        ((1.05, 1.02, True), 1.03, "reached"),
        ((1.05, 1.02, True), 1.06, "missed"),
        ((2.0, None, False), 9.0, "reached"),
        ((None, None, False), 9.0, ""),
        ((None, 5.0, True), 4.0, "aim reached"),
        ((None, 5.0, True), 6.0, "aim missed"),
    ],
)
def test_verdicts(bounds, value, verdict):
    assert report.Target("S1", "what", "x", *bounds).verdict(value) == verdict


def _a_run(setup, figure: float) -> report.Results:
    results = report.Results("rep_sgd_step", setup)
    results.target(report.Target("S1", "as fast", "x", 1.05, 1.2), figure, bound="80% of the stream probe")
    results.finish(whole=True)
    return results


def test_a_second_run_replaces_the_file_and_remembers_the_first(setup):
    for n in range(report.KEPT + 3):
        results = _a_run(setup, 1.0 + n)
    assert sorted(path.name for path in results.folder.iterdir()) == ["rep_sgd_step.json", "rep_sgd_step.md"]
    content = json.loads(results.path.read_text())
    assert content["targets"][0]["figure"]["median"] == n + 1.0
    assert [run["figures"]["S1 as fast"] for run in content["history"]] == [m + 1.0 for m in range(n - report.KEPT, n)]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"targets": [{}]}'])
def test_a_damaged_file_is_replaced(setup, text):
    path = _a_run(setup, 1.0).path
    path.write_text(text)
    assert json.loads(_a_run(setup, 2.0).path.read_text())["history"] == []


def test_markdown_marks_what_was_missed_and_by_what_it_is_bound(setup):
    page = _a_run(setup, 1.0).markdown()
    row = next(line for line in page.splitlines() if line.startswith("| S1"))
    assert row == "| S1 | as fast | 1 x |  | ≥ 1.05 x | ≥ 1.2 x | **missed** | 80% of the stream probe |"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (1234.5, "1230"), (12.345, "12.3"), (0.00012345, "0.000123"), (0.0000012, "0.000001")],
)
def test_numbers(value, shown):
    assert report.number(value) == shown


def test_a_wall_clock_counts_the_wait_for_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: time.sleep(0.05))
    assert harness.wall_clock(int, 1) >= 0.05 > harness.host_clock(int, 1)


def test_the_l2_cache_is_flushed_by_reading(monkeypatch):
    """What was written would be written back while the clock runs."""
    buffer = torch.zeros(8)
    monkeypatch.setattr(harness, "_flush_buffer", lambda: buffer)
    read = []
    monkeypatch.setattr(torch.Tensor, "sum", lambda tensor: read.append(tensor is buffer))
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda end: 1.0)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    harness.device_clock(lambda: None, 1)
    assert read == [True]
    assert buffer._version == 0


# -- the whole


def _run(*command: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def quick_forms(tmp_path_factory) -> Path:
    """Folder of the results of all benches, run by one process: to start one takes as long as the smallest bench."""
    folder = tmp_path_factory.mktemp("quick")
    files = (f"bench/bench_{bench}.py" for bench in TARGET_ROWS)
    done = _run("-m", "pytest", *files, "--quick", "--device", "cpu", "--threads", "1", "--results", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("bench", list(TARGET_ROWS))
def test_quick_form(quick_forms, bench):
    assert {path.stem for path in quick_forms.glob("*/*.json")} == set(TARGET_ROWS)
    (path,) = quick_forms.glob(f"*/{bench}.json")
    content = json.loads(path.read_text())
    assert path.stem == content["bench"] == bench
    assert path.parent.name == content["device"] == harness.slug(torch.device("cpu"))
    assert content["quick"]
    assert content["complete"]
    assert content["machine"]["cpu"]
    assert content["versions"]["torch"] == torch.__version__
    assert {row["row"] for row in content["targets"]} == TARGET_ROWS[bench]
    assert all(np.isfinite(row["figure"]["median"]) for row in content["targets"] if row["figure"])
    assert all(
        row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"] for row in content["measurements"]
    )
    page = path.with_suffix(".md").read_text()
    assert page == report.markdown(content)
    assert "Its figures mean nothing" in page


def test_a_selection_is_not_a_whole_run(tmp_path):
    done = _run(
        "-m",
        "pytest",
        "bench/bench_rep_sgd_step.py",
        "--quick",
        "--device",
        "cpu",
        "-k",
        "memory",
        "--results",
        str(tmp_path),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*/*.json")
    assert not json.loads(path.read_text())["complete"]


def test_gpu_check_says_that_there_is_no_gpu(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(gpu_check, "gpu_architecture", lambda: None)
    assert gpu_check.main(["--results", str(tmp_path / "out")]) == 2
    assert "sees no GPU" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_gpu_check_goes_on_after_a_failure_and_tells_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "gpu_architecture", lambda: None)
    broken = tmp_path / "test_broken.py"
    broken.write_text("import pytest\n\n\n@pytest.mark.gpu\ndef test_on_gpu():\n    assert False, 'out of order'\n")
    arguments = [
        "--dry-run",
        "--results",
        str(tmp_path),
        "--only",
        "small-run",
        "tests",
        "sanitizer",
        "--test-args",
        str(broken),
    ]
    assert gpu_check.main(arguments) == 1
    page = (tmp_path / "summary.md").read_text()
    assert "There is no GPU here" in page
    assert "| small run | passed |" in page
    assert "| tests on the GPU | failed |" in page
    assert "out of order" in page.split("## tests on the GPU")[1]
    assert "| sanitizer | skipped |" in page


def test_gpu_check_ends_a_phase_at_its_limit(tmp_path):
    check = gpu_check.Check(tmp_path, True, None, ())
    run = check.run([sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"], 2)
    assert run.status is None
    assert run.seconds < 20
    with pytest.raises(ProcessLookupError):
        os.kill(int(run.output.splitlines()[0]), 0)


def test_gpu_check_keeps_packages_that_come_by_pythonpath(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "only_here.py").touch()
    run = gpu_check.Check(tmp_path, True, None, ()).run(
        [sys.executable, "-c", "import only_here, gradrep_kernels; print(gradrep_kernels.__file__)"], 60
    )
    assert run.status == 0, run.output
    assert Path(run.output.strip()).parents[1] == ROOT


def test_gpu_check_counts_from_its_start(tmp_path, monkeypatch):
    """Asking torch for the GPU takes seconds."""
    seen = []
    start = time.monotonic()
    monkeypatch.setattr(gpu_check, "gpu_architecture", lambda: time.sleep(1))
    monkeypatch.setattr(gpu_check, "environment", lambda check: "")
    monkeypatch.setattr(gpu_check, "PHASES", {"look": lambda check: seen.append(check) or []})
    assert gpu_check.main(["--dry-run", "--results", str(tmp_path), "--only", "look"]) == 0
    assert seen[0].until < start + gpu_check.DEADLINE + 0.5


def test_gpu_check_fits_into_ten_minutes():
    assert (
        sum(gpu_check.LIMITS.values()) + 60 <= gpu_check.DEADLINE
    )  # a phase that takes all it may takes nothing from the next
    assert gpu_check.DEADLINE + 2 * gpu_check.GRACE < 600
    assert list(gpu_check.PHASES)[-2:] == ["sanitizer", "other-tests"]  # where running out of time is no failure


def test_gpu_check_runs_what_a_cuda_error_left(tmp_path):
    check = gpu_check.Check(tmp_path, True, "9.0", (str(test_lost_device.write_tests(tmp_path)), "-p", "no:xdist"))
    (found,) = gpu_check.tests(check)
    assert found.state == "failed"
    assert found.note == "exit status 1; 3 passed, 2 failure; a CUDA error ended pytest 2 times"
    assert {name: len(wrong) for name, wrong in test_lost_device.outcomes(tmp_path / "junit.xml").items()} == {
        f"test_on_gpu[{n}]": int(n in (1, 3)) for n in range(5)
    }
    assert all(f"test_on_gpu[{n}]" in found.output for n in (1, 3))


def test_gpu_check_does_not_start_tests_for_ever(tmp_path):
    junit = "<testsuite><testcase name='a'><failure/></testcase></testsuite>"
    check = _fake_gpu(tmp_path, junit, gpu_check.DEVICE_LOST)
    (found,) = gpu_check.tests(check)
    assert found.state == "failed"
    assert "what was left did not run" in found.note
    assert len(check.commands) == 1 + gpu_check.RESTARTS


@pytest.mark.parametrize("of_gpu", [True, False], ids=["gpu", "others"])
def test_gpu_check_runs_the_tests_of_the_files_that_can_be_collected(tmp_path, of_gpu):
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    whole = "import pytest\n\n\n@pytest.mark.gpu\ndef test_a(): ...\n\n\ndef test_b(): ...\n"
    (tmp_path / "test_whole.py").write_text(whole)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    check = gpu_check.Check(tmp_path, True, None, (str(tmp_path),))
    (found,) = gpu_check.tests(check) if of_gpu else gpu_check.other_tests(check)
    assert found.state == "failed"
    assert "no_such_module" in found.output
    assert "1 passed" in found.note


class _FakeGpu(gpu_check.Check):
    """Answers each command with what a machine with a GPU might."""

    def run(self, command, limit, **env):
        self.commands.append(command)
        self.environments.append(env)
        if "--backend" in command:
            return gpu_check.Run(int(command[2] not in self.serve), 1.0, "differs")
        junit = next(
            (argument.removeprefix("--junitxml=") for argument in command if argument.startswith("--junitxml=")), None
        )
        if junit:
            Path(junit).write_text(self.junit)
        return gpu_check.Run(self.status, 1.0, self.output)


def _fake_gpu(tmp_path, junit="", status=0, output="") -> _FakeGpu:
    check = _FakeGpu(tmp_path, False, "9.0", ())
    check.commands, check.junit, check.status, check.output = [], junit, status, output
    check.environments, check.serve = [], ()
    return check


@pytest.mark.parametrize(
    ("cases", "state"),
    [
        ('<testcase name="a[triton-cuda]"/>', "passed"),
        ('<testcase name="a[triton-cuda]"><skipped message="no GPU"/></testcase>', "failed"),
    ],
    ids=["a kernel ran", "none ran"],
)
def test_gpu_check_wants_a_test_that_ran_on_the_gpu(tmp_path, cases, state):
    check = _fake_gpu(tmp_path, f"<testsuite>{cases}</testsuite>")
    outcomes = {outcome.phase: outcome.state for outcome in gpu_check.tests(check)}
    assert outcomes["tests on the GPU"] == state
    (command,) = check.commands
    assert command[command.index("-m", 2) + 1] == "gpu"


@pytest.mark.parametrize(
    ("status", "output", "state"),
    [
        (0, "9 passed", "passed"),
        (1, "FAILED a.py::b", "failed"),
        (None, "9 passed", "skipped"),
        (None, "FAILED a.py::b\n1 failed", "failed"),
    ],
    ids=["all ran", "one failed", "no time", "no time, one failed"],
)
def test_gpu_check_may_run_out_of_time_for_other_tests_alone(tmp_path, status, output, state):
    check = _fake_gpu(tmp_path, status=status, output=output)
    (outcome,) = gpu_check.other_tests(check)
    assert outcome.state == state
    (command,) = check.commands
    assert command[command.index("-m", 2) + 1] == "not gpu"
    files = {path.name for path in Path(ROOT, "tests").rglob("test_*.py")}
    left_out = [
        argument.removeprefix("--ignore-glob=*/") for argument in command if argument.startswith("--ignore-glob=")
    ]
    assert all(any(fnmatch.fnmatch(file, pattern) for file in files) for pattern in left_out)
    if status is None:
        assert gpu_check.tests(check)[0].state == "failed"


def test_gpu_check_builds_the_cpu_kernels_where_cuda_fails(tmp_path):
    check = _fake_gpu(tmp_path, status=1, output="nvcc fatal")
    outcomes = gpu_check.build(check)
    assert [(outcome.phase, outcome.state) for outcome in outcomes] == [
        ("build", "failed"),
        ("build without CUDA", "failed"),
    ]
    assert "nvcc fatal" in gpu_check.summary(check, outcomes, "")


CARRIED = {
    # devices whose modules serve: what GRADREP_CUDA the build gets (none: no build), the note
    ("cpu", "cuda"): (None, "carried: _C, _C_cuda; built: none"),
    ("cpu",): ("only", "carried: _C; built: _C_cuda (differs)"),
    ("cuda",): ("0", "carried: _C_cuda; built: _C (differs)"),
    (): ("1", "carried: none; built: _C (differs), _C_cuda (differs)"),
}


@pytest.mark.parametrize("serve", CARRIED, ids=lambda serve: " and ".join(serve) or "none")
def test_gpu_check_builds_what_is_not_carried(tmp_path, monkeypatch, serve):
    for name in gpu_check.KERNELS:
        (tmp_path / "gradrep_kernels").mkdir(exist_ok=True)
        (tmp_path / "gradrep_kernels" / f"{name}.abi3.so").touch()
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    check = _fake_gpu(tmp_path)
    check.carried, check.serve = True, serve
    switch, note = CARRIED[serve]
    (found,) = gpu_check.build(check)
    assert (found.state, found.note) == ("passed", note)
    builds = [env["GRADREP_CUDA"] for command, env in zip(check.commands, check.environments) if "setup.py" in command]
    assert builds == ([] if switch is None else [switch])


def test_gpu_check_knows_what_a_module_registers():
    assert {"joint_histogram", "joint_histogram_", "pair_ranges"} <= set(gpu_check._ops("_C_cuda")) <= set(OPS)
    assert {"rep_sgd_step", "rep_sgd_plan_free", "rep_grad_norm", "pair_ranges"} <= set(gpu_check._ops("_C"))
    if backends.report(("cpu",))[0]["cpp"] == "available":
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        assert set(gpu_check._ops("_C")) == {op for op in OPS if has(f"{NAMESPACE}::{op}", "CPU")}


def test_gpu_check_takes_no_module_that_lacks_an_op(tmp_path, monkeypatch):
    check = gpu_check.Check(tmp_path, True, None, ())
    monkeypatch.setitem(gpu_check.LIMITS, "build", 1000)  # a busy machine takes 40 s to import torch
    if not list(ROOT.glob("gradrep_kernels/_C.*")):
        assert gpu_check._why_not_carried(check, "_C") == "is not there"
        return
    assert gpu_check._why_not_carried(check, "_C") == ""
    wanted = ["pair_ranges", "no_such_op"]
    monkeypatch.setattr(gpu_check, "_ops", lambda name: wanted)
    assert gpu_check._why_not_carried(check, "_C") == "no compiled kernel for cpu: no_such_op"


@pytest.mark.parametrize("checkout", [False, True])
def test_a_commit_is_told_where_there_is_no_checkout(tmp_path, monkeypatch, checkout):
    monkeypatch.setenv("GRADREP_COMMIT", "told-by-hand")
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    if checkout:
        git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b.c"]
        for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
            subprocess.run([*git, *command], check=True)
    assert (harness.commit() == "told-by-hand") is not checkout


def test_gpu_check_hands_the_commit_on(tmp_path):
    check = gpu_check.Check(tmp_path, True, None, (), commit="abc1234-dirty")
    run = check.run([sys.executable, "-c", "import os; print(os.environ['GRADREP_COMMIT'])"], 60)
    assert run.output.strip() == "abc1234-dirty"
    assert "abc1234-dirty" in gpu_check.summary(check, [], "")


@pytest.mark.parametrize(
    ("status", "output", "state"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", "passed"),
        (9, "========= ERROR SUMMARY: 2 errors", "failed"),
        (1, "========= Error: Device not supported", "skipped"),
        (1, "Traceback: could not open", "failed"),
        (None, "", "skipped"),
    ],
)
def test_gpu_check_tells_errors_from_a_sanitizer_that_does_not_work(tmp_path, monkeypatch, status, output, state):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/somewhere/{name}")
    assert {outcome.state for outcome in gpu_check.sanitizer(_fake_gpu(tmp_path, status=status, output=output))} == {
        state
    }
