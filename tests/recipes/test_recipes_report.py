"""The report of a job: figures, text and pictures; whole files; progress."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import subprocess
import sys

import pytest
from cases_recipes import TINY

import gradrep_kernels as gr
from gradrep_kernels import csla
from gradrep_kernels.recipes import files, pictures, plots
from gradrep_kernels.recipes.build import plain_model
from gradrep_kernels.recipes.costs import cost_columns
from gradrep_kernels.recipes.errors import InputError, extra
from gradrep_kernels.recipes.identity import identity_ratios
from gradrep_kernels.recipes.options.resolve import resolve
from gradrep_kernels.recipes.progress import Reporter
from gradrep_kernels.recipes.report import closing_lines, table, write_report
from gradrep_kernels.recipes.scale_sources import initial_scales
from gradrep_kernels.recipes.table import RECIPES

pytestmark = pytest.mark.usefixtures("one_thread")


def a_training(accuracy, row, lr=0.1, **others):
    timing = [
        {"seconds": 0.5, "sgs_updated": False, "sgs_seconds": 0.0},
        {"seconds": 1.5, "sgs_updated": row.sgs, "sgs_seconds": 0.25},
    ]
    epochs = [
        {"train_loss": 1.0 / (n + 1), "lr": lr, "test_accuracy": accuracy - 0.1 + 0.1 * n, **timing[n]}
        for n in range(2)
    ]
    kept = {"lr": lr, "epochs": epochs, "diverged": None, "parameters": 1234, "multiplier_bytes": 56}
    if row.sgs:
        kept["scalings"] = {"start": {"a": [[1.0, 2.0, 1.0]] * 3}, "end": {"a": [[0.5, 2.5, 1.0]] * 3}}
    return {**kept, **others}


def some_trainings(rows, accuracies=(0.8, 0.9)):
    """Row n has accuracies[m] + n / 100 with the m-th seed."""
    return {row.name: {0.1: [a_training(a + n / 100, row) for a in accuracies]} for n, row in enumerate(rows)}


def other_results(rows):
    return {
        "check": {"steps": 3, "outputs": 1e-15, "weights": 2e-15, "agrees": True},
        "speed": {row.name: [0.0095 * (n + 1), 0.01 * (n + 1), 0.0105 * (n + 1)] for n, row in enumerate(rows)},
        "seconds": 12.5,
    }


def with_rows(options, *names, ablate=()):
    return dataclasses.replace(options, recipe=names, ablate=ablate)


def test_the_report_says_what_the_results_hold(tmp_path, options, data, scales):
    options = with_rows(options, "sgd", "repopt+sgs", ablate=("ones",))
    rows = options.rows
    initial = initial_scales(plain_model(options, data, 0))
    moved = {name: gr.BranchScales(v.kxk * 1.5, v.one_by_one, v.identity) for name, v in initial.items()}
    summary = write_report(tmp_path, options, data, some_trainings(rows), [5, 6], other_results(rows), moved, initial)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    sgd, sgs = summary["recipes"]["sgd"], summary["recipes"]["repopt+sgs"]
    assert sgd["test_accuracy"] == [0.8, 0.9]
    assert (sgd["test_accuracy_mean"], sgd["test_accuracy_std"]) == (pytest.approx(0.85), pytest.approx(0.1 / 2**0.5))
    assert (sgd["seconds_per_step"], sgd["seconds_per_epoch"]) == (0.01, 1.0)
    assert (sgd["parameters"], sgd["multiplier_bytes"], sgd["diverged"]) == (1234, 56, 0)
    assert (sgd["sgs_seconds_per_epoch"], sgs["sgs_seconds_per_epoch"], sgs["sgs_updates"]) == (None, 0.125, 1)
    layer = summary["scales"]["layers"]["stage0.conv"]
    assert (layer["conv"]["moved"], layer["1x1"]["moved"]) == (pytest.approx(0.5), 0)
    assert [(found["row"], found["other"]) for found in summary["compared"]] == [
        ("repopt+sgs", "sgd"),
        ("repopt-ones", "sgd"),
    ]
    closing = "\n".join(closing_lines(summary))
    assert "85.00 ± 7.07" in closing
    assert "over 3 steps: outputs differ by at most 1.0e-15" in closing
    assert "0.0% to 50.0%" in closing
    assert "A training step takes as many times that of sgd: 2.00 (repopt+sgs), 3.00 (repopt-ones)." in closing
    text = (tmp_path / "summary.md").read_text()
    assert "Student's over 2 seeds" in text
    # One test image of 12 is 8.3 points, and no interval is narrower.
    form = " | ".join(cost_columns(sgs["form_costs"]).values())
    assert f"| repopt+sgs | 0.1 | 86.00 ± 7.07 | +1.0 ± 8.3 | 20.0 | 1,234 | {form} | 56 | 0.1250 |" in text
    assert text.index("](cost.png)") < text.index("| recipe |")
    for name in ("cost.png", "curves.png", "scales.png", "spatial_scaling_repopt_sgs.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in text
    assert not list(tmp_path.glob(f"*{files.TEMPORARY}"))


def test_one_seed_has_no_standard_deviation(tmp_path, options, data):
    options = with_rows(options, "sgd", "sgs")
    trainings = some_trainings(options.rows, (0.8,))
    summary = write_report(tmp_path, options, data, trainings, [0], other_results(options.rows), None, None)
    assert summary["recipes"]["sgd"]["test_accuracy_std"] is None
    assert "±" not in table(summary)
    assert "sgs against sgd: one seed allows no statement." in summary["statements"]
    assert "With one seed no difference between rows is evidence" in (tmp_path / "summary.md").read_text()


def test_the_choice_of_learning_rates_is_shown(tmp_path, source, data):
    options = resolve({"data": source, **TINY, "lr": (0.1, 0.3), "recipe": ("sgd", "repopt", "csla"), "seeds": 2})
    of_rates = {"sgd": ((0.1, 0.5, None), (0.3, 0.125, 4)), "repopt": ((0.3, 0.75, None), (0.1, 0.625, None))}
    trainings = {
        name: {
            lr: [a_training(0.25, RECIPES[name], lr, validation_accuracy=validation, diverged=epoch)] * 2
            for lr, validation, epoch in rates
        }
        for name, rates in of_rates.items()
    }
    trainings["csla"] = {0.3: [a_training(0.25, RECIPES["csla"], 0.3, validation_accuracy=0.5)] * 2}
    summary = write_report(tmp_path, options, data, trainings, [0, 1], other_results(options.rows), None, None)
    assert {name: figures["learning_rate"] for name, figures in summary["recipes"].items()} == {
        "sgd": 0.1,
        "repopt": 0.3,
        "csla": 0.3,
    }
    assert list(summary["recipes"]["repopt"]["by_rate"]) == ["0.1", "0.3"]
    text = (tmp_path / "summary.md").read_text()
    assert "| sgd | 50.0 / 25.0 | 12.5 / 25.0 (2 diverged) |" in text
    assert "| repopt | 62.5 / 25.0 | 75.0 / 25.0 |" in text
    assert "35% of the training images" in text


def test_trainings_that_diverged_or_never_began_are_in_the_table(tmp_path, options, data):
    options = with_rows(options, "sgd", "repopt")
    trainings = some_trainings([RECIPES["sgd"]])
    diverged = trainings["sgd"][0.1][0]
    diverged["diverged"], diverged["epochs"][1]["train_loss"] = 2, None
    results = {**other_results(options.rows), "check": None}
    summary = write_report(tmp_path, options, data, trainings, [0, 1], results, None, None)
    shown = table(summary)
    assert "85.00 ± 7.07 (1 diverged)" in shown
    assert re.search("repopt .* the Hyper-Search diverged", shown)
    assert summary["compared"] == []
    assert (tmp_path / "curves.png").exists()


def test_the_validation_part_has_a_column(tmp_path, options, data):
    options = dataclasses.replace(with_rows(options, "sgd", "sgs"), validation=0.2)
    trainings = {
        row.name: {0.1: [a_training(0.75, row, validation_accuracy=accuracy) for accuracy in (0.5, 0.6)]}
        for row in options.rows
    }
    summary = write_report(tmp_path, options, data, trainings, [0, 1], other_results(options.rows), None, None)
    assert summary["recipes"]["sgs"]["validation_accuracy"] == [0.5, 0.6]
    text = (tmp_path / "summary.md").read_text()
    assert "| test accuracy, % (mean ± std) | validation, % |" in text
    assert "| 75.00 ± 0.00 | 55.00 ± 7.07 |" in text


def test_what_all_rows_share_is_told_first(tmp_path, source, data):
    given = {**TINY, "recipe": ("sgd", "sgs", "sgs-grid"), "sgs_alpha": 1.0, "sgs_beta": 1.0}

    def written(**more):
        options = resolve({"data": source, **given, **more})
        summary = write_report(
            tmp_path, options, data, some_trainings(options.rows), [0, 1], other_results(options.rows), None, None
        )
        meanings = [figures["meaning"] for figures in summary["recipes"].values()]
        return (tmp_path / "summary.md").read_text().partition("| recipe |")[0], meanings

    text, meanings = written(preset="sgs-cifar-200")
    assert "Settings are those of `sgs-cifar-200` (" in text
    assert "All rows train with SGD (momentum 0.9) and weight decay 0.0005 of the set `everything` (" in text
    assert meanings[:2] == ["plain SGD", "SGD with spatial gradient scaling"]
    text, meanings = written(preset="repopt-hs", momentum=0.8)
    assert "All rows train with SGD (momentum 0.8, Nesterov) and weight decay 4e-05 of the set `repopt` (" in text
    text, meanings = written(optimizer="adamw", weight_decay=0.01)
    assert "All rows train with AdamW and weight decay 0.01 of the set" in text
    assert meanings[0] == "plain AdamW"
    assert meanings[2].startswith("AdamW with one fixed scaling")
    assert written(ema_decay=0.9)[1][0] == "plain FusedRepSGD"


def test_merged_networks_and_trainings_taken_over_are_told(tmp_path, options, data):
    options = with_rows(options, "sgd", "repvgg")
    trainings = some_trainings(options.rows)
    for training, difference in zip(trainings["repvgg"][0.1], (2e-7, 1e-7)):
        training |= {"parameters_deployed": 1000, "merge_difference": difference}
    for training in trainings["sgd"][0.1]:
        training["taken_from"] = "sgs-k=1"
    summary = write_report(tmp_path, options, data, trainings, [0, 1], other_results(options.rows), None, None)
    assert summary["recipes"]["repvgg"]["merge_difference"] == 2e-7
    text = (tmp_path / "summary.md").read_text()
    costs = [summary["recipes"][name]["form_costs"] for name in ("sgd", "repvgg")]
    assert costs[0]["macs"] == costs[0]["deployed_macs"] == costs[1]["deployed_macs"] < costs[1]["macs"]
    assert costs[0]["deployed_parameters"] == costs[1]["deployed_parameters"]
    assert "| parameters | multiply-adds, M | deployed, M | parameters deployed | multipliers" in text
    assert f"| 1,234 | {costs[1]['macs'] / 1e6:.1f} | {costs[0]['macs'] / 1e6:.1f} | " in text
    assert "outputs differ by at most 2.0e-07 (repvgg)" in text
    assert "no differing option touches: sgd from sgs-k=1." in text


def test_the_number_of_intervals_and_a_search_that_seeds_share_are_told(tmp_path, options, data):
    options = with_rows(options, "sgd", "sgs", "repopt")
    write_report(tmp_path, options, data, some_trainings(options.rows), [0, 1], other_results(options.rows), None, None)
    text = (tmp_path / "summary.md").read_text()
    assert "Of 2 such intervals 0.1 are expected to miss. The seeds of repopt share one Hyper-Search" in text
    options = with_rows(options, "sgd", "sgs")
    write_report(tmp_path, options, data, some_trainings(options.rows), [0, 1], other_results(options.rows), None, None)
    assert "share one Hyper-Search" not in (tmp_path / "summary.md").read_text()


def test_pictures_of_kernels_and_of_the_search(tmp_path, options, data):
    options = with_rows(options, "sgd", "sgs", "repopt", "repvgg")
    (tmp_path / "weights").mkdir()
    for n, row in enumerate(options.rows):
        name = f"{row.name}-lr0.1-seed4.pt" if row.name == "sgs" else f"{row.name}-seed4.pt"
        files.save_tensors(tmp_path / "weights" / name, plain_model(options, data, n).state_dict())
    means = {"a.conv": {"conv": 1.0, "1x1": 0.5}, "b.conv": {"conv": 1.0, "1x1": 0.5, "identity": 2.0}}
    records = [{"seconds": 1.0, "test_accuracy": 0.5, "layer_scale_means": means}] * 2
    search = {"epochs": records, "parameters": 1234, "diverged": None}
    initial = initial_scales(plain_model(options, data, 0))
    results = {**other_results(options.rows), "search": search}
    write_report(tmp_path, options, data, some_trainings(options.rows), [4, 5], results, initial, initial)
    text = (tmp_path / "summary.md").read_text()
    for name in ("kernels.png", "scale_means.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in text
    assert list(pictures._networks(tmp_path, {row.name: {"learning_rate": 0.1} for row in options.rows}, 4)) == [
        "sgd",
        "sgs",
        "repopt",
    ]


def test_scale_means_are_drawn_of_all_layers_and_of_the_last_shortcut():
    means = {"a.conv": {"conv": 1.0, "1x1": 0.5}, "b.conv": {"conv": 3.0, "1x1": 0.5, "identity": 2.0}}
    later = {"a.conv": {"conv": 2.0, "1x1": 0.0}, "b.conv": {"conv": 6.0, "1x1": 1.0, "identity": 4.0}}
    whole, last = plots._scale_means([means, later]).axes
    assert {line.get_label(): list(line.get_ydata()) for line in whole.lines} == {
        "k x k": [2, 4],
        "1 x 1": [0.5, 0.5],
        "identity": [2, 4],
    }
    assert {line.get_label(): list(line.get_ydata()) for line in last.lines} == {
        "k x k": [3, 6],
        "1 x 1": [0.5, 1],
        "identity": [2, 4],
    }


def test_identity_ratios_are_drawn_over_depth():
    (axes,) = plots._identity_ratios(
        {"depth": {"a.conv": 0.2, "b.conv": 0.6}, "1": {"a.conv": 0.3, "b.conv": 0.3}}
    ).axes
    assert {line.get_label(): list(line.get_ydata()) for line in axes.lines} == {"depth": [0.2, 0.6], "1": [0.3, 0.3]}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]


def test_identity_ratios_are_those_of_each_start(options, data, monkeypatch):
    seen = []

    def ratio(model, x):
        seen.append((max(v.kxk[0].item() for v in csla.extract_scales(model).values()), x.shape))
        return {"stage1.0": 0.5}

    monkeypatch.setattr(csla, "identity_variance_ratio", ratio)
    assert identity_ratios(options, data) == {"depth": {"stage1.0": 0.5}, "1": {"stage1.0": 0.5}}
    assert [start for start, _ in seen] == [pytest.approx(2**0.5), 1.0]
    assert seen[0][1] == (30, 3, 32, 32)
    assert list(identity_ratios(dataclasses.replace(options, hs_init=2.0), data)) == ["2", "depth", "1"]

    def none(model, x):
        raise ValueError("no block")

    monkeypatch.setattr(csla, "identity_variance_ratio", none)
    assert identity_ratios(options, data) == {}


def test_a_busy_machine_is_told(tmp_path, options, data):
    options = with_rows(options, "sgd", "sgs")
    results = other_results(options.rows)
    said = "quartiles of a step lie up to 40% apart"
    for quartiles, busy in (([0.009, 0.01, 0.011], False), ([0.008, 0.01, 0.012], True)):
        results["speed"]["sgs"] = quartiles
        summary = write_report(tmp_path, options, data, some_trainings(options.rows), [0, 1], results, None, None)
        assert any(said in statement for statement in summary["statements"]) == busy


def test_curves_of_trainings_that_all_diverged_are_drawn(tmp_path):
    plots.curves(tmp_path / "curves.png", {"sgd": [[{"train_loss": None, "test_accuracy": 0.1}]] * 2})
    assert (tmp_path / "curves.png").exists()


def test_curves_of_unequal_epochs_are_drawn(tmp_path):
    """Seeds that ended early, and epochs whose accuracy was not measured."""
    record = {"train_loss": 1.0}
    runs = [[record, {**record, "test_accuracy": 0.5}, {**record, "test_accuracy": 0.6}], [{"train_loss": None}]]
    plots.curves(tmp_path / "curves.png", {"sgd": runs, "sgs": [runs[0], runs[0]]})
    at, values = plots._measured([runs[0], runs[0]], "test_accuracy")
    assert (at.tolist(), values.tolist()) == ([2, 3], [[0.5, 0.6], [0.5, 0.6]])
    assert plots._measured(runs, "train_loss")[1].shape == (2, 0)


def test_a_check_that_is_not_finite_is_told():
    summary = {"csla_equals_gr": {"steps": 3, "outputs": None, "weights": 1.0, "agrees": False}}
    assert (
        "not finite"
        in closing_lines(
            {
                **summary,
                "recipes": {},
                "seeds": [0],
                "compared": [],
                "not_trained": {},
                "statements": [],
                "scales": None,
            }
        )[-1]
    )


def test_scales_without_a_training_are_drawn(tmp_path, options, data):
    initial = initial_scales(plain_model(options, data, 0))
    search = {"epochs": [{"seconds": 1.0, "test_accuracy": 0.5}], "parameters": 1234, "diverged": None}
    results = {"search": search, "speed": {}, "seconds": 1.0}
    summary = write_report(tmp_path, with_rows(options), data, {}, [0], results, initial, initial)
    assert summary["recipes"] == {}
    assert {path.name for path in tmp_path.glob("*.png")} == {"scales.png", "identity.png"}


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
    code = """
import pathlib, sys, tempfile
import matplotlib
from gradrep_kernels.recipes import plots

before, backend = matplotlib.rcParams.copy(), matplotlib.get_backend(auto_select=False)
g = {"a": [[1.0] * 3] * 3}
plots.spatial_scalings(pathlib.Path(tempfile.mkdtemp()) / "g.png", g, g)
assert matplotlib.rcParams.copy() == before
assert matplotlib.get_backend(auto_select=False) == backend
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


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
    monkeypatch.setattr("gradrep_kernels.recipes.progress.QUIET_SECONDS", -1.0)
    assert report_something(io.StringIO()) == "an epoch\na training\n"
