"""Put blocks into a copy of a model, and merge any blocks back into plain convolutions.

Both know a block by the interface `MultiBranch` alone. A new kind of block needs a file with its class and a function
that calls `with_blocks`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gradrep_kernels.branches.algebra import MultiBranch, fold, rounded
from gradrep_kernels.branches.pairs import Example, call, check_pairs, floating_outputs, scratch_copy
from gradrep_kernels.branches.sites import LOGGER, Site, convs_and_siblings, replace
from gradrep_kernels.wrappers import unwrapped

__all__ = ["merge", "with_blocks"]

# Of the largest output. Weights that are rounded once move it by some units in the last place for each layer, and by
# more where terms cancel. A norm that is folded wrongly moves it by a tenth and more.
_MOST_ROUNDING, _LEAST_DIFFERENCE = 1e3, 0.05  # units in the last place, a share


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
            takes its place, and the outputs are those of eval mode. Norms without running statistics, of other kinds,
            shared or not called in eval mode are left and logged (level INFO), and so are pairs with forward hooks.
        example: an input: a Tensor, a tuple of positional or a dict of keyword arguments. The floating-point outputs
            of the new model on it are compared with those of `model`, in eval mode.

    A norm must be called on the output of its convolution, and nothing else may be. With an example the calls of one
    forward pass show it. Without one the graph of torch.fx does, with optional arguments at their defaults. A forward
    that asks for the types of its arguments may go another way in the graph, so an example is the stronger proof.
    Where the model cannot be traced, a warning names the convolutions that are folded as they are registered.

    Sums are formed in float64 and rounded once to the weight's dtype. `model` itself is not changed.

    Raises ValueError if a convolution has another consumer than its norm, if the outputs differ on the example, or if
    none can be compared.
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
        _compare_outputs(model, merged, example)
    return merged


def _fold_norms(model: nn.Module, example: Example | None) -> None:
    pairs = []
    for name, conv, norm, shared in convs_and_siblings(model):
        is_pair = (
            type(conv) is nn.Conv2d
            and "weight" in conv._parameters  # else computed: weight norm, pruning
            and type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm)
            and norm.num_features == conv.out_channels
            and not _has_hooks(conv, norm)
        )
        if is_pair and not shared and norm.running_mean is not None:
            pairs.append(Site(name, conv, norm))
        else:
            LOGGER.info("not folded: %s, followed by %s", name, type(norm).__name__)
    called = check_pairs(model, pairs, example, "merge(fold_norm=True)")
    folded: dict[nn.Module, nn.Module] = {}
    for site in pairs:
        if site not in called:
            LOGGER.info("not folded: %s, which is not called in eval mode", site.name)
            continue
        _, conv, norm = site
        kernel, bias = fold(conv.weight, conv.bias, norm)
        conv.weight = rounded(kernel, conv.weight)
        conv.bias = nn.Parameter(bias.to(conv.weight.dtype), conv.weight.requires_grad)
        folded[norm] = nn.Identity().train(norm.training)
    replace(model, folded)


def _has_hooks(*modules: nn.Module) -> bool:
    """Whether the caller's hooks may change what goes between these modules. Those of this package only look."""
    hooks = [hook for m in modules for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return any(not type(hook).__module__.startswith("gradrep_kernels.") for hook in hooks)


def _compare_outputs(model: nn.Module, merged: nn.Module, example: Example) -> None:
    """Raise ValueError where the merged model gives other outputs than the model, or none that can be compared.

    Both are computed in float64, so that only the rounding of merged weights is left. A model that cannot be is
    computed as it is.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    units = _MOST_ROUNDING
    try:
        wide = tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, example)
        expected, found = (floating_outputs(call(scratch_copy(m).double(), wide)) for m in (model, merged))
    except Exception:
        units *= 10
        expected, found = (floating_outputs(call(scratch_copy(m), example)) for m in (model, merged))
    expected, found = ([t.double() for t in outputs] for outputs in (expected, found))
    if [t.shape for t in expected] != [t.shape for t in found]:
        raise ValueError("the merged model gives outputs of other numbers or shapes on the example")
    if not any(t.numel() for t in expected):
        raise ValueError("example: the model gives no floating-point outputs on it that could be compared")
    allowed = min(units * torch.finfo(dtype).eps, _LEAST_DIFFERENCE)
    for a, b in zip(expected, found):
        differ = (a != b) & ~(a.isnan() & b.isnan())  # infinities of one sign do not
        if not bool(differ.any()):
            continue
        difference, size = float((a - b)[differ].abs().max()), float(a.nan_to_num(0, 0, 0).abs().max())
        if not difference <= allowed * size:
            raise ValueError(
                f"the merged model gives other outputs on the example: they differ by up to {difference:.3g}, and are "
                f"up to {size:.3g} large"
            )
