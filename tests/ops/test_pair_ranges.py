"""pair_ranges: against numpy on explicit lists of pairs, and at the edges of what it is defined for."""

import math

import numpy as np
import pytest
import torch
from cases_sgs import MAPS, oracle_pairs

import gradrep_kernels as gr
from gradrep_kernels.ops import backends, reference
from gradrep_kernels.ops.reference.pair_ranges import new_ends
from gradrep_kernels.ops.reference.pair_rule import arithmetic_dtype, number_of_pairs, ranges_of
from gradrep_kernels.sgs.taps import flat, half_displacements, two_ints

INF = math.inf


@pytest.fixture(params=["reference", "auto"], autouse=True)
def backend(request):
    """The stranger judges the reference, and whatever serves by default here."""
    with gr.use_backend(request.param):
        yield request.param


def all_displacements(case):
    half = half_displacements(case.kernel_size, case.dilation)
    return half + [(-di, -dj) for di, dj in half]


@pytest.mark.parametrize("remove_near", [False, True])
@pytest.mark.parametrize("case", MAPS, ids=lambda case: case.desc)
def test_against_lists_of_pairs(case, remove_near):
    x = case.tensor()
    displacements = all_displacements(case)
    ranges, n = gr.pair_ranges(x, displacements, padding=case.padding, remove_near=remove_near)
    assert ranges.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert ranges.shape == (x.shape[1], len(displacements), 2, 2)
    assert n.dtype == torch.int64
    for d, displacement in enumerate(displacements):
        for c, sides in enumerate(oracle_pairs(x.to(ranges.dtype).numpy(), displacement, case.padding, remove_near)):
            assert n[c, d] == len(sides[0])
            expected = [[side.min(), side.max()] if len(side) else [INF, -INF] for side in sides]
            assert ranges[c, d].tolist() == expected


@pytest.mark.parametrize("remove_near", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 1), (3, 3)])
@pytest.mark.parametrize("padding", [0, 1, (0, 2), (3, 0)])
def test_small_maps_and_far_displacements(size, padding, remove_near):
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 3, *size))).float()
    displacements = [(0, 1), (1, 0), (1, -1), (-2, 2), (0, 0), (5, 5), (-100, 3), (2, 100)]
    ranges, n = gr.pair_ranges(x, displacements, padding=padding, remove_near=remove_near)
    padding = (padding, padding) if isinstance(padding, int) else padding
    for d, displacement in enumerate(displacements):
        for c, sides in enumerate(oracle_pairs(x.numpy(), displacement, padding, remove_near)):
            assert n[c, d] == len(sides[0])
            assert ranges[c, d].tolist() == [[side.min(), side.max()] if len(side) else [INF, -INF] for side in sides]


def test_no_pair_left_is_neutral_when_ranges_are_merged():
    ranges, n = gr.pair_ranges(torch.zeros(2, 1, 4, 4), [(0, 1)], remove_near=True)
    assert n.item() == 0
    assert ranges.flatten().tolist() == [INF, -INF, INF, -INF]
    ranges, n = reference.pair_ranges(torch.zeros(0, 3, 4, 4), [0, 1, 1, 0], [1, 1], False)
    assert ranges.shape == (3, 2, 2, 2)
    assert n.tolist() == [[0, 0]] * 3
    assert ranges[..., 0].eq(INF).all()
    assert ranges[..., 1].eq(-INF).all()


@pytest.mark.parametrize("remove_near", [False, True])
def test_batches_merge_to_the_whole(remove_near):
    x = torch.relu(torch.randn(7, 3, 6, 6, generator=torch.Generator().manual_seed(0)))
    displacements = [(0, 1), (1, -1), (2, 0)]
    whole, n = gr.pair_ranges(x, displacements, padding=1, remove_near=remove_near)
    parts = [gr.pair_ranges(part, displacements, padding=1, remove_near=remove_near) for part in x.split([3, 1, 3])]
    assert torch.equal(n, sum(part[1] for part in parts))
    assert torch.equal(whole[..., 0], torch.stack([part[0][..., 0] for part in parts]).amin(0))
    assert torch.equal(whole[..., 1], torch.stack([part[0][..., 1] for part in parts]).amax(0))


