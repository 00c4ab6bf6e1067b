"""Grad Mult: the constant that multiplies a gradient, in the small form that both papers need.

Sources: RepOptimizers (Ding et al., 2023), section 3.2, Eq. 3; Spatial Gradient Scaling (Detkov et al., 2023), Lemma 1.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gradrep_kernels.ops.reference.multiply import diagonal_taps

__all__ = ["GradMult", "awaits_grad_mult", "constant_copy", "expect_grad_mult", "span"]

_AWAITS = "awaits_grad_mult"


def constant_copy(name: str, value: Tensor) -> Tensor:
    """Copy `value` as float32 or float64.

    Raises TypeError unless it is a real, strided tensor, and ValueError for NaN and inf.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    if value.is_complex():
        raise TypeError(f"{name} must be real, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a strided tensor, got layout {value.layout}")
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    constant = value.detach().to(dtype=dtype, copy=True, memory_format=torch.contiguous_format)
    if not bool(torch.isfinite(constant).all()):
        raise ValueError(f"{name} must be finite, got NaN or inf")
    return constant


def expect_grad_mult(weight: Tensor) -> None:
    """Mark a weight that was initialised for a Grad Mult, so that an optimizer without one can tell.

    Copies and a state_dict do not have the mark. An attribute serves, for torch.utils.swap_tensors refuses
    tensors that weak references point to.
    """
    setattr(weight, _AWAITS, True)


def awaits_grad_mult(weight: Tensor) -> bool:
    return getattr(weight, _AWAITS, False)


def span(values: Tensor) -> str:
    """Return the least and the greatest of some values as text for a `repr`, which must not raise."""
    try:
        low, high = (float(v) for v in values.detach().aminmax())
    except Exception:  # no elements, or none that can be read: meta tensors, fake tensors, a lost device
        return "no values"
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


