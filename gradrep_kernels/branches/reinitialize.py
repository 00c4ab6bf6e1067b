"""The initial weights that a CSLA block implies, and whether a model is fresh enough to take them.

Source: RepOptimizers (Ding et al., 2023), Eq. 4.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from gradrep_kernels.branch_scales import BranchScales
from gradrep_kernels.branches.csla import CSLABlock, check_draw
from gradrep_kernels.branches.scales import match
from gradrep_kernels.branches.sites import Site
from gradrep_kernels.grad_mult import expect_grad_mult
from gradrep_kernels.messages import first_few, warn_outside

__all__ = ["reinitialize"]

# Deepcopies and pickles of a conv carry this attribute, so models that were saved earlier have it under this name.
_REINITIALIZED = "_csla_reinitialized"


@torch.no_grad()
def reinitialize(
    model: nn.Module,
    scales: Mapping[str, BranchScales],
    *,
    identity: str = "searched",
    one_by_one: str = "conv2d",
    force: bool = False,
    partial: bool = False,
) -> None:
    """Set each kernel, in place, to the one that its CSLA block starts with.

    RepOptimizers, Eq. 4: W ← Σ α_b ⊙ W_b + diag(id), and the constant branches. The k x k branch is the conv's present
    weight. The 1x1 and all further branches are drawn from the default generator, in the order of
    `BranchScales.branches`. Sums are formed in float64 and rounded once.

    Args:
        identity: 'searched': id is the searched identity scale, as in the published code, or 1 where none was searched.
                  'one': id is 1, as in the paper.
        one_by_one: how the 1x1 and all further branches are drawn. 'conv2d': as nn.Conv2d draws them, the published
                  code's choice. 'msra': normal with variance 2 / (inputs of a tap's sum), as the paper says (He et
                  al., 2015).
        force:    go ahead although the model has been trained or re-initialised.
        partial:  scales may leave out convolutions, whose kernels stay, and identity branches.

    A run that resumes from a checkpoint leaves `reinitialize` out, and so does fine-tuning: the weights are there, and
    `grad_mults` is all they need. An optimizer of this package warns at its first step where it has weights that were
    re-initialised and a Grad Mult for none of them. `grad_mults={}` says that this is meant.

    Raises ValueError, and changes nothing, if scales and model do not fit, if the model was re-initialised before, or
    if a norm is not fresh: it has seen batches, its running statistics moved, or, without statistics, its weight or
    bias differs between channels. That the model was re-initialised is known by a mark on the conv modules, which
    deepcopy and pickle keep and a state_dict does not. A norm with neither statistics nor weight shows nothing, of
    which a warning tells.
    """
    if identity not in ("searched", "one"):
        raise ValueError(f"identity must be 'searched' or 'one', got {identity!r}")
    check_draw(one_by_one)
    pairs = match(model, scales, partial)
    if not force:
        problems = [problem for site, _ in pairs if (problem := _why_not_fresh(site))]
        if problems:
            raise ValueError(
                "resuming? leave reinitialize out, for the checkpoint has the weights that it would make. "
                "Fine-tuning? A trained network keeps its weights, and needs grad_mults alone. "
                f"reinitialize begins a training, and this model is not untrained: {first_few(problems)}"
            )
        _warn_of_unknown([site for site, _ in pairs])
    for site, value in pairs:
        if identity == "one" and value.has_identity:
            value = BranchScales(
                value.kxk,
                value.one_by_one,
                True,
                others=value.others,
                constant_identity=value.constant_identity,
                constant_average=value.constant_average,
            )
        site.conv.weight.copy_(CSLABlock(site.conv, value, one_by_one=one_by_one).merged_kernel())
        setattr(site.conv, _REINITIALIZED, True)
        expect_grad_mult(site.conv.weight)


def _why_not_fresh(site: Site) -> str | None:
    if getattr(site.conv, _REINITIALIZED, False):
        return f"{site.name} was re-initialised before"
    batches = getattr(site.norm, "num_batches_tracked", None)
    if batches is not None and batches != 0:
        return f"the norm after {site.name} has seen {int(batches)} batches"
    mean, var = getattr(site.norm, "running_mean", None), getattr(site.norm, "running_var", None)
    if mean is not None:
        moved = bool((mean != 0).any() or (var != 1).any())
        return f"the norm after {site.name} has running statistics that moved" if moved else None
    # Initial values are one number for all channels: 1 and 0, or a weight of 0 at the end of a residual branch.
    for what in ("weight", "bias"):
        value = getattr(site.norm, what, None)
        if value is not None and bool((value != value[0]).any()):
            return f"the norm after {site.name} has a {what} that differs between channels, as after a training"
    return None


def _warn_of_unknown(sites: list[Site]) -> None:
    """Warn of convolutions that nothing tells to be fresh: no norm with statistics, or with a weight that trains."""

    def shows(norm: nn.Module | None) -> bool:
        if getattr(norm, "running_mean", None) is not None:
            return True
        weight = getattr(norm, "weight", None)
        return weight is not None and weight.requires_grad

    silent = [site.name for site in sites if not shows(site.norm)]
    if silent:
        warn_outside(
            "reinitialize cannot tell whether these convolutions are untrained, for no norm with statistics or a "
            f"weight that trains follows them: {first_few(silent)}. If they are, force=True says so"
        )
