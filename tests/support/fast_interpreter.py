"""Make Triton's interpreter three times as fast, with the same results.

Nearly all of its time is spent around numpy: it makes anew, for each operation, what it made for the one before. Each
function here takes the place of one of Triton's, and calls that for what it has not seen. An integer overflow in a
kernel is an error besides, also in masked lanes.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

NUMPY_OPERATIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def use() -> None:
    _replace(interpreter, "_patch_lang", language_patched_once_per_launch)
    _replace(interpreter, "_get_np_dtype", numpy_dtype)
    _replace(TritonSemantic, "binary_op_sanitize_overflow_impl", overflow_check)
    _replace(TritonSemantic, "computation_type_impl", computation_type)
    _replace(TritonSemantic, "cast", cast)
    _replace(TritonSemantic, "broadcast_impl_value", broadcast)
    _replace(tl.core.block_type, "__init__", block_type_init)
    _replace(tl.core.tensor, "__init__", tensor_init)


def _replace(owner: object, name: str, faster: Callable[[Callable], Callable]) -> None:
    """Put faster(Triton's own) in the place of Triton's own, if it is there."""
    if hasattr(owner, name):
        setattr(owner, name, faster(getattr(owner, name)))


def language_patched_once_per_launch(patch: Callable) -> Callable:
    """Replace the functions of triton.language once per launch.

    Triton does it at every call of a device function.
    """
    patched: set[int] = set()  # modules, in the present launch

    @functools.cache
    def modules(fn) -> frozenset[int]:
        return frozenset(id(m) for m in fn.__globals__.values() if inspect.ismodule(m) and m in (tl, tl.core))

    def patch_once(fn):
        if patched and modules(fn) <= patched:
            return None  # a device function, whose caller does not undo the patch
        scope = patch(fn)
        if not patched:
            undo = scope.restore

            def restore():
                patched.clear()
                undo()

            scope.restore = restore
        patched.update(modules(fn))
        return scope

    return patch_once


def numpy_dtype(own: Callable) -> Callable:
    """Triton makes a table of all types for each call."""
    known: dict[str, np.dtype] = {}

    def of(dtype):
        name = dtype.name if not isinstance(dtype, tl.pointer_type) else "pointer"
        found = known.get(name)
        if found is None:
            found = known[name] = own(dtype)
        return found

    return of


def overflow_check(own: Callable) -> Callable:
    """Check int8 to int32 in int64 by numpy, and raise.

    Triton's check is six operations of the language. Their result is read where a kernel is launched with debug=True.
    """

    def check(self, lhs, rhs, binary_op):
        dtype, operation = lhs.type.scalar, NUMPY_OPERATIONS.get(binary_op.__name__)
        if operation is None or not dtype.is_int() or dtype != rhs.type.scalar:
            return own(self, lhs, rhs, binary_op)
        if dtype.int_bitwidth >= 64 or not self.builder.options.sanitize_overflow:
            return None
        wide = operation(lhs.handle.data, rhs.handle.data, dtype=np.int64)
        if wide.size and (wide.max() > dtype.get_int_max_value() or wide.min() < dtype.get_int_min_value()):
            raise OverflowError(f"{dtype} overflow of {binary_op.__name__} in a kernel")
        return None

    return check


def computation_type(own: Callable) -> Callable:
    """Look up the type of a result by the names of the operands' types."""
    known: dict[tuple, tl.dtype] = {}

    def of(self, a, a_is_scalar, b, b_is_scalar, div_or_mod):
        key = (a.name, a_is_scalar, b.name, b_is_scalar, div_or_mod)
        found = known.get(key)
        if found is None:
            found = known[key] = own(self, a, a_is_scalar, b, b_is_scalar, div_or_mod)
        return found

    return of


def cast(own: Callable) -> Callable:
    """Return at once where nothing is to be cast: three of four times."""

    def to(self, given, dtype, *rounding, **named_rounding):
        if dtype.scalar is given.dtype:
            return given
        return own(self, given, dtype, *rounding, **named_rounding)

    return to


def broadcast(own: Callable) -> Callable:
    """Return at once where the shapes are equal: most times."""

    def to_one_shape(self, a, b):
        if a.type.is_block() and b.type.is_block() and a.type.shape is b.type.shape:
            return a, b
        return own(self, a, b)

    return to_one_shape


def block_type_init(own: Callable) -> Callable:
    """Check a shape once. Triton does at every operation."""
    known: dict[str, tuple] = {}

    def init(self, element_ty, shape):
        if not isinstance(shape, (list, tuple, tl.core.tuple)):
            return own(self, element_ty, shape)  # which says what is wrong
        spelled = str([s.value if isinstance(s, tl.constexpr) else s for s in shape])  # 4.0 is not 4
        if spelled not in known:
            own(self, element_ty, shape)
            known[spelled] = self.shape, self.numel
        self.shape, self.numel = known[spelled]
        self.element_ty, self.name = element_ty, f"<{spelled}, {element_ty.name}>"
        return None

    return init


def tensor_init(own: Callable) -> Callable:
    """Make the constants of a shape once."""
    known: dict[tuple[int, ...], tuple] = {}

    def init(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        shape = tuple(type.shape) if type.is_block() else ()
        if shape not in known:
            known[shape] = tl.constexpr(math.prod(shape)), tl.core.tuple([tl.constexpr(s) for s in shape])
        self.numel, self.shape = known[shape]

    return init
