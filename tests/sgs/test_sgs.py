"""From maps to scalings: against a float64 numpy oracle, the published code's results, and by hand."""

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cases_sgs import MAPS, Map, oracle_scaling
from checks import SCALING_TOLERANCE, scaling
from implementations import DEVICES

import gradrep_kernels as gr
from gradrep_kernels.sgs.dependence import (
    absolute_correlation,
    half_displacements,
    k_transform,
    pair_moments,
    resolve_padding,
    spatial_dependence,
)

PUBLISHED = (
    Path(os.environ.get("GRADREP_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data")) / "sgs_published.npz"
)

BACKENDS = [("auto", "cpu"), ("reference", "cpu")]  # interpreted Triton: interpreted_joint_histogram.py
BACKENDS += [
    pytest.param(backend, "cuda", marks=pytest.mark.gpu) for backend in ("cuda", "triton") if "cuda" in DEVICES
]


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("remove_near", [False, True])
@pytest.mark.parametrize("case", MAPS, ids=lambda case: case.desc)
def test_against_the_oracle(case, remove_near, backend, device):
    x = case.tensor()
    with gr.use_backend(backend):
        g = scaling(x.to(device), case, remove_near).cpu()
    assert g.dtype == torch.float32
    assert g.shape == case.kernel_size
    assert np.abs(g.numpy() - oracle_scaling(x.double().numpy(), case, remove_near)).max() < SCALING_TOLERANCE
    assert g.mean() == pytest.approx(1, abs=1e-6)
    assert torch.equal(g, g.flip(0, 1))
    assert g.argmax() == g.numel() // 2


@pytest.mark.skipif(not PUBLISHED.exists(), reason=f"the published code's results are not at {PUBLISHED}")
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_against_the_published_code(backend, device):
    data = np.load(PUBLISHED)
    names = sorted({key.split("/")[0] for key in data})
    assert len(names) == 8
    for name in names:
        kh, kw, padding, k, remove_near = data[f"{name}/args"].tolist()
        x = torch.from_numpy(data[f"{name}/x"]).to(device)
        with gr.use_backend(backend):
            g = gr.spatial_gradient_scaling(
                x, (int(kh), int(kw)), padding=int(padding), k=k, remove_near=bool(remove_near)
            )
        assert np.abs(g.cpu().numpy() - data[f"{name}/G"]).max() < SCALING_TOLERANCE, name


class TestWhereThePublishedScriptDiffers:
    """Its accidents, in words; our intent, in numbers. (That the oracle agrees with the intent is tested above.)"""

    def test_padding_is_rows_then_columns(self):
        """It pads rows by padding[1] and columns by padding[0]."""
        case = Map("", (5, 3, 6, 17), padding=(0, 1))
        x = case.tensor()
        assert not torch.allclose(scaling(x, case), scaling(x, replace(case, padding=(1, 0))), atol=1e-3)

    def test_kernels_are_rows_by_columns(self):
        """It reads a kernel of 3 x 5 as 5 x 3."""
        case = Map("", (4, 2, 11, 14), kernel_size=(3, 5), padding=(1, 2))
        x = case.tensor()
        turned = replace(case, kernel_size=(5, 3), padding=(2, 1))
        assert torch.allclose(scaling(x, case), scaling(x.transpose(2, 3), turned).T, atol=1e-6)
        assert scaling(x, case).shape == (3, 5)

    def test_dilation_spreads_the_taps(self):
        """It measures neighbours, whatever the dilation."""
        case = Map("", (4, 2, 14, 14), padding=(0, 0), dilation=(2, 2))
        x = case.tensor()
        spread, near = scaling(x, case), scaling(x, replace(case, dilation=(1, 1)))
        assert spread[0, 1] < near[0, 1]  # neighbours are more alike than pixels two apart

    def test_the_largest_value_is_counted(self):
        """Under NumPy 2 its bins, made of float32 edges, drop the maximum."""
        x = Map("", (2, 2, 8, 8)).tensor()
        counts = gr.joint_histogram(x, half_displacements((3, 3)), "sturges", padding=1)
        _, n = gr.pair_ranges(x, half_displacements((3, 3)), padding=1)
        assert torch.equal(counts.sum((-2, -1)), n)


