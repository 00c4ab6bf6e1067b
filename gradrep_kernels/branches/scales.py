"""Branch scales by the name of a conv or of its block, and matching with a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from gradrep_kernels.branch_scales import BranchScales
from gradrep_kernels.branches.algebra import can_average, has_shortcut
from gradrep_kernels.branches.sites import (
    Site,
    Survey,
    conv_sites,
    refuse_blocks,
    survey,
    warn_of_plain,
)
from gradrep_kernels.grad_mult import GradMult
from gradrep_kernels.messages import first_few
from gradrep_kernels.wrappers import saved_name

__all__ = ["Scales", "branch_scales", "checked", "grad_mults", "match"]

Scales = dict[str, BranchScales]


def checked(scales: Mapping[str, BranchScales]) -> Mapping[str, BranchScales]:
    """Return `scales`. Raises TypeError if they do not map names to BranchScales."""
    if not isinstance(scales, Mapping):
        raise TypeError(
            f"scales must map names to BranchScales, got {type(scales).__name__}; load_scales(path) reads a file"
        )
    for name, value in scales.items():
        if not isinstance(name, str) or not isinstance(value, BranchScales):
            raise TypeError(f"scales must map names to BranchScales, got {name!r}: {type(value).__name__}")
    return scales


def match(
    model: nn.Module, scales: Mapping[str, BranchScales], partial: bool = False, *, fake_quantized: bool = False
) -> list[tuple[Site, BranchScales]]:
    """Pair the convolutions of `model` with their branch scales, in module order.

    A name is that of the conv module, or of any module above it that holds no second such conv: the published files say
    `stage1.0` for `stage1.0.conv`. Convolutions without a norm behind them need no scales, and may have some.

    Args:
        partial: scales may leave out convolutions, which stay plain, and the identity branch of a convolution.
        fake_quantized: whether convolutions of prepare_qat count too.

    It warns where most k x k convolutions stay plain, unless `partial`.

    Raises ValueError, listing the first few mismatches, unless every name meets one conv, every conv has scales of its
    channel count whose branches lie inside its kernel, and the identity is present exactly where the conv has a
    shortcut. Of a block with further or constant branches, which is described as a whole, it may be absent there too.
    """
    checked(scales)
    if partial and not scales:
        raise ValueError("scales are empty: no convolution has any")
    refuse_blocks(model)
    small = {*scales, *map(saved_name, scales)}
    found = survey(model, lambda name, conv: True, fake_quantized=fake_quantized, small=small)
    followed = [site for site in found.sites if site.norm is not None]
    if not followed and not (found.sites and scales):
        conv_sites(model)  # says why there is none
    below_followed, below_any = _by_names_above(followed), _by_names_above(found.sites)
    by_site: dict[str, BranchScales] = {}
    problems, left_out = [], False
    for name, value in scales.items():
        below = below_followed.get(name) or below_any.get(name) or below_any.get(saved_name(name), [])
        if not below:
            problems.append(f"{name}: unexpected, {_why_not_met(name, found)}")
        elif len(below) > 1:
            problems.append(f"{name}: holds {len(below)} convs, one is needed")
        else:
            problem, is_left_out = _misfit(value, below[0], below[0].name in by_site, partial)
            left_out |= is_left_out
            if problem:
                problems.append(f"{name}: {problem}")
            by_site[below[0].name] = value
    missing = [] if partial else [f"{site.name}: missing" for site in followed if site.name not in by_site]
    problems += missing
    if problems:
        hint = " (partial=True accepts scales that leave out convolutions or identity branches)"
        raise ValueError(
            f"the scales do not fit the model, {len(problems)} mismatches: {first_few(problems)}"
            + (hint if missing or left_out else "")
        )
    if not partial:
        warn_of_plain(found, by_site.keys())
    return [(site, by_site[site.name]) for site in found.sites if site.name in by_site]


def _by_names_above(sites: list[Site]) -> dict[str, list[Site]]:
    """The sites at or below each name."""
    below: dict[str, list[Site]] = {}
    for site in sites:
        parts = site.name.split(".")
        for n in range(1, len(parts) + 1):
            below.setdefault(".".join(parts[:n]), []).append(site)
    return below


def _why_not_met(name: str, found: Survey) -> str:
    reasons = [reason for left, (_, reason) in found.left.items() if left == name or left.startswith(f"{name}.")]
    return f"its conv cannot have any: {reasons[0]}" if len(reasons) == 1 else "the model has no such conv"


def _misfit(value: BranchScales, site: Site, taken: bool, partial: bool) -> tuple[str | None, bool]:
    """Say why these branch scales cannot be those of `site` (None: they can), and whether `partial` would accept."""
    channels = site.conv.out_channels
    if taken:
        return f"{site.name} has scales under another name already", False
    if value.channels != channels:
        return f"scales of {value.channels} channels, {site.name} has {channels}", False
    if value.has_identity and not has_shortcut(site.conv):
        return f"an identity scale, but {site.name} has no shortcut", False
    if value.constant_identity and not has_shortcut(site.conv):
        return f"a constant identity, but {site.name} has no shortcut", False
    if value.constant_average and not can_average(site.conv):
        return f"a constant average, but {site.name} has no 'same' padding or unlike numbers of channels", False
    try:
        value.branches(site.conv.kernel_size)
    except ValueError as error:
        return str(error), False
    if has_shortcut(site.conv) and not value.has_identity and not value.is_general and not partial:
        return f"no identity scale, but {site.name} has one", True
    return None, False


def grad_mults(
    model: nn.Module, scales: Mapping[str, BranchScales], *, partial: bool = False
) -> dict[nn.Parameter, GradMult]:
    """Return {weight: Grad Mult} of the plain `model`, for FusedRepSGD (RepOptimizers, Eq. 3).

    Frozen weights have theirs too: the optimizer keeps them until the weights join. A model after torch.ao's
    prepare_qat is taken as well, with its convolutions alone or fused with their norms.

    Args:
        partial: scales may leave out convolutions, which then have no multiplier, and identity branches. Of a network
            whose strides were changed after the search, shortcuts of today may not have been searched.

    The model is not changed. The multipliers have the dtype of the scales and stay on their device. The optimizer
    moves them.

    Raises ValueError, listing the first few mismatches, if scales and model do not fit.
    """
    pairs = match(model, scales, partial, fake_quantized=True)
    return {site.conv.weight: value.grad_mult(site.conv.kernel_size) for site, value in pairs}


def branch_scales(
    model: nn.Module, scales: Mapping[str, BranchScales], *, partial: bool = False
) -> dict[nn.Parameter, BranchScales]:
    """Return {weight: BranchScales} of the plain `model`, for FusedRepAdamW, whose step Grad Mults do not determine.

    Weights, arguments and errors are those of `grad_mults`. The model is not changed.
    """
    return {site.conv.weight: value for site, value in match(model, scales, partial, fake_quantized=True)}
