"""A report of which convolutions of a model have blocks or scales, and why the others have none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from gradrep_kernels.branch_scales import BranchScales, branch_names
from gradrep_kernels.branches.csla import CSLABlock
from gradrep_kernels.branches.presets import Branches, kernel_text, layout_of
from gradrep_kernels.branches.scales import match
from gradrep_kernels.branches.sites import Where, convs_and_siblings, is_kxk, multi_branch_blocks, survey

__all__ = ["Coverage", "coverage"]


@dataclass(frozen=True, repr=False)
class Coverage:
    """Which convolutions are converted, by name, in module order. `str` is a table of one line per convolution."""

    converted: dict[str, str]  # name: what stands for it
    left: dict[str, str]  # name: why it stays plain
    kernels: dict[str, tuple[int, int]]  # of all
    what: str = "have branches"

    @property
    def counts(self) -> tuple[int, int]:
        """(converted, all) of the convolutions with an odd k x k kernel, k > 1."""
        large = {name for name, sides in self.kernels.items() if is_kxk(sides)}
        return len(large & self.converted.keys()), len(large)

    def __str__(self) -> str:
        width = max(map(len, self.kernels), default=0)
        lines = ["{} of {} k x k convolutions {}".format(*self.counts, self.what)]
        for name, (rows, columns) in self.kernels.items():
            said = self.converted.get(name) or f"plain: {self.left[name]}"
            lines.append(f"  {name:<{width}}  {rows} x {columns}  {said}")
        return "\n".join(lines)

    __repr__ = __str__


def coverage(
    model: nn.Module,
    scales: Mapping[str, BranchScales] | None = None,
    *,
    where: Where | None = None,
    branches: Branches = "repvgg",
) -> Coverage:
    """List every nn.Conv2d of a model: whether it has branches, would get them, or why not.

    - A model with blocks (Hyper-Search, CSLA, or blocks of other code): what has been converted.
    - A plain model: what `hyper_search_model(model, branches=branches, where=where)` would convert.
    - A plain model and its scales: which convolutions have some, as `grad_mults(model, scales, partial=True)` takes
      them.

    Raises ValueError if scales, `where` or `branches` do not fit the model.
    """
    blocks = multi_branch_blocks(model)
    if blocks and scales is None and where is None:
        return _of_blocks(model, blocks)
    found = survey(model, where, fake_quantized=scales is not None)
    left = {name: reason for name, (_, reason) in found.left.items()}
    if scales is None:
        laid_out = {site.name: layout_of(branches, site.name, site.conv) for site in found.sites}
        converted = {name: str(layout) for name, layout in laid_out.items() if layout is not None}
        left |= {name: "`branches` leaves it plain" for name, layout in laid_out.items() if layout is None}
        what = "would get branches"
    else:
        matched = {site.name: value for site, value in match(model, scales, partial=True, fake_quantized=True)}
        left |= {site.name: "no scales" for site in found.sites}
        converted = {name: f"scales of {_listed(value)}" for name, value in matched.items()}
        what = "have scales"
    kernels = {name: tuple(conv.kernel_size) for name, conv in _convs(model)}
    return Coverage(converted, {n: r for n, r in left.items() if n not in converted}, kernels, what)


def _of_blocks(model: nn.Module, blocks: Mapping[str, nn.Module]) -> Coverage:
    """The coverage of a model that has been converted: a block counts as one convolution, its largest."""
    inside = {m for block in blocks.values() for m in block.modules()}
    converted, left, kernels = {}, {}, {}
    convs = {name: [m for m in block.modules() if isinstance(m, nn.Conv2d)] for name, block in blocks.items()}
    largest = {max(own, key=lambda m: math.prod(m.kernel_size)): name for name, own in convs.items() if own}
    plain = survey(model).left
    for name, conv in _convs(model):
        if conv in largest:
            name = largest[conv]
            converted[name] = f"a {type(blocks[name]).__name__} of {_branches_of(blocks[name])}"
        elif conv in inside:
            continue
        else:
            left[name] = plain[name][1] if name in plain else "not converted"
        kernels[name] = tuple(conv.kernel_size)
    return Coverage(converted, left, kernels)


def _convs(model: nn.Module) -> list[tuple[str, nn.Conv2d]]:
    return [(sibling.name or "the model itself", sibling.conv) for sibling in convs_and_siblings(model)]


def _branches_of(block: nn.Module) -> str:
    """List the kernels of a block, and the identity where a child is called so, as those of ours and of RepVGG are."""
    dilations: dict[nn.Module, int] = {}
    constants = []
    if isinstance(block, CSLABlock):
        dilations = {branch.conv: branch.dilation for branch in block.others or ()}
        if block.constants is not None:
            constants = ["constant identity"] * block.adds_input + ["constant average"] * (block.average is not None)
    convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    kernels = [kernel_text(conv.kernel_size, dilations.get(conv, 1)) for conv in convs]
    identity = any("identity" in name for name, _ in block.named_children())
    return ", ".join(kernels + ["identity"] * identity + constants)


def _listed(value: BranchScales) -> str:
    names = {"conv": "k x k", "1x1": "1 x 1", "identity": "identity"}
    others = dict(zip(branch_names(value.others), value.others))
    kernels = {name: kernel_text(branch.kernel_size, branch.dilation) for name, branch in others.items()}
    branches = [kernels.get(branch) or names[branch] for branch in value.tensors()]
    constants = ["constant identity"] * (value.constant_identity != 0)
    constants += ["constant average"] * (value.constant_average != 0)
    return ", ".join(branches + ["identity"] * (value.identity is True) + constants)
