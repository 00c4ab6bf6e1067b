"""Costs: what is counted against hand counts, the search for the largest batch, memory, and the command at toy size."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import shutil

import pytest
import torch
from cases_recipes import train
from torch import nn
from torch.nn import functional as F

import gradrep_kernels as gr
from gradrep_kernels.cli import main
from gradrep_kernels.models.repopt_vgg import RepOptVGG
from gradrep_kernels.recipes.build import Trainee
from gradrep_kernels.recipes.costs import cost_columns, deployed, form_costs, forward_macs, parameters, rows, run
from gradrep_kernels.recipes.costs.memory import largest_batch, largest_batch_within, step_memory, two_steps
from gradrep_kernels.recipes.costs.rows import CostSettings, costs_of, repeated, seconds_alone, training_seconds
from gradrep_kernels.recipes.costs.turns import Timing, by_speed, in_turns

SHORT = Timing(rounds=2, seconds=0.0, warm_up=1)


# -- counted


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Conv2d(3, 5, 3), (1, 3, 7, 9), 5 * 7 * 5 * 3 * 9),  # outputs of 5 x 7
        (nn.Conv2d(4, 6, (3, 1), stride=(2, 3), padding=1), (2, 4, 8, 8), 2 * 6 * 4 * 4 * 4 * 3),
        (nn.Conv2d(8, 4, 3, groups=4, padding=1), (1, 8, 5, 5), 4 * 25 * 2 * 9),
        (nn.Conv2d(6, 6, 5, groups=6, dilation=2), (1, 6, 11, 9), 6 * 3 * 1 * 25),
        (nn.Linear(7, 11), (3, 7), 3 * 7 * 11),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()), (1, 3, 5, 3), 4 * 15 * 3),
    ],
)
def test_multiply_adds_by_hand(layer, shape, macs):
    assert forward_macs(layer, shape) == macs


@pytest.mark.parametrize(
    ("name", "published", "millions"),
    [("b1", 11.9, 51.8), ("b2", 18.4, 80.3), ("l1", 21.0, 76.0), ("l2", 32.8, 118.1)],  # RepOptimizers, Table 1
)
def test_multiply_adds_and_parameters_as_published(name, published, millions):
    with torch.device("meta"):
        model = getattr(gr.models, f"repopt_vgg_{name}")(num_classes=1000)
    assert forward_macs(model, (1, 3, 224, 224)) / 1e9 == pytest.approx(published, rel=0.01)
    assert parameters(model) / 1e6 == pytest.approx(millions, rel=0.01)


def test_b1_has_11_8_giga_multiply_adds():
    """By Table 1's own numbers: width, layers and side of each stage. The table says 11.9."""
    stages = [(64, 1, 112), (128, 4, 56), (256, 6, 28), (512, 16, 14), (2048, 1, 7)]
    macs, inputs = 0, 3
    for width, layers, side in stages:
        macs += 9 * side**2 * width * (inputs + (layers - 1) * width)
        inputs = width
    with torch.device("meta"):
        model = gr.models.repopt_vgg_b1(num_classes=1000)
    assert forward_macs(model, (1, 3, 224, 224)) == macs + 2048 * 1000 == 11_815_485_440


def test_counting_leaves_the_model_and_random_numbers_alone():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Dropout()).train()
    model[1].eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    forward_macs(model, (2, 2, 5, 5))
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


class ReadsValues(nn.Conv2d):
    """It cannot run on the meta device."""

    def forward(self, x):
        return super().forward(x) if float(self.weight.detach().abs().sum()) >= 0 else x


def test_a_model_that_reads_its_values_is_counted_too():
    assert forward_macs(ReadsValues(2, 3, 1), (1, 2, 4, 4)) == 3 * 16 * 2


