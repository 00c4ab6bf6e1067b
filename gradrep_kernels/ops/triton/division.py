"""Division by numbers that are known before a launch: a multiplication and a shift on the device."""

from __future__ import annotations

import triton
import triton.language as tl


def magic_division(divisor: int) -> tuple[int, int]:
    """(magic, shift) such that n // divisor == (2 n * magic >> 32) >> shift for 0 <= n < 2^31.

    The reciprocal is rounded up (Granlund and Montgomery, 1994).
    """
    shift = (divisor - 1).bit_length()
    return (1 << (31 + shift)) // divisor + 1, shift


@triton.jit
def quotient(n, magic, shift):
    """n // d for n < 2^31, with `magic_division(d)`.

    It takes 3 instructions, where a division by a number that the compiler does not know takes 20.
    """
    return (tl.umulhi(n.to(tl.uint32) << 1, magic) >> shift).to(tl.int32)
