"""Feature maps for spatial gradient scaling, and a numpy oracle in float64.

The oracle shares no code and no shortcut with the package.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass(frozen=True)
class Map:
    """One convolution input. Continuous values: on a bin's edge, float32 and float64 may differ in the bin."""

    desc: str
    shape: tuple[int, int, int, int]
    kernel_size: tuple[int, int] = (3, 3)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    k: float = 5.0
    kind: str = "smooth"
    dtype: torch.dtype = torch.float32
    seed: int = field(default=0, compare=False)

    def tensor(self) -> torch.Tensor:
        return torch.from_numpy(make_map(self.kind, self.shape, self.seed)).to(self.dtype)


def make_map(kind: str, shape: tuple[int, int, int, int], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    if kind == "noise":
        return x
    x = x + np.roll(x, 1, -1) + 0.7 * np.roll(x, 1, -2) + 0.4 * np.roll(x, (1, 1), (-2, -1))
    if kind == "relu":
        return np.maximum(x, 0)
    if kind == "unlike channels":  # scale, offset and sparsity differ by channel
        for c in range(shape[1]):
            x[:, c] = np.maximum(x[:, c], -1 + c) * 10.0 ** (c - 1) + c
    if kind == "dead channel":
        x = np.maximum(x, 0)
        x[:, 1] = 0
    if kind == "constant channel":
        x[:, 1] = 2.5
    return x


MAPS = (
    Map("smooth", (4, 3, 12, 13)),
    Map("relu", (4, 3, 12, 12), kind="relu"),
    Map("3x5 kernel", (4, 2, 11, 14), kernel_size=(3, 5), padding=(1, 2)),
    Map("5x3 kernel, padding (0, 1)", (4, 2, 11, 14), kernel_size=(5, 3), padding=(0, 1)),
    Map("padding (0, 1): the published script swaps rows and columns", (5, 3, 6, 17), padding=(0, 1)),
    Map("dilation 2: the published script ignores it", (4, 2, 15, 12), padding=(2, 2), dilation=(2, 2)),
    Map("dilation (1, 3), no padding", (4, 2, 10, 16), padding=(0, 0), dilation=(1, 3)),
    Map("unlike channels", (4, 4, 12, 12), kind="unlike channels"),
    Map("dead channel", (4, 3, 10, 10), kind="dead channel"),
    Map("constant channel, no padding: undefined there", (4, 3, 10, 10), padding=(0, 0), kind="constant channel"),
    Map("bf16", (4, 3, 12, 12), kind="noise", dtype=torch.bfloat16, seed=4),
    Map("fp16", (4, 3, 12, 12), dtype=torch.float16, seed=5),
    Map("float64", (3, 2, 9, 9), dtype=torch.float64),
    Map("7x7 kernel", (3, 2, 14, 13), kernel_size=(7, 7), padding=(3, 3), kind="relu"),
    Map("k = 2", (4, 2, 9, 9), k=2.0),
    Map("k = 1, one image, one channel", (1, 1, 16, 16), k=1.0),
    Map("20 images of 4 x 4: bins differ between displacements", (20, 3, 4, 4)),
)


def oracle_pairs(
    x: np.ndarray, displacement: tuple[int, int], padding: tuple[int, int], remove_near: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(p, q) of each channel, pooled over the images."""
    x = np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    rows, columns = x.shape[2:]
    i, j = (grid.ravel() for grid in np.mgrid[:rows, :columns])
    i2, j2 = i + displacement[0], j + displacement[1]
    inside = (i2 >= 0) & (i2 < rows) & (j2 >= 0) & (j2 < columns)
    pairs = []
    for c in range(x.shape[1]):
        p, q = x[:, c, i[inside], j[inside]].ravel(), x[:, c, i2[inside], j2[inside]].ravel()
        if remove_near:
            p, q = p[(p != 0) & (q != 0)], q[(p != 0) & (q != 0)]
        pairs.append((p, q))
    return pairs


def oracle_bins(values: np.ndarray, bins: int) -> np.ndarray:
    lo, hi = values.min(), values.max()
    return (
        np.zeros(len(values), int)
        if lo == hi
        else np.minimum(((values - lo) * (bins / (hi - lo))).astype(int), bins - 1)
    )


def oracle_counts(p: np.ndarray, q: np.ndarray, bins: int, remove_near: bool) -> np.ndarray:
    counts = np.zeros((bins, bins), int)
    if len(p):
        np.add.at(counts, (oracle_bins(p, bins), oracle_bins(q, bins)), 1)
    if remove_near:
        np.fill_diagonal(counts, 0)
    return counts


def oracle_nmi(counts: np.ndarray) -> float:
    def entropy(c):
        f = c[c > 0] / counts.sum()
        return -(f * np.log(f)).sum()

    joint = entropy(counts.ravel()) if counts.sum() else 0.0
    return (entropy(counts.sum(0)) + entropy(counts.sum(1)) - joint) / joint if joint else np.nan


def oracle_scaling(x: np.ndarray, case: Map, remove_near: bool, correlation: bool = False) -> np.ndarray:
    """G, with every displacement of the kernel computed on its own; ones where it is undefined."""
    kh, kw = case.kernel_size
    s = np.ones((kh, kw))
    for a in range(kh):
        for b in range(kw):
            d = (a - kh // 2) * case.dilation[0], (b - kw // 2) * case.dilation[1]
            if d == (0, 0):
                continue
            values = []
            for p, q in oracle_pairs(x, d, case.padding, remove_near):
                if correlation:
                    value = abs(np.corrcoef(p, q)[0, 1]) if len(p) and np.ptp(p) and np.ptp(q) else np.nan
                else:
                    bins = 1 + int(np.ceil(np.log2(len(p)))) if len(p) > 1 else 1
                    value = oracle_nmi(oracle_counts(p, q, bins, remove_near))
                values.append(case.k * value / ((case.k - 1) * value + 1))
            values = np.array(values)
            if np.isnan(values).all():
                return np.ones((kh, kw))
            s[a, b] = np.nan_to_num(values).mean() if remove_near else np.nanmean(values)
    return s / s.mean()
