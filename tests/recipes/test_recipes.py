"""Options, what each recipe is made of, the epoch, the check CSLA = GR, and the report."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys

import pytest
import torch
from cases_recipes import TINY, write_tiny_cifar10

import gradrep_kernels as gr
from gradrep_kernels import csla
from gradrep_kernels.recipes import files
from gradrep_kernels.recipes.build import Row, build, initial_scales, multiplier_bytes, plain_model, rows, search_model
from gradrep_kernels.recipes.data import load_data
from gradrep_kernels.recipes.environment import environment, environment_text
from gradrep_kernels.recipes.equivalence import TOLERANCE, csla_equals_gr
from gradrep_kernels.recipes.errors import InputError, extra
from gradrep_kernels.recipes.options import ABLATIONS, DEFAULTS, RECIPES, Options, resolve
from gradrep_kernels.recipes.progress import Reporter
from gradrep_kernels.recipes.report import check_line, scales_line, table, write_report
from gradrep_kernels.recipes.training import accuracy, repeatable, train_epoch


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return f"cifar10:{write_tiny_cifar10(tmp_path_factory.mktemp('data') / 'cifar')}"


@pytest.fixture(scope="module")
def data(source):
    return load_data(source)


@pytest.fixture
def options(source):
    return resolve({"data": source, **TINY})


@pytest.fixture
def scales(options, data):
    """Unlike in every channel, some negative."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: gr.BranchScales(
            *(torch.randn(value.channels, generator=generator) for _ in range(2)), identity=value.identity
        )
        for name, value in initial_scales(plain_model(options, data, 0)).items()
    }


@pytest.fixture(autouse=True)
def _one_thread():
    with repeatable(1, "cpu"):
        yield


# ---- options


def test_defaults_are_those_of_the_data_set(tmp_path):
    for kind, source in (("digits", "digits"), ("cifar10", f"cifar10:{tmp_path}"), ("folder", f"folder:{tmp_path}")):
        options = resolve({"data": source})
        for name in ("epochs", "batch_size", "weight_decay", "label_smoothing", "augment", "remove_near"):
            assert getattr(options, name) == DEFAULTS[kind][name]
    assert (options.lr, options.momentum, options.weight_decay, options.warmup, options.image_size) == (
        0.1,
        0.9,
        4e-5,
        5,
        224,
    )
    assert resolve({}).epochs <= 15


def test_options_survive_json(options):
    assert Options.from_json(json.loads(json.dumps(options.to_json()))) == options


def test_all_recipes_come_with_the_initial_scales_as_their_ablation():
    assert [row.label for row in rows(resolve({}))] == [
        "sgd",
        "sgs",
        "repopt",
        "repopt-hs-init",
        "repopt+sgs",
        "csla",
        "repvgg",
    ]
    assert [row.label for row in rows(resolve({"recipe": ("csla", "sgd")}))] == ["sgd", "csla"]
    assert [row.label for row in rows(resolve({"recipe": ("sgd",), "ablate": ("grad", "init")}))] == [
        "sgd",
        "repopt-init",
        "repopt-grad",
    ]
    assert [row.label for row in rows(resolve({"ablate": ()}))] == list(RECIPES)