def test_mutual_information_by_hand():
    counts = torch.tensor(
        [
            [[3, 0], [0, 5]],  # q follows from p
            [[0, 2], [7, 0]],  # and so it does here
            [[1, 2], [2, 4]],  # independent
            [[1, 1], [0, 2]],
            [[0, 6], [0, 0]],  # one cell: H(P, Q) = 0
            [[0, 0], [0, 0]],  # nothing
            [[2, 3], [0, 0]],  # p is constant
        ]
    )
    found = gr.normalized_mutual_information(counts)
    assert found.dtype == torch.float64
    h_p, h_q, h_pq = math.log(2), -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)), 1.5 * math.log(2)
    assert found[:4].tolist() == pytest.approx([1, 1, 0, (h_p + h_q - h_pq) / h_pq], abs=1e-14)
    assert found[4:6].isnan().all()
    assert found[[2, 6]].tolist() == [0, 0]
    assert torch.equal(gr.normalized_mutual_information(counts[3]), found[3])
    assert torch.equal(gr.normalized_mutual_information(counts.view(7, 1, 2, 2))[:, 0].nan_to_num(), found.nan_to_num())


def test_independence_is_exactly_zero():
    """Not a rounding error of 1e-17: that would become a scaling, with all its weight at the centre."""
    sides = torch.randint(1, 50, (2, 100, 9), generator=torch.Generator().manual_seed(0))
    assert gr.normalized_mutual_information(sides[0].unsqueeze(-1) * sides[1].unsqueeze(-2)).eq(0).all()


def test_mutual_information_knows_no_order_of_bins():
    counts = torch.randint(0, 50, (9, 9), generator=torch.Generator().manual_seed(0))
    found = gr.normalized_mutual_information(counts)
    assert 0 < found < 1
    assert gr.normalized_mutual_information(counts.T).item() == pytest.approx(found.item(), abs=1e-14)
    assert gr.normalized_mutual_information(counts[torch.randperm(9)]).item() == pytest.approx(found.item(), abs=1e-14)
    assert gr.normalized_mutual_information(torch.nn.functional.pad(counts, (0, 3, 0, 3))).item() == pytest.approx(
        found.item(), abs=1e-14
    )


@pytest.mark.parametrize("k", [0.5, 1.0, 2.0, 5.0])
def test_k_transform_is_equation_8(k):
    s = torch.linspace(0, 1, 11, dtype=torch.float64)
    found = k_transform(s, k)
    assert found[0] == 0
    assert found[-1] == 1
    assert (found.diff() > 0).all()
    assert found[5].item() == pytest.approx(k * 0.5 / ((k - 1) * 0.5 + 1), abs=1e-15)


