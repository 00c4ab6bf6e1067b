"""The front that all step ops share: it passes the parameters that a kernel cannot update to the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradrep_kernels.ops.dense import alike, is_dense, share_memory
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
    """Make the front of the C++ and CUDA kernels of a step op. It takes the reference's arguments.

    Parameters that the kernels cannot update go to the reference, which gives the same result. So do those of a GPU
    where tensors share memory: its threads run in any order. A table of hyper-parameters that lies on a GPU is not read
    here, so which states are used is not known, and all must be like their parameter (or be the parameter itself).
    """
    op, kernel = OPS[name], registered(name)
    reference, rule = op.reference, op.step

    @functools.wraps(reference)
    def front(*arguments, **named) -> None:
        columns, hyper, grad_scale, found_inf = rule.dealt(arguments, named)
        keeps_state = rule.keeps_state(hyper) if hyper.is_cpu else [True] * len(hyper)
        rest: list[tuple] = []
        taken: dict[torch.device, list[tuple]] = {}
        tensors: dict[torch.device, list[tuple[Tensor, ...]]] = {}
        for row in zip(*columns):
            p, grad, states, _, _, group = rule.taken_apart(row)
            used = states if keeps_state[group] else ()
            if takes(p, grad, used):
                taken.setdefault(p.device, []).append(row)
                tensors.setdefault(p.device, []).append((p, grad, *used))
            else:
                rest.append(row)
        numbers = [None if number is None else number.float() for number in (grad_scale, found_inf)]
        for device, rows in taken.items():
            if device.type != "cpu" and share_memory(tensors[device]):
                rest += rows
                continue
            there = [None if number is None else number.to(device) for number in numbers]
            kernel(*map(list, zip(*rows)), hyper if hyper.is_cpu else hyper.to(device), *there)
        if rest:
            reference(*map(list, zip(*rest)), hyper, *numbers)

    return front
