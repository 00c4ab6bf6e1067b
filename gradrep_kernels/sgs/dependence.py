"""The formulas from counts to a scaling: counts -> dependence -> S -> G.

Source: Detkov et al., "Reparameterization through Spatial Gradient Scaling" (ICLR 2023), section 3.3, Eq. 6-8.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from gradrep_kernels.ops.backends import implementation
from gradrep_kernels.ops.reference.pair_rule import padded, pair_views
from gradrep_kernels.sgs.histograms import check_map, count_pairs, sturges_bins
from gradrep_kernels.sgs.taps import flat, half_displacements, resolve_padding, scalable_kernel, two_ints
from gradrep_kernels.sgs.transfers import on_device, on_host

_ROUNDING = 1e-12  # relative error allowed: sums of some thousand float64 terms are exact to about 1e-13


def normalized_mutual_information(counts: Tensor) -> Tensor:
    """(H(P) + H(Q) - H(P, Q)) / H(P, Q) of joint histograms (Eq. 7).

    Args:
        counts: [..., B, B]

    Returns:
        float64 [...], in [0, 1]. NaN where it is undefined: no counts, or all of them in one cell (H(P, Q) = 0). Values
        below 1e-12 are the rounding error of the three sums and become 0.

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
    """Sum 1, p, q, p², q² and pq over the pairs, with p and q measured from the lower end of their range.

    Arguments are as the op `pair_ranges` takes and gives them.  # -> [C, D, 6] float64
    """
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
    """|Pearson's r| from `pair_moments`, NaN where a side does not vary.

    [..., 6] gives float64 [...], in [0, 1].
    """
    _, p, q, pp, qq, pq = (moments / moments[..., :1]).unbind(-1)
    variances = []
    for mean, square in ((p, pp), (q, qq)):
        variance = square - mean * mean
        variances.append(torch.where(variance > _ROUNDING * square, variance, torch.nan))
    return ((pq - p * q).abs() / (variances[0] * variances[1]).sqrt()).clamp(max=1)


def k_transform(dependence: Tensor, k: float) -> Tensor:
    """Eq. 8: k s / ((k - 1) s + 1), element by element. 0 and 1 stay, and k = 1 changes nothing."""
    return k * dependence / ((k - 1) * dependence + 1)


def spatial_dependence(dependence: Tensor, kernel_size: Sequence[int], k: float, remove_near: bool) -> Tensor | None:
    """Return S of one layer from the dependence at half of its displacements.

    Args:
        dependence:  [C, D] in [0, 1], NaN where undefined; D displacements as in `half_displacements`
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
    """Return G = S / mean(S).  # float32 [kh, kw]"""
    return (s / s.mean()).float()


def check_k(k: float) -> float:
    """Return k as a float, or raise ValueError if it is not positive and finite."""
    k = float(k)
    if not 0 < k < float("inf"):
        raise ValueError(f"k must be positive and finite, got {k}")
    return k


def not_finite(ranges: Tensor) -> Tensor:
    """Whether a value that is not finite is among the pairs.  # bool []

    It makes an end NaN or infinite. Where no pair is left the ends are (+inf, -inf).
    """
    return ~((ranges[..., 0] > -torch.inf) & (ranges[..., 1] < torch.inf)).all()


def spatial_gradient_scaling(
    x: Tensor,
    kernel_size: int | Sequence[int],
    *,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    k: float = 5.0,
    remove_near: bool = False,
) -> Tensor:
    """Return G of a convolution from one input map.

    It is the normalised mutual information of the map at each tap's displacement, k-transformed, with mean 1.

    Args:
        x:           [N, C, H, W], the input of the convolution, float32, float64, bfloat16 or float16
        kernel_size: odd and larger than 1, a number or (kh, kw)
        padding:     the convolution's: a number, (rows, columns), 'same' or 'valid'; zeros whatever its padding mode
        dilation:    the convolution's: a number or (rows, columns)
        k:           of the transform (Eq. 8), positive; 5 is the paper's
        remove_near: the paper's ImageNet setting: pairs with a zero and pairs of equal bin numbers do not count

    Returns:
        G float32 [kh, kw] with mean 1. It is ones where it is undefined (no pairs, constant maps, independent
        neighbours) and, with a warning, where the map is not finite.

    Raises:
        TypeError, ValueError: as `pair_ranges`; kernels, padding, dilation or k that no convolution or Eq. 8 has.
    """
    x, kernel_size = check_map(x), two_ints("kernel_size", kernel_size, 1)
    reason = scalable_kernel(kernel_size)
    if reason:
        raise ValueError(f"kernel_size: {reason}")
    dilation, k = two_ints("dilation", dilation, 1), check_k(k)
    rows_columns, remove_near = list(resolve_padding(padding, kernel_size, dilation)), bool(remove_near)
    displacements = flat(half_displacements(kernel_size, dilation))
    ranges, n = implementation("pair_ranges", x.device.type)(x, displacements, rows_columns, remove_near)
    bins = sturges_bins(x, displacements, rows_columns, n if remove_near else None)
    counts = count_pairs(x, displacements, ranges, bins, rows_columns, remove_near)
    # The first wait for the device, except that remove_near asks it how many pairs are left.
    nmi, is_not_finite = on_host([normalized_mutual_information(counts), not_finite(ranges).double()])
    g = torch.ones(kernel_size, device="cpu")
    if is_not_finite:
        warnings.warn("x is not finite: its spatial gradient scaling is left at ones", RuntimeWarning, stacklevel=2)
    elif (s := spatial_dependence(nmi, kernel_size, k, remove_near)) is not None:
        g = normalize(s)
    return on_device([g], x.device)[0]


def alpha_beta_scaling(alpha: float, beta: float) -> Tensor:
    """Return the 3 x 3 scaling of the paper's grid search (Figure 7), float32 [3, 3] with mean 1.

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
