"""Feature maps on which every implementation of the pair ops must equal the reference, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gradrep_kernels.ops import reference
from gradrep_kernels.ops.reference.pair_rule import arithmetic_dtype
from gradrep_kernels.sgs.dependence import half_displacements

LAYOUTS = ("contiguous", "channels_last", "cut", "every_other", "columns_first", "one_image_repeated")


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values at other addresses, between NaN in memory. ("one_image_repeated": the first image N times)"""
    n, c, h, w = x.shape
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "cut":
        return x.new_full((n, c + 1, h + 2, w + 3), math.nan)[:, 1:, 1 : h + 1, 2 : w + 2].copy_(x)
    if layout == "every_other":
        return x.new_full((n, 2 * c, h, 2 * w), math.nan)[:, ::2, :, ::2].copy_(x)
    if layout == "columns_first":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "one_image_repeated":
        return x[:1].expand(n, -1, -1, -1)
    return x.contiguous()


@dataclass(frozen=True)
class Pairs:
    desc: str
    shape: tuple[int, int, int, int]
    kernel_size: tuple[int, int] = (3, 3)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    kind: str = "relu"
    dtype: torch.dtype = torch.float32
    displacements: tuple[tuple[int, int], ...] = ()  # instead of the kernel's

    def flat_displacements(self) -> list[int]:
        return [v for d in self.displacements or half_displacements(self.kernel_size, self.dilation) for v in d]

    def tensor(self) -> torch.Tensor:
        return make(self.kind, self.shape, self.dtype)


