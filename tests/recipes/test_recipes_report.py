"""The report of a job: figures, text and pictures; whole files; progress."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest

import gradrep_kernels as gr
from gradrep_kernels.recipes import files
from gradrep_kernels.recipes.build import plain_model
from gradrep_kernels.recipes.errors import InputError, extra
from gradrep_kernels.recipes.progress import Reporter
from gradrep_kernels.recipes.report import check_line, scales_line, table, write_report
from gradrep_kernels.recipes.scale_sources import initial_scales
from gradrep_kernels.recipes.table import RECIPES, ablated

pytestmark = pytest.mark.usefixtures("one_thread")


def a_state(rows_, seeds, sgs_first=None):
    def training(accuracy_, row):
        timing = [
            {"seconds": 0.5, "sgs_updated": False, "sgs_seconds": 0.0},
            {"seconds": 1.5, "sgs_updated": row.sgs, "sgs_seconds": 0.25},
        ]
        epochs = [
            {"train_loss": 1.0 / (n + 1), "lr": 0.1, "test_accuracy": accuracy_ - 0.1 + 0.1 * n, **timing[n]}
            for n in range(2)
        ]
        kept = {"epochs": epochs, "parameters": 1234, "multiplier_bytes": 56}
        if row.sgs:
            kept["scalings"] = {"start": sgs_first or {"a": [[1.0, 2.0, 1.0]] * 3}, "end": {"a": [[0.5, 2.5, 1.0]] * 3}}
        return kept

    finished = {f"{row.name}-seed{seed}": training(0.8 + 0.1 * n, row) for row in rows_ for n, seed in enumerate(seeds)}
    return {
        "finished": finished,
        "current": None,
        "check": {"steps": 3, "outputs": 1e-15, "weights": 2e-15, "agrees": True},
        "seconds": 12.5,
    }


def test_the_report_says_what_the_state_holds(tmp_path, options, data, scales):
    chosen = [RECIPES["sgd"], RECIPES["repopt+sgs"], ablated("ones")]
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
        tmp_path, options, data, [RECIPES["sgd"]], [0], {**a_state([RECIPES["sgd"]], [0]), "check": None}, None, None
    )
    assert summary["recipes"]["sgd"]["test_accuracy_std"] is None
    assert "±" not in table(summary)
    assert "With one seed no difference between rows is evidence" in (tmp_path / "summary.md").read_text()


def test_a_loss_that_is_not_finite_is_no_obstacle(tmp_path, options, data):
    state = a_state([RECIPES["sgd"]], [0, 1])
    state["finished"]["sgd-seed0"]["epochs"][1]["train_loss"] = None
    write_report(tmp_path, options, data, [RECIPES["sgd"]], [0, 1], {**state, "check": None}, None, None)
    assert (tmp_path / "curves.png").exists()


def test_curves_of_one_epoch_and_scales_without_a_training_are_drawn(tmp_path, options, data):
    state = a_state([RECIPES["sgd"]], [0])
    del state["finished"]["sgd-seed0"]["epochs"][1:]
    write_report(tmp_path, options, data, [RECIPES["sgd"]], [0], {**state, "check": None}, None, None)
    initial = initial_scales(plain_model(options, data, 0))
    (tmp_path / "search").mkdir()
    search = {"epochs": [{"seconds": 1.0, "test_accuracy": 0.5}], "parameters": 1234}
    summary = write_report(
        tmp_path / "search", options, data, [], [0], {**state, "finished": {"search": search}}, initial, initial
    )
    assert summary["recipes"] == {}
    pictures = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.png"))
    assert list(map(str, pictures)) == ["curves.png", "search/scales.png"]
    assert all((tmp_path / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)


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