class TestSpatialDependence:
    def test_mean_over_the_channels_where_it_is_defined(self):
        dependence = torch.tensor([[0.25, 0.5, 1.0, 0.0], [0.75, math.nan, 0.0, 0.5]], dtype=torch.float64)
        s = spatial_dependence(dependence, (3, 3), 1.0, remove_near=False)
        assert s.tolist() == [[0.25, 0.5, 0.5], [0.5, 1.0, 0.5], [0.5, 0.5, 0.25]]
        s = spatial_dependence(dependence, (3, 3), 1.0, remove_near=True)  # an undefined channel counts as 0
        assert s.tolist() == [[0.25, 0.5, 0.25], [0.5, 1.0, 0.5], [0.25, 0.5, 0.25]]

    def test_the_transform_comes_before_the_mean(self):
        s = spatial_dependence(torch.tensor([[0.0] * 4, [1 / 3] * 4]), (3, 3), 5.0, remove_near=False)
        assert s[0, 0].item() == pytest.approx((0 + (5 / 3) / (4 / 3 + 1)) / 2)

    @pytest.mark.parametrize("remove_near", [False, True])
    def test_undefined(self, remove_near):
        assert spatial_dependence(torch.zeros(3, 4), (3, 3), 5.0, remove_near) is None
        assert spatial_dependence(torch.tensor([[0.5, 0.5, math.nan, 0.5]] * 2), (3, 3), 5.0, remove_near) is None
        assert spatial_dependence(torch.tensor([[0.0, 0.0, 0.0, 0.1]]), (3, 3), 5.0, remove_near) is not None

    def test_order_of_the_taps(self):
        assert half_displacements((3, 3)) == [(0, 1), (1, -1), (1, 0), (1, 1)]
        assert half_displacements((3, 5), (2, 3)) == [(0, 3), (0, 6), (2, -6), (2, -3), (2, 0), (2, 3), (2, 6)]
        assert [len(half_displacements((k, k))) for k in (3, 5, 7, 11)] == [4, 12, 24, 60]


class TestOnesWhereUndefined:
    @pytest.mark.parametrize("remove_near", [False, True])
    def test_constant_and_empty(self, remove_near):
        for x in (torch.zeros(2, 3, 6, 6), torch.full((2, 3, 6, 6), 3.0), torch.ones(1, 1, 1, 1)):
            assert torch.equal(gr.spatial_gradient_scaling(x, 3, remove_near=remove_near), torch.ones(3, 3))

    def test_a_tap_that_no_pair_reaches(self):
        assert torch.equal(gr.spatial_gradient_scaling(torch.randn(4, 2, 2, 9), 5), torch.ones(5, 5))
        assert not torch.equal(gr.spatial_gradient_scaling(torch.randn(4, 2, 2, 9), 5, padding=2), torch.ones(5, 5))

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_not_finite_warns(self, value):
        x = torch.randn(2, 2, 6, 6)
        x[1, 0, 2, 2] = value
        with pytest.warns(RuntimeWarning, match="not finite"):
            assert torch.equal(gr.spatial_gradient_scaling(x, 3, padding=1), torch.ones(3, 3))


def test_padding_as_a_convolution_takes_it():
    x = Map("", (3, 2, 12, 10)).tensor()
    for kernel_size, dilation in (((3, 3), (1, 1)), ((3, 5), (2, 1))):
        options = dict(kernel_size=kernel_size, dilation=dilation)
        same = tuple(d * (k // 2) for d, k in zip(dilation, kernel_size))
        assert torch.equal(
            gr.spatial_gradient_scaling(x, padding="same", **options),
            gr.spatial_gradient_scaling(x, padding=same, **options),
        )
        assert torch.equal(
            gr.spatial_gradient_scaling(x, padding="valid", **options), gr.spatial_gradient_scaling(x, **options)
        )
        conv = torch.nn.Conv2d(2, 1, kernel_size, padding="same", dilation=dilation)
        left, right, top, bottom = conv._reversed_padding_repeated_twice
        assert (left, right, top, bottom) == (same[1], same[1], same[0], same[0])
        assert resolve_padding(conv.padding, conv.kernel_size, conv.dilation) == same
    assert torch.equal(
        gr.spatial_gradient_scaling(x, 3, padding=1),
        gr.spatial_gradient_scaling(x, (3, 3), padding=(1, 1), dilation=(1, 1)),
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(kernel_size=4), ValueError, "4 x 4 kernel: both sides must be odd"),
        (dict(kernel_size=(1, 3)), ValueError, "1 x 3 kernel: both sides must be larger than 1"),
        (dict(kernel_size=1), ValueError, "larger than 1"),
        (dict(kernel_size=0), ValueError, "kernel_size must be .*none below 1"),
        (dict(kernel_size=3, dilation=0), ValueError, "dilation must be .*none below 1"),
        (
            dict(kernel_size=3, padding="full"),
            ValueError,
            "padding must be a number, a pair, 'same' or 'valid', got 'full'",
        ),
        (dict(kernel_size=3, padding=-1), ValueError, "padding must be"),
        (dict(kernel_size=3, k=0.0), ValueError, "k must be positive and finite"),
        (dict(kernel_size=3, k=math.nan), ValueError, "k must be positive and finite"),
        (dict(kernel_size=3, x=torch.ones(0, 1, 4, 4)), ValueError, "non-empty"),
        (dict(kernel_size=3, x=torch.ones(1, 1, 4, 4).int()), TypeError, "float32"),
    ],
)
def test_wrong_input(arguments, error, message):
    arguments = {"x": torch.randn(1, 1, 4, 4), **arguments}
    with pytest.raises(error, match=message):
        gr.spatial_gradient_scaling(arguments.pop("x"), **arguments)


