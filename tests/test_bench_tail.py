# ruff: noqa: E402 - the benches are no package: their folder goes on the path first
"""The benches of the end of a step, the replay of an overflow, and the study of momentum in bfloat16."""

from __future__ import annotations

import functools
import json
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

import bench_step_tail as bench
import harness
import ledger
import overflow
import parameter_sets
import report
import study_momentum


@pytest.fixture
def setup(tmp_path) -> harness.Setup:
    return harness.Setup(torch.device("cpu"), True, 0.01, tmp_path, "command")


def new_tensors() -> parameter_sets.Tensors:
    torch.manual_seed(0)
    parameters = [parameter_sets.Parameter((6, 6, 3, 3), shortcut=True), parameter_sets.Parameter((500,))]
    return parameter_sets.Tensors(parameters, torch.device("cpu"))


def ends(tensors: parameter_sets.Tensors) -> list[Tensor]:
    return [*(p.detach() for p in tensors.params), *tensors.buffers, *tensors.averages()]


# -- what is timed


@pytest.mark.parametrize("under_scaler", [False, True], ids=["alone", "under GradScaler"])
def test_without_multipliers_both_tails_compute_the_same(under_scaler):
    """Torch's clipping writes the gradients: their norm is the limit from its second call on, so both clip alike."""
    both = new_tensors(), new_tensors()
    for tensors in both:
        tensors.grad_mults = {}
    of_ours, of_torch = both
    runs = (
        (bench.ours_scaled(of_ours), bench.torchs_scaled(of_torch))
        if under_scaler
        else (bench.ours(of_ours).step, bench.torchs(of_torch))
    )
    start = [t.clone() for t in ends(of_ours)]
    for _ in range(4):
        for run in runs:
            run()
    assert float(torch.stack([g.square().sum() for g in (p.grad for p in of_torch.params)]).sum().sqrt()) < 0.101
    for found, expected, before in zip(ends(of_ours), ends(of_torch), start):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
        assert not torch.equal(found, before)


def test_optimizers_of_a_comparison_share_averages_and_float32_momenta():
    tensors = new_tensors()
    one, other = bench.ours(tensors), bench.ours(tensors, momentum_dtype=torch.bfloat16)
    bench.torchs(tensors)()
    for optimizer in (one, other):
        optimizer.step()
        for p, average in zip(tensors.params, tensors.averages()):
            assert optimizer.ema(p) is average
    for p, buffer in zip(tensors.params, tensors.buffers):
        assert one.state[p]["momentum_buffer"] is buffer
        assert other.state[p]["momentum_buffer"].dtype == torch.bfloat16


@pytest.mark.parametrize("clips", [True, False])
def test_clipping_clips_in_each_call_or_never(clips):
    tensors = new_tensors()
    ways = bench.clippings(tensors, clips)
    for name in (bench.CLIP, bench.TORCH_CLIP, bench.CLIP):
        before = [p.grad.clone() for p in tensors.params]
        versions = [p.grad._version for p in tensors.params]
        ways[name]()
        shrunk = [float((p.grad / g).median()) for p, g in zip(tensors.params, before)]
        assert shrunk == pytest.approx([bench.SHRINK if clips else 1.0] * 2, abs=1e-5)
        if not clips and name == bench.CLIP:
            assert versions == [p.grad._version for p in tensors.params]


def test_bytes_of_a_parameter_are_counted_on_what_optimizers_keep(setup, monkeypatch):
    monkeypatch.setitem(bench.SETS, "ResNet-18", lambda: [parameter_sets.Parameter((40, 50))])
    results = report.Results("step_tail", setup)
    bench.test_bytes_of_a_parameter(results)
    found = {row["what"].removeprefix("bytes a parameter, "): row["figure"]["median"] for row in rows_of(results)}
    assert found == {
        f"{bench.OURS}: weight, momentum and average": 12,
        f"{bench.OURS}: moved in a step": 32,
        f"{bench.BF16}: weight, momentum and average": 10,
        f"{bench.BF16}: moved in a step": 28,
    }


# -- how it is judged


def rows_of(results: report.Results) -> list[dict]:
    return results._content["targets"]


def timed(seconds: dict[str, float], skipped: dict[str, str] | None = None) -> harness.Comparison:
    ways = {way: harness.Candidate(way, lambda: None, bytes=100.0) for way in seconds}
    return harness.Comparison(1, ways, {way: [time] for way, time in seconds.items()}, skipped or {})


SECONDS = {bench.OURS: 1.0, bench.BF16: 0.9, bench.TORCH: 1.6, bench.SCALED: 1.25, bench.SCALED_TORCH: 2.0}


