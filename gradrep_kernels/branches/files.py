"""Files of branch scales: those of this package, the published ones, and checkpoints that hold some."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gradrep_kernels.branch_scales import Branch, BranchScales
from gradrep_kernels.branches.scales import Scales, checked
from gradrep_kernels.messages import first_few
from gradrep_kernels.wrappers import saved_name

__all__ = ["load_scales", "save_scales"]

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
# Files with further or constant branches are no flat dict, so that versions before them say that they hold no scales.
_VERSION, _NEWEST, _BLOCKS = "scales_version", 2, "blocks"
_CONSTANTS = ("constant_identity", "constant_average")
# Keys of a block with further branches in a Hyper-Search's state_dict.
_FURTHER_KEY = re.compile(r"(.+)\.(?:others\.(\d+)\.(scale\.weight|layout)|constants)")


def save_scales(scales: Mapping[str, BranchScales], path: str | os.PathLike[str]) -> None:
    """Write a flat dict of tensors [O] that `torch.load(weights_only=True)` reads.

    The keys are NAME.scale_conv.weight, NAME.scale_1x1.weight and NAME.scale_identity.weight. `identity=True` (a
    shortcut whose scale was not searched) is a tensor of no elements.

    Where any block has further or constant branches, the file holds 'scales_version': 2 and 'blocks': {NAME: {'conv',
    '1x1', 'identity', 'others': [{'scale', 'kernel_size', 'dilation'}], 'constant_identity', 'constant_average'}}
    instead, without what a block does not have. Versions of this package that know no such branches refuse it.

    The file is written under a temporary name first, so that `path` is whole or as it was.
    """
    scales = checked(scales)
    content = _nested(scales) if any(value.is_general for value in scales.values()) else _flat(scales)
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(content, unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _flat(scales: Mapping[str, BranchScales]) -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for name, value in scales.items():
        tensors = dict(value.tensors())
        if value.identity is True:
            tensors["identity"] = value.kxk.new_empty(0)
        for branch, tensor in tensors.items():
            flat[f"{name}.scale_{branch}.weight"] = tensor.detach().cpu().clone()
    return flat


def _nested(scales: Mapping[str, BranchScales]) -> dict[str, object]:
    blocks = {}
    for name, value in scales.items():
        own = value.mapped(lambda t: t.detach().cpu())
        block: dict[str, object] = {"conv": own.kxk}
        if own.one_by_one is not None:
            block["1x1"] = own.one_by_one
        if own.has_identity:
            block["identity"] = own.identity
        if own.others:
            block["others"] = [
                {"scale": branch.scale, "kernel_size": branch.kernel_size, "dilation": branch.dilation}
                for branch in own.others
            ]
        block |= {key: getattr(own, key) for key in _CONSTANTS if getattr(own, key)}
        blocks[name] = block
    return {_VERSION: _NEWEST, _BLOCKS: blocks}


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
    content = _read(path)
    blocks, problems = _of_version(content) if _VERSION in content else _by_block(content)
    scales: Scales = {}
    for name, parts in blocks.items():
        if "conv" not in parts:
            problems.append(f"{name} has no scale_conv")
            continue
        try:
            scales[name] = _scales_of(parts)
        except (TypeError, ValueError) as error:
            problems.append(f"{name}: {error}")
    if problems or not scales:
        raise ValueError(f"{path} is not a usable scales file: {first_few(problems) or 'it is empty'}")
    return scales


def _scales_of(parts: Mapping[str, object]) -> BranchScales:
    """Make the scales of one block from its parts, named as in a file of version 2."""
    known = {"conv", "1x1", "identity", "others", *_CONSTANTS}
    if unknown := [str(key) for key in parts if key not in known]:
        raise ValueError(f"unknown parts {', '.join(unknown)}")
    identity = parts.get("identity", False)
    if isinstance(identity, Tensor) and identity.shape == (0,):
        identity = True
    others = []
    for n, part in enumerate(parts.get("others", ())):
        if not isinstance(part, Mapping) or set(part) != {"scale", "kernel_size", "dilation"}:
            raise ValueError(f"others[{n}] has not exactly scale, kernel_size and dilation")
        try:
            others.append(Branch(part["scale"], part["kernel_size"], part["dilation"]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"others[{n}]: {error}") from None
    constants = {key: parts[key] for key in _CONSTANTS if key in parts}
    return BranchScales(parts["conv"], parts.get("1x1"), identity, others=others, **constants)


def _of_version(content: Mapping) -> tuple[Mapping[str, Mapping], list[str]]:
    """Return the blocks of a file that names its version, and what is wrong with it."""
    version, blocks = content[_VERSION], content.get(_BLOCKS)
    if isinstance(version, Tensor) or version != _NEWEST:
        return {}, [f"its {_VERSION} is {version!r}, this gradrep_kernels reads {_NEWEST} and files without one"]
    if not isinstance(blocks, Mapping):
        return {}, [f"it has no {_BLOCKS!r}"]
    problems = [
        f"{name!r} is no name of a block" if not isinstance(name, str) else f"{name} is a {type(parts).__name__}"
        for name, parts in blocks.items()
        if not isinstance(name, str) or not isinstance(parts, Mapping)
    ]
    return {} if problems else blocks, problems


def _read(path: Path) -> Mapping:
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
    if _VERSION in flat:
        return flat
    held = [flat, *(flat[key] for key in _CONTAINERS if isinstance(flat.get(key), Mapping))]
    return next((part for part in held if any(map(_branch_of, part))), held[1] if len(held) > 1 else flat)


def _branch_of(key: object) -> tuple[str, str] | None:
    """Split a key into (name of the block, branch). None: it is no scale's."""
    suffix = next((suffix for suffix in _BRANCH_OF_SUFFIX if isinstance(key, str) and key.endswith(suffix)), None)
    name = saved_name(key.removesuffix(suffix)) if suffix else ""
    return (name, _BRANCH_OF_SUFFIX[suffix]) if name else None


