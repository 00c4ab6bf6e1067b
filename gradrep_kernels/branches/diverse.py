"""Blocks of diverse branches: DBB's sequences, averages and kernels, with a norm in each.

Source: Diverse Branch Block (Ding et al., 2021), section 3. DyRep (dynamic.py) grows the same branches one convolution
after the other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradrep_kernels.branches.algebra import (
    CentredAverage,
    CentredConv2d,
    MultiBranch,
    add_average,
    add_centred,
    add_diagonal,
    fold,
    plain_conv,
    rounded,
)
from gradrep_kernels.branches.convert import with_blocks
from gradrep_kernels.branches.normed import check_norms
from gradrep_kernels.branches.pairs import check_pairs
from gradrep_kernels.branches.sites import Site, Where, conv_sites

__all__ = [
    "AverageBranch",
    "DiverseBranches",
    "IdentityBranch",
    "KernelBranch",
    "SequenceBranch",
    "dbb_model",
    "fresh_norm",
    "pointwise",
]

Sums = tuple[Tensor, Tensor]  # a kernel [O, I / groups, kh, kw] and a bias [O], float64


def fresh_norm(features: int, like: nn.Module | None, weight: Tensor) -> nn.BatchNorm2d:
    """Return a BatchNorm2d at its start, with the settings of `like` where that is one, where `weight` is."""
    place = {"device": weight.device, "dtype": weight.dtype}
    if not isinstance(like, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        return nn.BatchNorm2d(features, **place)
    group = {"process_group": like.process_group} if isinstance(like, nn.SyncBatchNorm) else {}
    norm = type(like)(features, like.eps, like.momentum, like.affine, like.track_running_stats, **group, **place)
    if like.weight is not None:
        norm.requires_grad_(like.weight.requires_grad)
    return norm


class IdentityConv2d(nn.Conv2d):
    """A 1 x 1 convolution whose kernel is the identity plus `weight`, which starts at 0.

    So it starts as the identity, and weight decay draws it there. Source: DBB, section 3.4, and its published code.
    """

    def __init__(self, channels: int, groups: int, device: torch.device, dtype: torch.dtype):
        super().__init__(channels, channels, 1, groups=groups, bias=False, device=device, dtype=dtype)
        nn.init.zeros_(self.weight)
        identity = torch.zeros_like(self.weight, requires_grad=False)
        add_diagonal(identity, 1.0)
        self.register_buffer("identity", identity, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight + self.identity, groups=self.groups)


def pointwise(like: nn.Conv2d, outputs: int) -> nn.Conv2d:
    """Return a 1 x 1 convolution of like's inputs, without stride and bias, drawn as nn.Conv2d draws it."""
    place = {"device": like.weight.device, "dtype": like.weight.dtype}
    conv = nn.Conv2d(like.in_channels, outputs, 1, groups=like.groups, bias=False, **place)
    return conv.requires_grad_(like.weight.requires_grad)


def _unpadded(like: nn.Conv2d) -> nn.Conv2d:
    """Return a convolution of like's kernel, stride and dilation, without padding and bias."""
    conv = nn.Conv2d(
        like.in_channels,
        like.out_channels,
        like.kernel_size,
        like.stride,
        0,
        like.dilation,
        like.groups,
        bias=False,
        device=like.weight.device,
        dtype=like.weight.dtype,
    )
    return conv.requires_grad_(like.weight.requires_grad)


class PaddedNorm(nn.Module):
    """A norm inside a sequence, and the padding of `like` behind it.

    Where `like` pads with 0, the output is padded with what the norm makes of 0 in eval mode. So the sequence is one
    convolution, also at the border. Like the published code, no gradient goes through that value.
    """

    def __init__(self, norm: nn.BatchNorm2d, like: nn.Conv2d):
        super().__init__()
        self.norm = norm
        pool = CentredAverage(like)
        self.padding, self.padding_mode = pool.padding, pool.padding_mode

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> [N, C, H + 2 rows, W + 2 columns]
        y = self.norm(x)
        if not any(self.padding):
            return y
        padded = F.pad(y, self.padding, self.padding_mode)
        if self.padding_mode != "constant":
            return padded  # The other modes repeat pixels, and a norm in eval mode acts on each of them alike.
        border = 1 - F.pad(y.new_ones(1, 1, *y.shape[2:]), self.padding)
        return torch.addcmul(padded, self.of_zero().to(y.dtype).view(1, -1, 1, 1), border)

    @torch.no_grad()
    def of_zero(self) -> Tensor:  # [C]
        norm = self.norm
        value = -norm.running_mean * (norm.running_var + norm.eps).rsqrt()
        if norm.weight is not None:
            value = value * norm.weight
        return value if norm.bias is None else value + norm.bias


