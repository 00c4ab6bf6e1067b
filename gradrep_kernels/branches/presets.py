"""Which branches the blocks of a Hyper-Search have: presets by name, lists, and functions of (name, conv).

An elementwise multiplier exists exactly where every parameter of a branch lands on one weight of the merged kernel.
Branches that break this rule are refused with the reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gradrep_kernels.branch_scales import Branch, BranchScales, branch_names
from gradrep_kernels.branches.algebra import can_average, has_shortcut
from gradrep_kernels.branches.sites import Site, Where, conv_sites

__all__ = ["PRESETS", "Branches", "Kernel", "Layout", "kernel_text", "laid_out_sites", "layout_of", "preset"]

Branches = str | Sequence | Callable[[str, nn.Conv2d], "str | Sequence | None"]


def kernel_text(size: Sequence[int], dilation: int = 1) -> str:
    """Return a kernel in words, such as '3 x 3 of dilation 2'."""
    return "{} x {}".format(*size) + f" of dilation {dilation}" * (dilation > 1)


@dataclass(frozen=True)
class Kernel:
    """A convolution of a block: its kernel, and its scale where that is fixed and not searched."""

    size: tuple[int, int]
    dilation: int = 1
    fixed: float | None = None


@dataclass(frozen=True)
class Layout:
    """The branches of one block, before any of them has a scale."""

    kxk: Kernel
    one_by_one: Kernel | None = None
    others: tuple[Kernel, ...] = ()
    identity: bool = False
    constant_identity: float = 0.0
    constant_average: float = 0.0

    @property
    def has_any_identity(self) -> bool:
        return self.identity or self.constant_identity != 0

    @property
    def fixed(self) -> frozenset[str]:
        """The names, as of `BranchScales.tensors`, of scales that are not searched."""
        others = branch_names(self.scales(1, 1.0).others)
        named = [("conv", self.kxk), ("1x1", self.one_by_one), *zip(others, self.others)]
        return frozenset(name for name, kernel in named if kernel is not None and kernel.fixed is not None)

    @property
    def has_fixed(self) -> bool:
        """Whether some branch has a value that is not searched."""
        return bool(self.fixed or self.constant_identity or self.constant_average)

    def scales(self, channels: int, start: float) -> BranchScales:
        """Return the scales [channels] that a search starts from, float64."""

        def vector(kernel: Kernel) -> torch.Tensor:
            value = start if kernel.fixed is None else kernel.fixed
            return torch.full((channels,), float(value), dtype=torch.float64, device="cpu")

        return BranchScales(
            vector(self.kxk),
            None if self.one_by_one is None else vector(self.one_by_one),
            self.identity,
            others=[Branch(vector(kernel), kernel.size, kernel.dilation) for kernel in self.others],
            constant_identity=self.constant_identity,
            constant_average=self.constant_average,
        )

    def __str__(self) -> str:
        kernels = [kernel for kernel in (self.kxk, self.one_by_one, *self.others) if kernel is not None]
        parts = [kernel_text(kernel.size, kernel.dilation) for kernel in kernels]
        parts += ["identity"] * self.identity
        parts += ["constant identity"] * (self.constant_identity != 0)
        parts += ["constant average"] * (self.constant_average != 0)
        return ", ".join(parts)


# UniRepLKNet's published DilatedReparamBlock: k of the large kernel, then (k, dilation) of each branch beside it.
_UNIREPLK = {
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 2), (3, 3)),
    5: ((3, 1), (3, 2)),
}


def _unireplk(conv: nn.Conv2d) -> list:
    kh, kw = conv.kernel_size
    if kh != kw or kh not in _UNIREPLK:
        sizes = ", ".join(f"{k} x {k}" for k in sorted(_UNIREPLK))
        raise ValueError(f"unireplk has no branches for a {kh} x {kw} kernel, it has some for {sizes}")
    return ["kxk", *(((k, k), dilation) for k, dilation in _UNIREPLK[kh])]


def _replk(conv: nn.Conv2d, k: int) -> list:
    if k % 2 == 0 or k >= min(conv.kernel_size):
        kh, kw = conv.kernel_size
        raise ValueError(f"replk:K needs an odd K smaller than the kernel, got {k} for a {kh} x {kw} kernel")
    return ["kxk", (k, k)]


_PRESETS: dict[str, Callable[..., list]] = {
    "repvgg": lambda conv: ["kxk", "1x1", "identity"],
    "acb": lambda conv: ["kxk", "1xk", "kx1"],
    "repghost": lambda conv: ["kxk", "identity"],
    "mobileone:N": lambda conv, n: [*["kxk"] * n, "1x1", "identity"],
    "replk:K": _replk,
    "unireplk": _unireplk,
    "qarepvgg": lambda conv: ["kxk", "1x1=1", *["identity=1", "average=1"] * has_shortcut(conv)],
}

PRESETS = tuple(_PRESETS)
"""How the presets are written."""

_BILINEAR = (
    "a sequence of trained kernels is bilinear: its merged kernel is their product, and no constant multiplier of the "
    "gradient stands for it"
)
_SPREADS = "is linear but not elementwise: each of its parameters lands on every tap, so that M would mix the taps"
_WITHOUT_FORM = {
    "dbb": f"its average branch (1 x 1, then AvgPool) {_SPREADS}; its 1x1-kxk branch is bilinear, a product of kernels",
    "dbb-avg": f"the average branch (1 x 1, then AvgPool) {_SPREADS}",
    "average": f"an average pool behind trained parameters {_SPREADS}; 'average=VALUE' is one without parameters",
    "1x1-kxk": _BILINEAR,
    "kxk-1x1": _BILINEAR,
    "1x1-kxk-1x1": _BILINEAR,
    "dyrep": f"it grows DBB's branches, of which the average {_SPREADS}, and 1x1-kxk is bilinear",
}
_KERNEL = re.compile(r"(\d+|k)x(\d+|k)(?:_d(\d+))?")
_GRAMMAR = (
    "needed are 'kxk', '1x1', '1xk', '5x5', '3x3_d2' (dilation 2), k, (rows, columns), ((rows, columns), dilation), "
    "'identity', or a fixed 'KERNEL=VALUE', 'identity=VALUE', 'average=VALUE'"
)


def laid_out_sites(model: nn.Module, branches: Branches, where: Where | None) -> list[tuple[Site, Layout]]:
    """Return the convolutions that `where` chooses and `branches` does not leave plain, with their branches."""
    described = [(site, layout_of(branches, site.name, site.conv)) for site in conv_sites(model, where)]
    return [(site, layout) for site, layout in described if layout is not None]


def layout_of(branches: Branches, name: str, conv: nn.Conv2d) -> Layout | None:
    """Return the branches of the block in the place of `conv`. None: it stays plain.

    Args:
        branches: what `hyper_search_model` takes.
        name:     of the conv, for the function and for messages.

    Raises TypeError or ValueError for what is no description of branches, for branches without an exact form, and for
    those that do not lie inside the kernel.
    """
    described = branches
    if callable(branches):
        described = branches(name, conv)
        if described is None:
            return None
    if isinstance(described, str):
        described = _listed(described, conv, name)
    elif not isinstance(described, Sequence):
        raise TypeError(
            f"branches must be the name of a preset, a list of branches or a function of (name, conv), got "
            f"{type(described).__name__}"
        )
    try:
        return _layout(described, conv)
    except ValueError as error:
        raise ValueError(f"branches of {name or 'the model itself'}: {error}") from None


def preset(text: str) -> Callable[[nn.Conv2d], list]:
    """Return the function that lists the branches of a preset for a convolution, and raises ValueError if none fit.

    Raises ValueError, which begins with the word 'branches', for a name that is no preset.
    """
    word, _, number = text.partition(":")
    if text.lower() in _WITHOUT_FORM:
        raise ValueError(
            f"branches {text!r} have no exact form: {_WITHOUT_FORM[text.lower()]}. Train explicit blocks and merge them"
        )
    for written, make in _PRESETS.items():
        if written.partition(":")[0] != word:
            continue
        takes_number = ":" in written
        if takes_number != (":" in text) or (takes_number and not re.fullmatch(r"[1-9]\d*", number)):
            raise ValueError(f"branches: {written} is how this preset is written, got {text!r}")
        return (lambda conv, make=make: make(conv, int(number))) if takes_number else make
    meant = {"acnet": "acb", "ghost": "repghost", "kxk": "a list, ['kxk']"}.get(text.lower())
    hint = "" if meant is None else f": {meant} is meant?"
    raise ValueError(f"branches must be one of {', '.join(PRESETS)}, got {text!r}{hint}")


def _listed(text: str, conv: nn.Conv2d, name: str) -> list:
    make = preset(text)
    try:
        return make(conv)
    except ValueError as error:
        raise ValueError(
            f"branches of {name or 'the model itself'}: {error}; `where`, or None of a function, leaves it plain"
        ) from None


def _layout(described: Iterable, conv: nn.Conv2d) -> Layout:
    """Sort a list of branches. Identities and averages are left out where the conv has no place for them."""
    kernels: list[Kernel] = []
    sums = {"identity": False, "constant_identity": 0.0, "constant_average": 0.0}
    for part in described:
        kind, value = _parsed(part, conv)
        if isinstance(kind, Kernel):
            kernels.append(kind)
        elif kind == "identity" and value is None:
            if sums["identity"]:
                raise ValueError("'identity' stands twice; two trained ones have no use that one has not")
            sums["identity"] = True
        else:
            sums[f"constant_{kind}"] += value
    k = next((n for n, kernel in enumerate(kernels) if (kernel.size, kernel.dilation) == (conv.kernel_size, 1)), None)
    if k is None:
        raise ValueError("there is no 'kxk' among them, which takes the present weight")
    kxk = kernels.pop(k)
    one = next((n for n, kernel in enumerate(kernels) if kernel.size == (1, 1)), None)
    one_by_one = None if one is None else kernels.pop(one)
    if not has_shortcut(conv):
        sums.update(identity=False, constant_identity=0.0)
    if not can_average(conv):
        sums["constant_average"] = 0.0
    layout = Layout(kxk, one_by_one, tuple(kernels), **sums)
    layout.scales(1, 1.0).branches(conv.kernel_size)  # raises for taps outside of the kernel
    return layout


def _parsed(part: object, conv: nn.Conv2d) -> tuple[Kernel | str, float | None]:
    """Read one branch of a list: (Kernel, None), or ('identity' or 'average', its constant value or None)."""
    if isinstance(part, str):
        word, equals, number = part.partition("=")
        value = _number(number, part) if equals else None
        if word == "identity" or (word == "average" and equals):
            return word, value
        if part.lower() in _WITHOUT_FORM:
            raise ValueError(f"{part!r} has no exact form: {_WITHOUT_FORM[part.lower()]}")
        match = _KERNEL.fullmatch(word)
        if match is None:
            raise ValueError(f"{part!r} is no branch, {_GRAMMAR}")
        sides = (k if own == "k" else int(own) for own, k in zip(match.groups(), conv.kernel_size))
        size, dilation = tuple(sides), int(match[3] or 1)
    elif isinstance(part, Sequence) and len(part) == 2 and isinstance(part[0], Sequence):
        (size, dilation), value = part, None
    else:
        size, dilation, value = part, 1, None
    try:
        branch = Branch(torch.ones(1, device="cpu"), size, dilation)
    except ValueError as error:
        raise ValueError(f"{part!r} is no branch ({error}), {_GRAMMAR}") from None
    return Kernel(branch.kernel_size, branch.dilation, value), None


def _number(text: str, part: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{part!r} has no finite number behind '='")
    return value
