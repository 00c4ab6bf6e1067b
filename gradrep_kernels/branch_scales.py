"""The branch scales α of one CSLA block, and the Grad Mult that follows from them.

Source: RepOptimizers (Ding et al., 2023), section 3.2, Eq. 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradrep_kernels.grad_mult import GradMult, constant_copy, span

__all__ = ["BranchScales"]


class BranchScales:
    """The branch scales α of one CSLA block (RepOptimizers, section 3.2).

    Args:
        kxk:        [O], behind the k x k convolution (s in the paper), of any sign.
        one_by_one: [O] or None, behind the 1 x 1 convolution (t in the paper), of any sign.
        identity:   True or False, or the searched scale of the identity branch [O].

    All are copied, and keep float32 or float64 (lower precision and integers are raised to float32).

    Raises:
        TypeError:  not a tensor, complex or sparse.
        ValueError: NaN or inf, not one number per channel, or unlike numbers of channels.
    """

    __slots__ = ("identity", "kxk", "one_by_one")

    def __init__(self, kxk: Tensor, one_by_one: Tensor | None = None, identity: bool | Tensor = False):
        self.kxk = self._vector("kxk", kxk, None)
        self.one_by_one = None if one_by_one is None else self._vector("one_by_one", one_by_one, self.channels)
        if identity is None:
            identity = False
        if not isinstance(identity, (bool, Tensor)):
            raise TypeError(f"identity must be a bool or a Tensor [O], got {type(identity).__name__}")
        self.identity = identity if isinstance(identity, bool) else self._vector("identity", identity, self.channels)

    @staticmethod
    def _vector(name: str, value: Tensor, channels: int | None) -> Tensor:
        vector = constant_copy(name, value)
        if vector.dim() != 1:
            raise ValueError(f"{name} must have shape [O], got {list(vector.shape)}")
        if channels is not None and vector.numel() != channels:
            raise ValueError(f"{name} has {vector.numel()} channels, kxk has {channels}")
        return vector

    @property
    def channels(self) -> int:
        return self.kxk.numel()

    @property
    def has_identity(self) -> bool:
        return self.identity is not False

    def grad_mult(self, kernel_size: int | tuple[int, int]) -> GradMult:
        """Return the Grad Mult of the block (Eq. 3).

        Its multiplier scale [O, 1, kh, kw] is s² on every tap, + t² at the centre, formed in float64 and rounded once
        to the dtype of the branch scales. Its identity [O] is 1 where the block has the identity branch, whose
        trainable scale has the constant factor 1, whatever its searched value.

        Raises ValueError for a kernel that is not odd, and where the squares overflow.
        """
        sides = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        if len(sides) != 2:
            raise ValueError(f"kernel_size must be a number or (rows, columns), got {kernel_size!r}")
        kh, kw = sides
        if kh < 1 or kw < 1 or kh % 2 == 0 or kw % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kh} x {kw}")
        squares = self.kxk.double().square().reshape(-1, 1, 1, 1).repeat(1, 1, kh, kw)
        if self.one_by_one is not None:
            squares[:, 0, kh // 2, kw // 2] += self.one_by_one.double().square()
        dtype = self.kxk.dtype
        if self.one_by_one is not None:
            dtype = torch.promote_types(dtype, self.one_by_one.dtype)
        scale = squares.to(dtype)
        if not bool(torch.isfinite(scale).all()):
            raise ValueError(f"the squares of the scales overflow {dtype}")
        return GradMult.of_parts(scale, torch.ones_like(self.kxk, dtype=dtype) if self.has_identity else None)

    def tensors(self) -> dict[str, Tensor]:
        """Return the searched tensors by the names of the published files: conv, 1x1, identity."""
        named = {"conv": self.kxk, "1x1": self.one_by_one, "identity": self.identity}
        return {name: t for name, t in named.items() if isinstance(t, Tensor)}

    def __repr__(self) -> str:
        """Tell the branches, and the mean and range of the scales of each. On a GPU it waits for the values."""
        try:
            named = [("kxk", self.kxk), ("one_by_one", self.one_by_one), ("identity", self.identity)]
            branches = [
                f"{name} not searched" if value is True else f"{name} {_mean(value)} ({span(value)})"
                for name, value in named
                if value is not None and value is not False
            ]
            return f"BranchScales([{self.channels}]: {', '.join(branches)})"
        except AttributeError:  # in a traceback of the constructor it has not all attributes yet
            return "BranchScales(not whole)"


def _mean(values: Tensor) -> str:
    try:
        return f"{float(values.detach().double().mean()):.3g}"
    except Exception:  # meta tensors, fake tensors, a lost device
        return "?"