def _by_block(flat: Mapping) -> tuple[dict[str, dict[str, object]], list[str]]:
    """Sort a flat file into {name: parts of the block}, and list the problems with its keys.

    Where there are scales, other keys are those of a checkpoint and are passed over.
    """
    tensors: dict[str, dict[str, object]] = {}
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
    problems += _add_further(flat, tensors)
    if not tensors and others:
        others[0] = f"it has no branch scales: {others[0]}"
    return tensors, problems or ([] if tensors else others)


def _add_further(flat: Mapping, blocks: dict[str, dict[str, object]]) -> list[str]:
    """Add the further and constant branches of a state_dict to its blocks, and list what is wrong with them."""
    problems = []
    further: dict[str, dict[int, dict[str, object]]] = {}
    for key, tensor in flat.items():
        match = _FURTHER_KEY.fullmatch(key) if isinstance(key, str) else None
        name = saved_name(match[1]) if match else None
        if name not in blocks:
            continue
        if not isinstance(tensor, Tensor):
            problems.append(f"{key} is a {type(tensor).__name__}, not a tensor")
        elif match[2] is None:
            if tensor.shape != (2,):
                problems.append(f"{key} must have shape [2], got {list(tensor.shape)}")
            else:
                blocks[name].update(zip(_CONSTANTS, tensor.tolist()))
        elif match[3] == "layout":
            if tensor.shape != (3,) or tensor.is_floating_point():
                problems.append(f"{key} must hold kernel rows, kernel columns and dilation")
            else:
                rows, columns, dilation = tensor.tolist()
                part = further.setdefault(name, {}).setdefault(int(match[2]), {})
                part.update(kernel_size=(rows, columns), dilation=dilation)
        else:
            further.setdefault(name, {}).setdefault(int(match[2]), {})["scale"] = tensor
    for name, numbered in further.items():
        lacking = [n for n in range(max(numbered)) if n not in numbered]
        if lacking:
            problems.append(f"{name} has no further branch {lacking[0]}, but one of number {max(numbered)}")
        blocks[name]["others"] = [numbered[n] for n in sorted(numbered)]
    return problems