@pytest.mark.parametrize("counts", [torch.ones(3), torch.ones(2, 3), torch.ones(2, 3, 4)])
def test_counts_of_another_shape(counts):
    with pytest.raises(ValueError, match=r"counts must have shape \[..., B, B\]"):
        gr.normalized_mutual_information(counts)
    with pytest.raises(TypeError, match="counts must be a Tensor"):
        gr.normalized_mutual_information(counts.tolist())


def test_alpha_beta_scaling_is_figure_7():
    g = gr.alpha_beta_scaling(2.0, 4.0)
    assert g.dtype == torch.float32
    assert torch.allclose(g, torch.tensor([[0.25, 0.5, 0.25], [0.5, 1, 0.5], [0.25, 0.5, 0.25]]) * 9 / 4)
    for alpha, beta in ((0.8, 0.8), (1, 100), (1.7, 5.0), (10, 1.25)):
        g = gr.alpha_beta_scaling(alpha, beta)
        assert g.mean() == pytest.approx(1, abs=1e-6)
        assert (g[1, 1] / g[0, 1]).item() == pytest.approx(alpha, rel=1e-6)
        assert (g[1, 1] / g[2, 0]).item() == pytest.approx(beta, rel=1e-6)
    assert torch.equal(gr.alpha_beta_scaling(1, 1), torch.ones(3, 3))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_alpha_and_beta_are_positive(bad):
    with pytest.raises(ValueError, match="alpha must be positive and finite"):
        gr.alpha_beta_scaling(bad, 1.0)
    with pytest.raises(ValueError, match="beta must be positive and finite"):
        gr.alpha_beta_scaling(1.0, bad)


@pytest.mark.parametrize("remove_near", [False, True])
@pytest.mark.parametrize("case", [case for case in MAPS if case.shape[1] > 1], ids=lambda case: case.desc)
def test_autocorrelation_against_numpy(case, remove_near):
    x = case.tensor()
    displacements = half_displacements(case.kernel_size, case.dilation)
    flat = [v for d in displacements for v in d]
    ranges, _ = gr.pair_ranges(x, displacements, padding=case.padding, remove_near=remove_near)
    correlation = absolute_correlation(pair_moments(x, flat, ranges, list(case.padding), remove_near))
    s = spatial_dependence(correlation, case.kernel_size, case.k, remove_near)
    assert (
        np.abs((s / s.mean()).numpy() - oracle_scaling(x.double().numpy(), case, remove_near, correlation=True)).max()
        < 1e-9
    )


def test_correlation_is_undefined_where_a_side_is_constant():
    x = torch.linspace(0.1, 7.1, 50).view(1, 50, 1, 1).repeat(3, 1, 7, 7)
    x[:, 7] = torch.randn(3, 7, 7)
    ranges, _ = gr.pair_ranges(x, [(0, 1)])
    for pivot in (ranges, torch.zeros_like(ranges)):  # exactly at the constant, and away from it
        found = absolute_correlation(pair_moments(x, [0, 1], pivot, [0, 0], False))
        assert found.isnan().sum() == 49
        assert found[7].isfinite()
