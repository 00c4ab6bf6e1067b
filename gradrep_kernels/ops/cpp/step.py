"""The front that all step ops share: it passes the parameters that a C++ kernel cannot update to the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradrep_kernels.ops.dense import alike, is_dense
from gradrep_kernels.ops.registry import OPS, registered

DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


def takes(p: Tensor, grad: Tensor, states: Sequence[Tensor]) -> bool:
    """Tell whether a kernel can update `p`: its tensors share shape, device, a dtype of DTYPES, and dense strides."""
    if p.dtype not in DTYPES or not is_dense(p):
        return False
    return all(
        t.dtype == p.dtype and t.device == p.device and t.shape == p.shape and alike(p.shape, t.stride(), p.stride())
        for t in (grad, *states)
    )


def step_front(name: str) -> Callable[..., None]:
    """Make the front of the C++ kernel of a step op. It takes the reference's arguments.

    Parameters that the kernel cannot update go to the reference, which gives the same result.
    """
    op, kernel = OPS[name], registered(name)
    reference, rule = op.reference, op.step

    @functools.wraps(reference)
    def front(*arguments, **named) -> None:
        columns, hyper, grad_scale, found_inf = rule.dealt(arguments, named)
        keeps_state = rule.keeps_state(hyper)
        rows = list(zip(*columns))
        taken = []
        for row in rows:
            p, grad, states, _, _, group = rule.taken_apart(row)
            taken.append(takes(p, grad, states if keeps_state[group] else ()))
        numbers = [None if number is None else number.float() for number in (grad_scale, found_inf)]
        for step, wanted in ((kernel, True), (reference, False)):
            chosen = [list(column) for column in zip(*(row for row, take in zip(rows, taken) if take is wanted))]
            if chosen:
                step(*chosen, hyper, *numbers)

    return front