def test_branches_cost_in_training_and_not_once_deployed():
    plain = RepOptVGG((2,), (6,), num_classes=3, strides=(1, 2))
    branches = gr.models.repvgg_model(plain)
    found = form_costs(branches, (3, 8, 8))
    own = form_costs(plain, (3, 8, 8))
    # 1 x 1 branches: one at 8 x 8, two at 4 x 4.
    assert found["macs"] - own["macs"] == 64 * 6 * 3 + 16 * 6 * 6 * 2
    assert found["deployed_macs"] == own["deployed_macs"] == own["macs"]
    assert found["deployed_parameters"] == own["deployed_parameters"]
    assert found["parameters"] == sum(p.numel() for p in branches.parameters()) > own["parameters"]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in deployed(branches).modules())


class TwoConsumers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


def test_a_norm_that_cannot_be_folded_stays():
    model = TwoConsumers().train()
    found = deployed(model)
    assert isinstance(found.norm, nn.BatchNorm2d)
    assert not found.training
    assert model.training
    assert found is not model


# -- the largest batch


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 97, 1000, 4096])
@pytest.mark.parametrize("start", [1, 2, 32, 33])
@pytest.mark.parametrize("least", [1, 2])
def test_the_largest_batch_of_any_limit(limit, start, least):
    tried = []

    def step(n):
        tried.append(n)
        if n > limit:
            raise torch.OutOfMemoryError(f"{n}")

    if start < least:
        with pytest.raises(ValueError, match="start must be from"):
            largest_batch(step, start, least=least)
        return
    assert largest_batch(step, start, least=least) == (limit if limit >= least else None)
    assert len(tried) == len(set(tried)) < 30
    assert limit < least or max(n for n in tried if n <= limit) == limit


def test_the_search_ends_at_the_most_and_within_a_share():
    assert largest_batch(lambda n: None, 3, most=1000) == 1000

    def step(n):
        if n > 1000:
            raise torch.OutOfMemoryError

    found = largest_batch(step, 32, within=1 / 64)
    assert 1000 - 1000 / 64 <= found <= 1000


def test_other_errors_pass():
    def step(n):
        raise RuntimeError("not memory")

    with pytest.raises(RuntimeError, match="not memory"):
        largest_batch(step)


@pytest.mark.parametrize("limit", [99, 100, 119, 120, 121, 1000, 12345])
def test_the_largest_batch_within_a_limit(limit):
    """100 bytes and 10 an image, which is exact."""
    found = largest_batch_within(lambda n: 100 + 10 * n, limit, 5)
    assert found == (None if limit < 120 else (limit - 100) // 10)


def test_a_batch_that_takes_more_than_its_estimate_is_lowered():
    measured = []

    def memory(n):
        measured.append(n)
        return 10 * n + (500 if n > 50 else 0)

    found = largest_batch_within(memory, 1000, 4)
    assert memory(found) <= 1000
    assert found > 40
    assert measured[2] == 100  # what two measurements promised


def test_two_steps_are_tried_with_a_new_network():
    done = []

    def make():
        done.append("new")
        return Trainee(nn.Linear(2, 2), torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1), 0.1)

    steps = two_steps(
        make, lambda n: (torch.ones(n, 2), torch.zeros(n)), lambda trainee, x, y: done.append(len(x)), "cpu"
    )
    steps(3)
    steps(5)
    assert done == ["new", 3, 3, "new", 5, 5]


# -- memory


class Nothing:
    param_groups = ()


def test_memory_of_a_step_is_what_it_allocates():
    """Kept by the network, by the batch, and for a moment: blocks in use at one time add up, others do not."""
    left = []

    def make():
        left.clear()  # What an earlier measurement left behind was not this row's.
        torch.zeros(9000)  # Given back before the step.
        model = nn.Module()
        model.register_buffer("kept", torch.zeros(1000))
        return Trainee(model, Nothing(), 0.1)

    def step(trainee, x, labels):
        first = torch.zeros(300)
        del first
        second, third = torch.zeros(200), torch.zeros(250)
        del second, third

    def leaving(trainee, x, labels):
        left.append(torch.zeros(5000))

    batch = torch.zeros(10, 10), torch.zeros(10)
    step_memory(make, lambda: batch, leaving, "cpu")
    assert len(left) == 3
    found = step_memory(make, lambda: tuple(t.clone() for t in batch), step, "cpu")
    assert found == 4 * (1000 + 100 + 10 + 450)