WRONG_OPTIONS = {
    "epochs": ({"epochs": 0}, "--epochs must be at least 1, got 0"),
    "batch": ({"batch_size": 1}, "--batch-size must be at least 2"),
    "lr": ({"lr": -1.0}, "--lr must be a number above 0, got -1.0"),
    "nan": ({"lr": float("nan")}, "--lr must be a number above 0, got nan"),
    "momentum": ({"momentum": 1.0}, "--momentum must be in"),
    "smoothing": ({"label_smoothing": 1.0}, "--label-smoothing must be in"),
    "seeds": ({"seeds": 0}, "--seeds must be at least 1"),
    "every": ({"sgs_every": 0}, "--sgs-every must be at least 1"),
    "k": ({"sgs_k": 0.0}, "--sgs-k must be a number above 0"),
    "clip": ({"clip_norm": 0.0}, "--clip-norm must be a number above 0"),
    "recipe": (
        {"recipe": ("sgd", "adam")},
        "--recipe must be one of sgd, sgs, repopt, repopt+sgs, csla, repvgg, all, got 'adam'",
    ),
    "ablate": ({"ablate": ("hs",)}, "--ablate must be one of init, grad, ones, hs-init, channel-mean, got 'hs'"),
    "augment": ({"augment": ("blur",)}, "--augment must be one of flip, crop, cutout, got 'blur'"),
    "model": ({"model": "b3"}, "--model must be one of small, .*, got 'b3'"),
    "device": ({"device": "tpu"}, "--device must be cpu, cuda or cuda:N, got 'tpu'"),
    "image size": ({"image_size": 32}, "--image-size is for folder:DIR, digits has its own"),
    "data": ({"data": "mnist"}, "--data must be digits, .*, got 'mnist'"),
}


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_a_wrong_option_is_named(case):
    given, said = WRONG_OPTIONS[case]
    with pytest.raises(InputError, match=said.replace("+", "[+]")):
        resolve(given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_gpu_is_told():
    with pytest.raises(InputError, match=r"--device cuda: torch .*; use --device cpu"):
        resolve({"device": "cuda"})


def test_a_resumed_run_takes_no_other_options(options):
    options.check_against({})
    options.check_against({"data": options.data, "model": "small", "epochs": 2, "augment": ("cutout", "crop", "flip")})
    for given, said in (
        ({"epochs": 3}, "--epochs was 2 when this run was started, now it is 3"),
        ({"augment": ("flip",)}, "--augment was flip,crop,cutout when"),
        ({"model": "vgg11"}, "--model was repopt_vgg_small when .* vgg11"),
        ({"data": "digits"}, "--data was cifar10:"),
        ({"ablate": ()}, "--ablate was hs-init"),
    ):
        with pytest.raises(InputError, match=said):
            options.check_against(given)


# ---- recipes


def all_rows():
    return [Row(recipe) for recipe in RECIPES] + [Row("repopt", ablation) for ablation in ABLATIONS]


@pytest.mark.parametrize("row", all_rows(), ids=lambda row: row.label)
def test_every_row_is_built_the_same_from_its_seed_and_learns(row, options, data, scales):
    first, again = (build(row, options, data, scales, 3) for _ in range(2))
    for a, b in zip(first.model.state_dict().values(), again.model.state_dict().values()):
        assert torch.equal(a, b)
    other = build(row, options, data, scales, 4)
    assert not torch.equal(next(first.model.parameters()), next(other.model.parameters()))
    assert (first.sgs is not None) == row.uses_sgs
    losses = [train_epoch(first, data, options, 3, epoch, 4, lambda: None)["train_loss"] for epoch in range(4)]
    assert losses[-1] < losses[0]


def kernels(trainee):
    return [p for p in trainee.model.parameters() if p.dim() == 4]


def mults(trainee):
    return [trainee.optimizer.grad_mult(p) for p in kernels(trainee)]


def test_repopt_breaks_the_rules_that_an_ablation_names(options, data, scales):
    plain, repopt = (build(Row(recipe), options, data, scales, 0) for recipe in ("sgd", "repopt"))
    no_init, no_grad = (build(Row("repopt", ablation), options, data, scales, 0) for ablation in ("init", "grad"))
    for a, b, c, d in zip(kernels(plain), kernels(no_init), kernels(repopt), kernels(no_grad)):
        assert torch.equal(a, b)
        assert torch.equal(c, d)
        assert not torch.equal(a, c)
    assert mults(no_grad) == [None] * len(kernels(no_grad))
    for a, b, (name, value) in zip(mults(repopt), mults(no_init), scales.items()):
        assert torch.equal(a.scale, b.scale), name
        assert torch.equal(a.scale[:, 0, 0, 0], value.kxk.square())


def test_ablated_scales_are_ones_means_or_where_the_search_starts(options, data, scales):
    ones, initial, mean = (
        mults(build(Row("repopt", ablation), options, data, scales, 0))
        for ablation in ("ones", "hs-init", "channel-mean")
    )
    for m in ones:
        assert m.scale[0, 0].tolist() == [[1, 1, 1], [1, 2, 1], [1, 1, 1]]
        assert len(torch.unique(m.scale[:, 0, 0, 0])) == 1
    # In module order: no shortcut, none, first, none, first, second: 1, 1, √2, 1, √2, 1.
    assert [round(float(m.scale[0, 0, 0, 0]), 5) for m in initial] == [1, 1, 2, 1, 2, 1]
    for m, value in zip(mean, scales.values()):
        torch.testing.assert_close(m.scale[:, 0, 0, 0], value.kxk.mean().square().expand(value.channels))


def test_ones_and_initial_scales_need_no_search(options, data):
    for ablation in ("ones", "hs-init"):
        row = Row("repopt", ablation)
        assert not row.uses_scales
        build(row, options, data, None, 0)


def test_all_rows_start_from_one_plain_network(options, data, scales):
    plain = plain_model(options, data, 0).state_dict()
    explicit = build(Row("csla"), options, data, scales, 0).model
    branched = build(Row("repvgg"), options, data, scales, 0).model
    for name in scales:
        assert torch.equal(explicit.get_submodule(name).conv.weight, plain[f"{name}.weight"])
        assert torch.equal(branched.get_submodule(name).convs[0].weight, plain[f"{name}.weight"])
    assert torch.equal(explicit.linear.weight, plain["linear.weight"])


def test_rows_without_multipliers_are_trained_by_torchs_own_sgd(options, data, scales):
    kinds = {row.label: type(build(row, options, data, scales, 0).optimizer) for row in all_rows()}
    assert {label for label, kind in kinds.items() if kind is torch.optim.SGD} == {"sgd", "csla", "repvgg"}
    assert all(kind is gr.FusedRepSGD for label, kind in kinds.items() if label not in ("sgd", "csla", "repvgg"))
    assert type(search_model(options, data).optimizer) is torch.optim.SGD


def test_multiplier_bytes_are_those_of_the_structured_form(options, data, scales):
    structured = sum(value.channels * 9 + value.channels * value.has_identity for value in scales.values()) * 4
    assert multiplier_bytes(build(Row("repopt"), options, data, scales, 0)) == structured
    assert multiplier_bytes(build(Row("sgd"), options, data, scales, 0)) == 0
    both = build(Row("repopt+sgs"), options, data, scales, 0)
    both.sgs.update(torch.rand(2, 4, 3, 32, 32))
    assert multiplier_bytes(both) == structured  # the product stays in the structured form


# ---- the epoch


def test_an_epoch_is_repeatable_whatever_the_default_generator_holds(options, data, scales):
    found = []
    for state in (1, 2):
        trainee = build(Row("repopt+sgs"), options, data, scales, 0)
        torch.manual_seed(state)
        records = [train_epoch(trainee, data, options, 0, epoch, 3, lambda: None) for epoch in range(3)]
        found.append((trainee.model.state_dict(), [record["train_loss"] for record in records]))
    assert found[0][1] == found[1][1]
    assert all(torch.equal(a, b) for a, b in zip(found[0][0].values(), found[1][0].values()))


def test_an_epoch_follows_the_schedule_and_calls_for_every_batch(options, data):
    calls = []
    trainee = build(Row("sgs"), options, data, None, 0)
    records = [train_epoch(trainee, data, options, 0, epoch, 4, lambda: calls.append(1)) for epoch in range(4)]
    assert len(calls) == 4 * 3
    assert records[0]["lr"] == options.lr  # end of the warm-up
    assert records[3]["lr"] == pytest.approx(options.lr * 0.5 * (1 + math.cos(math.pi * 8 / 9)))
    assert [record["sgs_updated"] for record in records] == [False, True, False, False]


def test_every_epoch_has_an_order_of_its_own(options, data):
    trainee = build(Row("sgd"), options, data, None, 0)
    seen = []
    trainee.model.register_forward_pre_hook(lambda model, args: seen.append(args[0].clone()))
    for epoch in (0, 1, 0):
        train_epoch(trainee, data, options, 0, epoch, 2, lambda: None)
    train_epoch(trainee, data, options, 1, 0, 2, lambda: None)
    first, second, first_again, of_another_seed = (torch.cat(seen[3 * n : 3 * n + 3]) for n in range(4))
    assert torch.equal(first, first_again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, of_another_seed)


def test_the_loss_is_smoothed_cross_entropy(source, data):
    smoothed = resolve({"data": source, **TINY, "label_smoothing": 0.3, "augment": (), "batch_size": 30})
    trainee = build(Row("sgd"), smoothed, data, None, 0)
    outputs = []
    trainee.model.register_forward_hook(lambda model, args, y: outputs.append((args[0].detach(), y.detach())))
    loss = train_epoch(trainee, data, smoothed, 0, 0, 1, lambda: None)["train_loss"]
    ((x, y),) = outputs
    everything = data.standardise(data.train.read(torch.arange(30))).flatten(1)
    labels = data.train.labels[torch.cdist(x.flatten(1), everything).argmin(1)]
    surprise = -y.log_softmax(1)
    expected = 0.7 * surprise[torch.arange(30), labels] + 0.3 * surprise.mean(1)
    assert loss == pytest.approx(float(expected.mean()), rel=1e-5)


def test_clipping_uses_the_norm_of_the_branches(options, data, scales, monkeypatch):
    """Clipped CSLA and clipped RepOpt stay the same network; RepOpt clipped by its plain gradient norm would not."""
    clipped = resolve(
        {
            **options.to_json(),
            "recipe": options.recipe,
            "ablate": options.ablate,
            "augment": (),
            "clip_norm": 0.05,
            "image_size": None,
        }
    )
    exact = {name: gr.BranchScales(value.kxk.double(), value.one_by_one.double(), value.identity.double() if value.has_identity else False)
             for name, value in scales.items()}  # fmt: skip
    doubled = type(data.train)(data.train.labels, lambda indices: data.train.read(indices).double())
    double = type(data)(data.name, doubled, data.test, data.classes, data.side, data.mean.double(), data.std.double())
    monkeypatch.setattr(
        "gradrep_kernels.recipes.build.MODELS",
        {"repopt_vgg_small": lambda **shape: gr.models.repopt_vgg_small(**shape).double()},
    )
    explicit, target = (build(Row(recipe), clipped, double, exact, 0) for recipe in ("csla", "repopt"))
    for trainee in (explicit, target):
        train_epoch(trainee, double, clipped, 0, 0, 1, lambda: None)
    merged = csla.merge(explicit.model).state_dict()
    unclipped = build(Row("repopt"), options, double, exact, 0)
    train_epoch(unclipped, double, options, 0, 0, 1, lambda: None)
    for name, tensor in target.model.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-10, rtol=0)
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(target.model.parameters(), unclipped.model.parameters()))