class GradMult:
    """The multiplier of a gradient, M = scale + identity on the diagonal of the centre tap.

        M[o, i, y, x] = scale[o|0, i|0, y|0, x|0] + identity[o] * 1[i == o mod I, (y, x) = centre]

    `|0` stands for index 0 along a dimension in which the multiplier scale is broadcast.

    Args:
        scale:    any shape that broadcasts to the weight: [], [1, 1, kh, kw], [O, 1, kh, kw], [O, I, kh, kw], ...
        identity: [O], or None. Only for 4-D weights with an odd kernel.

    Both are copied. They keep float32 or float64 (lower precision and integers are raised to float32; of a mixed pair
    both become float64). Immutable by convention: make a new one instead of writing into `.scale`.

    Raises:
        TypeError:  not a tensor, complex or sparse.
        ValueError: NaN or inf, or negative. With an identity, the sign of M is known only when it is attached to a
                    weight, and is checked then.
    """

    __slots__ = ("identity", "scale")

    def __init__(self, scale: Tensor, identity: Tensor | None = None):
        self.scale = constant_copy("scale", scale)
        self.identity = None
        if identity is not None:
            self.identity = constant_copy("identity", identity).to(self.scale.device)
            if self.identity.dim() != 1:
                raise ValueError(f"identity must have shape [O], got {list(self.identity.shape)}")
            if self.scale.dim() > 4:
                raise ValueError(f"identity needs a 4-D weight, scale has {self.scale.dim()} dimensions")
            dtype = torch.promote_types(self.scale.dtype, self.identity.dtype)
            self.scale, self.identity = self.scale.to(dtype), self.identity.to(dtype)
        elif bool((self.scale < 0).any()):
            raise ValueError(f"a Grad Mult must not be negative, scale has {float(self.scale.min()):g}")

    @property
    def dtype(self) -> torch.dtype:
        return self.scale.dtype

    @property
    def device(self) -> torch.device:
        return self.scale.device

    @property
    def nbytes(self) -> int:
        """The bytes of the stored form."""
        return sum(t.numel() * t.element_size() for t in self.parts() if t is not None)

    def parts(self) -> tuple[Tensor, Tensor | None]:
        """Return scale and identity, as the ops take them."""
        return self.scale, self.identity

    def to(self, device: torch.device | str) -> GradMult:
        if torch.device(device) == self.device:
            return self
        return self.of_parts(self.scale.to(device), None if self.identity is None else self.identity.to(device))

    @classmethod
    def of_parts(cls, scale: Tensor, identity: Tensor | None) -> GradMult:
        """Make a Grad Mult from the parts of another, without a copy and without checks."""
        new = cls.__new__(cls)
        new.scale, new.identity = scale, identity
        return new

    def __reduce__(self):
        return _unpickle, (self.scale, self.identity)

    def check(self, shape: Iterable[int]) -> None:
        """Raise ValueError unless M is defined on a weight of `shape` and nowhere negative."""
        shape = torch.Size(shape)
        try:
            fits = torch.broadcast_shapes(self.scale.shape, shape) == shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"scale {list(self.scale.shape)} does not broadcast to the weight {list(shape)}")
        if self.identity is not None:
            if len(shape) != 4:
                raise ValueError(f"identity needs a 4-D weight, got {list(shape)}")
            if shape[2] % 2 == 0 or shape[3] % 2 == 0:
                raise ValueError(f"identity needs an odd kernel, got {shape[2]} x {shape[3]}")
            if self.identity.numel() != shape[0]:
                raise ValueError(
                    f"identity has {self.identity.numel()} elements, the weight has {shape[0]} output channels"
                )
        if any(part is not None and bool((part < 0).any()) for part in self.parts()):
            dense = self._dense(shape)
            if bool((dense < 0).any()):
                raise ValueError(f"a Grad Mult must not be negative, got {float(dense.min()):g}")

    def _dense(self, shape: torch.Size) -> Tensor:
        dense = self.scale.expand(shape).clone(memory_format=torch.contiguous_format)
        if self.identity is not None:
            dense[diagonal_taps(shape, dense.device)] += self.identity
        return dense

    def dense(self, shape: Iterable[int]) -> Tensor:
        """Return M at full size, a new contiguous tensor of `shape` [O, I, kh, kw].

        Raises ValueError where M does not fit, or is negative.
        """
        shape = torch.Size(shape)
        self.check(shape)
        return self._dense(shape)

    def __mul__(self, other: GradMult) -> GradMult:
        """Return the element-wise product, with scale and identity kept apart."""
        if not isinstance(other, GradMult):
            return NotImplemented
        a, b = self, other.to(self.device)
        dtype = torch.promote_types(a.dtype, b.dtype)
        try:
            shape = torch.broadcast_shapes(a.scale.shape, b.scale.shape)
        except RuntimeError:
            raise ValueError(
                f"Grad Mults of {list(a.scale.shape)} and {list(b.scale.shape)} do not fit one weight"
            ) from None
        scale = a.scale.to(dtype) * b.scale.to(dtype)
        if a.identity is None and b.identity is None:
            return GradMult.of_parts(scale, None)
        if a.identity is not None and b.identity is not None and a.identity.shape != b.identity.shape:
            raise ValueError(
                f"identities of {a.identity.numel()} and {b.identity.numel()} output channels do not fit one weight"
            )
        channels = (b if a.identity is None else a).identity.numel()
        # On the diagonal M = (sa + ia)(sb + ib), formed in float64. The identity is its difference from the rounded
        # scale, rounded once.
        sa, sb = a._on_diagonal(channels, shape), b._on_diagonal(channels, shape)
        ia = 0.0 if a.identity is None else a.identity.double()
        ib = 0.0 if b.identity is None else b.identity.double()
        base = GradMult.of_parts(scale, None)._on_diagonal(channels, shape)
        return GradMult.of_parts(scale, ((sa + ia) * (sb + ib) - base).to(dtype))

    def _on_diagonal(self, channels: int, shape: torch.Size) -> Tensor:
        """Return the multiplier scale at the identity's taps, float64 [O]. Broadcast dimensions have one tap."""
        scale = self.scale.double()
        scale = scale.reshape((1,) * (4 - scale.dim()) + tuple(scale.shape))
        if scale.shape[0] not in (1, channels):
            raise ValueError(f"scale {list(self.scale.shape)} does not fit identity[{channels}]")
        if any(n % 2 == 0 for n in shape[-2:]):
            raise ValueError(f"identity needs an odd kernel, got {shape[-2]} x {shape[-1]}")
        o = torch.arange(channels, device=scale.device)
        return scale[o % scale.shape[0], o % scale.shape[1], scale.shape[2] // 2, scale.shape[3] // 2]

    @classmethod
    def from_dense(cls, m: Tensor) -> GradMult:
        """Find the smallest form whose `.dense(m.shape)` gives back the bits of `m`.

        If there is none, `m` is kept at full size.
        """
        m = constant_copy("M", m)
        if bool((m < 0).any()):
            raise ValueError(f"a Grad Mult must not be negative, M has {float(m.min()):g}")
        m = m.abs()  # -0.0 becomes 0.0, so that equal multipliers have equal bits
        if m.numel() == 0:
            return cls(m)
        if m.dim() == 4 and m.shape[1] > 1 and m.shape[2] % 2 and m.shape[3] % 2:
            o, i, y, x = taps = diagonal_taps(m.shape, m.device)
            beside = m[o, (i + 1) % m.shape[1], y, x]
            plain = m.clone()
            plain[taps] = beside
            scale = _collapse(plain)
            if scale.shape[1] == 1 and not torch.equal(plain, m):
                identity = _difference(m[taps], beside)
                if torch.equal(beside + identity, m[taps]):
                    return cls.of_parts(scale, identity)
        return cls.of_parts(_collapse(m), None)

    @classmethod
    def from_masks(cls, masks: Iterable[Tensor]) -> GradMult:
        """Add up binary masks [kh, kw], or of any shape that broadcasts to the weight (SGS paper, Lemma 1)."""
        masks = [constant_copy(f"masks[{n}]", mask).float() for n, mask in enumerate(masks)]
        if not masks:
            raise ValueError("masks must hold at least one mask, got none")
        for n, mask in enumerate(masks):
            if not bool(((mask == 0) | (mask == 1)).all()):
                raise ValueError(f"masks[{n}] must hold only 0 and 1")
        total = masks[0]
        for n, mask in enumerate(masks[1:], start=1):
            try:
                total = total + mask
            except RuntimeError:
                raise ValueError(
                    f"masks[{n}] of {list(mask.shape)} does not fit the others, {list(total.shape)}"
                ) from None
        return cls(total.reshape((1, 1) + tuple(total.shape)) if total.dim() == 2 else total)

    def same(self, other: GradMult, shape: Iterable[int]) -> bool:
        """Whether both are the same multiplier of a weight of `shape`, bit for bit."""
        if self.dtype != other.dtype:
            return False
        other = other.to(self.device)
        if self.scale.shape == other.scale.shape and (self.identity is None) == (other.identity is None):
            return all(a is b or torch.equal(a, b) for a, b in zip(self.parts(), other.parts()))
        return torch.equal(self.dense(shape), other.dense(shape))

    def __repr__(self) -> str:
        """Tell shapes, the range of the values and the size. On a GPU it waits for the values."""
        try:
            parts = [
                f"{name}{list(t.shape)} {span(t)}"
                for name, t in (("scale", self.scale), ("identity", self.identity))
                if t is not None
            ]
            dtype = str(self.dtype).removeprefix("torch.")
            return f"GradMult({', '.join(parts)}, {dtype}, {self.nbytes:,} bytes)"
        except AttributeError:  # in a traceback of the constructor it has not all attributes yet
            return "GradMult(not whole)"


def _unpickle(scale: Tensor, identity: Tensor | None) -> GradMult:
    # Pickles name this function by its module and name: neither may change.
    return GradMult.of_parts(scale, identity)


def _collapse(m: Tensor) -> Tensor:
    """Reduce to 1 every dimension along which `m` does not change."""
    for dim in range(m.dim()):
        first = m.narrow(dim, 0, 1)
        if torch.equal(first.expand_as(m), m):
            m = first
    return m.clone(memory_format=torch.contiguous_format)


def _difference(total: Tensor, part: Tensor) -> Tensor:
    """Look for d with part + d == total.

    It is, per element, the rounded difference or one of its two neighbours.
    """
    near = total - part
    up, down = torch.full_like(near, torch.inf), torch.full_like(near, -torch.inf)
    best = near.clone()
    for candidate in (near, torch.nextafter(near, up), torch.nextafter(near, down)):
        best = torch.where(part + best == total, best, candidate)
    return best