@pytest.mark.parametrize("remove_near", [False, True])
def test_a_nan_makes_both_ends_nan_on_the_sides_it_is_on(remove_near):
    x = torch.ones(2, 2, 3, 3)
    x[1, 1, 0, 0] = math.nan  # the top left corner: never the lower neighbour of anything
    ranges, n = gr.pair_ranges(x, [(1, 0)], remove_near=remove_near)
    assert n.tolist() == [[12], [12]]
    assert ranges[0].isfinite().all()
    assert ranges[1, 0, 0].isnan().all()
    assert ranges[1, 0, 1].tolist() == [1, 1]


def test_infinities_are_values():
    x = torch.tensor([[[[1.0, INF, -2.0, -INF]]]])
    ranges, _ = gr.pair_ranges(x, [(0, 1)])
    assert ranges.flatten().tolist() == [-2, INF, -INF, INF]


def test_zero_ends_are_positive_zeros():
    x = torch.tensor([[[[-0.0, -1.0, -0.0]]], [[[0.0, -1.0, -0.0]]]])
    for part in (x, x[:1], x[1:]):
        ranges, _ = gr.pair_ranges(part, [(0, 2)])
        assert ranges.flatten().tolist() == [0, 0, 0, 0]
        assert not ranges.signbit().any()


def test_negative_zero_is_removed_as_zero():
    _, n = gr.pair_ranges(torch.tensor([[[[1.0, -0.0, 2.0, 3.0]]]]), [(0, 1)], remove_near=True)
    assert n.item() == 1


@pytest.mark.parametrize("remove_near", [False, True])
def test_strides_do_not_matter(remove_near):
    x = torch.relu(torch.randn(3, 5, 7, 6, generator=torch.Generator().manual_seed(1)))
    expected = gr.pair_ranges(x, [(0, 1), (1, -1)], padding=(0, 1), remove_near=remove_near)
    every_other = torch.zeros(3, 10, 7, 12)[:, ::2, :, ::2].copy_(x)
    for view in (
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        every_other,
    ):
        found = gr.pair_ranges(view, [(0, 1), (1, -1)], padding=(0, 1), remove_near=remove_near)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_the_map_is_left_alone_and_no_graph_is_kept():
    x = torch.randn(2, 2, 4, 4, requires_grad=True)
    before, version = x.detach().clone(), x._version
    ranges, _ = gr.pair_ranges(x, [(0, 1)], padding=1)
    assert not ranges.requires_grad
    assert torch.equal(x, before)
    assert x._version == version


# ---- kept between batches


def in_place():
    return backends.implementation("pair_ranges_", "cpu")


@pytest.mark.parametrize("remove_near", [False, True])
@pytest.mark.parametrize("case", MAPS, ids=lambda case: case.desc)
def test_ends_of_two_batches_against_lists_of_pairs(case, remove_near):
    x = case.tensor()
    displacements = all_displacements(case)
    ends = torch.full((x.shape[1], len(displacements), 2, 2), -INF, dtype=arithmetic_dtype(x.dtype))
    n = torch.full(ends.shape[:2], 7)
    for part in (x[:1], x[1:]):
        in_place()(ends, n, part, flat(displacements), list(two_ints("padding", case.padding, 0)), remove_near)
    for d, displacement in enumerate(displacements):
        for c, sides in enumerate(oracle_pairs(x.to(ends.dtype).numpy(), displacement, case.padding, remove_near)):
            assert n[c, d] == 7 + len(sides[0])
            expected = [[-side.min(), side.max()] if len(side) else [-INF, -INF] for side in sides]
            assert ends[c, d].tolist() == expected


@pytest.mark.parametrize("remove_near", [False, True])
def test_ends_only_rise_and_a_nan_stays(remove_near):
    ends = torch.tensor([5.0, -INF, math.nan, 0.5]).view(1, 1, 2, 2)
    in_place()(ends, None, torch.tensor([[[[-1.0, 2.0, 3.0]]]]), [0, 1], [0, 0], remove_near)
    assert ends.flatten()[[0, 1, 3]].tolist() == [5, 2, 3]
    assert ends.flatten()[2].isnan()
    in_place()(ends, None, torch.tensor([[[[math.nan, 2.0, 1.0]]]]), [0, 1], [0, 0], remove_near)
    assert ends[0, 0, 0].isnan().all()
    assert ends[0, 0, 1, 1] == 3


@pytest.mark.parametrize("remove_near", [False, True])
def test_no_pixel_raises_nothing(remove_near):
    ends, n = torch.full((3, 1, 2, 2), -INF), torch.full((3, 1), 7)
    in_place()(ends, n, torch.zeros(0, 3, 4, 4), [0, 1], [1, 1], remove_near)
    assert ends.eq(-INF).all()
    assert n.eq(7).all()


