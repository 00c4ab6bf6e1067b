"""GradMult and BranchScales, against their formulas written out as loops.

The formulas are that of GradMult's docstring, and Eq. 3 of RepOptimizers.
"""

from __future__ import annotations

import copy
import math
import pickle

import cases
import pytest
import torch

from gradrep_kernels import BranchScales, GradMult

SHAPES = [s for s in cases.SHAPES.values() if math.prod(s) < 5000]


def by_loops(mult: GradMult, shape) -> torch.Tensor:
    """Form M element by element.

    M[o, i, y, x] = scale[o|0, i|0, y|0, x|0] + identity[o] · 1[i == o mod I, (y, x) = centre]

    `|0` stands for index 0 along a broadcast dimension.
    """
    scale = mult.scale.reshape((1,) * (4 - mult.scale.dim()) + tuple(mult.scale.shape))
    dense = torch.empty(shape, dtype=mult.dtype)
    for o, i, y, x in torch.cartesian_prod(*(torch.arange(n) for n in shape)).tolist():
        at = [n if scale.shape[d] > 1 else 0 for d, n in enumerate((o, i, y, x))]
        value = scale[tuple(at)]
        if mult.identity is not None and i == o % shape[1] and (y, x) == (shape[2] // 2, shape[3] // 2):
            value = value + mult.identity[o]
        dense[o, i, y, x] = value
    return dense


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("form", ["number", "repopt", "spatial", "kernel", "per_output", "per_input", "dense"])
@pytest.mark.parametrize("shape", [(6, 3, 3, 3), (4, 4, 5, 3), (5, 1, 3, 3), (4, 6, 1, 1)], ids=str)
def test_dense_is_the_formula(shape, form, identity):
    mult = cases.multiplier(shape, form, identity)
    assert torch.equal(mult.dense(shape), by_loops(mult, shape))


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize(
    "shape", [s for s in SHAPES if cases.takes_identity(s)] + [(7, 1, 3, 3), (8, 2, 3, 3)], ids=str
)
def test_from_dense_finds_the_structured_form(shape, identity):
    for form in ("number", "repopt", "spatial", "per_output", "per_input", "dense"):
        dense = cases.multiplier(shape, form, identity).dense(shape)
        mult = GradMult.from_dense(dense)
        assert torch.equal(mult.dense(shape), dense), form
        if shape[1] > 1 and form in ("repopt", "spatial", "number"):
            assert mult.scale.shape[1] == 1
            assert mult.nbytes <= (shape[0] * shape[2] * shape[3] + shape[0]) * 4


def test_from_dense_keeps_what_has_no_structure():
    dense = torch.rand(4, 4, 3, 3)
    mult = GradMult.from_dense(dense)
    assert mult.identity is None
    assert torch.equal(mult.scale, dense)
    assert torch.equal(GradMult.from_dense(torch.zeros(3, 2)).dense((3, 2)), torch.zeros(3, 2))
    assert GradMult.from_dense(torch.full((3, 5), 2.0)).scale.numel() == 1
    assert torch.equal(GradMult.from_dense(torch.zeros(0, 3)).dense((0, 3)), torch.zeros(0, 3))


@pytest.mark.parametrize("other", ["number", "repopt", "spatial", "per_input", "dense"])
@pytest.mark.parametrize("form", ["repopt", "spatial", "kernel", "per_output"])
@pytest.mark.parametrize(("identity_a", "identity_b"), [(False, False), (True, False), (False, True), (True, True)])
def test_product(form, other, identity_a, identity_b):
    shape = (6, 3, 3, 3)
    a, b = cases.multiplier(shape, form, identity_a, seed=1), cases.multiplier(shape, other, identity_b, seed=2)
    expected = a.dense(shape).double() * b.dense(shape).double()
    for product in (a * b, b * a):
        # scale and identity are rounded apart and added again: up to 2 ulp of the larger
        torch.testing.assert_close(product.dense(shape).double(), expected, rtol=4 * 2**-24, atol=0)
        assert (product.identity is None) == (not identity_a and not identity_b)
        if other in ("number", "repopt", "spatial"):
            assert product.scale.numel() <= 6 * 9


def test_product_of_unlike_weights_is_refused():
    with pytest.raises(ValueError, match=r"\[2, 1, 3, 3\] and \[5, 1, 3, 3\]"):
        GradMult(torch.rand(2, 1, 3, 3)) * GradMult(torch.rand(5, 1, 3, 3))
    with pytest.raises(ValueError, match="4 and 5 output channels"):
        GradMult(torch.rand(1), torch.ones(4)) * GradMult(torch.rand(1), torch.ones(5))


def test_masks():
    kernel, row, centre = torch.ones(3, 3), torch.zeros(3, 3), torch.zeros(3, 3)
    row[1], centre[1, 1] = 1, 1
    mult = GradMult.from_masks([kernel, row.bool(), centre])
    assert mult.scale.shape == (1, 1, 3, 3)
    assert mult.dense((2, 2, 3, 3))[1, 0].tolist() == [[1, 1, 1], [2, 3, 2], [1, 1, 1]]
    with pytest.raises(ValueError, match=r"masks\[1\] must hold only 0 and 1"):
        GradMult.from_masks([kernel, row * 2])
    with pytest.raises(ValueError, match="at least one mask"):
        GradMult.from_masks([])


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.int64, torch.float32),
    ],
)
def test_dtype(dtype, kept):
    assert GradMult(torch.ones(3, dtype=dtype)).dtype == kept
    assert GradMult(torch.ones(3, 1, 3, 3), torch.ones(3, dtype=torch.float64)).scale.dtype == torch.float64


