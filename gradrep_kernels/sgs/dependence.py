"""From a feature map to a spatial gradient scaling: pairs -> counts -> dependence -> S -> G.

Source: Detkov et al., "Reparameterization through Spatial Gradient Scaling" (ICLR 2023), section 3.3, Eq. 6-8.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from gradrep_kernels.ops.backends import implementation
from gradrep_kernels.ops.reference.pair_rule import MAX_BINS, compute_dtype, padded, pair_views, sturges

_MAP_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_ROUNDING = 1e-12  # relative; sums of some thousand float64 terms are exact to about 1e-13


# -- arguments ---------------------------------------------------------------------------------------------------------


def _check_map(x: Tensor) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor [N, C, H, W], got {type(x).__name__}")
    if x.dtype not in _MAP_DTYPES:
        raise TypeError(f"x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.dim() != 4 or x.numel() == 0:
        raise ValueError(f"x must be a non-empty map [N, C, H, W], got {list(x.shape)}")
    return x.detach()


def two_ints(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    """A number or a pair of numbers (rows, columns), none below `least`."""
    try:
        pair = tuple(operator.index(v) for v in value) if isinstance(value, Iterable) else (operator.index(value),) * 2
    except TypeError:
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}") from None
    if len(pair) != 2 or min(pair) < least:
        raise ValueError(f"{name} must be an int or a pair of ints, none below {least}, got {value!r}")
    return pair


def _flat(displacements: Iterable[Sequence[int]]) -> list[int]:
    try:
        pairs = [tuple(operator.index(v) for v in displacement) for displacement in displacements]
    except TypeError:
        raise TypeError(f"displacements must be pairs of ints (rows, columns), got {displacements!r}") from None
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"displacements must be one or more pairs of ints (rows, columns), got {displacements!r}")
    return [v for pair in pairs for v in pair]


def scalable_kernel(kernel_size: Sequence[int]) -> str | None:
    """Why a kernel of this size has no spatial scaling, or None if it has one."""
    kh, kw = kernel_size
    if kh % 2 == 0 or kw % 2 == 0:
        return f"{kh} x {kw} kernel: both sides must be odd"
    if kh == 1 or kw == 1:
        return f"{kh} x {kw} kernel: both sides must be larger than 1"
    return None


def resolve_padding(
    padding: int | str | Sequence[int], kernel_size: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """A convolution's padding as (rows, columns); 'same' and 'valid' as torch.nn.Conv2d has them (odd kernels: equal on both sides)."""
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"padding must be a number, a pair, 'same' or 'valid', got {padding!r}")
        return (0, 0) if padding == "valid" else tuple(d * (k // 2) for d, k in zip(dilation, kernel_size))
    return two_ints("padding", padding, 0)


# -- pairs and counts --------------------------------------------------------------------------------------------------


def pair_ranges(
    x: Tensor, displacements: Iterable[Sequence[int]], *, padding: int | Sequence[int] = 0, remove_near: bool = False
) -> tuple[Tensor, Tensor]:
    """Range of both sides of all pairs (p, q = p + displacement) of each channel, pooled over the images.

    Args:
        x:             [N, C, H, W], float32, float64, bfloat16 or float16, any strides; not changed
        displacements: D pairs (rows, columns), any sign; see `half_displacements`
        padding:       zeros around each image, a number or (rows, columns)
        remove_near:   drop pairs with a zero on either side

    Returns:
        ranges [C, D, 2, 2] = (p | q, lo | hi), float64 for a float64 map, else float32; (+inf, -inf) where no pair is
               left, NaN where a NaN is among the values
        n      [C, D] int64, how many pairs

    Raises:
        TypeError, ValueError: another dtype, an empty map, no displacement, negative padding.
    """
    x, flat, rows_columns = _check_map(x), _flat(displacements), list(two_ints("padding", padding, 0))
    return implementation("pair_ranges", x.device.type)(x, flat, rows_columns, bool(remove_near))


def _check_bins(bins: int | str | Tensor, channels: int, pairs: int, device: torch.device) -> Tensor | None:
    """[C, D] int32, or None for 'sturges'."""
    if isinstance(bins, str):
        if bins != "sturges":
            raise ValueError(f"bins must be an int, 'sturges' or an integer Tensor [D] or [C, D], got {bins!r}")
        return None
    if not isinstance(bins, Tensor):
        try:
            bins = torch.tensor([operator.index(bins)])
        except TypeError:
            raise TypeError(
                f"bins must be an int, 'sturges' or an integer Tensor [D] or [C, D], got {type(bins).__name__}"
            ) from None
    elif bins.dtype == torch.bool or bins.is_floating_point() or bins.is_complex():
        raise TypeError(f"bins must be integers, got {bins.dtype}")
    elif tuple(bins.shape) not in ((pairs,), (channels, pairs)):
        raise ValueError(f"bins must have shape [{pairs}] or [{channels}, {pairs}], got {list(bins.shape)}")
    if not 1 <= int(bins.min()) <= int(bins.max()) <= MAX_BINS:
        raise ValueError(f"bins must be between 1 and {MAX_BINS}, got {int(bins.min())} to {int(bins.max())}")
    return bins.to(device=device, dtype=torch.int32).expand(channels, pairs).contiguous()


def joint_histogram(
    x: Tensor,
    displacements: Iterable[Sequence[int]],
    bins: int | str | Tensor,
    *,
    padding: int | Sequence[int] = 0,
    remove_near: bool = False,
    ranges: Tensor | None = None,
) -> Tensor:
    """How often a pixel in bin p has its displaced neighbour in bin q, for each channel and displacement.

    Args:
        x, displacements, padding: as in `pair_ranges`
        bins:        per side: an int, an integer Tensor [D] or [C, D], or 'sturges' for 1 + ceil(log2 n) of n pairs
        remove_near: drop pairs with a zero on either side, and pairs that fall into bins of the same number
        ranges:      [C, D, 2, 2] as `pair_ranges` gives them, if the bins are to span other data than `x`; values outside
                     fall into the end bins

    Returns:
        counts [C, D, B, B] int64 with B the largest number of bins; unused cells are 0. The top bin is closed, as in
        numpy.histogram2d. A NaN falls into bin 0. The rule in full: gradrep_kernels/ops/reference/pair_rule.py.

    Raises:
        TypeError, ValueError: as `pair_ranges`; bins below 1 or of another shape; ranges of another shape.
    """
    x, flat, rows_columns = _check_map(x), _flat(displacements), list(two_ints("padding", padding, 0))
    channels, pairs = x.shape[1], len(flat) // 2
    bins = _check_bins(bins, channels, pairs, x.device)
    if ranges is not None:
        if not isinstance(ranges, Tensor):
            raise TypeError(f"ranges must be a Tensor [C, D, 2, 2], got {type(ranges).__name__}")
        if tuple(ranges.shape) != (channels, pairs, 2, 2) or not ranges.is_floating_point():
            raise ValueError(
                f"ranges must be floating [{channels}, {pairs}, 2, 2], got {ranges.dtype} {list(ranges.shape)}"
            )
    if ranges is None or bins is None:
        own_ranges, n = implementation("pair_ranges", x.device.type)(x, flat, rows_columns, bool(remove_near))
        ranges = own_ranges if ranges is None else ranges
        bins = sturges(n) if bins is None else bins
    ranges = ranges.detach().to(device=x.device, dtype=compute_dtype(x.dtype)).contiguous()
    return implementation("joint_histogram", x.device.type)(
        x, flat, ranges, bins, int(bins.max()), rows_columns, bool(remove_near)
    )


def half_displacements(kernel_size: Sequence[int], dilation: Sequence[int] = (1, 1)) -> list[tuple[int, int]]:
    """One of each pair ±d of the taps of an odd kernel, times the dilation: 4 for 3x3, 12 for 5x5, 24 for 7x7.

    In the order of the taps after the centre, row by row. S is point-symmetric, so these are enough.
    """
    (kh, kw), (rows, columns) = kernel_size, dilation
    taps = [(i, j) for i in range(-(kh // 2), kh // 2 + 1) for j in range(-(kw // 2), kw // 2 + 1)]
    return [(i * rows, j * columns) for i, j in taps[len(taps) // 2 + 1 :]]


# -- dependence --------------------------------------------------------------------------------------------------------


def normalized_mutual_information(counts: Tensor) -> Tensor:
    """(H(P) + H(Q) - H(P, Q)) / H(P, Q) of joint histograms (Eq. 7)  # [..., B, B] -> float64 [...], in [0, 1]

    NaN where it is undefined: no counts, or all of them in one cell (H(P, Q) = 0). Values below 1e-12 are the rounding
    error of the three sums and become 0.

    Raises:
        TypeError, ValueError: not a Tensor, or the last two dimensions are not equal.
    """
    if not isinstance(counts, Tensor):
        raise TypeError(f"counts must be a Tensor [..., B, B], got {type(counts).__name__}")
    if counts.dim() < 2 or counts.shape[-1] != counts.shape[-2]:
        raise ValueError(f"counts must have shape [..., B, B], got {list(counts.shape)}")
    joint = counts.double()
    joint = joint / joint.sum((-2, -1), keepdim=True)
    h_p, h_q = (torch.special.entr(joint.sum(dim)).sum(-1) for dim in (-1, -2))
    h_pq = torch.special.entr(joint).sum((-2, -1))
    nmi = (h_p + h_q - h_pq) / h_pq
    return torch.where(nmi < _ROUNDING, torch.zeros_like(nmi), nmi).clamp(max=1)


def pair_moments(x: Tensor, displacements: list[int], ranges: Tensor, padding: list[int], remove_near: bool) -> Tensor:
    """n and the sums of p, q, p², q², pq over the pairs, p and q measured from the lower end of their range  # [C, D, 6] float64"""
    maps, sums = padded(x, padding), []
    for d, (di, dj) in enumerate(zip(displacements[::2], displacements[1::2])):
        p, q = pair_views(maps, di, dj)
        keep = (p != 0) & (q != 0) if remove_near else torch.ones_like(p, dtype=torch.bool)
        p, q = (((side.double() - ranges[:, d, s, 0].double().view(-1, 1, 1)) * keep) for s, side in enumerate((p, q)))
        sums.append(
            torch.stack([moment.sum((0, 2, 3)) for moment in (keep.double(), p, q, p * p, q * q, p * q)], dim=-1)
        )
    return torch.stack(sums, dim=1)


def absolute_correlation(moments: Tensor) -> Tensor:
    """|Pearson's r| from `pair_moments`  # [..., 6] -> float64 [...], in [0, 1]; NaN where a side does not vary"""
    _, p, q, pp, qq, pq = (moments / moments[..., :1]).unbind(-1)
    variances = []
    for mean, square in ((p, pp), (q, qq)):
        variance = square - mean * mean
        variances.append(torch.where(variance > _ROUNDING * square, variance, torch.nan))
    return ((pq - p * q).abs() / (variances[0] * variances[1]).sqrt()).clamp(max=1)


def k_transform(dependence: Tensor, k: float) -> Tensor:
    """Eq. 8: k s / ((k - 1) s + 1), element by element; 0 and 1 stay, k = 1 changes nothing."""
    return k * dependence / ((k - 1) * dependence + 1)


def spatial_dependence(dependence: Tensor, kernel_size: Sequence[int], k: float, remove_near: bool) -> Tensor | None:
    """S of one layer from the dependence of its half displacements.

    Args:
        dependence:  [C, D] in [0, 1], NaN where undefined; D as in `half_displacements`
        kernel_size: (kh, kw), both odd
        remove_near: an undefined channel counts as 0 instead of being left out of the mean

    Returns:
        S [kh, kw] float64, 1 at the centre, or None where some displacement is undefined in every channel or all are 0.
    """
    s = k_transform(dependence.double(), k)
    if bool(s.isnan().all(0).any()):
        return None
    half = s.nan_to_num(nan=0.0).mean(0) if remove_near else s.nanmean(0)
    if not bool((half > 0).any()):
        return None
    return torch.cat([half.flip(0), half.new_ones(1), half]).view(*kernel_size)


def normalize(s: Tensor) -> Tensor:
    """G = S / mean(S)  # float32 [kh, kw]"""
    return (s / s.mean()).float()


def check_k(k: float) -> float:
    k = float(k)
    if not 0 < k < float("inf"):
        raise ValueError(f"k must be positive and finite, got {k}")
    return k


def not_finite(ranges: Tensor, n: Tensor) -> Tensor:
    """Whether a value that is not finite is among the pairs  # bool []"""
    return (~torch.isfinite(ranges) & (n > 0)[..., None, None]).any()


def spatial_gradient_scaling(
    x: Tensor,
    kernel_size: int | Sequence[int],
    *,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    k: float = 5.0,
    remove_near: bool = False,
) -> Tensor:
    """G of a convolution from one input map: its normalised mutual information at each tap's displacement, k-transformed.

    Args:
        x:           [N, C, H, W], the input of the convolution, float32, float64, bfloat16 or float16
        kernel_size: odd and larger than 1, a number or (kh, kw)
        padding:     the convolution's: a number, (rows, columns), 'same' or 'valid'; zeros whatever its padding mode
        dilation:    the convolution's: a number or (rows, columns)
        k:           of the transform (Eq. 8), positive; 5 is the paper's
        remove_near: the paper's ImageNet setting: pairs with a zero and pairs of equal bin numbers do not count

    Returns:
        G float32 [kh, kw] with mean 1; ones where it is undefined (no pairs, constant maps, independent neighbours) and,
        with a warning, where the map is not finite.

    Raises:
        TypeError, ValueError: as `pair_ranges`; kernels, padding, dilation or k that no convolution or Eq. 8 has.
    """
    x, kernel_size = _check_map(x), two_ints("kernel_size", kernel_size, 1)
    reason = scalable_kernel(kernel_size)
    if reason:
        raise ValueError(f"kernel_size: {reason}")
    dilation, k = two_ints("dilation", dilation, 1), check_k(k)
    rows_columns = resolve_padding(padding, kernel_size, dilation)
    displacements = half_displacements(kernel_size, dilation)
    ranges, n = pair_ranges(x, displacements, padding=rows_columns, remove_near=remove_near)
    ones = torch.ones(kernel_size, device=x.device)
    if bool(not_finite(ranges, n)):
        warnings.warn("x is not finite: its spatial gradient scaling is left at ones", RuntimeWarning, stacklevel=2)
        return ones
    counts = joint_histogram(x, displacements, sturges(n), padding=rows_columns, remove_near=remove_near, ranges=ranges)
    s = spatial_dependence(normalized_mutual_information(counts), kernel_size, k, remove_near)
    return ones if s is None else normalize(s)


def alpha_beta_scaling(alpha: float, beta: float) -> Tensor:
    """The 3 x 3 scaling of the paper's grid search (Figure 7), float32 [3, 3] with mean 1.

    Args:
        alpha: centre over edges, positive
        beta:  centre over corners, positive

    Raises:
        ValueError: alpha or beta not positive and finite.
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0 < float(value) < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {value}")
    edge, corner = 1 / float(alpha), 1 / float(beta)
    scaling = torch.tensor([[corner, edge, corner], [edge, 1, edge], [corner, edge, corner]], dtype=torch.float64)
    return (scaling * (9 / (1 + 4 * edge + 4 * corner))).float()
