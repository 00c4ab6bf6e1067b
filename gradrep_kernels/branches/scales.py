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
from gradrep_kernels.branches.sites import Site, conv_sites, first_few, unwrap
from gradrep_kernels.grad_mult import GradMult

__all__ = ["Scales", "grad_mults", "load_scales", "match", "save_scales"]

Scales = dict[str, BranchScales]

# The branch that a key's ending names. Files are written with the first three; the others are those of the published
# RepOpt-GhostNet file.
_BRANCH_OF_SUFFIX = {
    ".scale_conv.weight": "conv",
    ".scale_1x1.weight": "1x1",
    ".scale_identity.weight": "identity",
    ".cheap_operation.1.weight": "conv",
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


def match(model: nn.Module, scales: Mapping[str, BranchScales]) -> list[tuple[Site, BranchScales]]:
    """Pair the convolutions of `model` with their branch scales, in module order.

    The convolutions are those that a CSLA block can stand for. A name is that of the conv module, or of any module
    above it that holds no second such conv: the published files say `stage1.0` for `stage1.0.conv`.

    Raises ValueError, listing the first few mismatches, unless every name meets one conv, every conv has scales of its
    channel count, and the identity is present exactly where the conv has a shortcut.
    """
    sites = conv_sites(model)
    sites_below: dict[str, list[Site]] = {}
    for site in sites:
        parts = site.name.split(".")
        for n in range(1, len(parts) + 1):
            sites_below.setdefault(".".join(parts[:n]), []).append(site)
    by_site: dict[str, BranchScales] = {}
    problems = []
    for name, value in _checked(scales).items():
        below = sites_below.get(name, [])
        if not below:
            problems.append(f"{name}: unexpected, the model has no such conv")
        elif len(below) > 1:
            problems.append(f"{name}: holds {len(below)} convs, one is needed")
        else:
            problem = _misfit(value, below[0], taken=below[0].name in by_site)
            if problem:
                problems.append(f"{name}: {problem}")
            by_site[below[0].name] = value
    problems += [f"{site.name}: missing" for site in sites if site.name not in by_site]
    if problems:
        raise ValueError(f"the scales do not fit the model, {len(problems)} mismatches: {first_few(problems)}")
    return [(site, by_site[site.name]) for site in sites]


def _misfit(value: BranchScales, site: Site, taken: bool) -> str | None:
    """Say why these branch scales cannot be those of `site`. None: they can."""
    channels = site.conv.out_channels
    if taken:
        return f"{site.name} has scales under another name already"
    if value.channels != channels:
        return f"scales of {value.channels} channels, {site.name} has {channels}"
    if value.has_identity and not has_shortcut(site.conv):
        return f"an identity scale, but {site.name} has no shortcut"
    if has_shortcut(site.conv) and not value.has_identity:
        return f"no identity scale, but {site.name} has one"
    return None


def grad_mults(model: nn.Module, scales: Mapping[str, BranchScales]) -> dict[nn.Parameter, GradMult]:
    """Return {weight: Grad Mult} of the plain `model`, for FusedRepSGD (RepOptimizers, Eq. 3).

    The model is not changed. The multipliers have the dtype of the scales and stay on their device. The optimizer
    moves them.

    Raises ValueError, listing the first few mismatches, if scales and model do not fit.
    """
    return {site.conv.weight: value.grad_mult(site.conv.kernel_size) for site, value in match(unwrap(model), scales)}


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
    """Read a file of `save_scales`, or one that the RepOptimizers authors published.

    The tensors are on the CPU.

    The published files name blocks (`stage1.0`), not convs. Everything that takes scales accepts both. A `module.`
    prefix is taken off. In the RepOpt-GhostNet file `cheap_operation.1` is the k x k scale and `fusion_scale` the
    identity's. Never unpickles code (`weights_only=True`).

    Raises FileNotFoundError, or ValueError that lists the first few problems: not a flat dict of tensors, unknown keys,
    the same branch twice, a block without a k x k scale, channel counts that differ in a block, NaN or inf.
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
            f"{path} is not a scales file: it is not torch's, or holds more than tensors; code is never unpickled"
        ) from error
    except Exception as error:  # torch.load raises half a dozen unrelated classes for files that are not its own
        raise ValueError(f"{path} is not a scales file: torch.load cannot read it ({type(error).__name__})") from error
    if not isinstance(flat, Mapping):
        raise ValueError(
            f"{path} is not a scales file: it holds a {type(flat).__name__}, needed is a flat dict of tensors"
        )
    return flat


def _by_block(flat: Mapping) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Sort a file into {name: {branch: tensor}}, and list the problems with its keys."""
    tensors: dict[str, dict[str, Tensor]] = {}
    problems = []
    for key, tensor in flat.items():
        suffix = next((suffix for suffix in _BRANCH_OF_SUFFIX if isinstance(key, str) and key.endswith(suffix)), None)
        name = key.removesuffix(suffix).removeprefix("module.") if suffix else ""
        if not name:
            problems.append(f"unknown key {key!r}")
            continue
        branch = _BRANCH_OF_SUFFIX[suffix]
        if not isinstance(tensor, Tensor):
            problems.append(f"{key} is a {type(tensor).__name__}, not a tensor")
        elif branch in tensors.setdefault(name, {}):
            problems.append(f"{key} is the second {branch} scale of {name}")
        else:
            tensors[name][branch] = tensor
    return tensors, problems
