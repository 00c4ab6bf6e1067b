"""Put blocks into a copy of a model, and merge any blocks back into plain convolutions.

Both know a block by the interface `MultiBranch` alone. A new kind of block needs a file with its class and a function
that calls `with_blocks`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from gradrep_kernels.branches.algebra import MultiBranch, fold, rounded
from gradrep_kernels.branches.pairs import Example, call, check_pairs
from gradrep_kernels.branches.sites import LOGGER, Site, convs_and_siblings, replace
from gradrep_kernels.wrappers import unwrapped

__all__ = ["merge", "with_blocks"]

_MOST_ROUNDING = 1e4  # units in the last place of the largest output: 1e-3 in float32, for some hundred layers


def with_blocks(model: nn.Module, make_blocks: Callable[[nn.Module], Iterable[tuple[Site, MultiBranch]]]) -> nn.Module:
    """Return a copy of `model` in which blocks stand in the place of convolutions.

    Args:
        make_blocks: called once with the copy, gives each of its sites that is replaced, and the block. A block that
            holds the norm of its site leaves an nn.Identity in the norm's place.

    A wrapper (DDP, torch.compile, Fabric, AveragedModel) is taken off. Hooks on a replaced convolution do not come
    along.
    """
    model = copy.deepcopy(unwrapped(model))
    new: dict[nn.Module, nn.Module] = {}
    for site, block in make_blocks(model):
        new[site.conv] = block
        if block.holds_norm:
            new[site.norm] = nn.Identity().train(site.norm.training)
    replace(model, new)
    return model


def merge(model: nn.Module, fold_norm: bool = False, example: Example | None = None) -> nn.Module:
    """Return a new model with a plain nn.Conv2d in place of each multi-branch block.

    Blocks are those of Hyper-Search, CSLA, RepVGG and ACB models.

    Args:
        fold_norm: for deployment: also fold a BatchNorm2d into the nn.Conv2d whose next sibling it is. An nn.Identity
            takes its place, and the outputs are those of eval mode. Norms without running statistics, of other kinds or
            shared are left and logged (level INFO).
        example: an input: a Tensor, a tuple of positional or a dict of keyword arguments. The outputs of the new model
            on it are compared with those of `model` in eval mode.

    A norm must be called on the output of its convolution, and nothing else may be. With an example the calls of one
    forward pass show it, without one the graph of torch.fx. Where the model cannot be traced, a warning names the
    convolutions that are folded as they are registered.

    Sums are formed in float64 and rounded once to the weight's dtype. `model` itself is not changed.

    Raises ValueError if a convolution has another consumer than its norm, or if the outputs differ on the example.
    """
    model = unwrapped(model)
    merged = copy.deepcopy(model)
    if isinstance(merged, MultiBranch):
        merged = merged.merged()
    else:
        replace(merged, {module: module.merged() for module in merged.modules() if isinstance(module, MultiBranch)})
    if fold_norm:
        _fold_norms(merged, example)
    if example is not None:
        _compare_outputs(copy.deepcopy(model), merged, example)
    return merged


def _fold_norms(model: nn.Module, example: Example | None) -> None:
    pairs = []
    for name, conv, norm, shared in convs_and_siblings(model):
        is_pair = (
            type(conv) is nn.Conv2d
            and type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm)
            and norm.num_features == conv.out_channels
        )
        if is_pair and not shared and norm.running_mean is not None:
            pairs.append(Site(name, conv, norm))
        else:
            LOGGER.info("not folded: %s, followed by %s", name, type(norm).__name__)
    check_pairs(model, pairs, example, "merge(fold_norm=True)")
    folded: dict[nn.Module, nn.Module] = {}
    for _, conv, norm in pairs:
        kernel, bias = fold(conv.weight, conv.bias, norm)
        conv.weight = rounded(kernel, conv.weight)
        conv.bias = nn.Parameter(bias.to(conv.weight.dtype), conv.weight.requires_grad)
        folded[norm] = nn.Identity().train(norm.training)
    replace(model, folded)


def _compare_outputs(model: nn.Module, merged: nn.Module, example: Example) -> None:
    """Raise ValueError where the merged model gives other outputs than the model."""
    expected, found = (tree_flatten(call(m, example))[0] for m in (model, merged))
    for a, b in zip(expected, found):
        if isinstance(a, Tensor) and a.is_floating_point():
            difference, size = float((a.double() - b.double()).abs().max()), float(a.double().abs().max())
            # Wrong folding is off by as much as the outputs are large, rounding by some ulp a layer.
            if not difference <= _MOST_ROUNDING * torch.finfo(a.dtype).eps * max(size, 1.0):
                raise ValueError(
                    f"the merged model gives other outputs on the example: they differ by up to {difference:.3g}, "
                    f"and are up to {size:.3g} large"
                )
