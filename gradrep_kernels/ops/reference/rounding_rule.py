"""The rule of stochastic rounding: random bits of an element from a counter, and the bfloat16 that they choose.

Every implementation follows this page to the letter. So a state that is stored in bfloat16 has the same bits on every
device, for any number of threads, however a parameter is sharded, and after a resume.

Random bits. The generator is Philox4x32 with 7 rounds (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy
as 1, 2, 3", SC 2011, section 3.3; 7 is the least number of rounds that passes BigCrush, table 2). It turns a key of two
words and a counter of four, all of 32 bits, into four words:

    key     = (seed mod 2^32, seed div 2^32)
    counter = (element div 8, parameter, step mod 2^32, state), each mod 2^32

Word (element mod 8) div 2 serves two elements: its lower 16 bits the even one, its upper 16 bits the odd one.

    element    its number in the whole parameter, in the order in which a dense parameter lies in memory
    parameter  the parameter's position in its optimizer
    step       the number of the step, from 1
    state      which of the update's states is stored, from 0

Rounding. v is float32. A float64 value is rounded to float32 first, to the nearest. NaN becomes 0x7fc0. Else the 16
bits are added to the 32 bits of v as an unsigned number, and the upper 16 bits of the sum are the result. So v becomes
one of its two neighbours, the further one with probability (distance to the nearer) / (distance between them), and the
mean over random bits is v. Infinities stay. Above the greatest finite bfloat16, v can become infinite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradrep_kernels.ops.dense import memory_order

ROUNDS = 7
_MULTIPLIERS, _WEYL, _MASK = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 0xFFFFFFFF


def philox(counter: tuple[Tensor | int, ...], key: tuple[int, int], rounds: int = ROUNDS) -> tuple[Tensor, ...]:
    """Four words of 32 bits for each counter of four such words  # int64 tensors that broadcast, or ints"""
    # Not where torch.set_default_device says: numbers on the CPU go with tensors on any device.
    c0, c1, c2, c3 = (c if isinstance(c, Tensor) else torch.tensor(c, device="cpu") for c in counter)
    k0, k1 = key
    for _ in range(rounds):
        # int64 products wrap, and their 64 bits are those of the unsigned product.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (second >> 32) & _MASK ^ c1 ^ k0, second & _MASK
        c2, c3 = (first >> 32) & _MASK ^ c3 ^ k1, first & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def random_bits(elements: Tensor, seed: int, step: int, parameter: int, state: int = 0) -> Tensor:
    """The 16 random bits of each element  # elements int64, any shape -> int64, the same shape, in [0, 2^16)"""
    words = philox(
        ((elements >> 3) & _MASK, parameter & _MASK, step & _MASK, state), (seed & _MASK, (seed >> 32) & _MASK)
    )
    words = torch.stack(torch.broadcast_tensors(*words)).to(elements.device)
    word = words.gather(0, ((elements & 7) >> 1).unsqueeze(0)).squeeze(0)
    return (word >> 16 * (elements & 1)) & 0xFFFF


def element_numbers(t: Tensor, elements: Tensor | None = None) -> Tensor:
    """The number of each element of `t` in the whole parameter  # int64, the shape of t

    Args:
        elements: None: `t` is the whole. [1] int64: it is a run of the whole that begins at this number.
                  int64 in the shape of t: the numbers themselves
    """
    if elements is not None and elements.shape == t.shape and elements.numel() != 1:
        return elements.to(t.device)
    order = sorted(range(t.dim()), key=lambda d: -t.stride(d))
    outer = memory_order(t.shape, t.stride())
    if outer is not None:
        order = outer + [d for d in range(t.dim()) if d not in outer]
    numbers = torch.arange(t.numel(), device=t.device).reshape([t.shape[d] for d in order])
    numbers = numbers.permute([order.index(d) for d in range(t.dim())])
    return numbers if elements is None else numbers + elements.to(t.device).reshape(())


def rounded(value: Tensor, bits: Tensor) -> Tensor:
    """Round to bfloat16 by 16 random bits for each element  # value floating, bits int64, both of one shape"""
    value = value.to(torch.float32)
    sums = ((value.contiguous().view(torch.int32).to(torch.int64) & _MASK) + bits) >> 16
    sums = torch.where(value.isnan(), 0x7FC0, sums)
    # A sum has 16 bits and int16 is signed: the upper half of its range stands for negative numbers.
    return torch.where(sums < 0x8000, sums, sums - 0x10000).to(torch.int16).view(torch.bfloat16)
