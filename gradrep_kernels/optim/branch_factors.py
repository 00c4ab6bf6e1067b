"""What AdamW's step multiplies by: the |α| of the branches that reach each tap, and G of SGS apart.

M = Σ α² alone does not determine an AdamW step. It is what the gradient norm of the CSLA model needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gradrep_kernels.branch_scales import Branch, BranchScales
from gradrep_kernels.grad_mult import GradMult

__all__ = ["BranchFactors"]


class BranchFactors:
    """The factors of a weight under AdamW.

    Args:
        scales:   the branch scales they come from. None: they come from none.
        alphas:   [B, ...]: B times |α| that broadcast to the weight, 0 on taps that no further branch reaches
        identity: [O] ones, or None
        spatial:  G, or None
        mult:     M, of which the gradient norm is made. None: Σ α², which is formed where it is asked for
    """

    __slots__ = ("_mult", "_stack", "identity", "scales", "spatial")

    def __init__(
        self,
        scales: BranchScales | None,
        alphas: Tensor,
        identity: Tensor | None = None,
        spatial: GradMult | None = None,
        mult: GradMult | None = None,
    ):
        self.scales, self.identity, self.spatial, self._mult = scales, identity, spatial, mult
        first = alphas.new_ones(()) if spatial is None else spatial.scale
        shape = torch.broadcast_shapes(first.shape, alphas.shape[1:])
        dtype = torch.promote_types(first.dtype, alphas.dtype)
        self._stack = torch.cat((first.to(dtype).expand(1, *shape), alphas.to(dtype).expand(-1, *shape))).contiguous()

    @classmethod
    def of(cls, scales: BranchScales, shape: torch.Size) -> BranchFactors:
        """Return those of a convolution's weight [O, I, kh, kw], or of a linear layer's [O, I].

        Raises ValueError where the scales do not fit.
        """
        if len(shape) not in (2, 4):
            raise ValueError(f"branch scales need a weight [O, I, kh, kw] or [O, I], got {list(shape)}")
        if scales.channels != shape[0]:
            raise ValueError(f"the scales have {scales.channels} channels, the weight has {shape[0]} output channels")
        if len(shape) == 2 and scales.has_identity:
            raise ValueError("an identity branch needs a convolution's weight [O, I, kh, kw]")
        kernel_size = (shape[2], shape[3]) if len(shape) == 4 else (1, 1)
        dtype = scales.grad_mult(kernel_size).dtype  # an error where the squares overflow
        alphas = _slots(scales.branches(kernel_size))
        if len(shape) == 2:
            alphas = alphas[:, :, :, 0, 0]
        ones = alphas.new_ones(scales.channels) if scales.has_identity else None
        factors = cls(scales, alphas.to(dtype), None if ones is None else ones.to(dtype))
        factors.mult.check(shape)
        return factors

    @classmethod
    def of_spatial(cls, spatial: GradMult, dims: int) -> BranchFactors:
        """Return those of a weight of `dims` dimensions without branches."""
        one = torch.ones((1,) * (1 + dims), dtype=spatial.dtype, device=spatial.device)
        return cls(None, one, None, spatial)

    def with_spatial(self, spatial: GradMult | None) -> BranchFactors:
        return BranchFactors(self.scales, self.alphas, self.identity, spatial, self._mult)

    @property
    def alphas(self) -> Tensor:
        return self._stack[1:]

    @property
    def mult(self) -> GradMult:
        """M = Σ α², in float64 as it is formed: explicit branches have no rounding of it either."""
        if self._mult is not None:
            return self._mult
        ones = None if self.identity is None else self.identity.double()
        return GradMult.of_parts(self.alphas.double().square().sum(0), ones)

    @property
    def device(self) -> torch.device:
        return self._stack.device

    def parts(self) -> tuple[Tensor, Tensor | None]:
        """Return G and the |α| as one tensor [1 + B, ...], and the identity, as the op takes them."""
        return self._stack, self.identity

    def tensors(self) -> dict[str, Tensor]:
        """Return all that tells these factors from others, but for G."""
        given = self._mult.parts() if self._mult is not None else ()
        named = {"alphas": self.alphas, "diagonal": self.identity, **dict(zip(("scale", "identity"), given))}
        return {name: t for name, t in named.items() if t is not None}

    def mapped(self, part: Callable[[GradMult], GradMult]) -> BranchFactors:
        """Apply `part`, which takes a Grad Mult to another place or to its part on a shard, to each of the factors."""
        alphas = [part(GradMult.of_parts(alpha, None)).scale for alpha in self.alphas]
        identity = None
        if self.identity is not None:
            zero = self.alphas.new_zeros((1, 1, 1, 1))
            shifted = part(GradMult.of_parts(zero, self.identity))
            identity = shifted.identity
            if identity is None:  # dense: the diagonal is shifted on this shard, and becomes one more factor
                alphas = [alpha.expand(shifted.scale.shape) for alpha in (*alphas, shifted.scale)]
        spatial = None if self.spatial is None else part(self.spatial)
        mult = None if self._mult is None else part(self._mult)
        return BranchFactors(self.scales, torch.stack(alphas), identity, spatial, mult)

    def to(self, device: torch.device | str) -> BranchFactors:
        return self if torch.device(device) == self.device else self.mapped(lambda mult: mult.to(device))

    def same(self, other: BranchFactors, shape: torch.Size) -> bool:
        """Whether both update a weight of `shape` in the same way, bit for bit. G does not count."""
        mine, others = self.tensors(), other.to(self.device).tensors()
        return mine.keys() == others.keys() and all(
            own.dtype == others[key].dtype and torch.equal(own, others[key]) for key, own in mine.items()
        )

    # ---- checkpoints

    def packed(self) -> dict[str, Any]:
        """Return plain tensors in plain dicts, what torch.load(weights_only=True) accepts."""
        scales = self.scales
        branches = (
            None
            if scales is None
            else {
                "kxk": scales.kxk,
                "one_by_one": scales.one_by_one,
                "identity": scales.identity,
                "others": [
                    {"scale": branch.scale, "kernel_size": list(branch.kernel_size), "dilation": branch.dilation}
                    for branch in scales.others
                ],
                "constant_identity": scales.constant_identity,
                "constant_average": scales.constant_average,
            }
        )
        # A view would bring all of its storage into a file.
        own = {"alphas": self.alphas.clone(), "diagonal": self.identity, "branch_scales": branches}
        mult = (None, None) if self._mult is None else self._mult.parts()
        return {**dict(zip(("scale", "identity"), mult)), **own}

    @classmethod
    def unpacked(cls, packed: Mapping[str, Any]) -> BranchFactors:
        """Raises KeyError or TypeError where entries are missing."""
        branches, scales, mult = packed["branch_scales"], None, None
        if packed["scale"] is not None:
            mult = GradMult(packed["scale"], packed["identity"])
        if branches is not None:
            others = [Branch(o["scale"], tuple(o["kernel_size"]), o["dilation"]) for o in branches["others"]]
            constants = {name: branches[name] for name in ("constant_identity", "constant_average")}
            first = (branches["kxk"], branches["one_by_one"], branches["identity"])
            scales = BranchScales(*first, others=others, **constants)
        diagonal = packed["diagonal"]
        return cls(scales, packed["alphas"].detach(), None if diagonal is None else diagonal.clone(), None, mult)

    def __reduce__(self):
        return BranchFactors, (self.scales, self.alphas.clone(), self.identity, self.spatial, self._mult)

    def __repr__(self) -> str:
        return f"BranchFactors({self.scales!r})"


def _slots(branches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Put the |α| of the branches that reach a tap side by side  # [B, O, 1, kh, kw]

    B is the most that reach one tap. So ACB's row and column take one slot outside of the centre.
    """
    masks = torch.stack([mask for _, mask in branches]).cpu()
    before = masks.cumsum(0) - masks.long()  # how many branches before this one reach the tap
    first = branches[0][0]
    slots = first.new_zeros((int(masks.sum(0).max()), first.numel(), 1, *masks.shape[1:]), dtype=torch.float64)
    for (alpha, _), mask, place in zip(branches, masks, before):
        for y, x in mask.nonzero().tolist():
            slots[int(place[y, x]), :, 0, y, x] = alpha.double().abs()
    return slots
