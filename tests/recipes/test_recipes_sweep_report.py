"""The table of a sweep, what it says in words, and its pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gradrep_kernels.recipes.options.resolve import resolve
from gradrep_kernels.recipes.sweeps.plots import draw_sweep
from gradrep_kernels.recipes.sweeps.report import sweep_lines, write_sweep

SEEDS = [3, 4, 5, 6]


def figures(accuracies, validation=None, taken=None, lr=0.1, diverged=0, **more):
    return {
        "test_accuracy": list(accuracies),
        "validation_accuracy": validation,
        "learning_rate": lr,
        "diverged": diverged,
        "taken_from": taken,
        "seconds_per_step": 0.01,
        "shares_search": False,
        **more,
    }


def summary(recipes, seeds=SEEDS, **more):
    return {
        "seeds": seeds[: len(next(iter(recipes.values()))["test_accuracy"])],
        "recipes": recipes,
        "not_trained": [],
        "search": None,
        "csla_equals_gr": None,
        "compared": [],
        "seconds": 1.0,
        "data": {"name": "digits", "test": 10000},
        "options": {"model": "small"},
        **more,
    }


def swept(tmp_path, summaries, base=None, **values):
    """Write the sweep of options whose values at each point are `values`."""
    points = {
        name: resolve({"recipe": ("sgs",), **{option: given[n] for option, given in values.items()}})
        for n, name in enumerate(summaries)
    }
    return write_sweep(tmp_path, list(values), base or next(iter(points)), points, summaries)


def test_points_are_compared_with_the_base_seed_by_seed(tmp_path):
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    b, c = rng.uniform(0.7, 0.8, (2, 4))
    a = b + [0.01, -0.01, 0.005, -0.004]
    sweep = swept(
        tmp_path,
        {name: summary({"sgs": figures(x.tolist())}) for name, x in (("k=1", a), ("k=3", b), ("k=5", c + 0.2))},
        base="k=3",
        sgs_k=(1, 3, 5),
    )
    assert [(found["point"], found["row"], found["other"]) for found in sweep["compared"]] == [
        ("k=1", "sgs at k=1", "sgs at k=3"),
        ("k=5", "sgs at k=5", "sgs at k=3"),
    ]
    for found, x in zip(sweep["compared"], (a, c + 0.2)):
        low, high = stats.ttest_rel(x, b).confidence_interval(0.95)
        assert found["mean"] - found["half_width"] == pytest.approx(100 * low)
        assert found["mean"] + found["half_width"] == pytest.approx(100 * high)
    text = "\n".join(sweep["statements"])
    assert "sgs at k=5 is better than sgs at k=3 by" in text
    assert "k=1" not in text  # Nothing is said where the interval holds 0.
    assert "Of 2 differences 1 is shown. Of 2 such intervals 0.1 are expected to miss." in text
    assert json.loads((tmp_path / "sweep.json").read_text()) == sweep


def test_pairs_are_the_seeds_that_both_points_have(tmp_path):
    one = summary({"sgs": figures([0.5, 0.6, 0.7])}, [0, 1, 2])
    other = summary({"sgs": figures([0.7, 0.9])}, [2, 1])
    sweep = swept(tmp_path, {"a": one, "b": other}, sgs_k=(1, 2))
    (found,) = sweep["compared"]
    assert (found["seeds"], found["mean"], found["better"]) == (2, pytest.approx(15), 1)


def test_one_seed_allows_no_statement(tmp_path):
    sweep = swept(tmp_path, {n: summary({"sgs": figures([0.5])}) for n in "ab"}, sgs_k=(1, 2))
    assert sweep["compared"] == []
    assert sweep["statements"] == ["One seed allows no statement about a difference."]
    assert "±" not in sweep_lines(sweep)[0]


def test_other_test_images_are_not_compared(tmp_path):
    points = {n: summary({"sgs": figures([0.5, 0.6])}, data={"name": n, "test": 9}) for n in "ab"}
    assert swept(tmp_path, points, sgs_k=(1, 2))["compared"] == []


def test_the_best_point_is_that_of_the_validation_part(tmp_path):
    recipes = {
        "k=1": {"sgd": figures([0.9, 0.9], [0.9, 0.9]), "sgs": figures([0.9, 0.9], [0.60, 0.62])},
        "k=3": {"sgd": figures([0.9, 0.9], [0.9, 0.9], "k=1"), "sgs": figures([0.5, 0.5], [0.60, 0.70])},
        "k=5": {"sgd": figures([0.9, 0.9], [0.9, 0.9], "k=1"), "sgs": figures([0.8, 0.8], [0.9, 0.9], diverged=1)},
    }
    sweep = swept(tmp_path, {name: summary(rows) for name, rows in recipes.items()}, sgs_k=(1, 3, 5))
    assert sweep["best"] == {"sgs": "k=3"}
    assert sweep["statements"][-1] == (
        "sgs is best on the validation part at k=3: 65.00 % there, 50.00 % on the test images."
    )
    table = sweep_lines(sweep)[0].splitlines()
    assert [line.split()[:2] for line in table[2:]] == [["sgd", "any"], ["sgs", "1"], ["sgs", "3"], ["sgs", "5"]]
    assert [line.count("(best)") for line in table[2:]] == [0, 0, 1, 0]
    assert "(1 diverged)" in table[-1]


def test_points_that_are_equal_are_told(tmp_path):
    recipes = {name: {"sgs": figures([0.5, 0.5], [0.6, 0.6])} for name in ("k=1", "k=3", "k=5")}
    recipes["k=1"]["sgs"]["validation_accuracy"] = [0.1, 0.2]
    sweep = swept(tmp_path, {name: summary(rows) for name, rows in recipes.items()}, sgs_k=(1, 3, 5))
    assert sweep["best"] == {}
    assert sweep["statements"][-1] == "sgs is as good on the validation part at k=3, k=5."


def test_without_a_validation_part_no_point_is_best(tmp_path):
    sweep = swept(tmp_path, {n: summary({"sgs": figures([0.5, 0.6])}) for n in "ab"}, sgs_k=(1, 2))
    assert sweep["best"] == {}
    assert "validation" not in sweep_lines(sweep)[0]


def test_what_was_taken_over_is_compared_once(tmp_path):
    found = {"other": "sgd", "mean": 20.0, "half_width": 1.0, "better": 2, "worse": 0, "seeds": 2}
    compared = [{"row": row, **found} for row in ("repopt", "sgs")]
    recipes = {
        name: {
            "sgd": figures([0.5, 0.5], taken=taken),
            "sgs": figures([0.7, 0.7]),
            "repopt": figures([0.7, 0.7], taken=taken, shares_search=True),
        }
        for name, taken in (("a", None), ("b", "a"))
    }
    points = {name: summary(rows, compared=compared, search={}) for name, rows in recipes.items()}
    sweep = swept(tmp_path, points, sgs_k=(1, 2))
    assert [(c["point"], c["row"], c["other"]) for c in sweep["compared"]] == [
        ("b", "sgs at b", "sgs at a"),
        ("a", "repopt", "sgd"),
        ("a", "sgs at a", "sgd"),
        ("b", "sgs at b", "sgd"),
    ]
    assert "All seeds of a row share the Hyper-Search of their point" in sweep["statements"][-1]
    assert "Trained once and taken over where no option that touches it differs: sgd at a, repopt at a." in (
        (tmp_path / "sweep.md").read_text()
    )


def test_a_row_that_half_of_a_grid_takes_over_is_compared_once(tmp_path):
    """sgd depends on the epochs and not on k. The base takes it over too."""
    taken = {"k=1,e=1": None, "k=2,e=1": "k=1,e=1", "k=1,e=2": None, "k=2,e=2": "k=1,e=2"}
    points = {
        name: summary({"sgd": figures([0.5 + 0.1 * name.endswith("2")] * 2, taken=source)})
        for name, source in taken.items()
    }
    sweep = swept(tmp_path, points, base="k=2,e=1", sgs_k=(1, 2, 1, 2), epochs=(1, 1, 2, 2))
    (found,) = sweep["compared"]
    assert (found["row"], found["other"], found["mean"]) == ("sgd at k=1,e=2", "sgd at k=2,e=1", pytest.approx(10))
    assert [line.split()[:3] for line in sweep_lines(sweep)[0].splitlines()[2:]] == [
        ["sgd", "1", "1"],
        ["sgd", "1", "2"],
    ]


def test_rows_that_were_not_trained_are_in_the_table(tmp_path):
    points = {n: summary({"sgd": figures([0.5, 0.6])}, not_trained=["repopt"]) for n in "ab"}
    assert sweep_lines(swept(tmp_path, points, sgs_k=(1, 2)))[0].count("the Hyper-Search diverged") == 2


# -- pictures


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draw the pictures of a sweep and return their axes."""
    figures_drawn = []

    def write(path, draw, *arguments):
        figures_drawn.append(draw(*arguments))
        path.write_bytes(b"")

    monkeypatch.setattr("gradrep_kernels.recipes.plots.write", write)

    def draw(points, **values):
        options = {
            name: resolve({"recipe": ("sgs",), **{o: given[n] for o, given in values.items()}})
            for n, name in enumerate(points)
        }
        captions = draw_sweep(tmp_path, list(values), options, {n: {"recipes": rows} for n, rows in points.items()})
        assert len(captions) == len(figures_drawn)
        return [axes for figure in figures_drawn for axes in figure.axes]

    return draw


