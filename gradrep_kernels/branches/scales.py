"""Branch scales by the name of a conv or of its block: files, and matching with a model."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from gradrep_kernels.branch_scales import BranchScales
from gradrep_kernels.branches.algebra import has_shortcut
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

__all__ = ["Scales", "grad_mults", "load_scales", "match", "save_scales"]

Scales = dict[str, BranchScales]

_BIASES = (".scale_conv.bias", ".scale_1x1.bias", ".scale_identity.bias")
_GHOST_CONV = ".cheap_operation.1.weight"
_CONTAINERS = ("model", "state_dict", "model_state_dict")  # keys under which checkpoints hold a model's state_dict
# The branch that a key's ending names. Files are written with the first three; the others are those of the published
# RepOpt-GhostNet file.
_BRANCH_OF_SUFFIX = {
    ".scale_conv.weight": "conv",
    ".scale_1x1.weight": "1x1",
    ".scale_identity.weight": "identity",
    _GHOST_CONV: "conv",
    ".fusion_scale.weight": "identity",
}


def _checked(scales: Mapping[str, BranchScales]) -> Mapping[str, BranchScales]:
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
    channel count, and the identity is present exactly where the conv has a shortcut.
    """
    _checked(scales)
    if partial and not scales:
        raise ValueError("scales are empty: no convolution has any")
    refuse_blocks(model)
    found = survey(model, lambda name, conv: True, fake_quantized=fake_quantized)
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
    if has_shortcut(site.conv) and not value.has_identity and not partial:
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


def save_scales(scales: Mapping[str, BranchScales], path: str | os.PathLike[str]) -> None:
    """Write a flat dict of tensors [O] that `torch.load(weights_only=True)` reads.

    The keys are NAME.scale_conv.weight, NAME.scale_1x1.weight and NAME.scale_identity.weight. `identity=True` (a
    shortcut whose scale was not searched) is a tensor of no elements.

    The file is written under a temporary name first, so that `path` is whole or as it was.
    """
    flat: dict[str, Tensor] = {}
    for name, value in _checked(scales).items():
        tensors = dict(value.tensors())
        if value.identity is True:
            tensors["identity"] = value.kxk.new_empty(0)
        for branch, tensor in tensors.items():
            flat[f"{name}.scale_{branch}.weight"] = tensor.detach().cpu().clone()
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(flat, unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_scales(path: str | os.PathLike[str]) -> Scales:
    """Read a file of `save_scales`, one that the RepOptimizers authors published, or the checkpoint of a Hyper-Search.

    The tensors are on the CPU.

    The published files name blocks (`stage1.0`), not convs. Everything that takes scales accepts both. Prefixes of
    wrappers (`module.`) are taken off. In the RepOpt-GhostNet file `cheap_operation.1` is the k x k scale and
    `fusion_scale` the identity's.

    A checkpoint is any state_dict that holds such scales among other keys, bare or under 'model' or 'state_dict'. Never
    unpickles code (`weights_only=True`).

    Raises FileNotFoundError, or ValueError that lists the first few problems: no dict of tensors, no scales in it, the
    same branch twice, a block without a k x k scale, channel counts that differ in a block, NaN or inf.
    """
    path = Path(path)
    tensors, problems = _by_block(_read_flat(path))
    scales: Scales = {}
    for name, branches in tensors.items():
        if "conv" not in branches:
            problems.append(f"{name} has no scale_conv")
            continue
        identity = branches.get("identity", False)
        if isinstance(identity, Tensor) and identity.shape == (0,):
            identity = True
        try:
            scales[name] = BranchScales(branches["conv"], branches.get("1x1"), identity)
        except (TypeError, ValueError) as error:
            problems.append(f"{name}: {error}")
    if problems or not scales:
        raise ValueError(f"{path} is not a usable scales file: {first_few(problems) or 'it is empty'}")
    return scales


def _read_flat(path: Path) -> Mapping:
    if not path.is_file():
        raise FileNotFoundError(f"no scales file at {path}")
    try:
        flat = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not a scales file: it is not torch's, or holds more than tensors; code is never unpickled. "
            "If it is a checkpoint that holds a whole model, and you trust where it comes from, write its scales into "
            "a file of their own: "
            "csla.save_scales(csla.extract_scales(torch.load(path, weights_only=False)['model']), new)"
        ) from error
    except Exception as error:  # torch.load raises half a dozen unrelated classes for files that are not its own
        raise ValueError(f"{path} is not a scales file: torch.load cannot read it ({type(error).__name__})") from error
    if not isinstance(flat, Mapping):
        raise ValueError(
            f"{path} is not a scales file: it holds a {type(flat).__name__}, needed is a flat dict of tensors"
        )
    held = [flat, *(flat[key] for key in _CONTAINERS if isinstance(flat.get(key), Mapping))]
    return next((part for part in held if any(map(_branch_of, part))), held[1] if len(held) > 1 else flat)


def _branch_of(key: object) -> tuple[str, str] | None:
    """Split a key into (name of the block, branch). None: it is no scale's."""
    suffix = next((suffix for suffix in _BRANCH_OF_SUFFIX if isinstance(key, str) and key.endswith(suffix)), None)
    name = saved_name(key.removesuffix(suffix)) if suffix else ""
    return (name, _BRANCH_OF_SUFFIX[suffix]) if name else None


def _by_block(flat: Mapping) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Sort a file into {name: {branch: tensor}}, and list the problems with its keys.

    Where there are scales, other keys are those of a checkpoint and are passed over.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    problems, others = [], []
    # In a GhostNet without scales `cheap_operation.1` is a norm.
    fused = {name for name, branch in filter(None, map(_branch_of, flat)) if branch == "identity"}
    for key, tensor in flat.items():
        name, branch = _branch_of(key) or ("", "")
        if isinstance(key, str) and key.endswith(_BIASES) and isinstance(tensor, Tensor) and bool((tensor != 0).any()):
            problems.append(f"{key} is not 0: a bias behind a scale is no part of a CSLA block")
        elif not name or (key.endswith(_GHOST_CONV) and name not in fused):
            others.append(f"unknown key {key!r}")
        elif not isinstance(tensor, Tensor):
            problems.append(f"{key} is a {type(tensor).__name__}, not a tensor")
        elif branch in tensors.setdefault(name, {}):
            problems.append(f"{key} is the second {branch} scale of {name}")
        else:
            tensors[name][branch] = tensor
    if not tensors and others:
        others[0] = f"it has no branch scales: {others[0]}"
    return tensors, problems or ([] if tensors else others)
