"""The front that all step ops share: it passes the parameters that a kernel cannot update to the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradrep_kernels.ops.dense import alike, is_dense, share_memory
from gradrep_kernels.ops.reference.multiply import compute_dtype
from gradrep_kernels.ops.reference.step_tail import Tail, one_each
from gradrep_kernels.ops.registry import OPS, registered

DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


def as_number(t: Tensor) -> Tensor:
    """One number in a dtype that kernels read."""
    return t if t.dtype in (torch.float32, torch.float64) else t.double()


def takes(
    p: Tensor,
    grad: Tensor,
    states: Sequence[Tensor],
    average: Tensor | None = None,
    elements: Tensor | None = None,
    stochastic: bool = False,
    layered: bool = False,
) -> bool:
    """Tell whether a kernel can update `p`: its tensors share shape, device, a dtype of DTYPES, and dense strides.

    States may be in bfloat16, all or none of them, where they are rounded by random bits. On a GPU, where a multiplier
    has layers, `p` must be contiguous or channels_last.
    """
    if p.dtype not in DTYPES or not is_dense(p):
        return False
    if layered and not p.is_cpu and not (p.is_contiguous() or is_channels_last(p)):
        return False
    if elements is not None and not (elements.is_cpu and elements.dtype == torch.int64 and elements.numel() == 1):
        return False
    narrow = stochastic and bool(states) and all(s.dtype == torch.bfloat16 for s in states)
    stored = torch.bfloat16 if narrow else p.dtype
    others = [(grad, p.dtype), *((s, stored) for s in states)]
    if average is not None:
        others.append((average, compute_dtype(p.dtype)))
    return all(
        t.dtype == dtype and t.device == p.device and t.shape == p.shape and alike(p.shape, t.stride(), p.stride())
        for t, dtype in others
    )


def is_channels_last(p: Tensor) -> bool:
    return p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last)


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
        hyper, tail, clip = call.hyper, call.tail, call.clip
        kept = rule.kept_states(hyper) if hyper.is_cpu else [len(rule.states)] * len(hyper)
        stochastic = Tail.of(tail).stochastic if tail is None or tail.is_cpu else True
        clip = None if clip is None else as_number(clip)
        more = one_each(len(call.columns[0]), call.averages, call.numbers, call.elements)
        rest: list[tuple] = []
        taken: dict[torch.device, list[tuple]] = {}
        tensors: dict[torch.device, list[tuple[Tensor, ...]]] = {}
        for row, tail_row in zip(zip(*call.columns), zip(*more)):
            p, grad, states, _, _, group = rule.taken_apart(row)
            average, _, elements = tail_row
            used = states[: kept[group]]
            if takes(p, grad, used, average, elements, stochastic, rule.layered):
                taken.setdefault(p.device, []).append((*row, *tail_row))
                tensors.setdefault(p.device, []).append((p, grad, *used, *(() if average is None else (average,))))
            else:
                rest.append((*row, *tail_row))
        numbers = [None if number is None else number.float() for number in (call.grad_scale, call.found_inf)]
        for device, rows in taken.items():
            if device.type != "cpu" and share_memory(tensors[device]):
                rest += rows
                continue
            there = [None if number is None else number.to(device) for number in (*numbers, clip)]
            columns = list(map(list, zip(*rows)))
            tables = [table if table is None or table.is_cpu else table.to(device) for table in (hyper, tail)]
            kernel(*columns[:-3], tables[0], *there, *columns[-3:], tables[1])
        if rest:
            columns = list(map(list, zip(*rest)))
            reference(*columns[:-3], hyper, *numbers, clip, *columns[-3:], tail)

    return front