def test_memory_of_a_training_step_holds_its_parts():
    """Weights, gradients, momentum, the batch, and the two outputs that the backward pass needs."""
    rows, width = 64, 128

    def make():
        model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        return Trainee(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), 0.1)

    def step(trainee, x, labels):
        trainee.optimizer.zero_grad()
        F.cross_entropy(trainee.model(x), labels).backward()
        trainee.optimizer.step()

    found = step_memory(make, lambda: (torch.randn(rows, width), torch.zeros(rows, dtype=torch.int64)), step, "cpu")
    weights, outputs = 4 * 2 * (width * width + width), 4 * rows * width
    least = 3 * weights + 2 * outputs  # batch and ReLU's output, with all gradients
    assert least <= found <= least + 4 * outputs


# -- timed


def test_works_take_turns_and_each_begins_once():
    called = []
    works = {name: lambda name=name: called.append(name) for name in "abc"}
    found = in_turns(works, Timing(rounds=3, seconds=0.0, warm_up=0), "cpu")
    assert {name: len(times) for name, times in found.items()} == {"a": 3, "b": 3, "c": 3}
    rounds = "".join(called[3:])  # each was called once before, to find how often it is called in a turn
    assert rounds == "aabbcc" + "bbccaa" + "ccaabb"


def test_nothing_is_timed_where_there_is_nothing():
    assert in_turns({}, SHORT, "cpu") == {}


def test_settings_are_restored():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    cudnn = torch.backends.cudnn
    settings = (cudnn.benchmark, cudnn.deterministic, torch.get_num_threads())
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with contextlib.suppress(KeyError), by_speed(3):
            assert cudnn.benchmark
            assert not cudnn.deterministic
            assert torch.get_num_threads() == 3
            assert not torch.are_deterministic_algorithms_enabled()
            torch.rand(3)
            raise KeyError
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert (cudnn.benchmark, cudnn.deterministic, torch.get_num_threads()) == settings
    assert torch.equal(torch.get_rng_state(), before)


def test_images_are_repeated_in_order():
    batches = [(torch.arange(3.0).view(3, 1), torch.tensor([0, 1, 2])), (torch.tensor([[7.0]]), torch.tensor([9]))]
    x, labels = repeated(batches, 6, "cpu")
    assert x[:, 0].tolist() == [0, 1, 2, 7, 0, 1]
    assert labels.tolist() == [0, 1, 2, 9, 0, 1]


def test_rows_that_run_out_of_memory_have_no_figures():
    def make():
        return Trainee(nn.Linear(1, 1), torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1), 0.1)

    def step(trainee, x, labels):
        if len(x) > 4:
            raise torch.OutOfMemoryError

    makers = {f"{n}": (make, lambda n=n: (torch.zeros(n, 1), torch.zeros(n))) for n in (3, 5)}
    found = seconds_alone(makers, step, SHORT, "cpu")
    assert list(found) == ["3"]
    assert len(found["3"]) == 2


# -- rows


def tiny_step(trainee, x, labels):
    trainee.optimizer.zero_grad()
    F.cross_entropy(trainee.model(x), labels).backward()
    trainee.optimizer.step()


def tiny_rows():
    """A plain row, one with branches, one with spatial gradient scaling."""
    torch.manual_seed(0)
    plain = RepOptVGG((1,), (4,), num_classes=3, strides=(1, 2))

    def make(model, sgs=False):
        model = copy.deepcopy(model)
        trainee = Trainee(model, gr.FusedRepSGD(model.parameters(), lr=1e30, momentum=0.9), 1e30)
        trainee.sgs = gr.SpatialGradientScaling(model, trainee.optimizer, batches=3) if sgs else None
        return trainee

    return {
        "plain": lambda: make(plain),
        "branches": lambda: make(gr.models.repvgg_model(plain)),
        "sgs": lambda: make(plain, sgs=True),
    }


