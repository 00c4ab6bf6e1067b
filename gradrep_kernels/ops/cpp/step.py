"""The front that all step ops share: it passes the parameters that a kernel cannot update to the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradrep_kernels.ops.dense import alike, is_dense, share_memory
from gradrep_kernels.ops.reference.step_tail import one_each
from gradrep_kernels.ops.registry import OPS, registered

DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


def takes(
    p: Tensor,
    grad: Tensor,
    states: Sequence[Tensor],
    average: Tensor | None = None,
    elements: Tensor | None = None,
    stochastic: bool = False,
) -> bool:
    """Tell whether a kernel can update `p`: its tensors share shape, device, a dtype of DTYPES, and dense strides."""
    if p.dtype not in DTYPES or not is_dense(p) or average is not None or elements is not None or stochastic:
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
        call = rule.dealt(arguments, named)
        hyper = call.hyper
        keeps_state = rule.keeps_state(hyper) if hyper.is_cpu else [True] * len(hyper)
        more = one_each(len(call.columns[0]), call.averages, call.numbers, call.elements)
        rest: list[tuple] = []
        taken: dict[torch.device, list[tuple]] = {}
        tensors: dict[torch.device, list[tuple[Tensor, ...]]] = {}
        for row, tail_row in zip(zip(*call.columns), zip(*more)):
            p, grad, states, _, _, group = rule.taken_apart(row)
            average, _, elements = tail_row
            used = states if keeps_state[group] else ()
            if takes(p, grad, used, average, elements, call.tail is not None) and call.clip is None:
                taken.setdefault(p.device, []).append((*row, *tail_row))
                tensors.setdefault(p.device, []).append((p, grad, *used))
            else:
                rest.append((*row, *tail_row))
        numbers = [None if number is None else number.float() for number in (call.grad_scale, call.found_inf)]
        for device, rows in taken.items():
            if device.type != "cpu" and share_memory(tensors[device]):
                rest += rows
                continue
            there = [None if number is None else number.to(device) for number in (*numbers, call.clip)]
            columns = list(map(list, zip(*rows)))
            table = hyper if hyper.is_cpu else hyper.to(device)
            kernel(*columns[:-3], table, *there, *columns[-3:], call.tail)
        if rest:
            columns = list(map(list, zip(*rest)))
            reference(*columns[:-3], hyper, *numbers, call.clip, *columns[-3:], call.tail)

    return front
