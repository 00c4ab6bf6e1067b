"""The frame of every optimizer's step on the device. An op adds its update of one block."""

from __future__ import annotations

import triton
import triton.language as tl

from gradrep_kernels.ops.triton.addressing import (  # by name: the key of Triton's cache holds no attributes of modules
    ALIGNED,
    AVERAGE,
    FIRST_STEP,
    FLAGS,
    GRAD,
    GROUP,
    NUMBER,
    OCTET,
    POINTERS,
    TAIL,
    WITHIN_OCTET,
    aligned,
    multiplier_row,
    own_chunk,
    switched,
    unaligned,
)
from gradrep_kernels.ops.triton.step_tail import from_bits, incoming, random_bits, rounded, update_average

PARAM = tl.constexpr(POINTERS.value)
STATE = tl.constexpr(POINTERS.value + 1)
"""Columns of `pointers`: the parameter, and the first of the states, which stand side by side."""

TENSORS = ["chunks", "geometry", "pointers", "hyper", "grad_scale", "found_inf", "clip", "tail"]
NUMBERS = ["weight", "seed", "step"]
"""What a step's kernel takes. Triton must not compile it anew for tensors that happen to be aligned, nor for numbers
that happen to be 1 or a multiple of 16."""


@triton.jit
def state_addresses(pointers, STATES: tl.constexpr):
    addresses = ()
    for n in tl.static_range(STATES):
        addresses += (tl.load(pointers + STATE + n),)
    return addresses


