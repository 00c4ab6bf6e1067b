"""Any plain model -> its Hyper-Search model, its CSLA model, or itself re-initialised; and back by merging."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from numbers import Real

import torch
from torch import nn

from gradrep_kernels.branch_scales import BranchScales
from gradrep_kernels.branches.algebra import MultiBranch, fold, has_shortcut, rounded
from gradrep_kernels.branches.csla import CSLABlock
from gradrep_kernels.branches.scales import match
from gradrep_kernels.branches.sites import Site, conv_sites, convs_and_siblings, first_few, replace, unwrap

__all__ = ["csla_model", "hyper_search_model", "merge", "reinitialize"]

logger = logging.getLogger(__name__)

_DONE = "_csla_reinitialized"


def hyper_search_model(model: nn.Module, init: str | float = "depth") -> nn.Module:
    """A new model with a CSLA block of trainable scales in place of each convolution that stands for one.

    Every odd k x k nn.Conv2d (both sides above 1) whose next sibling in registration order is a BatchNorm2d, SyncBatchNorm,
    GroupNorm or InstanceNorm2d of as many features is replaced by a k x k and a 1 x 1 branch and, where it has as many
    outputs as inputs, stride 1 and 'same' padding, an identity branch. Others are left and logged (level INFO).
    Train it on a small set; `extract_scales` then gives the constants (RepOptimizers, section 3.3).

    Args:
        init: 'depth': in module order, i = 0 at a conv without shortcut and +1 at each that has one; scales behind convs
            start at 1 for i = 0, else √(2/i) (Appendix B; section 4.1 misprints it). A number: all start there (YOLOv6: 1.0).
            Identity scales start at 1 either way.

    The k x k branches take the present weights; the 1x1 kernels are drawn as nn.Conv2d draws them, in module order, from
    the default generator, which moves on. `model` itself is not changed. A DDP or torch.compile wrapper is taken off;
    hooks on a replaced conv do not come along.

    Raises ValueError where nothing can be replaced, or multi-branch blocks are there already.
    """
    if init != "depth" and (isinstance(init, bool) or not isinstance(init, Real) or not math.isfinite(init)):
        raise ValueError(f"init must be 'depth' or a finite number, got {init!r}")
    model = copy.deepcopy(unwrap(model))
    pairs = []
    depth = 0
    for site in conv_sites(model):
        shortcut = has_shortcut(site.conv)
        depth = depth + 1 if shortcut else 0
        start = init if init != "depth" else math.sqrt(2 / depth) if depth else 1.0
        scale = torch.full((site.conv.out_channels,), float(start), dtype=torch.float64, device="cpu")
        pairs.append((site, BranchScales(scale, scale, shortcut)))
    return _with_blocks(model, pairs, trainable=True)


def csla_model(model: nn.Module, scales: Mapping[str, BranchScales]) -> nn.Module:
    """A new model with explicit CSLA blocks: constant scales behind the convolutions, a trainable one on the identity.

    Training it is the same as training `model`, after `reinitialize`, by FusedRepSGD with `grad_mults`; it is what that
    imitates, for checks and comparisons. Scales are cast to the weights' dtype and are buffers; the identity's starts at the
    searched value, or at 1 where `identity` is True. With the same state of the default generator, `csla_model` and
    `reinitialize` draw the same 1x1 kernels. What is replaced, and what is drawn: see `hyper_search_model`.

    Raises ValueError, listing the first few mismatches, where scales and model do not fit.
    """
    model = copy.deepcopy(unwrap(model))
    return _with_blocks(model, match(model, scales), trainable=False)


def _with_blocks(model: nn.Module, pairs: list[tuple[Site, BranchScales]], *, trainable: bool) -> nn.Module:
    replace(model, {site.conv: CSLABlock(site.conv, scales, trainable=trainable) for site, scales in pairs})
    return model


@torch.no_grad()
def reinitialize(
    model: nn.Module, scales: Mapping[str, BranchScales], *, identity: str = "searched", force: bool = False
) -> None:
    """W ← Σ α_b ⊙ W_b + diag(id), in place: the kernel of the CSLA block as it is at its start (RepOptimizers, Eq. 4).

    The k x k branch is the conv's present weight; the 1x1 is drawn as nn.Conv2d draws it, from the default generator
    (the published code's choice; the paper says MSRA). Sums are formed in float64 and rounded once.

    Args:
        identity: id is the searched identity scale ('searched', as the published code; 1 where none was searched) or 'one' (the paper).
        force:    go ahead although the model has been trained or re-initialised.

    Raises ValueError, and changes nothing, where scales and model do not fit, where a norm is not fresh (batches seen,
    running statistics moved), or where the model was re-initialised before. The last is known by a mark on the conv
    modules, which deepcopy and pickle keep and a state_dict does not.
    """
    if identity not in ("searched", "one"):
        raise ValueError(f"identity must be 'searched' or 'one', got {identity!r}")
    pairs = match(unwrap(model), scales)
    problems = [] if force else [problem for site, _ in pairs if (problem := _why_not_fresh(site))]
    if problems:
        raise ValueError(f"reinitialize needs an untrained model, force=True goes ahead: {first_few(problems)}")
    for site, value in pairs:
        if identity == "one" and value.has_identity:
            value = BranchScales(value.kxk, value.one_by_one, True)
        site.conv.weight.copy_(CSLABlock(site.conv, value).merged_kernel())
        setattr(site.conv, _DONE, True)


def _why_not_fresh(site: Site) -> str | None:
    if getattr(site.conv, _DONE, False):
        return f"{site.name} was re-initialised before"
    batches = getattr(site.norm, "num_batches_tracked", None)
    if batches is not None and batches != 0:
        return f"the norm after {site.name} has seen {int(batches)} batches"
    mean, var = getattr(site.norm, "running_mean", None), getattr(site.norm, "running_var", None)
    if mean is not None and bool((mean != 0).any() or (var != 1).any()):
        return f"the norm after {site.name} has running statistics that moved"
    return None


def merge(model: nn.Module, fold_norm: bool = False) -> nn.Module:
    """A new model with a plain nn.Conv2d in place of each multi-branch block (CSLA, Hyper-Search, RepVGG, ACB).

    Args:
        fold_norm: for deployment: also fold into every nn.Conv2d the BatchNorm2d that is its next sibling, which becomes
            nn.Identity; the outputs are then those of eval mode. It relies on that norm being called on the conv's output.
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
        plain = (
            type(conv) is nn.Conv2d
            and type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm)
            and norm.num_features == conv.out_channels
        )
        if plain and not shared and norm.running_mean is not None:
            kernel, bias = fold(conv.weight, conv.bias, norm)
            conv.weight = rounded(kernel, conv.weight)
            conv.bias = nn.Parameter(bias.to(conv.weight.dtype), conv.weight.requires_grad)
            folded[norm] = nn.Identity().train(norm.training)
        else:
            logger.info("not folded: %s, followed by %s", name, type(norm).__name__)
    replace(model, folded)