def make(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    chosen = torch.rand(shape, generator=generator)
    match kind:
        case "noise":
            pass
        case "relu":
            x = x.relu()
        case "negative":
            x = -x.abs() - 0.1
        case "all NaN":
            x = torch.full(shape, math.nan, dtype=torch.float64)
        case "sparse":
            x = torch.where(chosen < 0.9, 0.0, x.abs())
        case "relu6":
            x = (6 * x).clamp(0, 6)
        case "constant":
            x = torch.full(shape, 1.5, dtype=torch.float64)
        case "zeros":
            x = torch.where(chosen < 0.5, -0.0, torch.zeros(shape, dtype=torch.float64))
        case "one hot":
            x = torch.zeros(shape, dtype=torch.float64)
            x[0, -1, -1, 0] = 1.0
        case "dead channels":
            x = x.relu()
            x[:, ::2] = 0
        case "unlike channels":
            x = x * 10.0 ** (torch.arange(shape[1], dtype=torch.float64) % 7 - 3).view(-1, 1, 1) + 1
        case "8-bit":  # multiples of 1/8: with 8 bins each value is a bin's edge
            x = torch.randint(0, 9, shape, generator=generator).double() / 8
        case "bytes":  # with 15 bins every 17th is an edge
            x = torch.randint(0, 256, shape, generator=generator).double()
        case "NaN":
            x = torch.where(chosen < 0.02, math.nan, x)
        case "infinities":
            x = torch.where(chosen < 0.02, math.inf, torch.where(chosen > 0.98, -math.inf, x))
        case "denormal":
            x = x * (1e-310 if dtype == torch.float64 else 1e-41 if dtype != torch.float16 else 1e-6)
        case "wide":  # hi - lo overflows
            x = x.sign() * torch.finfo(dtype).max
        case _:
            raise AssertionError(kind)
    return x.to(dtype)


PAIRS = (
    Pairs("one pixel", (1, 1, 1, 1)),
    Pairs("one pixel, no padding: no pair", (3, 2, 1, 1), padding=(0, 0)),
    Pairs("two by two", (2, 3, 2, 2), kind="noise"),
    Pairs("one row", (2, 3, 1, 19), padding=(0, 1)),
    Pairs("one column", (2, 3, 19, 1), padding=(1, 0)),
    Pairs("four by four, many channels", (5, 67, 4, 4)),
    Pairs("primes", (3, 7, 13, 17), kind="noise"),
    Pairs("one image, one channel", (1, 1, 31, 33)),
    Pairs("513 channels", (2, 513, 3, 3)),
    Pairs("a plane as large as a block", (2, 2, 32, 32)),
    Pairs("rows longer than a block", (1, 2, 3, 5000), kind="noise"),
    Pairs("many images of few pixels", (300, 3, 4, 4)),
    Pairs("constant", (3, 4, 9, 9), kind="constant"),
    Pairs("constant, no padding", (3, 4, 9, 9), kind="constant", padding=(0, 0)),
    Pairs("zeros of both signs", (3, 4, 9, 9), kind="zeros"),
    Pairs("one hot", (3, 4, 9, 9), kind="one hot"),
    Pairs("ReLU6, saturated", (3, 4, 16, 16), kind="relu6"),
    Pairs("90 % zeros", (4, 4, 16, 16), kind="sparse"),
    Pairs("dead channels", (3, 5, 12, 12), kind="dead channels"),
    Pairs("unlike channels", (3, 9, 12, 12), kind="unlike channels"),
    Pairs("values on the bins' edges", (3, 4, 16, 16), kind="8-bit"),
    Pairs("bytes, of which every 17th is the edge of one of Sturges' 15 bins", (33, 2, 16, 16), kind="bytes"),
    Pairs("values on the bins' edges, bf16", (3, 4, 16, 16), kind="8-bit", dtype=torch.bfloat16),
    Pairs("NaN", (3, 4, 9, 11), kind="NaN"),
    Pairs("infinities", (3, 4, 9, 11), kind="infinities"),
    Pairs("denormal", (3, 4, 9, 11), kind="denormal"),
    Pairs("denormal fp16", (3, 4, 9, 11), kind="denormal", dtype=torch.float16),
    Pairs("denormal float64", (3, 4, 9, 11), kind="denormal", dtype=torch.float64),
    Pairs("range overflows", (3, 4, 9, 11), kind="wide"),
    Pairs("no padding", (4, 5, 11, 10), padding=(0, 0), kind="noise"),
    Pairs("padding below the radius in rows", (4, 5, 11, 10), padding=(0, 1), kind="noise"),
    Pairs("padding below the radius, 5x5", (4, 5, 11, 10), kernel_size=(5, 5), padding=(1, 1), kind="noise"),
    Pairs("padding above the radius", (4, 5, 7, 6), padding=(3, 2), kind="noise"),
    Pairs("padding far above the radius, one image of one channel", (1, 1, 3, 2), padding=(9, 7), kind="noise"),
    Pairs("padding is the largest value", (3, 4, 9, 9), kind="negative"),
    Pairs("all NaN", (2, 3, 5, 5), kind="all NaN"),
    Pairs("constant, padding above the radius", (3, 4, 9, 9), kind="constant", padding=(2, 2)),
    Pairs("dilation 2", (4, 5, 11, 10), dilation=(2, 2), padding=(2, 2)),
    Pairs("dilation (1, 3), no padding", (4, 5, 11, 10), dilation=(1, 3), padding=(0, 0)),
    Pairs("3x5", (4, 5, 11, 10), kernel_size=(3, 5), padding=(1, 2)),
    Pairs("3x5, padding below the radius in columns", (4, 5, 11, 10), kernel_size=(3, 5), padding=(1, 1), kind="noise"),
    Pairs("3x5, no padding of rows", (4, 5, 11, 10), kernel_size=(3, 5), padding=(0, 1), kind="noise"),
    Pairs("5x3", (4, 5, 11, 10), kernel_size=(5, 3), padding=(2, 1)),
    Pairs("5x5", (4, 5, 11, 10), kernel_size=(5, 5), padding=(2, 2)),
    Pairs("7x7", (6, 3, 20, 20), kernel_size=(7, 7), padding=(3, 3)),
    Pairs("7x7 on a map of 4 x 4", (6, 3, 4, 4), kernel_size=(7, 7), padding=(3, 3)),
    Pairs("7x7 on a map of 3 x 4, no padding: some have no pair", (6, 3, 3, 4), kernel_size=(7, 7), padding=(0, 0)),
    Pairs("11x11", (2, 2, 17, 18), kernel_size=(11, 11), padding=(5, 5)),
    Pairs(
        "negative, far, repeated and no displacement at all",
        (3, 4, 7, 8),
        displacements=((0, -1), (-1, 1), (-2, -2), (0, 0), (50, 0), (0, -1), (0, -9), (2, 2)),
    ),
    Pairs(
        "negative, repeated and no displacement at all, padding enough",
        (3, 4, 7, 8),
        padding=(2, 3),
        kind="noise",
        displacements=((0, -1), (-1, 1), (-2, -2), (0, 0), (0, -1), (0, -3), (2, 2), (-1, 0)),
    ),
    Pairs("no displacement at all", (3, 4, 7, 8), padding=(0, 0), kind="noise", displacements=((0, 0),)),
    Pairs("no displacement at all, padded", (3, 4, 7, 8), kind="noise", displacements=((0, 0),)),
    Pairs("one displacement", (3, 4, 7, 8), displacements=((1, -1),)),
    Pairs("three that could share an increment", (3, 4, 7, 8), displacements=((0, 1), (1, 0), (1, 1))),
    Pairs("float64", (3, 4, 9, 11), dtype=torch.float64, kind="noise"),
    Pairs("bf16", (3, 33, 9, 11), dtype=torch.bfloat16, kind="noise"),
    Pairs("fp16", (3, 33, 9, 11), dtype=torch.float16, kind="noise"),
    Pairs("NaN fp16", (3, 4, 9, 11), dtype=torch.float16, kind="NaN"),
    Pairs("infinities bf16", (3, 4, 9, 11), dtype=torch.bfloat16, kind="infinities"),
)


MANY = (
    Pairs("many images", (1000, 3, 9, 9)),
    Pairs("large maps", (2, 2, 300, 301)),
    Pairs("many of both", (200, 65, 16, 16), kind="noise"),
)
"""Maps for a GPU: more programs than fit on it."""

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the last bit, zeros with their sign; one NaN is as good as another."""
    bits = torch.int64 if a.dtype == torch.float64 else torch.int32
    return (
        a.dtype == b.dtype
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(nan=0.0).view(bits), b.nan_to_num(nan=0.0).view(bits))
    )


def ends_of_before(channels: int, pairs: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Ends and n as other maps could have left them: nothing, numbers of all sizes, a NaN of either sign."""
    ends = torch.full((channels, pairs, 2, 2), -math.inf, dtype=arithmetic_dtype(dtype))
    for start, value in enumerate((0.25, -0.5, 1e9, math.inf, math.nan, -math.nan, 0.0)):
        ends.view(-1)[start + 1 :: 17] = value
    return ends, torch.arange(7, 7 + channels * pairs).view(channels, pairs)


def assert_raised(
    op: Callable, x: torch.Tensor, displacements: list[int], padding: list[int], remove_near: bool
) -> None:
    """`pair_ranges_` in two batches, onto ends of before, against the reference on the CPU; with n and without."""
    expected, expected_n = ends_of_before(x.shape[1], len(displacements) // 2, x.dtype)
    found, n = (part.to(x.device, copy=True) for part in (expected, expected_n))
    without_n = found.clone()
    reference.pair_ranges_(expected, expected_n, x.cpu(), displacements, padding, remove_near)
    for part in (x[:1], x[1:]):
        op(found, n, part, displacements, padding, remove_near)
        op(without_n, None, part, displacements, padding, remove_near)
    assert torch.equal(n.cpu(), expected_n)
    assert same_bits(found.cpu(), expected), (found, expected)
    assert same_bits(without_n, found)
