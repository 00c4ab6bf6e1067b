"""The step in Triton: one launch per device and dtype for all parameters of all groups; the reference says what it computes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradrep_kernels.ops import reference
from gradrep_kernels.ops.triton import plans
from gradrep_kernels.ops.triton.plans import (  # by name: the key of Triton's cache holds no attributes of modules
    ALIGNED,
    FIRST_CHUNK,
    FIRST_STEP,
    FLAGS,
    GEOMETRY,
    GRAD,
    GROUP,
    NUMEL,
    POINTERS,
    TAIL,
    aligned,
    multiplier,
    multiplier_row,
    switched,
    unaligned,
)

PARAM, BUFFER = tl.constexpr(POINTERS.value), tl.constexpr(POINTERS.value + 1)
WIDTH = tl.constexpr(POINTERS.value + 2)

_plans = plans.Plans("rep_sgd_step", plans.BLOCK, distinct=True)
_hyper_tables: dict[tuple, Tensor] = {}


@triton.jit
def _update(place, inside, param, grad, buffer, first, row_of_piece, hyper, grad_scale):
    """One block: every product and sum in the order of the reference, each rounded on its own."""
    lr, momentum, undamped, weight_decay = tl.load(hyper), tl.load(hyper + 1), tl.load(hyper + 2), tl.load(hyper + 3)
    has_momentum, has_decay = tl.load(hyper + 4).to(tl.int32), tl.load(hyper + 5) != 0
    nesterov, maximize = tl.load(hyper + 6) != 0, tl.load(hyper + 7) != 0
    dtype: tl.constexpr = lr.dtype
    g = tl.load(grad + place, mask=inside).to(dtype)
    if grad_scale is not None:  # before the other loads: 48 registers, not 64
        if dtype == tl.float32:
            g = tl.div_rn(g, tl.load(grad_scale))
        else:
            g = g / tl.load(grad_scale)
        tl.store(grad + place, g, mask=inside)
    w = tl.load(param + place, mask=inside).to(dtype)
    v = tl.load(buffer + place, mask=switched(inside, has_momentum), other=0.0).to(dtype)
    g = g * tl.where(maximize, -1.0, 1.0).to(dtype)  # unary minus is 0 - g up to Triton 3.6: the sign of zero is lost
    g = g * multiplier(place, inside, row_of_piece)
    g = tl.where(has_decay, g + w * weight_decay, g)
    v = tl.where(first, g, v * momentum + g * undamped)
    tl.store(buffer + place, v, mask=switched(inside, has_momentum))
    d = tl.where(has_momentum != 0, tl.where(nesterov, g + v * momentum, v), g)
    tl.store(param + place, w - d * lr, mask=inside)


@triton.jit(do_not_specialize_on_alignment=["chunks", "geometry", "pointers", "hyper", "grad_scale", "found_inf"])
def rep_sgd_step_kernel(
    chunks,  # [programs] int32
    geometry,  # [pieces, GEOMETRY] int32
    pointers,  # [pieces, WIDTH] int64
    hyper,  # [G, 8] in the dtype that is computed in: see `pack`
    grad_scale,  # [1] in that dtype, or None
    found_inf,  # [1] float32, or None
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if found_inf is not None:  # noqa: SIM102 (a constant for the compiler, then a number on the device)
        if tl.load(found_inf) != 0:
            return
    program = tl.program_id(0)
    number = tl.load(chunks + program)
    piece = geometry + number * GEOMETRY
    pointers += number * WIDTH
    numel = tl.load(piece + NUMEL)
    start = (program - tl.load(piece + FIRST_CHUNK)) * BLOCK
    hyper += tl.load(piece + GROUP) * 8
    flags = tl.load(pointers + FLAGS)
    first = (flags & FIRST_STEP) != 0
    param, grad, buffer = (
        tl.load(pointers + PARAM),
        tl.load(pointers + GRAD),
        tl.load(pointers + BUFFER),
    )  # integers: see `aligned`
    row_of_piece = multiplier_row(piece, pointers, hyper.dtype.element_ty)
    if (start + BLOCK <= numel) & ((flags & ALIGNED) != 0):
        place = start + tl.arange(0, BLOCK)
        inside = tl.full([BLOCK], True, tl.int1)
        _update(
            place, inside, aligned(param, DTYPE), aligned(grad, DTYPE), aligned(buffer, DTYPE),
            first, row_of_piece, hyper, grad_scale,
        )  # fmt: skip
    else:
        end = tl.minimum(start + BLOCK, numel)
        while start < end:
            place = start + tl.arange(0, TAIL)
            _update(
                place, place < end, unaligned(param, DTYPE), unaligned(grad, DTYPE), unaligned(buffer, DTYPE),
                first, row_of_piece, hyper, grad_scale,
            )  # fmt: skip
            start += TAIL


def pack(hyper: Tensor, dtype: torch.dtype) -> Tensor:
    """[G, 6] float64 -> [G, 8]: lr, momentum, 1 − dampening, weight decay, then as 0 or 1 momentum ≠ 0, weight decay ≠ 0, nesterov, maximize."""
    switches = torch.cat((hyper[:, 1:2], hyper[:, 3:]), dim=1) != 0
    return torch.cat((hyper[:, :2], 1 - hyper[:, 2:3], hyper[:, 3:4], switches), dim=1).to(dtype)


def _hyper_table(call: plans.Call, hyper: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    if hyper.device.type != "cpu":
        return pack(hyper, dtype).to(device)
    values = hyper.flatten().tolist()
    if plans.capturing(device):  # only that of an earlier step of these tensors is sure to be there at a replay
        last, table = call.hyper.get((device, dtype), (None, None))
        if last != values:
            return plans.upload(pack(hyper, dtype), device)
        plans.keep(table)
        return table
    key = (*values, device, dtype, plans.stream(device))
    if key not in _hyper_tables:
        plans.remember(_hyper_tables, key, plans.upload(pack(hyper, dtype), device))
    call.hyper[device, dtype] = values, _hyper_tables[key]
    return _hyper_tables[key]


@torch.no_grad()
def rep_sgd_step(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    scales: list[Tensor | None],
    identities: list[Tensor | None],
    first_steps: list[bool],
    groups: list[int],
    hyper: Tensor,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """As `reference.rep_sgd_step`; float32 and float64 bit for bit.

    `hyper`, `grad_scale` and `found_inf` may live on the device: the host then waits for nothing, and a CUDA graph reads
    their values at replay. Where the host cannot see that a momentum is 0, the buffer must be like its parameter (or be
    the parameter itself). Parameters that the kernels do not take (strides that differ, gaps, complex, mixed dtypes) go
    to the reference, and so does the whole call where its tensors overlap each other.
    Version counters are the caller's to move, as with the C++ kernels: the optimizer does it once, in 6 µs for 124 tensors.
    """
    if not params:
        return
    momenta = hyper[:, 1].tolist() if hyper.device.type == "cpu" else [1.0] * len(hyper)
    call = _plans.prepare(
        (grads, params, momentum_buffers),
        scales,
        identities,
        groups,
        [2 if m == 0 else 3 for m in momenta],
        first_steps,
    )
    rest = range(len(params)) if call.pointers is None else call.plan.rest
    if rest:
        columns = [
            [column[n] for n in rest]
            for column in (params, grads, momentum_buffers, scales, identities, first_steps, groups)
        ]
        reference.rep_sgd_step(*columns, hyper, grad_scale, found_inf)
    if call.pointers is None:
        return
    for launch, pointers in zip(call.plan.launches, call.pointers):
        dtype = plans.COMPUTE[launch.dtype]
        _plans.launch(
            launch,
            rep_sgd_step_kernel,
            pointers,
            _hyper_table(call, hyper, launch.device, dtype),
            None if grad_scale is None else grad_scale.to(device=launch.device, dtype=dtype),
            None if found_inf is None else _flag(found_inf).to(launch.device),
        )


def _flag(found_inf: Tensor) -> Tensor:
    return found_inf if found_inf.dtype == torch.float32 else (found_inf != 0).float()
