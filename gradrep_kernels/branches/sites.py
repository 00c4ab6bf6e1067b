"""Find the convolutions that a block can stand for, and say why it cannot for the others."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import Tensor, nn

from gradrep_kernels.branches.algebra import MultiBranch
from gradrep_kernels.messages import first_few, warn_outside
from gradrep_kernels.wrappers import named_root, plain_name

__all__ = [
    "LOGGER",
    "Sibling",
    "Site",
    "Survey",
    "Where",
    "branch_scale",
    "conv_sites",
    "convs_and_siblings",
    "has_branch_scales",
    "is_fake_quantized",
    "is_kxk",
    "multi_branch_blocks",
    "refuse_blocks",
    "replace",
    "survey",
    "warn_of_plain",
]

# Users turn on the messages under the name of the public module, whichever file writes them.
LOGGER = logging.getLogger("gradrep_kernels.csla")

# Which convolutions to convert: names of convs or of modules above them, patterns, or a function of (name, conv).
Where = str | Iterable[str] | Callable[[str, nn.Conv2d], bool]

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, nn.InstanceNorm2d)
# The deployed form of a multi-branch block is made by one of these methods. RepVGG, DBB and YOLO have the first two,
# timm and MobileOne, YOLOv9 and RepViT the others, which models of other kinds may have too.
_MERGING_METHODS = ("switch_to_deploy", "get_equivalent_kernel_bias")
_USUAL_METHODS = ("reparameterize", "fuse_convs", "fuse")


class Site(NamedTuple):
    """A convolution that a block can stand for, and the norm that follows it, if one does."""

    name: str  # of the conv module, from the model's root
    conv: nn.Conv2d
    norm: nn.Module | None


class Sibling(NamedTuple):
    """A convolution, and the module that is registered after it in the same parent, or its norm inside it."""

    name: str
    conv: nn.Conv2d
    next: nn.Module | None
    shared: bool  # the conv, its weight or its norm is registered at more than one place


@dataclass
class Survey:
    """The convolutions of a model: which can be converted, and why the others cannot."""

    sites: list[Site] = field(default_factory=list)
    left: dict[str, tuple[nn.Conv2d, str]] = field(default_factory=dict)  # name: conv, why not
    blocks: dict[str, nn.Module] = field(default_factory=dict)  # those that are multi-branch already, by name


def replace(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Put the values of `new` where its keys are registered. Names and their order stay."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]


def convs_and_siblings(model: nn.Module) -> Iterator[Sibling]:
    """Yield every nn.Conv2d in module order, with the module that is registered after it.

    A module whose class has an attribute `norms_after` says itself which norm follows a convolution below it, where
    they are no siblings: {name of the convolution: name of the norm}.
    """
    following: dict[nn.Module, nn.Module | None] = {}
    places: Counter[nn.Module] = Counter()
    holders: Counter[nn.Parameter] = Counter()
    for module in model.modules():
        children = [child for child in module._modules.values() if child is not None]
        places.update(children)
        following.update(zip(children, [*children[1:], None]))
        holders.update(p for p in module._parameters.values() if p is not None)
    for module in model.modules():
        for conv, norm in getattr(type(module), "norms_after", {}).items():
            following[module.get_submodule(conv)] = module.get_submodule(norm)
    for name, conv in named_root(model).named_modules():
        if isinstance(conv, nn.Conv2d):
            after = conv._modules.get("bn", following.get(conv))  # prepare_qat fuses the norm into the convolution
            shared = places[conv] > 1 or holders[conv._parameters.get("weight")] > 1
            shared = shared or (isinstance(after, _NORMS) and places[after] > 1)
            yield Sibling(plain_name(name), conv, after, shared)


def is_kxk(kernel_size: Iterable[int]) -> bool:
    """Whether both sides of a kernel are odd and above 1."""
    return all(side % 2 == 1 and side > 1 for side in kernel_size)


def is_fake_quantized(conv: nn.Conv2d) -> bool:
    """Whether torch.ao's prepare_qat made this convolution, alone or fused with its norm."""
    return type(conv).__module__.startswith(("torch.ao.nn.qat", "torch.ao.nn.intrinsic.qat"))