def tiny_batches(n=4, batches=2):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 3, 8, 6, generator=generator), torch.arange(n) % 3) for _ in range(batches)]


def test_the_costs_of_rows():
    settings = CostSettings(
        memory=1 << 18, inference_batches=(1, 5), dtypes=(torch.float32, torch.bfloat16), timing=Timing(1, 0.0, 1)
    )
    told = []
    found = costs_of(tiny_rows(), tiny_batches(), tiny_step, settings, 10, torch.zeros(1, 3, 16, 12), told.append)
    assert list(found) == ["plain", "branches", "sgs"]
    assert len(told) == len(set(told)) == 3 + 1 + 3 + 1 + 1
    for row in found.values():
        rate, seconds = row["images_per_second"], row["seconds_per_step"]
        assert rate["low"] == rate["median"] == rate["high"] == pytest.approx(4 / seconds["median"])
        assert [(entry["batch_size"], entry["dtype"]) for entry in row["inference"]] == [
            (1, "float32"), (5, "float32"), (1, "bfloat16"), (5, "bfloat16"),
        ]  # fmt: skip
        largest = row["largest_batch"]
        assert largest["lr_factor"] == largest["images"] / 4
        assert largest["images_per_second"]["median"] > 0
        json.dumps(row, allow_nan=False)
    plain, branches, sgs = found.values()
    assert plain["times_first"] == {"median": 1.0, "low": 1.0, "high": 1.0, "n": 1}
    assert plain["deployed_macs"] == branches["deployed_macs"] == sgs["deployed_macs"]
    convs = plain["macs"] - 4 * 3  # all but the classifier grow with the image
    assert plain["deployed_macs"] == 4 * convs + 4 * 3
    assert branches["peak_memory"] > plain["peak_memory"]
    assert branches["largest_batch"]["images"] < plain["largest_batch"]["images"]
    assert plain["sgs_share"] is None
    update, step = sgs["sgs_update_seconds"]["median"], sgs["seconds_per_step"]["median"]
    assert sgs["sgs_share"] == pytest.approx(update / (update + 10 * step))
    assert (plain["multiplier_bytes"], sgs["multiplier_bytes"]) == (0, 2 * 9 * 4)


def test_without_a_limit_a_cpu_has_no_largest_batch():
    found = costs_of({"plain": tiny_rows()["plain"]}, tiny_batches(), tiny_step, CostSettings(timing=SHORT))
    assert found["plain"]["largest_batch"] == {"not_measured": "on a CPU it needs a limit, --memory GiB"}


def test_where_nothing_fits_there_is_no_largest_batch():
    settings = CostSettings(timing=SHORT, memory=1000)
    found = costs_of({"plain": tiny_rows()["plain"]}, tiny_batches(), tiny_step, settings)
    assert found["plain"]["largest_batch"] == {"images": None, "not_measured": "not even 2 images fit"}


def test_no_weight_moves_while_it_is_timed():
    """At the rate of the rows, 1e30, they would overflow in the second step."""
    made = []

    def keeping(make):
        def kept():
            trainee = make()
            made.append((trainee.model, [p.detach().clone() for p in trainee.model.parameters()]))
            return trainee

        return kept

    makers = {name: keeping(make) for name, make in tiny_rows().items()}
    training_seconds(makers, tiny_batches(), tiny_step, SHORT, "cpu")
    assert len(made) == 3
    for model, before in made:
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