WRONG = {
    "nan": (lambda: GradMult(torch.tensor([1.0, math.nan])), ValueError, "scale must be finite"),
    "inf": (lambda: GradMult(torch.tensor([math.inf])), ValueError, "scale must be finite"),
    "inf_identity": (lambda: GradMult(torch.ones(1), torch.tensor([math.inf])), ValueError, "identity must be finite"),
    "negative": (lambda: GradMult(torch.tensor([1.0, -2.0])), ValueError, "not be negative, scale has -2"),
    "number": (lambda: GradMult(2.0), TypeError, "scale must be a Tensor, got float"),
    "complex": (lambda: GradMult(torch.ones(2, dtype=torch.complex64)), TypeError, "must be real"),
    "sparse": (lambda: GradMult(torch.ones(2, 2).to_sparse()), TypeError, "strided"),
    "identity_matrix": (
        lambda: GradMult(torch.ones(1), torch.ones(2, 2)),
        ValueError,
        r"identity must have shape \[O\]",
    ),
    "does_not_broadcast": (
        lambda: GradMult(torch.ones(3, 1, 3, 3)).dense((4, 4, 3, 3)),
        ValueError,
        r"\[3, 1, 3, 3\] does not broadcast to the weight \[4, 4, 3, 3\]",
    ),
    "larger_than_the_weight": (lambda: GradMult(torch.ones(4, 4)).dense((4,)), ValueError, "does not broadcast"),
    "identity_even": (
        lambda: GradMult(torch.ones(1), torch.ones(4)).dense((4, 4, 2, 3)),
        ValueError,
        "odd kernel, got 2 x 3",
    ),
    "identity_2d": (lambda: GradMult(torch.ones(1), torch.ones(4)).dense((4, 4)), ValueError, "4-D weight"),
    "identity_length": (
        lambda: GradMult(torch.ones(1), torch.ones(3)).dense((4, 4, 3, 3)),
        ValueError,
        "3 elements, the weight has 4",
    ),
    "negative_with_identity": (
        lambda: GradMult(torch.tensor(-1.0), torch.ones(4)).dense((4, 4, 3, 3)),
        ValueError,
        "not be negative, got -1",
    ),
    "negative_dense": (lambda: GradMult.from_dense(torch.tensor([[1.0, -3.0]])), ValueError, "M has -3"),
    "mask_of_lists": (lambda: GradMult.from_masks([[1]]), TypeError, r"masks\[0\] must be a Tensor, got list"),
    "scales_kernel": (
        lambda: BranchScales(torch.ones(4)).grad_mult((1, 2, 3)),
        ValueError,
        "kernel_size must be a number or",
    ),
    "scales_number": (lambda: BranchScales(1.0), TypeError, "kxk must be a Tensor"),
    "scales_channels": (
        lambda: BranchScales(torch.ones(4), torch.ones(5)),
        ValueError,
        "one_by_one has 5 channels, kxk has 4",
    ),
    "scales_shape": (lambda: BranchScales(torch.ones(4, 1)), ValueError, r"kxk must have shape \[O\]"),
    "scales_identity": (lambda: BranchScales(torch.ones(4), identity=1.0), TypeError, "identity must be a bool"),
    "scales_nan": (
        lambda: BranchScales(torch.ones(4), torch.full((4,), math.nan)),
        ValueError,
        "one_by_one must be finite",
    ),
    "scales_even": (lambda: BranchScales(torch.ones(4)).grad_mult(2), ValueError, "odd, got 2 x 2"),
    "scales_overflow": (lambda: BranchScales(torch.full((4,), 1e30)).grad_mult(3), ValueError, "overflow"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(name):
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call()


def test_negativity_is_judged_on_m():
    """A negative scale is fine where the identity lifts every tap that it has: a depthwise 1 x 1."""
    mult = GradMult(torch.tensor(-0.5), torch.ones(4))
    assert mult.dense((4, 1, 1, 1)).unique().tolist() == [0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("identity", [False, True])
def test_branch_scales_are_eq_3(dtype, identity):
    s, t = cases.tensor(5, 1, dtype), cases.tensor(5, 2, dtype)  # any sign
    mult = BranchScales(s, t, identity).grad_mult((3, 5))
    assert mult.dtype == dtype
    expected = torch.zeros(5, 5, 3, 5, dtype=torch.float64)
    for c in range(5):
        expected[c] = float(s[c]) ** 2
        expected[c, :, 1, 2] += float(t[c]) ** 2
    assert torch.equal(mult.scale.expand(5, 5, 3, 5), expected.to(dtype))  # one rounding
    if identity:
        expected[range(5), range(5), 1, 2] += 1
    torch.testing.assert_close(
        mult.dense((5, 5, 3, 5)).double(), expected, rtol=1.2e-7 if dtype == torch.float32 else 2.3e-16, atol=0
    )


def test_the_searched_identity_does_not_enter_m():
    searched = BranchScales(torch.ones(3), torch.ones(3), identity=torch.tensor([0.1, 5.0, -2.0]))
    assert searched.grad_mult(3).identity.tolist() == [1, 1, 1]
    assert searched.tensors().keys() == {"conv", "1x1", "identity"}


def test_arguments_are_copied():
    scale, ones = torch.ones(4, 1, 3, 3), torch.ones(4)
    mult = GradMult(scale, ones)
    scale.zero_()
    ones.zero_()
    assert mult.dense((4, 4, 3, 3)).min() == 1
    assert mult.dense((4, 4, 3, 3)).max() == 2


def test_copies_and_pickles():
    mult = cases.multiplier((4, 4, 3, 3), "repopt", True)
    for twin in (copy.deepcopy(mult), pickle.loads(pickle.dumps(mult))):
        assert twin.same(mult, (4, 4, 3, 3))
        assert not twin.same(GradMult(mult.scale), (4, 4, 3, 3))
    dense = GradMult(mult.dense((4, 4, 3, 3)))
    assert dense.same(mult, (4, 4, 3, 3))
