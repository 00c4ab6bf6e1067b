"""Triton's language in the interpreter, as tests/support/fast_interpreter.py makes it."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import interpreter


def test_in_the_interpreter():
    interpreter.run("interpreted_language.py")
