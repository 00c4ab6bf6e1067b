"""The branch scales α of one CSLA block, and the Grad Mult that follows from them.

Source: RepOptimizers (Ding et al., 2023), section 3.2, Eq. 3. Blocks of more branches than the paper's follow the same
equation, since each parameter of a branch lands on one weight of the merged kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real

import torch
from torch import Tensor

from gradrep_kernels.grad_mult import GradMult, constant_copy, span

__all__ = ["Branch", "BranchScales", "branch_names", "kernel_sides"]


def kernel_sides(kernel_size: int | Sequence[int]) -> tuple[int, int]:
    """Return (rows, columns) of a kernel.

    Raises ValueError unless both are odd and above 0.
    """
    sides = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    if not isinstance(sides, Sequence) or len(sides) != 2 or not all(type(side) is int for side in sides):
        raise ValueError(f"kernel_size must be a number or (rows, columns), got {kernel_size!r}")
    kh, kw = sides
    if kh < 1 or kw < 1 or kh % 2 == 0 or kw % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kh} x {kw}")
    return kh, kw


def _vector(name: str, value: Tensor, channels: int | None) -> Tensor:
    vector = constant_copy(name, value)
    if vector.dim() != 1:
        raise ValueError(f"{name} must have shape [O], got {list(vector.shape)}")
    if channels is not None and vector.numel() != channels:
        raise ValueError(f"{name} has {vector.numel()} channels, kxk has {channels}")
    return vector


class Branch:
    """One convolution of a block beyond its k x k and its 1 x 1, centred on the k x k kernel.

    Args:
        scale:       [O], α behind the convolution, of any sign.
        kernel_size: rows and columns of its own kernel: a number, or (rows, columns). Both odd.
        dilation:    the distance of its taps, in taps of the k x k kernel. Where that convolution itself has dilation
                     d, the branch has d · dilation.

    The scale is copied, and keeps float32 or float64 (lower precision and integers are raised to float32).

    Raises:
        TypeError:  scale is not a tensor, complex or sparse.
        ValueError: scale has NaN or inf or is not [O], an even kernel, or a dilation that is no int of 1 or more.
    """

    __slots__ = ("dilation", "kernel_size", "scale")

    def __init__(self, scale: Tensor, kernel_size: int | tuple[int, int], dilation: int = 1):
        self.scale = _vector("scale", scale, None)
        self.kernel_size = kernel_sides(kernel_size)
        if type(dilation) is not int or dilation < 1:
            raise ValueError(f"dilation must be an int, 1 or more, got {dilation!r}")
        self.dilation = dilation

    @property
    def reach(self) -> tuple[int, int]:
        """The rows and columns of the k x k kernel between its outermost taps, these included."""
        rows, columns = self.kernel_size
        return (rows - 1) * self.dilation + 1, (columns - 1) * self.dilation + 1

    def mask(self, kernel_size: int | tuple[int, int]) -> Tensor:
        """Return which taps of a k x k kernel the branch reaches: bool [kh, kw], on the scale's device.

        Raises ValueError where one lies outside of the kernel.
        """
        (kh, kw), (rows, columns) = kernel_sides(kernel_size), self.reach
        if rows > kh or columns > kw:
            own = "{} x {}".format(*self.kernel_size) + f" of dilation {self.dilation}" * (self.dilation > 1)
            raise ValueError(f"a branch of {own} reaches {rows} x {columns} taps, more than the {kh} x {kw} kernel has")
        mask = torch.zeros(kh, kw, dtype=torch.bool, device=self.scale.device)
        top, left = (kh - rows) // 2, (kw - columns) // 2
        mask[top : top + rows : self.dilation, left : left + columns : self.dilation] = True
        return mask

    def __repr__(self) -> str:
        try:
            return f"Branch({branch_names([self])[0]}, {_mean(self.scale)} ({span(self.scale)}))"
        except AttributeError:  # in a traceback of the constructor it has not all attributes yet
            return "Branch(not whole)"


def branch_names(others: Iterable[Branch]) -> list[str]:
    """Name branches by their kernel, such as 3x3, 1x5 and 3x3_d2. The n-th of one name is NAME.n from n = 2 on."""
    names: list[str] = []
    seen: dict[str, int] = {}
    for branch in others:
        name = "{}x{}".format(*branch.kernel_size) + f"_d{branch.dilation}" * (branch.dilation > 1)
        seen[name] = seen.get(name, 1 if name == "1x1" else 0) + 1  # `one_by_one` is the first of 1x1
        names.append(name if seen[name] == 1 else f"{name}.{seen[name]}")
    return names


class BranchScales:
    """The branch scales α of one CSLA block (RepOptimizers, section 3.2).

    Args:
        kxk:        [O], behind the k x k convolution (s in the paper), of any sign.
        one_by_one: [O] or None, behind the 1 x 1 convolution (t in the paper), of any sign.
        identity:   True or False, or the searched scale of the identity branch [O].
        others:     a `Branch` for every further convolution: of another size, of dilated taps, or one more k x k.
        constant_identity: c of a branch c · x without parameters (QARepVGG, RepViT). It enters the initial kernel and
                    is no part of M.
        constant_average:  c of a branch c · AvgPool2d(x) without parameters (QARepVGG), whose window is the kernel
                    and counts the padding. It enters the initial kernel and is no part of M.

    Weight decay takes hold of the merged kernel as a whole, and so of constant branches too. With weight decay a block
    that has some is equal to one whose constants decay.

    Tensors are copied, and keep float32 or float64 (lower precision and integers are raised to float32).

    Raises:
        TypeError:  not a tensor, complex or sparse; `others` of another kind.
        ValueError: NaN or inf, not one number per channel, or unlike numbers of channels.
    """

    __slots__ = ("constant_average", "constant_identity", "identity", "kxk", "one_by_one", "others")

    def __init__(
        self,
        kxk: Tensor,
        one_by_one: Tensor | None = None,
        identity: bool | Tensor = False,
        *,
        others: Iterable[Branch] = (),
        constant_identity: float = 0.0,
        constant_average: float = 0.0,
    ):
        self.kxk = _vector("kxk", kxk, None)
        self.one_by_one = None if one_by_one is None else _vector("one_by_one", one_by_one, self.channels)
        if identity is None:
            identity = False
        if not isinstance(identity, (bool, Tensor)):
            raise TypeError(f"identity must be a bool or a Tensor [O], got {type(identity).__name__}")
        self.identity = identity if isinstance(identity, bool) else _vector("identity", identity, self.channels)
        self.others = self._branches(others)
        self.constant_identity = _constant("constant_identity", constant_identity)
        self.constant_average = _constant("constant_average", constant_average)

    def _branches(self, others: Iterable[Branch]) -> tuple[Branch, ...]:
        branches = tuple(others) if isinstance(others, Iterable) and not isinstance(others, Tensor) else (others,)
        for n, branch in enumerate(branches):
            if not isinstance(branch, Branch):
                raise TypeError(f"others[{n}] must be a Branch, got {type(branch).__name__}")
            if branch.scale.numel() != self.channels:
                raise ValueError(f"others[{n}] has {branch.scale.numel()} channels, kxk has {self.channels}")
        return branches

    def __getstate__(self) -> tuple[None, dict[str, object]]:
        """Leave out what the block does not have, so that versions without it read such pickles."""
        state = {name: getattr(self, name) for name in ("identity", "kxk", "one_by_one")}
        further = {name: getattr(self, name) for name in _FURTHER}
        return None, {**state, **{name: value for name, value in further.items() if value != _FURTHER[name]}}

    def __setstate__(self, state: tuple[None, dict[str, object]]) -> None:
        for name, value in {**_FURTHER, **state[1]}.items():
            setattr(self, name, value)

    @property
    def channels(self) -> int:
        return self.kxk.numel()

    @property
    def has_identity(self) -> bool:
        """Whether there is an identity branch with a trainable scale."""
        return self.identity is not False

    @property
    def is_general(self) -> bool:
        """Whether the block has more than the k x k, 1 x 1 and identity branches of the paper."""
        return bool(self.others or self.constant_identity or self.constant_average)

    def branches(self, kernel_size: int | tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
        """Return (scale [O], which taps it reaches: bool [kh, kw]) of every branch that is a convolution.

        They are k x k, then 1 x 1 where there is one, then `others`. The identity branch is not among them.

        Raises ValueError for a kernel that is not odd, and where a branch has taps outside of it.
        """
        kh, kw = kernel_sides(kernel_size)
        pairs = [(self.kxk, torch.ones(kh, kw, dtype=torch.bool, device=self.kxk.device))]
        if self.one_by_one is not None:
            pairs.append((self.one_by_one, Branch(self.one_by_one, 1).mask((kh, kw))))
        for name, branch in zip(branch_names(self.others), self.others):
            try:
                pairs.append((branch.scale, branch.mask((kh, kw))))
            except ValueError as error:
                raise ValueError(f"others: {name}: {error}") from None
        return pairs

    def grad_mult(self, kernel_size: int | tuple[int, int]) -> GradMult:
        """Return the Grad Mult of the block (Eq. 3).

        Its multiplier scale [O, 1, kh, kw] is Σ α² over the branches that reach a tap: s² on every tap, + t² at the
        centre, + α² of every further branch on its taps. It is formed in float64 and rounded once to the dtype of the
        branch scales. Its identity [O] is 1 where the block has the identity branch, whose trainable scale has the
        constant factor 1, whatever its searched value.

        The weight of an nn.Linear has kernel size 1. Of its [O, 1, 1, 1] take `GradMult(m.scale.flatten(1))`.

        Raises ValueError for a kernel that is not odd, where a branch has taps outside of it, and where the squares
        overflow.
        """
        kh, kw = kernel_sides(kernel_size)
        pairs = self.branches((kh, kw))
        squares = torch.zeros(self.channels, 1, kh, kw, dtype=torch.float64, device=self.kxk.device)
        dtype = self.kxk.dtype
        for scale, mask in pairs:
            squares[:, 0, mask] += scale.double().square()[:, None]
            dtype = torch.promote_types(dtype, scale.dtype)
        scale = squares.to(dtype)
        if not bool(torch.isfinite(scale).all()):
            raise ValueError(f"the squares of the scales overflow {dtype}")
        return GradMult.of_parts(scale, torch.ones_like(self.kxk, dtype=dtype) if self.has_identity else None)

    def tensors(self) -> dict[str, Tensor]:
        """Return the searched tensors by name.

        Those of the published files are conv, 1x1, identity. Further branches follow by their kernel and dilation,
        such as 5x5, 1x3 and 3x3_d2. The n-th of one name is NAME.n from n = 2 on.
        """
        named = {"conv": self.kxk, "1x1": self.one_by_one, "identity": self.identity}
        named |= dict(zip(branch_names(self.others), (branch.scale for branch in self.others)))
        return {name: t for name, t in named.items() if isinstance(t, Tensor)}

    def mapped(self, change: Callable[[Tensor], Tensor]) -> BranchScales:
        """Return scales of the same branches whose tensors are `change(tensor)`, in the order of `tensors`."""
        new = {name: change(tensor) for name, tensor in self.tensors().items()}
        return BranchScales(
            new["conv"],
            new.get("1x1"),
            new.get("identity", self.identity),
            others=[
                Branch(new[name], branch.kernel_size, branch.dilation)
                for name, branch in zip(branch_names(self.others), self.others)
            ],
            constant_identity=self.constant_identity,
            constant_average=self.constant_average,
        )

    def __repr__(self) -> str:
        """Tell the branches, and the mean and range of the scales of each. On a GPU it waits for the values."""
        try:
            named = [("kxk", self.kxk), ("one_by_one", self.one_by_one), ("identity", self.identity)]
            named += zip(branch_names(self.others), (branch.scale for branch in self.others))
            branches = [
                f"{name} not searched" if value is True else f"{name} {_mean(value)} ({span(value)})"
                for name, value in named
                if value is not None and value is not False
            ]
            branches += [f"{name} {getattr(self, name):.3g}" for name in _CONSTANTS if getattr(self, name)]
            return f"BranchScales([{self.channels}]: {', '.join(branches)})"
        except AttributeError:  # in a traceback of the constructor it has not all attributes yet
            return "BranchScales(not whole)"


_CONSTANTS = ("constant_identity", "constant_average")
_FURTHER = {"others": (), "constant_identity": 0.0, "constant_average": 0.0}  # pickles may lack them


def _constant(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def _mean(values: Tensor) -> str:
    try:
        return f"{float(values.detach().double().mean()):.3g}"
    except Exception:  # meta tensors, fake tensors, a lost device
        return "?"
