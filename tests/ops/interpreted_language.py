"""The functions of tests/support/fast_interpreter.py, on kernels whose results are known.

test_triton_language.py runs this file with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


@triton.jit
def outer_kernel(result, a, b, ROWS: tl.constexpr, COLUMNS: tl.constexpr, OPERATION: tl.constexpr):
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    p, q = tl.load(a + row), tl.load(b + column)
    if OPERATION == "add":
        r = p + q
    elif OPERATION == "sub":
        r = p - q
    else:
        r = p * q
    tl.store(result + row * COLUMNS + column, r)


def outer(operation: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    result = torch.zeros(len(a), len(b), dtype=torch.promote_types(a.dtype, b.dtype))
    outer_kernel[(1,)](result, a, b, len(a), len(b), operation)
    return result


def test_the_functions_are_in_place():
    for function in (interpreter._patch_lang, interpreter._get_np_dtype, TritonSemantic.cast, tl.tensor.__init__):
        assert "fast_interpreter" in function.__code__.co_filename


DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64)


@pytest.mark.parametrize("operation", ["add", "sub", "mul"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes_and_types_come_together(dtype, operation):
    """The same shapes with other types, and the same types with other shapes."""
    for rows, columns in ((4, 8), (8, 4), (1, 8), (8, 1), (1, 1)):
        for other in (dtype, torch.float32):
            a, b = (torch.arange(n).sub(2).to(t) for n, t in ((rows, dtype), (columns, other)))
            assert torch.equal(outer(operation, a, b), getattr(torch, operation)(a[:, None], b[None, :]))


def test_small_types():
    bits = torch.tensor([False, True, True, False])
    assert torch.equal(outer("mul", bits, bits), bits[:, None] & bits)
    bytes_ = torch.arange(4, dtype=torch.uint8)
    for operation in ("add", "mul"):
        assert torch.equal(outer(operation, bytes_, bytes_), getattr(torch, operation)(bytes_[:, None], bytes_))
    with pytest.raises(interpreter.InterpreterError, match="uint8 overflow of sub"):
        outer("sub", bytes_, bytes_)


@pytest.mark.parametrize(
    ("operation", "a", "b", "overflows"),
    [
        ("add", 2**31 - 1, 0, False),
        ("add", 2**31 - 1, 1, True),
        ("sub", -(2**31), 0, False),
        ("sub", -(2**31), 1, True),
        ("mul", 2**16, 2**15 - 1, False),
        ("mul", 2**16, 2**15, True),
        ("mul", -(2**16), 2**15, False),
    ],
)
def test_an_overflow_is_an_error(operation, a, b, overflows):
    arguments = operation, torch.tensor([a], dtype=torch.int32), torch.tensor([0, b], dtype=torch.int32)
    if overflows:
        with pytest.raises(interpreter.InterpreterError, match=r"int32 overflow of (add|sub|mul)"):
            outer(*arguments)
    else:
        assert outer(*arguments)[0, 1] == getattr(torch, operation)(torch.tensor(a), b)
