"""Write files that are whole or not there, and read them.

They are written under a temporary name beside their own, then renamed. A write that fails raises OutputError, which
names the file.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gradrep_kernels.recipes.errors import InputError, OutputError

__all__ = ["TEMPORARY", "append_text", "read_json", "save_tensors", "whole", "write_json", "write_text", "writing"]

TEMPORARY = ".tmp"
"""The last part of every temporary name. A killed run may leave such files, and the next one removes them."""

# torch.save to a path says no more than this of a write that failed (inline_container.cc; small files go by iostream).
_OF_TORCH = ("inline_container", "PytorchStreamWriter", "iostream error")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise OutputError, naming `path`, where a write inside the block fails."""
    try:
        yield
    except OSError as reason:
        raise OutputError.of(path, reason) from None
    except RuntimeError as reason:
        if not any(part in str(reason) for part in _OF_TORCH):
            raise
        raise OutputError(str(path), str(reason).splitlines()[0]) from None


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to.

    The file becomes `path` after the block, or is removed if that raises. Raises OutputError where it cannot be
    written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    with writing(path):
        try:
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())  # Without it a power failure could leave the new name on an empty file.
            temporary.replace(path)
        finally:
            with contextlib.suppress(OSError):  # The first error says more than this one.
                temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace the file by `text` in UTF-8.

    Names of files that are no UTF-8 are written with escapes.
    """
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def append_text(path: Path, text: str) -> None:
    """Add `text` in UTF-8 to the end of the file. A write that fails may leave a part of it."""
    with writing(path), path.open("a", encoding="utf-8", errors="backslashreplace") as out:
        out.write(text)


def write_json(path: Path, value: Any) -> None:
    """Replace the file by `value` as JSON.

    Raises ValueError for NaN and infinity, which JSON has not.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, remedy: str) -> Any:
    """The value in a JSON file. Raises InputError, which ends with the remedy, where it is none, and OSError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as reason:
        raise InputError(f"{path} is damaged ({reason}); {remedy}") from None


def save_tensors(path: Path, value: Any) -> None:
    """Replace the file by `value`: tensors, numbers, strings, and dicts and lists of them.

    torch.load(weights_only=True) reads it.
    """
    with whole(path) as temporary, temporary.open("wb") as out:
        try:
            torch.save(value, out)
        except RuntimeError as failed:
            # torch's writer closes its archive after a write that failed, and covers the error by one of its own.
            cause = failed.__context__
            raise cause if isinstance(cause, (OSError, KeyboardInterrupt)) else failed from None