def _why_no_block(sibling: Sibling, fake_quantized: bool, named: bool) -> str | None:
    """Say why no block can stand for this convolution, whatever follows it. None: one can.

    One with a side of 1 must be `named`: the papers' blocks leave them alone, MobileOne's do not.
    """
    conv = sibling.conv
    if is_fake_quantized(conv):
        if not fake_quantized:
            return "it is fake-quantized; convert the model before prepare_qat"
    elif type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__} may have a forward of its own"
    kh, kw = conv.kernel_size
    if kh % 2 == 0 or kw % 2 == 0 or not (named or is_kxk(conv.kernel_size)):
        return f"kernel {kh} x {kw}, needed is odd and above 1 both ways"
    if "weight" not in conv._parameters:
        return "its weight is not a parameter (weight norm, pruning)"
    if not conv.weight.is_floating_point():
        return f"its weight is {conv.weight.dtype}"
    if sibling.shared:
        return "it, its weight or its norm is registered at more than one place"
    return None


def _why_no_norm(sibling: Sibling) -> str | None:
    """Say why what follows this convolution is not its norm. None: it is."""
    after = sibling.next
    if not isinstance(after, _NORMS):
        return "no sibling follows" if after is None else f"a {type(after).__name__} follows, not a norm"
    features = after.num_channels if isinstance(after, nn.GroupNorm) else after.num_features
    if features != sibling.conv.out_channels:
        return f"the norm that follows has {features} features, the conv {sibling.conv.out_channels} outputs"
    return None


def branch_scale(block: nn.Module, name: str) -> nn.Module | None:
    """Return the child of a block that holds the scale of a branch: one number per channel."""
    layer = block._modules.get(name)  # not getattr, which a wrapper may pass on to what it wraps
    if layer is None or isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear)):
        return None
    return layer


def has_branch_scales(module: nn.Module) -> bool:
    layer = branch_scale(module, "scale_conv")
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and weight.numel() == max(weight.shape, default=0)