# -- the command


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(run, "CostSettings", functools.partial(CostSettings, timing=SHORT))


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of a finished run."""
    return shutil.copytree(finished, tmp_path / "copied")


def test_the_command_writes_a_row_for_each_recipe(folder, short, capsys, monkeypatch):
    monkeypatch.setattr(rows, "largest_batch_within", lambda memory_at, limit, start: 3 * start)
    arguments = ["costs", str(folder), "--memory", "0.05", "--inference-batches", "3,1,3"]
    assert main(arguments) == 0
    found = json.loads((folder / "costs.json").read_text())
    page = (folder / "costs.md").read_text()
    assert page in capsys.readouterr().out
    summary = json.loads((folder / "summary.json").read_text())["recipes"]
    assert list(found["recipes"]) == ["repopt+sgs", "csla"] == list(summary)
    for name, row in found["recipes"].items():
        assert row["parameters"] == summary[name]["parameters"]
        assert row["multiplier_bytes"] == summary[name]["multiplier_bytes"]
        assert row["batch_size"] == 10
        assert [entry["batch_size"] for entry in row["inference"]] == [3, 1]
        assert row["largest_batch"]["images"] == 30
        assert row["largest_batch"]["learning_rate"] == pytest.approx(3 * summary[name]["learning_rate"])
        assert page.count(f"| {name} |") == 3
        headings = cost_columns(row)
        assert list(headings)[:3] == list(cost_columns(form_costs_alone(row)))
        assert all(headings.values())
    csla, repopt = found["recipes"]["csla"], found["recipes"]["repopt+sgs"]
    assert csla["macs"] > repopt["macs"] == repopt["deployed_macs"] == csla["deployed_macs"]
    assert found["settings"]["memory"] == int(0.05 * 2**30)
    assert (found["image"], found["test_image"], found["gpu"]) == ([3, 32, 32], [3, 32, 32], None)


def form_costs_alone(row):
    return {name: row[name] for name in ("macs", "deployed_macs", "parameters", "deployed_parameters")}


def test_rows_that_cannot_be_made_again_are_left_out(folder, short, capsys):
    """One ended with another structure than its row can have, the other has lost its weights."""
    (kept,) = (folder / "weights").glob("csla-*.pt")
    torch.save({**torch.load(kept, weights_only=True), "one.more": torch.zeros(1)}, kept)
    (lost,) = (folder / "weights").glob("repopt+sgs-*.pt")
    lost.unlink()
    assert main(["costs", str(folder)]) == 0
    assert json.loads((folder / "costs.json").read_text())["recipes"] == {
        "repopt+sgs": {"not_measured": "the run has no weights of it"},
        "csla": {
            "not_measured": "csla-seed0.pt has another structure than a new network, which cannot be made again from it"
        },
    }
    assert "- csla: csla-seed0.pt has another structure" in (folder / "costs.md").read_text()


def test_a_run_measures_its_costs_at_its_end(source, tmp_path, short, no_pictures):
    train(source, tmp_path, "--name", "a", "--recipe", "sgd", "--epochs", "1", "--costs")
    found = json.loads((tmp_path / "a" / "costs.json").read_text())
    assert list(found["recipes"]) == ["sgd"]
    assert "not_measured" in found["recipes"]["sgd"]["largest_batch"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "0"], "--memory must be a number above 0, got 0"),
        (["--memory", "much"], "--memory must be a number, got 'much'"),
        (["--inference-batches", "1,0"], "--inference-batches must be whole numbers of at least 1"),
        (["--inference-batches", "70000"], "--inference-batches must be from 1 to 65536, got 70000"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--batch-size", "3"], "`costs` takes no --batch-size"),
    ],
)
def test_wrong_settings_are_told_in_a_line(folder, short, arguments, message, capsys):
    assert main(["costs", str(folder), *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (folder / "costs.json").exists()


def test_a_run_that_is_not_finished_has_no_costs(folder, short, capsys):
    (folder / "summary.json").unlink()
    assert main(["costs", str(folder)]) == 2
    assert "this run is not finished" in capsys.readouterr().err
