"""Put blocks into a copy of a model, and merge any blocks back into plain convolutions.

Both know a block by the interface `MultiBranch` alone. A new kind of block needs a file with its class and a function
that calls `with_blocks`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

from torch import nn

from gradrep_kernels.branches.algebra import MultiBranch, fold, rounded
from gradrep_kernels.branches.sites import LOGGER, Site, convs_and_siblings, replace, unwrap

__all__ = ["merge", "with_blocks"]


def with_blocks(model: nn.Module, make_blocks: Callable[[nn.Module], Iterable[tuple[Site, MultiBranch]]]) -> nn.Module:
    """Return a copy of `model` in which blocks stand in the place of convolutions.

    Args:
        make_blocks: called once with the copy, gives each of its sites that is replaced, and the block. A block that
            holds the norm of its site leaves an nn.Identity in the norm's place.

    A DDP or torch.compile wrapper is taken off. Hooks on a replaced convolution do not come along.
    """
    model = copy.deepcopy(unwrap(model))
    new: dict[nn.Module, nn.Module] = {}
    for site, block in make_blocks(model):
        new[site.conv] = block
        if block.holds_norm:
            new[site.norm] = nn.Identity().train(site.norm.training)
    replace(model, new)
    return model


def merge(model: nn.Module, fold_norm: bool = False) -> nn.Module:
    """Return a new model with a plain nn.Conv2d in place of each multi-branch block.

    Blocks are those of Hyper-Search, CSLA, RepVGG and ACB models.

    Args:
        fold_norm: for deployment: also fold a BatchNorm2d into the nn.Conv2d whose next sibling it is. An nn.Identity
            takes its place, and the outputs are those of eval mode. The norm must be called on the conv's output.
            Norms without running statistics, of other kinds or shared are left and logged (level INFO).

    Sums are formed in float64 and rounded once to the weight's dtype. `model` itself is not changed.
    """
    model = copy.deepcopy(unwrap(model))
    if isinstance(model, MultiBranch):
        return model.merged()
    replace(model, {module: module.merged() for module in model.modules() if isinstance(module, MultiBranch)})
    if fold_norm:
        _fold_norms(model)
    return model


def _fold_norms(model: nn.Module) -> None:
    folded: dict[nn.Module, nn.Module] = {}
    for name, conv, norm, shared in convs_and_siblings(model):
        is_pair = (
            type(conv) is nn.Conv2d
            and type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm)
            and norm.num_features == conv.out_channels
        )
        if is_pair and not shared and norm.running_mean is not None:
            kernel, bias = fold(conv.weight, conv.bias, norm)
            conv.weight = rounded(kernel, conv.weight)
            conv.bias = nn.Parameter(bias.to(conv.weight.dtype), conv.weight.requires_grad)
            folded[norm] = nn.Identity().train(norm.training)
        else:
            LOGGER.info("not folded: %s, followed by %s", name, type(norm).__name__)
    replace(model, folded)