@pytest.mark.parametrize(
    ("name", "threads", "verdicts"),
    [
        ("RepOpt-VGG-B1", 2, ("reached", "", "reached")),
        ("RepOpt-VGG-B1", 1, ("", "", "")),
        ("ResNet-50", 2, ("", "", "")),
    ],
)
def test_tails_on_a_cpu_are_judged_on_two_threads(setup, name, threads, verdicts):
    results = report.Results("step_tail", setup)
    bench.judge_cpu(results, timed({**SECONDS, bench.PROBE: 0.5}), name, threads)
    rows = rows_of(results)
    assert [(row["row"], row["figure"]["median"]) for row in rows] == [("T1", 1.6), ("T1", 1.6), ("T2", 0.9)]
    assert tuple(row["verdict"] for row in rows) == verdicts
    assert rows[0]["bound"] == "50% of the stream probe, 0 GB/s; the other 31%"


def test_tails_on_a_gpu_are_judged_by_their_copy_rate_under_a_scaler(setup):
    results = report.Results("step_tail", setup)
    bench.judge_gpu(results, timed({**SECONDS, bench.COPY: 1.0}, {bench.GRAPH: "no graph"}), "RepOpt-VGG-B1")
    found = {row["what"]: (row["verdict"], row["figure"] and row["figure"]["median"]) for row in rows_of(results)}
    share = "RepOpt-VGG-B1, {}: share of the measured copy rate"
    assert {row["row"] for row in rows_of(results)} == {"G5"}
    assert found == {
        share.format(bench.SCALED): ("reached", pytest.approx(80)),
        share.format(bench.OURS): ("", pytest.approx(100)),
        share.format(bench.BF16): ("", pytest.approx(1000 / 9)),
        share.format(bench.GRAPH): ("not measured: no graph", None),
        f"RepOpt-VGG-B1: as fast as {bench.SCALED_TORCH}": ("reached", pytest.approx(1.6)),
        f"RepOpt-VGG-B1: as fast as {bench.TORCH}": ("", pytest.approx(1.6)),
        "RepOpt-VGG-B1: time with momentum in bfloat16 over float32": ("", pytest.approx(0.9)),
    }


def test_the_whole_tail_on_the_host_of_a_gpu_is_judged_against_torchs_calls(setup):
    results = report.Results("step_tail", setup)
    bench.judge_host(results, timed({bench.OURS: 100e-6, bench.TORCH: 800e-6}), 161)
    assert [(row["row"], row["verdict"]) for row in rows_of(results)] == [("G0", "reached"), ("G0", "reached")]
    assert [row["figure"]["median"] for row in rows_of(results)] == [pytest.approx(100), pytest.approx(8)]


def test_a_figure_of_the_first_page_waits_until_a_machine_has_measured_it(monkeypatch):
    (figure,) = [figure for figure in ledger.IN_README if figure.bench == "step_tail"]
    # The bench names its row so: the figure is found once it has run.
    assert figure.what == f"RepOpt-VGG-B1, 2 threads: as fast as {bench.TORCH}"
    found = ledger.results()
    if not found:
        pytest.skip("an sdist brings no results of the benches")
    for benches in found.values():
        benches.pop("step_tail", None)
    monkeypatch.setattr(ledger, "results", lambda: found)
    assert figure.words not in ledger.readme_table()
    *others, measured = found
    row = {"row": "T1", "what": figure.what, "at_least": 1.5, "aim": 1.9, "unit": "x", "less_is_better": False}
    row |= {"figure": {"median": 1.6, "low": 1.5, "high": 1.7, "n": 9}, "verdict": "reached"}
    found[measured]["step_tail"] = {"targets": [row]}
    (line,) = [line for line in ledger.readme_table().splitlines() if figure.words in line]
    assert line == f"| {figure.words} | {' | ' * len(others)}1.6 x, reached | ≥ 1.5 x |"


# -- an overflow


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, str]]:
    return overflow.replay(torch.device("cpu"))


@pytest.mark.parametrize("way", [way for way in overflow.WAYS if "Rep" in way])
@pytest.mark.parametrize("situation", overflow.SITUATIONS)
def test_ours_goes_on_after_an_overflow(outcomes, situation, way):
    assert outcomes[situation][way] in (overflow.AS_WITHOUT, "right")


def test_a_training_that_an_overflow_breaks_is_told(outcomes):
    """By torch's foreach SGD and its fused SGD on a later step, and by optimizers that do what they should not."""
    assert outcomes["an overflow on a later step"]["SGD(fused=True)"] == overflow.AS_WITHOUT
    assert outcomes["an overflow on the first step"]["SGD(foreach=True)"] == overflow.AS_WITHOUT

    device = torch.device("cpu")
    with overflow.uninitialised_memory_is_nan():
        assert overflow.after_overflow(overflow.Way(functools.partial(Naive, skips=True)), device, 0) == overflow.BROKEN
    with pytest.raises(RuntimeError, match="was not skipped"):
        overflow.after_overflow(overflow.Way(functools.partial(Naive, skips=False)), device, overflow.LATER)
    assert not torch.are_deterministic_algorithms_enabled()


