"""The step's frame under a second update, with two states.

test_triton_step_frame.py runs this file with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import inspect

import cases
import pytest
import torch
from second_step import reference, second_step

from gradrep_kernels.ops.schema import op
from gradrep_kernels.ops.triton.launching import LAUNCHES

SHAPES = [(1030,), (5, 5, 3, 3), (1,), (12, 4, 3, 3)]
HYPER = torch.tensor([[0.1, 0.5, 0.9], [0.01, 0.0, 1.0]], dtype=torch.float64)


def columns(dtype=torch.float32) -> list[list]:
    arrays = [[cases.tensor(shape, 10 * n + k, dtype) for k, shape in enumerate(SHAPES)] for n in range(4)]
    mults = [cases.multiplier(shape, "dense", len(shape) == 4, dtype) for shape in SHAPES]
    return [*arrays, [m.scale for m in mults], [m.identity for m in mults], [False, True, False, False], [0, 1, 1, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("aligned", [True, False])
def test_all_states_have_the_references_bits(aligned, dtype):
    ours, twin = columns(dtype), columns(dtype)
    if not aligned:
        ours[3] = [cases.unaligned(t) for t in ours[3]]
    LAUNCHES.clear()
    second_step(*ours, HYPER)
    reference(*twin, HYPER)
    assert LAUNCHES["reference", "cpu", dtype] == 1
    for got, wanted in zip(ours[:4], twin[:4]):
        assert all(torch.equal(a, b) for a, b in zip(got, wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_tail_is_the_frames(dtype):
    """Each state has random bits of its own, and one may be stored as the parameter is."""
    ours = columns(dtype)
    ours[2:4] = [t.bfloat16() for t in ours[2]], [t if k == 1 else t.bfloat16() for k, t in enumerate(ours[3])]
    twin = [[t.clone() for t in column] for column in ours[:4]] + ours[4:]
    averages = [[torch.zeros(shape, dtype=dtype) for shape in SHAPES] for _ in range(2)]
    more = {"grad_scale": torch.tensor(2.0), "clip": torch.tensor(0.7)}
    more["tail"] = torch.tensor([0.9, 1, 3, 4], dtype=torch.float64)
    more["elements"] = [torch.tensor([first]) for first in (8, 2**20 + 5, 0, 2**31)]
    LAUNCHES.clear()
    second_step(*ours, HYPER, averages=averages[0], **more)
    reference(*twin, HYPER, averages=averages[1], **more)
    assert LAUNCHES["reference", "cpu", dtype] == 2
    for got, wanted in zip([*ours[:4], averages[0]], [*twin[:4], averages[1]]):
        assert all(torch.equal(a, b) for a, b in zip(got, wanted))


def test_it_is_called_as_the_reference_is():
    assert inspect.signature(second_step) == inspect.signature(reference)
    names = list(inspect.signature(reference).parameters)
    ours, twin = columns(), columns()
    second_step(**dict(zip(names, [*ours, HYPER])), found_inf=torch.tensor([1.0]))
    assert all(torch.equal(a, b) for a, b in zip(ours[0], twin[0]))
    second_step(*ours[:3], **dict(zip(names[3:], [*ours[3:], HYPER])), grad_scale=None)
    reference(*twin, HYPER)
    assert all(torch.equal(a, b) for got, wanted in zip(ours[:4], twin[:4]) for a, b in zip(got, wanted))
    with pytest.raises(TypeError, match=r"a step takes .* got 8 arguments"):
        second_step(*ours)
    with pytest.raises(TypeError, match=r"a step takes .* got 17 arguments"):
        second_step(*ours, HYPER, *[None] * 8)


def test_a_leaf_that_does_not_fit_is_refused():
    def no_step(params: list[torch.Tensor], hyper: torch.Tensor) -> None: ...

    with pytest.raises(TypeError, match="no_step: a step with this rule takes params, grads, fast, slow, scales"):
        op("what it means", step=reference.op.step)(no_step)
