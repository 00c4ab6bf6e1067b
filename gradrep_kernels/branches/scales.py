"""Scales: {name of a convolution or of its block: BranchScales}, their files, and how they meet a model."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from gradrep_kernels.branch_scales import BranchScales
from gradrep_kernels.branches.algebra import has_shortcut
from gradrep_kernels.branches.csla import CSLABlock
from gradrep_kernels.branches.sites import Site, conv_sites, first_few, unwrap
from gradrep_kernels.grad_mult import GradMult

__all__ = ["Scales", "extract_scales", "grad_mults", "load_scales", "match", "save_scales"]

Scales = dict[str, BranchScales]

# What a key ends with -> the branch. The first of a branch is written; the others are the published RepOpt-GhostNet file's.
_SUFFIXES = {
    ".scale_conv.weight": "conv",
    ".scale_1x1.weight": "1x1",
    ".scale_identity.weight": "identity",
    ".cheap_operation.1.weight": "conv",
    ".fusion_scale.weight": "identity",
}


def extract_scales(model: nn.Module) -> Scales:
    """The scales of a Hyper-Search or CSLA model, by the name of the convolution that each block replaced; copies.

    Raises ValueError where there is no such block, or where a scale is NaN or inf (the search diverged).
    """
    scales: Scales = {}
    problems = []
    for name, module in unwrap(model).named_modules():
        if isinstance(module, CSLABlock):
            try:
                scales[name] = module.scales()
            except ValueError as error:
                problems.append(f"{name}: {error}")
    if problems:
        raise ValueError(f"the model's scales cannot be used: {first_few(problems)}")
    if not scales:
        raise ValueError("model holds no Hyper-Search or CSLA block")
    return scales


def _checked(scales: Mapping[str, BranchScales]) -> Mapping[str, BranchScales]:
    if not isinstance(scales, Mapping):
        raise TypeError(
            f"scales must map names to BranchScales, got {type(scales).__name__}; load_scales(path) reads a file"
        )
    for name, value in scales.items():
        if not isinstance(name, str) or not isinstance(value, BranchScales):
            raise TypeError(f"scales must map names to BranchScales, got {name!r}: {type(value).__name__}")
    return scales


def match(model: nn.Module, scales: Mapping[str, BranchScales]) -> list[tuple[Site, BranchScales]]:
    """The scales of each convolution of `model` that stands for a CSLA block, in module order.

    A name is that of the conv module, or of any module above it that holds no second such conv: the published files say
    `stage1.0` for `stage1.0.conv`. Raises ValueError, listing the first few mismatches, unless every name meets one conv,
    every conv has scales of its channel count, and the identity is present exactly where the conv has a shortcut.
    """
    sites = conv_sites(model)
    below: dict[str, list[Site]] = {}
    for site in sites:
        parts = site.name.split(".")
        for n in range(1, len(parts) + 1):
            below.setdefault(".".join(parts[:n]), []).append(site)
    found: dict[str, BranchScales] = {}
    problems = []
    for name, value in _checked(scales).items():
        here = below.get(name, [])
        if len(here) != 1:
            problems.append(
                f"{name}: holds {len(here)} convs, one is needed"
                if here
                else f"{name}: unexpected, the model has no such conv"
            )
            continue
        conv = here[0].conv
        if here[0].name in found:
            problems.append(f"{name}: {here[0].name} has scales under another name already")
        elif value.channels != conv.out_channels:
            problems.append(f"{name}: scales of {value.channels} channels, {here[0].name} has {conv.out_channels}")
        elif value.has_identity != has_shortcut(conv):
            problems.append(f"{name}: {'an identity scale' if value.has_identity else 'no identity scale'}, but {here[0].name} has "
                            f"{'no shortcut' if value.has_identity else 'one'}")  # fmt: skip
        found[here[0].name] = value
    problems += [f"{site.name}: missing" for site in sites if site.name not in found]
    if problems:
        raise ValueError(f"the scales do not fit the model, {len(problems)} mismatches: {first_few(problems)}")
    return [(site, found[site.name]) for site in sites]


def grad_mults(model: nn.Module, scales: Mapping[str, BranchScales]) -> dict[nn.Parameter, GradMult]:
    """{weight: Grad Mult} for FusedRepSGD (RepOptimizers, Eq. 3), of the plain `model`; it is not changed.

    The multipliers have the dtype of the scales and stay on their device; the optimizer moves them.
    Raises ValueError, listing the first few mismatches, where scales and model do not fit.
    """
    return {site.conv.weight: value.grad_mult(site.conv.kernel_size) for site, value in match(unwrap(model), scales)}


def save_scales(scales: Mapping[str, BranchScales], path: str | os.PathLike[str]) -> None:
    """Write a flat dict of tensors [O] that `torch.load(weights_only=True)` reads: NAME.scale_conv.weight, NAME.scale_1x1.weight,
    NAME.scale_identity.weight. `identity=True` (a shortcut whose scale was not searched) is a tensor of no elements.

    Written under a temporary name first, so that `path` is whole or as it was.
    """
    flat: dict[str, Tensor] = {}
    for name, value in _checked(scales).items():
        tensors = dict(value.tensors())
        if value.identity is True:
            tensors["identity"] = value.kxk.new_empty(0)
        flat.update(
            {f"{name}.scale_{branch}.weight": tensor.detach().cpu().clone() for branch, tensor in tensors.items()}
        )
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(flat, unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_scales(path: str | os.PathLike[str]) -> Scales:
    """Read what `save_scales` wrote, or one of the files that the RepOptimizers authors published; on the CPU.

    The published files name blocks (`stage1.0`), not convs; `match` accepts both. A `module.` prefix is taken off. In the
    RepOpt-GhostNet file `cheap_operation.1` is the k x k scale and `fusion_scale` the identity's.
    Never unpickles code (`weights_only=True`).

    Raises FileNotFoundError, or ValueError that lists the first few problems: not a flat dict of tensors, unknown keys,
    the same branch twice, a block without a k x k scale, channel counts that differ in a block, NaN or inf.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no scales file at {path}")
    try:
        flat = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not a scales file: it is not torch's, or holds more than tensors; code is never unpickled"
        ) from error
    except Exception as error:  # torch.load raises half a dozen unrelated classes for what is not its file
        raise ValueError(f"{path} is not a scales file: torch.load cannot read it ({type(error).__name__})") from error
    if not isinstance(flat, Mapping):
        raise ValueError(
            f"{path} is not a scales file: it holds a {type(flat).__name__}, needed is a flat dict of tensors"
        )
    branches: dict[str, dict[str, Tensor]] = {}
    problems = []
    for key, tensor in flat.items():
        suffix = next((suffix for suffix in _SUFFIXES if isinstance(key, str) and key.endswith(suffix)), None)
        name = key.removesuffix(suffix).removeprefix("module.") if suffix else ""
        if not name:
            problems.append(f"unknown key {key!r}")
        elif not isinstance(tensor, Tensor):
            problems.append(f"{key} is a {type(tensor).__name__}, not a tensor")
        elif _SUFFIXES[suffix] in branches.setdefault(name, {}):
            problems.append(f"{key} is the second {_SUFFIXES[suffix]} scale of {name}")
        else:
            branches[name][_SUFFIXES[suffix]] = tensor
    scales: Scales = {}
    for name, tensors in branches.items():
        if "conv" not in tensors:
            problems.append(f"{name} has no scale_conv")
            continue
        identity = tensors.get("identity", False)
        if isinstance(identity, Tensor) and identity.shape == (0,):
            identity = True
        try:
            scales[name] = BranchScales(tensors["conv"], tensors.get("1x1"), identity)
        except (TypeError, ValueError) as error:
            problems.append(f"{name}: {error}")
    if problems or not scales:
        raise ValueError(f"{path} is not a usable scales file: {first_few(problems) or 'it is empty'}")
    return scales
