"""Find the convolutions that a block can stand for, and say why it cannot for the others."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from gradrep_kernels.branches.algebra import MultiBranch

__all__ = ["LOGGER", "Sibling", "Site", "conv_sites", "convs_and_siblings", "first_few", "replace", "unwrap"]

# Users turn on the messages under the name of the public module, whichever file writes them.
LOGGER = logging.getLogger("gradrep_kernels.csla")

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, nn.InstanceNorm2d)


class Site(NamedTuple):
    """A convolution that a block can stand for, and the norm that follows it."""

    name: str  # of the conv module, from the model's root
    conv: nn.Conv2d
    norm: nn.Module


class Sibling(NamedTuple):
    """A convolution, and the module that is registered after it in the same parent."""

    name: str
    conv: nn.Conv2d
    next: nn.Module | None
    shared: bool  # the conv, its weight or the next sibling is registered at more than one place


def first_few(problems: list[str], shown: int = 4) -> str:
    """Join the first problems into one line that says how many more there are."""
    return "; ".join(problems[:shown]) + (f"; and {len(problems) - shown} more" if len(problems) > shown else "")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside DataParallel, DistributedDataParallel and torch.compile.

    Its names have no prefix.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._orig_mod
        else:
            return model


def replace(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Put the values of `new` where its keys are registered. Names and their order stay."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]


def convs_and_siblings(model: nn.Module) -> Iterator[Sibling]:
    """Yield every nn.Conv2d in module order, with the module that is registered after it."""
    following: dict[nn.Module, nn.Module | None] = {}
    places: Counter[nn.Module] = Counter()
    holders: Counter[nn.Parameter] = Counter()
    for module in model.modules():
        children = [child for child in module._modules.values() if child is not None]
        places.update(children)
        following.update(zip(children, [*children[1:], None]))
        holders.update(p for p in module._parameters.values() if p is not None)
    for name, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d):
            after = following.get(conv)
            shared = places[conv] > 1 or places[after] > 1 or holders[conv._parameters.get("weight")] > 1
            yield Sibling(name, conv, after, shared)


def _why_left(sibling: Sibling) -> str | None:
    """Say why no block can stand for this convolution. None: one can."""
    conv, after = sibling.conv, sibling.next
    kh, kw = conv.kernel_size
    if type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__} may have a forward of its own"
    if 1 in (kh, kw) or kh % 2 == 0 or kw % 2 == 0:
        return f"kernel {kh} x {kw}, needed is odd and above 1 both ways"
    if "weight" not in conv._parameters:
        return "its weight is not a parameter (weight norm, pruning)"
    if not conv.weight.is_floating_point():
        return f"its weight is {conv.weight.dtype}"
    if sibling.shared:
        return "it, its weight or its norm is registered at more than one place"
    if not isinstance(after, _NORMS):
        return "no sibling follows" if after is None else f"a {type(after).__name__} follows, not a norm"
    features = after.num_channels if isinstance(after, nn.GroupNorm) else after.num_features
    if features != conv.out_channels:
        return f"the norm that follows has {features} features, the conv {conv.out_channels} outputs"
    return None


def conv_sites(model: nn.Module) -> list[Site]:
    """List the convolutions that a block can stand for, in module order.

    The others are logged (level INFO).

    Raises ValueError if there is none, or if the model holds multi-branch blocks already.
    """
    blocks = [name or "the model itself" for name, module in model.named_modules() if isinstance(module, MultiBranch)]
    if blocks:
        raise ValueError(
            f"model holds multi-branch blocks already ({first_few(blocks)}): csla.merge(model) gives the plain one"
        )
    sites, left = [], []
    for sibling in convs_and_siblings(model):
        reason = _why_left(sibling)
        if reason is None:
            sites.append(Site(sibling.name, sibling.conv, sibling.next))
        else:
            left.append(f"{sibling.name or 'the model itself'}: {reason}")
            LOGGER.info("left as it is: %s", left[-1])
    if not sites:
        raise ValueError(
            f"model has no odd k x k nn.Conv2d with a norm after it ({first_few(left) or 'no nn.Conv2d at all'})"
        )
    return sites
