"""What the steps of all optimizers share around their update, on the device. See reference/step_tail.py."""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from triton.language.random import philox_impl

from gradrep_kernels.ops.reference import rounding_rule

ROUNDS = tl.constexpr(rounding_rule.ROUNDS)


@triton.jit
def from_bits(bits, dtype: tl.constexpr):
    """The float64 or float32 whose bits are (the lower half of) an integer: a float argument would be a float32."""
    if dtype == tl.float64:
        return bits.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        return bits.to(tl.int32).to(tl.float32, bitcast=True)


def to_bits(number: float, dtype: torch.dtype) -> int:
    """The argument that `from_bits` reads."""
    wide = dtype == torch.float64
    return struct.unpack("q" if wide else "i", struct.pack("d" if wide else "f", number))[0]


@triton.jit
def quotient(a, b):
    """Rounded as IEEE 754 says."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    return a / b


@triton.jit
def incoming(grad, inside, grad_scale, clip, dtype: tl.constexpr):
    """g as an update takes it: unscaled in place where there is a grad_scale, then clipped elsewhere."""
    g = tl.load(grad, mask=inside).to(dtype)
    if grad_scale is not None:
        g = quotient(g, tl.load(grad_scale))
        tl.store(grad, g, mask=inside)
    if clip is not None:
        g = g * tl.load(clip)
    return g


@triton.jit
def random_bits(octet, within, number, seed, step, state):
    """The 16 random bits of each element, by reference/rounding_rule.py. Their numbers are 8 · octet + within.

    Where `within` is a range of constants the compiler sees that a thread's neighbours have one counter.
    """
    c0, c1, c2, c3 = philox_impl(
        tl.add(octet, (within >> 3).to(tl.uint32), sanitize_overflow=False),
        number.to(tl.uint32),
        step.to(tl.uint32),
        tl.zeros_like(number).to(tl.uint32) + state,
        seed.to(tl.uint32),
        (seed.to(tl.int64) >> 32).to(tl.uint32),
        ROUNDS,
    )
    lane = within & 7
    word = tl.where(lane < 4, tl.where(lane < 2, c0, c1), tl.where(lane < 6, c2, c3))
    return (word >> ((lane & 1) << 4).to(tl.uint32)) & 0xFFFF


@triton.jit
def rounded(value, bits, stochastic):
    """Round to bfloat16 by 16 random bits for each element. Where the integer `stochastic` is 0, to the nearest."""
    value = value.to(tl.float32)
    whole = value.to(tl.uint32, bitcast=True)
    bits = tl.where(stochastic != 0, bits, 0x7FFF + (whole >> 16 & 1))
    whole = tl.where(value == value, whole, 0x7FC00000)
    return (whole + bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def update_average(average, inside, w, weight):
    """e <- e + (1 - decay) (W - e), with the weight as it is stored."""
    e = tl.load(average, mask=inside, other=0.0)
    tl.store(average, e + (w.to(e.dtype) - e) * weight, mask=inside)


@triton.jit(do_not_specialize_on_alignment=["tail", "result"])
def tail_kernel(
    tail,  # [4] float64, as step_tail.COLUMNS has it; -1: the number is not there
    result,  # [4] int64
    compute: tl.constexpr,
):
    """Write the tail as the kernels of steps take it: as integers, its decay as `from_bits` reads 1 - decay."""
    decay = tl.load(tail)
    weight = (1 - decay).to(compute)
    if compute == tl.float64:
        bits = weight.to(tl.int64, bitcast=True)
    else:
        bits = weight.to(tl.int32, bitcast=True).to(tl.int64)
    tl.store(result, tl.where(decay < 0, -1, bits))
    for n in tl.static_range(1, 4):
        tl.store(result + n, tl.load(tail + n).to(tl.int64))
