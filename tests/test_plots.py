"""`gr.plots`: what the figures show, what is refused, and what stays untouched."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

import gradrep_kernels as gr
from gradrep_kernels.sgs import ScalingUpdate

matplotlib_figure = pytest.importorskip("matplotlib.figure")


def maps(names="abcdefgh", sides=(3, 3), seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.random(sides) for name in names}


def images(figure):
    """[(title, label, array)] of the maps that are drawn."""
    return [
        (axes.get_title(), axes.get_ylabel(), np.asarray(axes.images[0].get_array()))
        for axes in figure.axes
        if axes.images
    ]


def test_spatial_scalings_of_the_first_middle_and_last_layer():
    g = maps()
    figure = gr.plots.spatial_scalings(g)
    assert isinstance(figure, matplotlib_figure.Figure)
    drawn = images(figure)
    assert [title for title, _, _ in drawn] == ["a", "e", "h"]
    for name, _, array in drawn:
        assert np.array_equal(array, g[name])


def test_start_and_end_stand_one_above_the_other_with_one_scale():
    start, end = maps(seed=1), maps(seed=2)
    figure = gr.plots.spatial_scalings(end, start, layers="all")
    drawn = images(figure)
    assert len(drawn) == 16
    # Six columns: the first six at the start, the same at the end, then the other two.
    assert [label for _, label, _ in drawn if label] == ["start", "end", "start", "end"]
    expected = [t[n] for part in ("abcdef", "gh") for t in (start, end) for n in part]
    assert all(np.array_equal(array, g) for (_, _, array), g in zip(drawn, expected, strict=True))
    limits = {axes.images[0].get_clim() for axes in figure.axes if axes.images}
    every = np.stack([*start.values(), *end.values()])
    assert limits == {(every.min(), every.max())}


def test_a_controller_and_chosen_layers_are_drawn():
    model = gr.models.resnet18(num_classes=3)
    sgs = gr.SpatialGradientScaling(model, torch.optim.SGD(model.parameters(), lr=0.1), batches=1)
    sgs.update([torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).cumsum(3)])
    name = list(sgs.scalings)[3]
    ((title, _, array),) = images(gr.plots.spatial_scalings(sgs, layers=name))
    assert title == name
    assert np.allclose(array, sgs.scalings[name].numpy())
    assert not np.allclose(array, 1)
    figure = gr.plots.scaling_history(sgs)
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    assert list(lines[name]) == [pytest.approx(float(sgs.scalings[name][1, 1]))]


def test_numbers_stand_in_small_maps_alone():
    assert len(gr.plots.spatial_scalings(maps("a", (5, 5))).axes[0].texts) == 25
    assert not gr.plots.spatial_scalings(maps("a", (7, 7))).axes[0].texts


@pytest.mark.parametrize(
    ("scalings", "options", "error", "message"),
    [
        ({}, {}, ValueError, "scalings holds no layers"),
        ({"a": np.ones(3)}, {}, ValueError, r"scalings: a must be a matrix \[kh, kw\], got \[3\]"),
        ([np.ones((3, 3))], {}, TypeError, "scalings must map layers to G"),
        (maps("ab"), {"layers": ["a", "z"]}, ValueError, "layers: there is no G of z"),
        (maps("ab"), {"layers": []}, ValueError, "layers must be"),
        (maps("ab"), {"start": maps("abc")}, ValueError, "there is no G of c at the end"),
    ],
)
def test_spatial_scalings_refuses(scalings, options, error, message):
    with pytest.raises(error, match=message):
        gr.plots.spatial_scalings(scalings, **options)


def test_kernel_magnitudes_are_those_of_a_hand_count():
    kernel = torch.tensor([[[1.0, -3.0, 2.0]], [[-5.0, 1.0, 0.0]]])[None].transpose(0, 1)  # [2, 1, 1, 3]
    plain = {"a.weight": kernel, "a.bias": torch.ones(2), "one.weight": torch.ones(2, 2, 1, 1)}
    plain |= {"b.weight": torch.ones(1, 1, 1, 3), "c.weight": torch.ones(1, 1, 1, 1, 3)}
    drawn = images(gr.plots.kernel_magnitudes({"sgd": plain, "sgs": {**plain, "a.weight": kernel.flip(3)}}))
    assert [title for title, _, _ in drawn] == ["a", "b", "mean of 2 layers", "", "", ""]
    assert [label for _, label, _ in drawn] == ["sgd", "", "", "sgs", "", ""]
    # |kernel| over two output channels is (3, 2, 1), its mean 2.
    assert np.allclose(drawn[0][2], [[1.5, 1.0, 0.5]])
    assert np.allclose(drawn[3][2], [[0.5, 1.0, 1.5]])
    assert np.allclose(drawn[2][2], [[1.25, 1.0, 0.75]])


def test_kernel_magnitudes_take_models_and_leave_them():
    model = gr.models.repopt_vgg_small(num_classes=3, in_channels=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)]
    drawn = images(gr.plots.kernel_magnitudes({"x": model}, layers="all"))
    assert [title for title, _, _ in drawn] == [*names, f"mean of {len(names)} layers"]
    assert np.allclose(drawn[1][2].mean(), 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("networks", "message"),
    [
        ({}, "networks holds none"),
        ({"x": {"a.weight": torch.ones(2, 2, 1, 1)}}, "x has no kernels of more than one tap"),
        (
            {"x": {"a.weight": torch.ones(1, 1, 3, 3)}, "y": {"b.weight": torch.ones(1, 1, 3, 3)}},
            "layers: y has no kernels of a",
        ),
    ],
)
def test_kernel_magnitudes_refuse(networks, message):
    with pytest.raises(ValueError, match=message):
        gr.plots.kernel_magnitudes(networks)


def test_a_sweep_curve():
    figure = gr.plots.sweep_curve(
        [5, 1, 3],
        {"a": [50.0, 10.0, 30.0], "level": 20.0},
        {"a": [5.0, 1.0, 3.0], "level": 2.0},
        name="k",
        dashed=["a"],
    )
    (axes,) = figure.axes
    (curve,) = axes.containers
    assert curve.lines[0].get_xdata().tolist() == [1, 3, 5]
    assert curve.lines[0].get_ydata().tolist() == [10, 30, 50]
    assert curve.lines[0].get_linestyle() == "--"
    low, high = zip(*(segment[:, 1] for segment in curve.lines[2][0].get_segments()))
    assert (list(low), list(high)) == ([9, 27, 45], [11, 33, 55])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["level", "a"]
    assert (axes.get_xlabel(), axes.get_xscale()) == ("k", "linear")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "3", "5"]


@pytest.mark.parametrize(
    ("values", "scale"), [([1, 99], "linear"), ([1, 100], "log"), ([0, 100], "linear"), ([-1, 100], "linear")]
)
def test_two_decades_of_positive_values_stand_on_a_logarithmic_axis(values, scale):
    assert gr.plots.sweep_curve(values, {"a": [1, 2]}).axes[0].get_xscale() == scale


@pytest.mark.parametrize(
    ("values", "means", "bars", "message"),
    [
        ([], {"a": []}, None, "values must be numbers"),
        ([1, 2], {}, None, "means must have a label, got 2 and 0"),
        ([1, 2], {"a": [1]}, None, "must have 2 numbers of a"),
        ([1, 2], {"a": [1, 2]}, {"a": [1]}, "must have 2 numbers of a"),
    ],
)
def test_a_sweep_curve_refuses(values, means, bars, message):
    with pytest.raises(ValueError, match=message):
        gr.plots.sweep_curve(values, means, bars)


def entries(epochs, steps, names="ab"):
    return [
        ScalingUpdate(n + 1, epoch, step, {name: torch.full((3, 3), float(n)) for name in names})
        for n, (epoch, step) in enumerate(zip(epochs, steps))
    ]


@pytest.mark.parametrize(
    ("epochs", "steps", "unit", "at"),
    [
        ([1, 5, 10], [None] * 3, "epoch", [1, 5, 10]),
        ([1, 1, 1], [20, 40, 60], "step", [20, 40, 60]),
        ([None] * 3, [None] * 3, "update", [1, 2, 3]),
        ([1, 1, 5], [None] * 3, "update", [1, 2, 3]),  # the caller updated twice in an epoch
    ],
)
def test_the_history_is_drawn_over_what_the_updates_are_counted_in(epochs, steps, unit, at):
    figure = gr.plots.scaling_history(entries(epochs, steps))
    axes = figure.axes[0]
    assert axes.get_xlabel() == unit
    lines = [line for line in axes.lines if line.get_label() in ("a", "b")]
    assert [list(line.get_xdata()) for line in lines] == [at, at]
    assert all(list(line.get_ydata()) == [0, 1, 2] for line in lines)


def test_an_empty_history_is_refused():
    with pytest.raises(ValueError, match="no update yet"):
        gr.plots.scaling_history([])


def scales():
    return {
        "stem.conv": gr.BranchScales(torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.5])),
        "a.conv": gr.BranchScales(torch.tensor([2.0, 2.0]), None, torch.tensor([1.0, 2.0])),
        "b.conv": gr.BranchScales(torch.tensor([4.0, 4.0]), torch.tensor([1.0, 1.0]), True),
    }


def test_scales_over_depth():
    figure = gr.plots.scales_over_depth(scales())
    axes = figure.axes[0]
    bars = {tuple(c.lines[0].get_xdata()): tuple(c.lines[0].get_ydata()) for c in axes.containers}
    assert bars[(0,)] in ((2.0,), (0.5,))  # the stem stands alone, for it has no identity
    assert bars[(1, 2)] == (2.0, 4.0)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["stem", "a", "b"]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["k x k", "1 x 1", "identity"]
    assert not any(line.get_linestyle() == "--" for line in axes.lines)
    started = gr.plots.scales_over_depth(scales(), scales())
    assert [text.get_text() for text in started.axes[0].get_legend().get_texts()][-1] == "initial"


def test_scales_over_depth_draws_further_branches():
    ones = torch.ones(2)
    others = [gr.Branch(3 * ones, 3, 2), gr.Branch(5 * ones, 3, 2)]
    drawn = gr.plots.scales_over_depth({"a.conv": gr.BranchScales(ones, 2 * ones, others=others)}).axes[0]
    assert [float(c.lines[0].get_ydata()[0]) for c in drawn.containers] == [1, 2, 3, 5]
    legend = [text.get_text() for text in drawn.get_legend().get_texts()]
    assert legend == ["k x k", "1 x 1", "3x3_d2", "3x3_d2.2"]
    assert len({c.lines[0].get_color() for c in drawn.containers}) == 4


def test_scales_over_depth_refuses():
    with pytest.raises(TypeError, match="scales must map names to BranchScales"):
        gr.plots.scales_over_depth({"a": torch.ones(2)})
    with pytest.raises(ValueError, match="scales holds no layers"):
        gr.plots.scales_over_depth({})
    initial = scales()
    del initial["b.conv"]
    with pytest.raises(ValueError, match=r"initial has no scales of b\.conv \(conv\)"):
        gr.plots.scales_over_depth(scales(), initial)


def test_without_matplotlib_a_call_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib, or 'gradrep_kernels\[recipes\]'"):
        gr.plots.spatial_scalings(maps())
    with pytest.raises(ImportError, match="pip install matplotlib"):
        gr.plots.scales_over_depth(scales())
    with pytest.raises(ImportError, match="pip install matplotlib"):
        gr.plots.scaling_history(entries([1], [None]))
    with pytest.raises(ImportError, match="pip install matplotlib"):
        gr.plots.kernel_magnitudes({"x": {"a.weight": torch.ones(1, 1, 3, 3)}})
    with pytest.raises(ImportError, match="pip install matplotlib"):
        gr.plots.sweep_curve([1], {"a": [1]})


def test_the_import_takes_no_matplotlib_and_figures_touch_no_setting():
    code = """
import io, sys
import gradrep_kernels as gr
assert "matplotlib" not in sys.modules
import matplotlib
before, backend = matplotlib.rcParams.copy(), matplotlib.get_backend(auto_select=False)
gr.plots.spatial_scalings({"a": [[1.0] * 3] * 3}).savefig(io.BytesIO(), format="png")
assert matplotlib.rcParams.copy() == before
assert matplotlib.get_backend(auto_select=False) == backend
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
