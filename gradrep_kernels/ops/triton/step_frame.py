"""The frame of every optimizer's step on the device. An op adds its update of one block."""

from __future__ import annotations

import triton
import triton.language as tl

from gradrep_kernels.ops.triton.addressing import (  # by name: the key of Triton's cache holds no attributes of modules
    ALIGNED,
    FIRST_STEP,
    FLAGS,
    GRAD,
    GROUP,
    POINTERS,
    TAIL,
    aligned,
    multiplier_row,
    own_chunk,
    unaligned,
)

PARAM = tl.constexpr(POINTERS.value)
STATE = tl.constexpr(POINTERS.value + 1)
"""Columns of `pointers`: the parameter, and the first of the states, which stand side by side."""

ARGUMENTS = ["chunks", "geometry", "pointers", "hyper", "grad_scale", "found_inf"]
"""The tensors that a step's kernel takes. Triton must not compile it anew for those that happen to be aligned."""


@triton.jit
def state_addresses(pointers, STATES: tl.constexpr):
    addresses = ()
    for n in tl.static_range(STATES):
        addresses += (tl.load(pointers + STATE + n),)
    return addresses


@triton.jit
def all_aligned(addresses, STATES: tl.constexpr, DTYPE: tl.constexpr):
    states = ()
    for n in tl.static_range(STATES):
        states += (aligned(addresses[n], DTYPE),)
    return states


@triton.jit
def all_unaligned(addresses, STATES: tl.constexpr, DTYPE: tl.constexpr):
    states = ()
    for n in tl.static_range(STATES):
        states += (unaligned(addresses[n], DTYPE),)
    return states


@triton.jit
def step_frame(
    chunks,  # [programs] int32
    geometry,  # [pieces, GEOMETRY] int32
    pointers,  # [pieces, POINTERS + 1 + STATES] int64
    hyper,  # [G, COLUMNS] in the dtype that is computed in
    grad_scale,  # [1] in that dtype, or None
    found_inf,  # [1] float32, or None
    UPDATE: tl.constexpr,
    COLUMNS: tl.constexpr,
    STATES: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update the chunk of this program: one BLOCK where it is whole and aligned, else a loop of small blocks.

    UPDATE is a device function. It gets
        (place, inside, param, grad, states, first, row_of_piece, hyper, grad_scale):
    the places in the piece and which of them exist; pointers to parameter, gradient and the tuple of states; whether
    this is the parameter's first step; what `multiplier` takes; its group's row of hyper-parameters; and `grad_scale`
    as above.
    """
    if found_inf is not None:  # noqa: SIM102 (a constant for the compiler, then a number on the device)
        if tl.load(found_inf) != 0:
            return
    piece, pointers, start, numel = own_chunk(chunks, geometry, pointers, STATE + STATES, BLOCK)
    hyper += tl.load(piece + GROUP) * COLUMNS
    flags = tl.load(pointers + FLAGS)
    first = (flags & FIRST_STEP) != 0
    # Integers: see `aligned`.
    param, grad, states = tl.load(pointers + PARAM), tl.load(pointers + GRAD), state_addresses(pointers, STATES)
    row_of_piece = multiplier_row(piece, pointers, hyper.dtype.element_ty)
    if (start + BLOCK <= numel) & ((flags & ALIGNED) != 0):
        place = start + tl.arange(0, BLOCK)
        inside = tl.full([BLOCK], True, tl.int1)
        UPDATE(
            place, inside,
            aligned(param, DTYPE), aligned(grad, DTYPE), all_aligned(states, STATES, DTYPE),
            first, row_of_piece, hyper, grad_scale,
        )  # fmt: skip
    else:
        end = tl.minimum(start + BLOCK, numel)
        while start < end:
            place = start + tl.arange(0, TAIL)
            UPDATE(
                place, place < end,
                unaligned(param, DTYPE), unaligned(grad, DTYPE), all_unaligned(states, STATES, DTYPE),
                first, row_of_piece, hyper, grad_scale,
            )  # fmt: skip
            start += TAIL