def test_one_number_is_a_curve(drawn):
    points = {
        str(k): {
            "sgd": figures([0.5, 0.5], taken="7" if k != 7 else None),
            "sgs": figures([k / 10, k / 10], [0.3, 0.3]),
        }
        for k in (7, 1, 4)
    }
    (axes,) = drawn(points, sgs_k=(7, 1, 4))
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["sgd"].get_ydata()[0] == 50  # one level
    curves = {container.get_label(): container.lines[0] for container in axes.containers}
    assert curves["sgs"].get_xdata().tolist() == [1, 4, 7]
    assert curves["sgs"].get_ydata().tolist() == pytest.approx([10, 40, 70])
    assert curves["sgs, validation"].get_linestyle() == "--"
    assert axes.get_xscale() == "linear"


def test_values_of_two_decades_have_a_logarithmic_axis(drawn):
    points = {str(n): {"sgs": figures([0.5, 0.6])} for n in range(3)}
    (axes,) = drawn(points, weight_decay=(1e-5, 1e-4, 1e-3))
    assert axes.get_xscale() == "log"


def test_two_numbers_are_a_map(drawn):
    alphas, betas = (5.0, 5.0, 0.8, 0.8), (1.0, 100.0, 1.0, 100.0)
    points = {
        f"{n}": {"sgs-grid": figures([0.1 * n]), "sgd": figures([0.9], taken="0" if n else None)} for n in range(4)
    }
    axes, _ = drawn(points, sgs_alpha=alphas, sgs_beta=betas)
    assert np.asarray(axes.images[0].get_array()) == pytest.approx(np.array([[20, 30], [0, 10]]))
    assert (axes.get_ylabel(), axes.get_xlabel(), axes.get_title()) == ("sgs-alpha", "sgs-beta", "sgs-grid")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.8", "5"]


@pytest.mark.parametrize(
    "values",
    [
        {"optimizer": ("sgd", "adam", "adamw")},
        {"sgs_alpha": (1.0, 2.0, 3.0), "sgs_beta": (1.0, 2.0, 3.0)},  # no grid
        {"lr": ((0.1,), (0.1, 0.2), (0.3,)), "sgs_k": (1, 2, 3)},
    ],
)
def test_other_points_stand_side_by_side(drawn, values):
    rows = {"sgd": figures([0.5, 0.6]), "sgs": figures([0.7, 0.7])}
    (axes,) = drawn({"a": rows, "b": rows, "c": rows}, **values)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]
    assert [container.get_label() for container in axes.containers] == ["sgd", "sgs"]


def test_one_point_has_no_picture(drawn):
    assert drawn({"a": {"sgs": figures([0.5])}}, sgs_k=(1,)) == []