class Naive(torch.optim.Optimizer):
    """Makes its momentum in any step, also in one that is skipped, and leaves it as it lay in memory."""

    _step_supports_amp_scaling = True

    def __init__(self, params, lr, momentum, skips):
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.skips = skips

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        for p in group["params"]:
            buffer = self.state[p].setdefault("momentum_buffer", torch.empty_like(p))
            if not (self.skips and self.found_inf):
                buffer.mul_(group["momentum"]).add_(p.grad / self.grad_scale)
                p.sub_(group["lr"] * buffer)


def test_runs_of_several_versions_stand_side_by_side(tmp_path, monkeypatch):
    def replay(outcome: str) -> None:
        told = {situation: dict.fromkeys(overflow.WAYS, outcome) for situation in overflow.SITUATIONS}
        monkeypatch.setattr(overflow, "replay", lambda device: told)
        overflow.add(tmp_path, torch.device("cpu"))

    for version, outcome in (("2.9.1", "broken"), ("2.13.0+cpu", "broken"), ("2.10.0", "right"), ("2.10.0", "broken")):
        monkeypatch.setattr(torch, "__version__", version)
        replay(outcome)
    monkeypatch.setattr(torch, "__version__", "2.14.1")
    replay("right")
    lines = (tmp_path / "overflow.md").read_text().splitlines()
    rows = [line for line in lines if "on a later step | `SGD(fused=True)`" in line]
    assert rows == [
        "| an overflow on a later step | `SGD(fused=True)` | broken | 2.9.1, 2.10.0, 2.13.0 |",
        "| an overflow on a later step | `SGD(fused=True)` | right | 2.14.1 |",
    ]


def test_what_this_torch_does_stands_in_the_results(outcomes):
    path = BENCH / "results" / "overflow.json"
    if not path.exists():
        pytest.skip("an sdist brings no results of the benches")
    runs = json.loads(path.read_text(encoding="utf-8"))
    assert path.with_suffix(".md").read_text(encoding="utf-8") == overflow.page(runs)
    of_this = [run for run in runs if run["torch"] == torch.__version__.partition("+")[0] and run["device"] == "cpu"]
    for run in of_this:
        assert run["outcomes"]["an overflow on the first step"] == outcomes["an overflow on the first step"]


# -- the study of momentum in bfloat16


def test_the_study_pairs_trainings_by_seed(tmp_path, capsys):
    pytest.importorskip("sklearn", reason="needs scikit-learn: pip install gradrep_kernels[recipes]")
    pytest.importorskip("scipy")
    arguments = ["digits", "--pairs", "2", "--epochs", "1", "--images", "64", "--results", str(tmp_path)]
    assert study_momentum.main(arguments) == 0
    found = json.loads((tmp_path / "study-momentum-digits.json").read_text())
    assert [run["seed"] for run in found["runs"]] == [0, 1]
    assert (found["train_images"], found["test_images"]) == (64, 600)
    losses = {way: [run[way]["train_loss"] for run in found["runs"]] for way in study_momentum.WAYS}
    # Both ways begin alike: a rounding of momentum moves the loss of two steps by little, another seed by more.
    assert losses["float32"] == pytest.approx(losses["bfloat16"], rel=1e-2)
    assert losses["float32"][0] != pytest.approx(losses["float32"][1], rel=1e-3)
    text = (tmp_path / "study-momentum-digits.md").read_text()
    assert text in capsys.readouterr().out
    assert text.count("95 % interval") == 4
    assert "momentum in bfloat16 against float32, by the weights" in text


def test_the_study_says_what_is_missing(tmp_path, capsys):
    assert study_momentum.main([str(tmp_path / "nowhere"), "--results", str(tmp_path / "out")]) == 2
    assert "neither it nor train-images-idx3-ubyte.gz is there" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_study_keeps_the_momentum_that_it_says():
    options = study_momentum.resolve({**study_momentum.DIGITS, "momentum_dtype": "bfloat16", "seeds": 1})
    data = study_momentum.load_data(options.data, None)
    trainee = study_momentum.build(study_momentum.ROW, options, data, None, 0, 0.1)
    assert isinstance(trainee.optimizer, gr.FusedRepSGD)
    assert trainee.optimizer.momentum_dtype == torch.bfloat16
    assert trainee.optimizer.state_dict()["grad_mults"]