def test_accuracy_is_the_share_of_right_answers(data):
    class Right(torch.nn.Module):
        def forward(self, x):  # brightest of ten squares, as the data set draws them
            return torch.stack([x[:, :, 3 * c : 3 * c + 4, 3 * c : 3 * c + 4].sum((1, 2, 3)) for c in range(10)], 1)

    class Always(torch.nn.Module):
        def forward(self, x):
            return torch.eye(10)[5].expand(len(x), 10)

    assert accuracy(Right(), data, "cpu") == 1
    assert accuracy(Always(), data, "cpu") == pytest.approx(float((data.test.labels == 5).float().mean()))


def test_repeatable_gives_back_what_it_changed():
    torch.set_num_threads(1)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    with repeatable(2, "cpu"):
        assert torch.get_num_threads() == 2
        torch.rand(3)
    assert torch.get_num_threads() == 1
    assert torch.equal(torch.get_rng_state(), state)


# ---- CSLA = GR


def test_csla_equals_gr_on_the_jobs_own_network(options, data, scales):
    longer = resolve({**TINY, "data": options.data, "check_steps": 12})
    found = csla_equals_gr(longer, data, scales)
    assert found["steps"] == 12
    assert found["agrees"]
    assert 0 < max(found["outputs"], found["weights"]) <= TOLERANCE