def _is_multi_branch(module: nn.Module) -> bool:
    """Whether `module` is a block of branches: ours, one with branch scales, or one that can be merged for deployment.

    Of the last kind some branches have the same shape and stride. Where only the name of a usual method speaks for it,
    all have. A block that has been merged has one convolution left.
    """
    if isinstance(module, MultiBranch) or has_branch_scales(module):
        return True
    can_be_merged = _has_method(module, _MERGING_METHODS)
    if not can_be_merged and not _has_method(module, _USUAL_METHODS):
        return False
    convs = [m for m in module.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    alike = Counter((conv.in_channels, conv.out_channels, conv.stride) for conv in convs)
    most = max(alike.values(), default=0)
    return most > 1 and (can_be_merged or most == len(convs))


def _has_method(module: nn.Module, names: Iterable[str]) -> bool:
    """Ask the class, not the instance, whose properties may raise."""
    return any(callable(getattr(type(module), name, None)) for name in names)


def multi_branch_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks of branches by name. Of blocks within blocks it is the innermost."""
    named = {module: name for name, module in named_root(model).named_modules() if _is_multi_branch(module)}
    inner = {m: n for m, n in named.items() if not any(other in named for other in m.modules() if other is not m)}
    return {plain_name(name) or "the model itself": module for module, name in inner.items()}


def survey(
    model: nn.Module,
    where: Where | None = None,
    *,
    fake_quantized: bool = False,
    small: Container[str] = (),
) -> Survey:
    """Sort the convolutions of a model, in module order.

    Args:
        where: convolutions that are chosen. They need no norm behind them. None: all that have one.
        fake_quantized: whether those of prepare_qat count too.
        small: names of convolutions that count although a side of their kernel is 1. Those that `where` names do.

    Raises TypeError or ValueError for a `where` of another kind, with a name or pattern that no convolution has, or
    with the name of a convolution that cannot be converted.
    """
    chosen = None if where is None else _Chosen(where)
    found = Survey(blocks=multi_branch_blocks(model))
    block_of = {m: (name, block) for name, block in found.blocks.items() for m in block.modules()}
    for sibling in convs_and_siblings(model):
        name, conv = sibling.name, sibling.conv
        by_name = name in small or (chosen is not None and chosen.names(name))
        reason = _why_no_block(sibling, fake_quantized, by_name)
        if reason is None and conv in block_of:
            block_name, block = block_of[conv]
            reason = f"part of {block_name}, a {type(block).__name__} that is multi-branch already"
        why_no_norm = _why_no_norm(sibling)
        if chosen is None:
            reason = reason or why_no_norm
        elif not chosen(name, conv):
            reason = reason or "not chosen by `where`"
        elif reason is not None and chosen.names(name):
            raise ValueError(f"where: {name} cannot be converted: {reason}")
        if reason is None:
            found.sites.append(Site(name, conv, None if why_no_norm else sibling.next))
        else:
            found.left[name or "the model itself"] = conv, reason
    if chosen is not None and chosen.unmet:
        raise ValueError(f"where: the model has no convolution of that name, or below it: {first_few(chosen.unmet)}")
    return found


class _Chosen:
    """Answers whether `where` chooses a convolution, and remembers which names and patterns have met none."""

    def __init__(self, where: Where):
        self._function = where if callable(where) else None
        patterns = () if callable(where) else (where,) if isinstance(where, str) else where
        self.patterns = list(patterns) if isinstance(patterns, Iterable) else [patterns]
        if isinstance(where, nn.Module) or not all(isinstance(p, str) for p in self.patterns):
            raise TypeError(f"where must be names, patterns or a function of (name, conv), got {where!r}")
        self.patterns = [plain_name(p) for p in self.patterns]
        self.unmet = list(self.patterns)

    def __call__(self, name: str, conv: nn.Conv2d) -> bool:
        if self._function is not None:
            return bool(self._function(name, conv))
        met = [p for p in self.patterns if name == p or name.startswith(f"{p}.") or fnmatchcase(name, p)]
        self.unmet = [p for p in self.unmet if p not in met]
        return bool(met)

    def names(self, name: str) -> bool:
        return name in self.patterns


def conv_sites(model: nn.Module, where: Where | None = None) -> list[Site]:
    """List the convolutions that a block can stand for, in module order.

    The others are logged (level INFO). It warns where blocks are multi-branch already, and where most k x k
    convolutions stay plain that `where` did not leave out.

    Raises ValueError if there is none, or if the model holds multi-branch blocks of this package already.
    """
    refuse_blocks(model)
    found = survey(model, where)
    for name, (_, reason) in found.left.items():
        LOGGER.info("left as it is: %s: %s", name, reason)
    if not found.sites:
        left = [f"{name}: {reason}" for name, (_, reason) in found.left.items()]
        what = "with a norm after it" if where is None else "that `where` chooses"
        raise ValueError(f"model has no odd k x k nn.Conv2d {what} ({first_few(left) or 'no nn.Conv2d at all'})")
    if where is None:
        warn_of_plain(found, {site.name for site in found.sites})
    return found.sites


def refuse_blocks(model: nn.Module) -> None:
    """Raise ValueError where the model holds blocks of this package."""
    blocks = [name for name, block in multi_branch_blocks(model).items() if isinstance(block, MultiBranch)]
    if blocks:
        raise ValueError(
            f"model holds multi-branch blocks already ({first_few(blocks)}): csla.merge(model) gives the plain one"
        )


def warn_of_plain(found: Survey, converted: Container[str]) -> None:
    """Warn where most k x k convolutions stay plain, and of blocks that are multi-branch already."""
    parts = []
    plain = {name: reason for name, (conv, reason) in found.left.items() if is_kxk(conv.kernel_size)}
    plain |= {site.name: "no norm follows" for site in found.sites if site.name not in converted}
    total = len(plain) + sum(site.name in converted for site in found.sites)
    if 2 * len(plain) > total:
        reasons = first_few([f"{name}: {reason}" for name, reason in plain.items()], 2)
        parts.append(
            f"{len(plain)} of {total} k x k convolutions stay plain ({reasons}). `where` of hyper_search_model chooses "
            "convolutions, and takes those that no norm follows"
        )
    if found.blocks:
        names = [f"{name}, a {type(block).__name__}" for name, block in found.blocks.items()]
        parts.append(f"{len(names)} blocks are multi-branch already and stay so ({first_few(names, 2)})")
    if parts:
        warn_outside(f"{'; '.join(parts)}. gr.csla.coverage(model) lists all")