class KernelBranch(nn.Module):
    """norm(conv(x)), of the kernel of `like` or of a smaller one on its centre. A block may stand for conv."""

    def __init__(self, conv: nn.Module, norm: nn.BatchNorm2d, like: nn.Conv2d):
        super().__init__()
        self.conv, self.norm, self.kernel_size = conv, norm, like.kernel_size

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def sums(self) -> Sums:
        small, shift = fold(*_sums_of(self.conv), self.norm)
        kernel = small.new_zeros(*small.shape[:2], *self.kernel_size)
        add_centred(kernel, small)
        return kernel, shift


class SequenceBranch(nn.Module):
    """norm(conv(first_norm(first(x)))), where `first` is 1 x 1 and `conv` has the kernel of `like`."""

    def __init__(self, first: nn.Conv2d, first_norm: nn.BatchNorm2d, norm: nn.BatchNorm2d, like: nn.Conv2d):
        super().__init__()
        self.first, self.first_norm, self.conv = first, PaddedNorm(first_norm, like), _unpadded(like)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.first_norm(self.first(x))))

    def sums(self) -> Sums:
        first, value = fold(*_sums_of(self.first), self.first_norm.norm)
        second, bias = _sums_of(self.conv)
        groups, (outputs, inputs, kh, kw) = self.first.groups, second.shape
        first, value = first.view(groups, -1, inputs), value.view(groups, -1)
        second = second.view(groups, outputs // groups, -1, kh, kw)
        # Every tap meets the value of the inner norm, those on the padding too.
        shift = torch.einsum("gomhw,gm->go", second, value).flatten()
        kernel = torch.einsum("gomhw,gmi->goihw", second, first).reshape(outputs, inputs, kh, kw)
        return fold(kernel, shift if bias is None else shift + bias, self.norm)


class AverageBranch(nn.Module):
    """norm(average(first_norm(first(x)))), or norm(average(x)) where `first` is None.

    `first` is 1 x 1, and the window of the average is the kernel of `like`.
    """

    def __init__(
        self, first: nn.Conv2d | None, first_norm: nn.BatchNorm2d | None, norm: nn.BatchNorm2d, like: nn.Conv2d
    ):
        super().__init__()
        self.first, self.norm, self.average = first, norm, CentredAverage(like)
        self.first_norm = None
        self.shape = (like.out_channels, like.in_channels // like.groups, *like.kernel_size)
        if first is not None:
            self.first_norm = PaddedNorm(first_norm, like)
            self.average.padding, self.average.padding_mode = (0, 0, 0, 0), "constant"

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.average(x if self.first is None else self.first_norm(self.first(x))))

    def sums(self) -> Sums:
        kernel = torch.zeros(self.shape, dtype=torch.float64, device=self.norm.running_mean.device)
        if self.first is None:
            add_average(kernel, 1.0)
            return fold(kernel, None, self.norm)
        first, value = fold(*_sums_of(self.first), self.first_norm.norm)
        kernel += first / (self.shape[2] * self.shape[3])
        return fold(kernel, value, self.norm)


class IdentityBranch(nn.Module):
    """norm(x)"""

    def __init__(self, norm: nn.BatchNorm2d, like: nn.Conv2d):
        super().__init__()
        self.norm, self.shape = norm, (like.out_channels, like.in_channels // like.groups, *like.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def sums(self) -> Sums:
        kernel = torch.zeros(self.shape, dtype=torch.float64, device=self.norm.running_mean.device)
        add_diagonal(kernel, 1.0)
        return fold(kernel, None, self.norm)


Branch = KernelBranch | SequenceBranch | AverageBranch | IdentityBranch


def _sums_of(conv: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return kernel and bias of a convolution, or of the block in its place, float64."""
    if isinstance(conv, DiverseBranches):
        return conv.sums()
    weight = conv.weight + conv.identity if isinstance(conv, IdentityConv2d) else conv.weight
    return weight.double(), None if conv.bias is None else conv.bias.double()


class DiverseBranches(MultiBranch):
    """The sum of branches, each with its norm at its end. `branches` has "kxk", the branch of the convolution itself.

    [N, I, H, W] -> [N, O, H', W']
    """

    def __init__(self, branches: Mapping[str, Branch], training: bool):
        super().__init__()
        self.branches = nn.ModuleDict(branches)
        self.train(training)

    def forward(self, x: Tensor) -> Tensor:
        return sum(branch(x) for branch in self.branches.values())

    @property
    def plain(self) -> nn.Conv2d:
        """The convolution that the block stands for, with a kernel of its own."""
        conv = self.branches["kxk"].conv
        return conv.plain if isinstance(conv, DiverseBranches) else conv

    @torch.no_grad()
    def sums(self, leave_out: tuple[str, ...] = ()) -> Sums:
        """Return kernel and bias of all branches, but of those that `leave_out` names."""
        weight = self.plain.weight
        kernel = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
        bias = kernel.new_zeros(len(weight))
        for name, branch in self.branches.items():
            if name not in leave_out:
                its_kernel, shift = branch.sums()
                kernel += its_kernel
                bias += shift
        return kernel, bias

    @torch.no_grad()
    def merged(self) -> nn.Conv2d:
        kernel, bias = self.sums()
        weight = rounded(kernel, self.plain.weight)
        conv = plain_conv(self.plain, weight, nn.Parameter(bias.to(weight.dtype), weight.requires_grad))
        return conv.train(self.training)


class DiverseBranchBlock(DiverseBranches):
    """DBB's block, which stands for conv and norm.

    norm(conv(x)), 1 x 1 and norm, 1 x 1 with norm before k x k with norm, and 1 x 1 with norm before an average with
    norm. The first branch takes over the weight and bias of conv, and the norm. The last has no 1 x 1 where conv is
    depthwise.
    """

    holds_norm = True

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d):
        inputs, outputs = conv.in_channels, conv.out_channels
        first = IdentityConv2d(inputs, conv.groups, conv.weight.device, conv.weight.dtype)
        first.requires_grad_(conv.weight.requires_grad)
        is_depthwise = inputs == outputs == conv.groups
        before_average = None if is_depthwise else pointwise(conv, outputs)
        before_average_norm = None if is_depthwise else copy.deepcopy(norm)
        branches = {
            "kxk": KernelBranch(plain_conv(conv, conv.weight, conv.bias), norm, conv),
            "1x1": KernelBranch(CentredConv2d(conv, (1, 1)), copy.deepcopy(norm), conv),
            "1x1_kxk": SequenceBranch(first, fresh_norm(inputs, norm, conv.weight), copy.deepcopy(norm), conv),
            "1x1_average": AverageBranch(before_average, before_average_norm, copy.deepcopy(norm), conv),
        }
        super().__init__(branches, conv.training)


def dbb_model(model: nn.Module, *, where: Where | None = None) -> nn.Module:
    """Return a new model in DBB's training form (Ding et al., 2021, Figure 2).

    A block is k x k + BN, 1 x 1 + BN, 1 x 1 + BN + k x k + BN, and 1 x 1 + BN + average + BN. It stands in place of
    each conv that `csla.hyper_search_model` would replace, and of its BatchNorm2d. `where` chooses convolutions as
    there. The 1 x 1 before k x k has as many outputs as inputs and starts as the identity. Inner norms pad with their
    value of 0, so that the merged convolution is exact for every stride, dilation, group count and padding mode. A
    depthwise convolution has no 1 x 1 before its average. `csla.merge` gives the deployed form. Random numbers and
    names are as in `csla.hyper_search_model`. `model` itself is not changed.

    Raises ValueError if such a conv is followed by another norm than a BatchNorm2d with running statistics, or if that
    norm is not the only consumer of its output.
    """

    def blocks(model: nn.Module) -> Iterator[tuple[Site, DiverseBranchBlock]]:
        sites = conv_sites(model, where)
        check_norms(sites)
        check_pairs(model, sites, None, "a block that takes its norm along")
        for site in sites:
            yield site, DiverseBranchBlock(site.conv, site.norm)

    return with_blocks(model, blocks)