@pytest.mark.parametrize("broken", ["multipliers", "initialisation"])
def test_the_check_sees_a_broken_rule(options, data, scales, monkeypatch, broken):
    if broken == "multipliers":
        monkeypatch.setattr(csla, "grad_mults", lambda model, scales: {})
    else:
        monkeypatch.setattr(csla, "reinitialize", lambda model, scales: None)
    assert not csla_equals_gr(options, data, scales)["agrees"]


# ---- report


def a_state(rows_, seeds, sgs_first=None):
    def training(accuracy_, row):
        timing = [
            {"seconds": 0.5, "sgs_updated": False, "sgs_seconds": 0.0},
            {"seconds": 1.5, "sgs_updated": row.uses_sgs, "sgs_seconds": 0.25},
        ]
        epochs = [
            {"train_loss": 1.0 / (n + 1), "lr": 0.1, "test_accuracy": accuracy_ - 0.1 + 0.1 * n, **timing[n]}
            for n in range(2)
        ]
        kept = {"epochs": epochs, "parameters": 1234, "multiplier_bytes": 56}
        if row.uses_sgs:
            kept["scalings"] = {"start": sgs_first or {"a": [[1.0, 2.0, 1.0]] * 3}, "end": {"a": [[0.5, 2.5, 1.0]] * 3}}
        return kept

    finished = {
        f"{row.label}-seed{seed}": training(0.8 + 0.1 * n, row) for row in rows_ for n, seed in enumerate(seeds)
    }
    return {
        "finished": finished,
        "current": None,
        "check": {"steps": 3, "outputs": 1e-15, "weights": 2e-15, "agrees": True},
        "seconds": 12.5,
    }


