"""How widely the weights of a kernel spread: as a whole, at its centre, around it, and after each step of deployment.

Source: RepOptimizers (Ding et al., 2023), section 4.4, Table 8, and Appendix C, Table 11.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradrep_kernels.branches.algebra import MultiBranch, fold
from gradrep_kernels.branches.sites import convs_and_siblings, is_kxk

__all__ = ["KernelHistory", "KernelSpread", "kernel_histories", "kernel_spread", "largest_over_std"]


class KernelSpread(NamedTuple):
    """Standard deviations of the weights of a kernel, over their number (not one less)."""

    whole: float
    centre: float
    """Of the tap in the middle, over all pairs of channels."""
    surround: float
    """Of all other taps."""


def kernel_spread(weight: Tensor) -> KernelSpread:
    """Return the standard deviations of a kernel [O, I, kh, kw], in float64.

    Raises ValueError unless both sides are odd and one is above 1, for there is a centre then and something around it.
    """
    if weight.ndim != 4 or not weight.numel():
        raise ValueError(f"weight must be a kernel [O, I, kh, kw] with channels, got {list(weight.shape)}")
    kh, kw = weight.shape[2:]
    if kh % 2 == 0 or kw % 2 == 0 or kh * kw == 1:
        raise ValueError(f"weight must have odd sides, one of them above 1, got {kh} x {kw}")
    taps = weight.detach().double().flatten(2)
    middle = kh * kw // 2
    around = torch.cat([taps[:, :, :middle], taps[:, :, middle + 1 :]], 2)
    return KernelSpread(*(float(part.std(correction=0)) for part in (taps, taps[:, :, middle], around)))


def largest_over_std(weight: Tensor) -> float:
    """Return max |w| over the standard deviation of the weights, 0 where they are all 0.

    A step of a symmetric grid is max |w| over its steps, so that a large ratio leaves most weights few of them.
    """
    wide = weight.detach().double()
    largest = float(wide.abs().max())
    return largest / float(wide.std(correction=0)) if largest else 0.0


class KernelHistory(NamedTuple):
    """A k x k kernel [O, I, kh, kw] from training to deployment. A step that there is not is None."""

    trained: Tensor | None
    """As trained. Of a block of branches it is that of its k x k branch, None where no branch has that shape."""
    fused: Tensor | None
    """With the norm behind it folded in. Of a block of branches it is the norm of that branch alone."""
    added: Tensor | None
    """With all branches added, and all norms folded in."""

    def steps(self) -> dict[str, Tensor]:
        """The kernels that there are, by the names of their fields."""
        kernels = {"trained": self.trained, "fused": self.fused, "added": self.added}
        return {name: kernel for name, kernel in kernels.items() if kernel is not None}

    @property
    def deployed(self) -> Tensor:
        """The kernel of the deployed network."""
        return list(self.steps().values())[-1]


def kernel_histories(model: nn.Module, deployed: nn.Module) -> dict[str, KernelHistory]:
    """Return {name: history} of each convolution of `deployed` with odd sides above 1, in module order.

    Args:
        model: as trained, plain or with blocks of branches of any kind.
        deployed: what `csla.merge(model, fold_norm=True)` gave.

    Kernels are tensors of the models, or new ones. Neither model is changed.
    """
    histories = {}
    for name, conv in deployed.named_modules():
        if type(conv) is not nn.Conv2d or not is_kxk(conv.kernel_size):
            continue
        before, kernel = model.get_submodule(name), conv.weight.detach()
        if isinstance(before, MultiBranch):
            histories[name] = _of_block(before, conv)
        else:
            trained = before.weight.detach()
            histories[name] = KernelHistory(trained, None if torch.equal(trained, kernel) else kernel, None)
    return histories


def _of_block(block: MultiBranch, deployed: nn.Conv2d) -> KernelHistory:
    """The first convolution of the deployed shape is the k x k branch. Blocks register further ones behind it."""
    added = deployed.weight.detach()
    convs = (module for module in block.modules() if isinstance(module, nn.Conv2d))
    main = next((conv for conv in convs if conv.weight.shape == added.shape), None)
    if main is None:
        return KernelHistory(None, None, added)
    norm = _norm_of(block, main)
    fused = None if norm is None else fold(main.weight, main.bias, norm)[0].to(added.dtype)
    return KernelHistory(main.weight.detach(), fused, added)


def _norm_of(block: MultiBranch, conv: nn.Conv2d) -> nn.BatchNorm2d | None:
    """The norm of one branch: at the same place of a list `norms` as the conv in `convs`, or its next sibling."""
    convs, norms = getattr(block, "convs", None), getattr(block, "norms", None)
    if isinstance(convs, nn.ModuleList) and isinstance(norms, nn.ModuleList) and conv in list(convs):
        return norms[list(convs).index(conv)]
    after = next((sibling.next for sibling in convs_and_siblings(block) if sibling.conv is conv), None)
    is_norm = isinstance(after, (nn.BatchNorm2d, nn.SyncBatchNorm)) and after.num_features == conv.out_channels
    return after if is_norm else None
