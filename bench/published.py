"""The papers' published algorithms, written anew from their description, with which the kernels are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

Histogram2d = Callable[[np.ndarray, np.ndarray, int, tuple[float, float], tuple[float, float]], np.ndarray]


@torch.no_grad()
def rep_sgd_loop(
    params: Sequence[Tensor],
    masks: dict[Tensor, Tensor],
    buffers: Sequence[Tensor],
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """RepOptimizers' SGD: a Python loop over the parameters, a full-size product, then a pass for each term of SGD."""
    for p, buffer in zip(params, buffers):
        g = (p.grad * masks[p]).add_(p, alpha=weight_decay) if p in masks else p.grad.add(p, alpha=weight_decay)
        buffer.mul_(momentum).add_(g)
        p.add_(buffer, alpha=-lr)


@torch.no_grad()
def rep_adamw_loop(
    params: Sequence[Tensor],
    masks: dict[Tensor, Tensor],
    averages: Sequence[Tensor],
    squares: Sequence[Tensor],
    step: int,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> None:
    """RepOptimizers' AdamW: a full-size mask multiplies the gradient, and the update once more.

    For one branch the mask is its α. Of several it is Σ α, which is not what AdamW does to them.
    """
    for p, average, square in zip(params, averages, squares):
        g = p.grad * masks[p] if p in masks else p.grad
        p.mul_(1 - lr * weight_decay)
        average.mul_(betas[0]).add_(g, alpha=1 - betas[0])
        square.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        root = (square.sqrt() / math.sqrt(1 - betas[1] ** step)).add_(eps)
        update = average / root
        p.add_(update.mul_(masks[p]) if p in masks else update, alpha=-lr / (1 - betas[0] ** step))


def fast_histogram2d(
    p: np.ndarray, q: np.ndarray, bins: int, p_range: tuple[float, float], q_range: tuple[float, float]
) -> np.ndarray:
    from fast_histogram import histogram2d

    return histogram2d(p, q, bins, (p_range, q_range))


def numpy_histogram2d(
    p: np.ndarray, q: np.ndarray, bins: int, p_range: tuple[float, float], q_range: tuple[float, float]
) -> np.ndarray:
    return np.histogram2d(p, q, bins, (p_range, q_range))[0]


def channel_counts(
    x: np.ndarray, displacements: Iterable[tuple[int, int]], histogram2d: Histogram2d, remove_near: bool = False
) -> list[np.ndarray]:
    """Joint histograms of one channel, one displacement at a time, in Sturges bins.

    x is [N, H, W] and padded; there are D results [B, B].
    """
    found = []
    height, width = x.shape[1:]
    for di, dj in displacements:
        left, right = max(0, -dj), width - max(0, dj)
        p = x[:, : height - di, left:right].ravel()
        q = x[:, di:, left + dj : right + dj].ravel()
        if remove_near:
            kept = (p != 0) & (q != 0)
            p, q = p[kept], q[kept]
        if p.size == 0:
            found.append(np.zeros((1, 1)))
            continue
        ranges = [(float(side.min()), float(side.max())) for side in (p, q)]
        ranges = [(lo, hi if hi > lo else lo + 1) for lo, hi in ranges]
        counts = histogram2d(p, q, 1 + math.ceil(math.log2(p.size)), *ranges)
        if remove_near:
            np.fill_diagonal(counts, 0)
        found.append(counts)
    return found


def _entropy(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def spatial_gradient_scaling(
    maps: Sequence[np.ndarray],
    kernel_size: tuple[int, int],
    padding: int,
    displacements: Sequence[tuple[int, int]],
    histogram2d: Histogram2d,
    *,
    k: float = 5.0,
    remove_near: bool = False,
    channels: Sequence[int] | None = None,
) -> np.ndarray:
    """G of one layer (SGS, section 3.3): the maps of all batches gathered, then a loop over channels and displacements.

    Args:
        maps:          batches [N, C, H, W] of the layer's input, in host memory
        displacements: one of each pair ±d, in the order of the taps after the centre; none goes up
        channels:      a sub-sample; None: all
    """
    x = np.concatenate(maps)
    s = []
    for c in range(x.shape[1]) if channels is None else channels:
        channel = np.pad(x[:, c], ((0, 0), (padding, padding), (padding, padding)))
        of_channel = []
        for counts in channel_counts(channel, displacements, histogram2d, remove_near):
            joint = _entropy(counts) if counts.any() else 0.0
            nmi = (_entropy(counts.sum(0)) + _entropy(counts.sum(1)) - joint) / joint if joint > 0 else 0.0
            of_channel.append(k * nmi / ((k - 1) * nmi + 1))
        s.append(of_channel)
    half = np.mean(s, axis=0)
    whole = np.concatenate([half[::-1], [1.0], half]).reshape(kernel_size)
    return whole / whole.mean()