def test_the_report_says_what_the_state_holds(tmp_path, options, data, scales):
    chosen = [Row("sgd"), Row("repopt+sgs"), Row("repopt", "ones")]
    initial = initial_scales(plain_model(options, data, 0))
    moved = {name: gr.BranchScales(v.kxk * 1.5, v.one_by_one, v.identity) for name, v in initial.items()}
    summary = write_report(tmp_path, options, data, chosen, [5, 6], a_state(chosen, [5, 6]), moved, initial)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    sgd, sgs = summary["recipes"]["sgd"], summary["recipes"]["repopt+sgs"]
    assert sgd["test_accuracy"] == [0.8, 0.9]
    assert (sgd["test_accuracy_mean"], sgd["test_accuracy_std"]) == (pytest.approx(0.85), pytest.approx(0.1 / 2**0.5))
    assert (sgd["seconds_per_epoch"], sgd["parameters"], sgd["multiplier_bytes"]) == (1.0, 1234, 56)
    assert (sgd["sgs_seconds_per_epoch"], sgs["sgs_seconds_per_epoch"], sgs["sgs_updates"]) == (None, 0.125, 1)
    layer = summary["scales"]["layers"]["stage0.conv"]
    assert (layer["conv"]["moved"], layer["1x1"]["moved"]) == (pytest.approx(0.5), 0)
    assert "85.00 ± 7.07" in table(summary)
    assert "over 3 steps: outputs differ by at most 1.0e-15" in check_line(summary)
    assert "0.0% to 50.0%" in scales_line(summary)
    text = (tmp_path / "summary.md").read_text()
    assert "Differences within one standard deviation are not evidence" in text
    assert "| repopt+sgs | 85.00 ± 7.07 | 1.000 | 1,234 | 56 | 0.1250 |" in text
    for name in ("curves.png", "scales.png", "spatial_scaling_repopt_sgs.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in text
    assert not list(tmp_path.glob(f"*{files.TEMPORARY}"))


def test_one_seed_has_no_standard_deviation(tmp_path, options, data):
    summary = write_report(
        tmp_path, options, data, [Row("sgd")], [0], {**a_state([Row("sgd")], [0]), "check": None}, None, None
    )
    assert summary["recipes"]["sgd"]["test_accuracy_std"] is None
    assert "±" not in table(summary)
    assert "With one seed no difference between rows is evidence" in (tmp_path / "summary.md").read_text()


def test_a_loss_that_is_not_finite_is_no_obstacle(tmp_path, options, data):
    state = a_state([Row("sgd")], [0, 1])
    state["finished"]["sgd-seed0"]["epochs"][1]["train_loss"] = None
    write_report(tmp_path, options, data, [Row("sgd")], [0, 1], {**state, "check": None}, None, None)
    assert (tmp_path / "curves.png").exists()


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "x.txt"
    files.write_text(path, "before")

    def broken():
        with files.whole(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_package_is_named():
    with pytest.raises(InputError, match=r"this needs Nonesuch: pip install 'gradrep_kernels\[recipes\]'"):
        extra("no_such_module_here", "Nonesuch")


def test_pictures_touch_no_global_setting():
    code = (
        "import sys, pathlib, tempfile; from gradrep_kernels.recipes import plots; import matplotlib;"
        "before = matplotlib.rcParams.copy(); backend = matplotlib.get_backend(auto_select=False);"
        "plots.spatial_scalings(pathlib.Path(tempfile.mkdtemp()) / 'g.png', {'a': [[1.0] * 3] * 3}, {'a': [[1.0] * 3] * 3});"
        "assert matplotlib.rcParams.copy() == before and matplotlib.get_backend(auto_select=False) == backend;"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def report_something(stream):
    reporter = Reporter(stream)
    reporter.start(batches=4, done=1)
    reporter.doing("sgd-seed0 1/2")
    for _ in range(3):
        reporter.batch()
    reporter.epoch("an epoch")
    reporter.line("a training")
    reporter.close()
    return stream.getvalue()


def test_there_is_a_bar_on_a_terminal_and_plain_lines_elsewhere(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    pytest.importorskip("tqdm")
    on_terminal = report_something(Terminal())
    assert "4/4" in on_terminal
    assert "\r" in on_terminal
    assert "a training" in on_terminal
    assert report_something(io.StringIO()) == "a training\n"


def test_an_epoch_is_worth_a_line_after_a_silence(monkeypatch):
    monkeypatch.setattr("gradrep_kernels.recipes.progress._QUIET_SECONDS", -1.0)
    assert report_something(io.StringIO()) == "an epoch\na training\n"


# ---- env


def test_the_environment_names_every_op_on_every_device():
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["torch"] == torch.__version__ or torch.__version__.startswith(found["versions"]["torch"])
    assert {(row["op"], row["device"]) for row in found["ops"]} == {
        (op, device) for op in gr.ops.OPS for device in ("cpu", "cuda")
    }
    text = environment_text(found)
    for row in found["ops"]:
        assert row["op"] in text
        assert all(
            reason in text
            for name, reason in row.items()
            if name in ("cpp", "triton", "cuda") and reason != "available"
        )