@pytest.mark.parametrize("padding", [0, 1, (0, 2)])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 1, 1, 1), (0, 3, 4, 4)])
def test_the_number_of_pairs_follows_from_the_shapes(shape, padding):
    displacements, padding = [(0, 1), (1, -1), (-3, 2), (0, 0), (50, 0)], two_ints("padding", padding, 0)
    n = number_of_pairs(shape, flat(displacements), padding)
    for number, displacement in zip(n, displacements, strict=True):
        assert number == len(oracle_pairs(np.ones((*shape[:1], 1, *shape[2:])), displacement, padding, False)[0][0])


ENDS = {
    "another shape": (dict(ends=torch.zeros(3, 1, 2, 2)), "ends"),
    "another dtype": (dict(ends=torch.zeros(2, 1, 2, 2, dtype=torch.float64)), "ends"),
    "not contiguous": (dict(ends=torch.zeros(2, 1, 2, 4)[..., ::2]), "ends"),
    "n of another shape": (dict(n=torch.zeros(1, 2, dtype=torch.int64)), "n"),
    "n of another dtype": (dict(n=torch.zeros(2, 1, dtype=torch.int32)), "n"),
    "n is not contiguous": (dict(n=torch.zeros(2, 2, dtype=torch.int64)[:, ::2]), "n"),
}


@pytest.mark.parametrize("case", ENDS)
def test_wrong_ends(case):
    change, name = ENDS[case]
    arguments = {"ends": torch.zeros(2, 1, 2, 2), "n": torch.zeros(2, 1, dtype=torch.int64), **change}
    with pytest.raises((ValueError, RuntimeError), match=f"pair_ranges_: {name} must be contiguous"):
        in_place()(**arguments, x=torch.ones(2, 2, 4, 4), displacements=[0, 1], padding=[0, 0], remove_near=False)


WRONG = {
    "not a tensor": (TypeError, "x must be a Tensor", lambda x: dict(x=x.numpy())),
    "integers": (TypeError, "x must be float32", lambda x: dict(x=x.int())),
    "complex": (TypeError, "x must be float32", lambda x: dict(x=x.cfloat())),
    "three dimensions": (ValueError, r"non-empty map \[N, C, H, W\]", lambda x: dict(x=x[0])),
    "no image": (ValueError, r"got \[0, 2, 4, 4\]", lambda x: dict(x=x[:0])),
    "no displacement": (ValueError, "displacements must be one or more", lambda x: dict(displacements=[])),
    "three numbers": (ValueError, "displacements must be one or more pairs", lambda x: dict(displacements=[(0, 1, 2)])),
    "flat displacements": (TypeError, "displacements must be pairs", lambda x: dict(displacements=[0, 1])),
    "fractions": (TypeError, "displacements must be pairs", lambda x: dict(displacements=[(0.5, 1)])),
    "negative padding": (ValueError, "padding must be .*none below 0", lambda x: dict(padding=-1)),
    "triple padding": (ValueError, "padding must be", lambda x: dict(padding=(1, 1, 1))),
    "string padding": (TypeError, "padding must be", lambda x: dict(padding="same")),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case):
    error, message, change = WRONG[case]
    x = torch.randn(2, 2, 4, 4)
    arguments = {"x": x, "displacements": [(0, 1)], **change(x)}
    with pytest.raises(error, match=message):
        gr.pair_ranges(arguments.pop("x"), arguments.pop("displacements"), **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_registered_op(dtype):
    x = torch.randn(2, 3, 5, 4).to(dtype)
    arguments = (x, [0, 1, 1, -1], [1, 0], True)
    found = torch.ops.gradrep_kernels.pair_ranges(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(found, reference.pair_ranges(*arguments)))
    torch.library.opcheck(
        torch.ops.gradrep_kernels.pair_ranges.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
    ends, n = new_ends(x, [0, 1, 1, -1])
    for numbers in (n, None):
        torch.library.opcheck(
            torch.ops.gradrep_kernels.pair_ranges_.default,
            (ends, numbers, *arguments),
            test_utils=("test_schema", "test_faketensor"),
        )
    torch.ops.gradrep_kernels.pair_ranges_(ends, n, *arguments)
    assert torch.equal(ranges_of(ends), found[0])
    assert torch.equal(n, found[1])