@triton.jit
def all_aligned(addresses, STATES: tl.constexpr, NARROW: tl.constexpr, DTYPE: tl.constexpr, LANES: tl.constexpr):
    states = ()
    for n in tl.static_range(STATES):
        if NARROW >> n & 1:
            states += (aligned(addresses[n], tl.bfloat16, 2 * LANES),)
        else:
            states += (aligned(addresses[n], DTYPE, DTYPE.primitive_bitwidth // 8 * LANES),)
    return states


@triton.jit
def all_unaligned(addresses, STATES: tl.constexpr, NARROW: tl.constexpr, DTYPE: tl.constexpr):
    states = ()
    for n in tl.static_range(STATES):
        if NARROW >> n & 1:
            states += (unaligned(addresses[n], tl.bfloat16),)
        else:
            states += (unaligned(addresses[n], DTYPE),)
    return states


@triton.jit
def given(place, other):
    """The number on the device, `other` where it is -1."""
    number = tl.load(place)
    return tl.where(number < 0, other, number)


@triton.jit
def further(switch, n: tl.constexpr):
    """Whether there are more than n, as an integer: 0 where there are not."""
    return tl.maximum(switch - n, 0)


@triton.jit
def block(
    place, inside, param, grad, states, average, octet, within,
    first, hyper, row_of_piece, random, averaged, weight, grad_scale, clip,
    UPDATE: tl.constexpr, ROW: tl.constexpr, FACTOR: tl.constexpr, STATES: tl.constexpr,
    AVERAGED: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Update one block. Every product and sum is in the order of the reference, and rounded on its own."""
    dtype: tl.constexpr = hyper.dtype.element_ty
    switch, numbers = ROW(hyper)
    g = incoming(grad + place, inside, grad_scale, clip, dtype)  # before the other loads: 48 registers, not 64
    w = tl.load(param + place, mask=inside).to(dtype)
    old = ()
    for n in tl.static_range(STATES):
        old += (tl.load(states[n] + place, mask=switched(inside, further(switch, n)), other=0.0).to(dtype),)
    w, new = UPDATE(w, g, FACTOR(place, inside, row_of_piece), old, first, numbers)
    for n in tl.static_range(STATES):
        used = switched(inside, further(switch, n))
        if NARROW >> n & 1:
            piece, seed, step, stochastic = random
            counted = tl.add(tl.load(piece + OCTET), octet, sanitize_overflow=False).to(tl.uint32)
            bits = random_bits(counted, within, tl.load(piece + NUMBER), seed, step, n)
            tl.store(states[n] + place, rounded(new[n], bits, stochastic), mask=used)
        else:
            tl.store(states[n] + place, new[n], mask=used)
    w = w.to(param.dtype.element_ty)
    tl.store(param + place, w, mask=inside)
    if AVERAGED:
        update_average(average + place, switched(inside, averaged), w, weight)


@triton.jit
def step_frame(
    chunks,  # [programs] int32
    geometry,  # [pieces, GEOMETRY] int32
    pointers,  # [pieces, STATE + STATES] int64
    hyper,  # [G, COLUMNS] in the dtype that is computed in
    grad_scale,  # [1] in that dtype, or None
    found_inf,  # [1] float32, or None
    clip,  # [1] in the dtype that is computed in, or None
    tail,  # [4] int64, or None: `weight`, whether states are rounded by random bits, `seed`, `step`; -1: not there
    weight,  # the bits of 1 - ema_decay in the dtype that is computed in
    seed,
    step,
    UPDATE: tl.constexpr,
    ROW: tl.constexpr,
    FACTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    STATES: tl.constexpr,
    AVERAGED: tl.constexpr,
    NARROW: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update the chunk of this program: one BLOCK where it is whole and aligned, else a loop of small blocks.

    ROW, UPDATE and FACTOR are device functions of values in the dtype that is computed in:
        hyper -> (switch, numbers): a group's row of hyper-parameters, and an integer, how many of its states are read
            and written, from the first
        (w, g, m, states, first, numbers) -> (w, states): of parameter, gradient, what FACTOR gives, the tuple of
            states, whether this is the parameter's first step
        (place, inside, row_of_piece) -> m: `addressing.multiplier`, or what UPDATE needs in its place

    Args:
        AVERAGED: whether some parameters have an average
        NARROW:   bit n: state n is bfloat16, and rounded by random bits
    """
    if found_inf is not None:  # noqa: SIM102 (a constant for the compiler, then a number on the device)
        if tl.load(found_inf) != 0:
            return
    dtype: tl.constexpr = hyper.dtype.element_ty
    # One thread's run of elements has 128 bits in the widest tensor. With runs of unlike lengths the compiler would
    # exchange elements between threads.
    LANES: tl.constexpr = 128 // (dtype.primitive_bitwidth if AVERAGED else DTYPE.primitive_bitwidth)
    BYTES: tl.constexpr = DTYPE.primitive_bitwidth // 8 * LANES
    piece, pointers, start, numel = own_chunk(chunks, geometry, pointers, STATE + STATES, BLOCK)
    hyper += tl.load(piece + GROUP) * COLUMNS
    flags = tl.load(pointers + FLAGS)
    first = (flags & FIRST_STEP) != 0
    # Integers: see `aligned`.
    param, grad, states = tl.load(pointers + PARAM), tl.load(pointers + GRAD), state_addresses(pointers, STATES)
    average = tl.load(pointers + AVERAGE)
    stochastic = 1
    if tail is not None:
        weight, seed, step = given(tail, weight), given(tail + 2, seed), given(tail + 3, step)
        stochastic = tl.load(tail + 1)
    random = ()
    within_octet = 0
    if NARROW:
        random = (piece, seed, step, stochastic)
        within_octet = tl.load(piece + WITHIN_OCTET)
    weight = from_bits(weight, dtype)
    averaged = (average != 0).to(tl.int32)
    row_of_piece = multiplier_row(piece, pointers, dtype)
    if (start + BLOCK <= numel) & ((flags & ALIGNED) != 0):
        place = start + tl.arange(0, BLOCK)
        inside = tl.full([BLOCK], True, tl.int1)
        block(
            place, inside,
            aligned(param, DTYPE, BYTES), aligned(grad, DTYPE, BYTES),
            all_aligned(states, STATES, NARROW, DTYPE, LANES),
            aligned(average, dtype), start >> 3, tl.arange(0, BLOCK),
            first, hyper, row_of_piece, random, averaged, weight, grad_scale, clip,
            UPDATE, ROW, FACTOR, STATES, AVERAGED, NARROW,
        )  # fmt: skip
    else:
        end = tl.minimum(start + BLOCK, numel)
        while start < end:
            place = start + tl.arange(0, TAIL)
            block(
                place, place < end,
                unaligned(param, DTYPE), unaligned(grad, DTYPE),
                all_unaligned(states, STATES, NARROW, DTYPE),
                unaligned(average, dtype), 0, place + within_octet,
                first, hyper, row_of_piece, random, averaged, weight, grad_scale, clip,
                UPDATE, ROW, FACTOR, STATES, AVERAGED, NARROW,
            )  # fmt: skip
            start += TAIL
