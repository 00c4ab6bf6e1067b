"""Write files that are whole or not there.

They are written under a temporary name beside their own, then renamed.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

__all__ = ["TEMPORARY", "save_tensors", "whole", "write_json", "write_text"]

TEMPORARY = ".tmp"
"""The last part of every temporary name. A killed run may leave such files, and the next one removes them."""


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to.

    The file becomes `path` after the block, or is removed if that raises.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())  # Without it a power failure could leave the new name on an empty file.
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace the file by `text` in UTF-8."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replace the file by `value` as JSON.

    Raises ValueError for NaN and infinity, which JSON has not.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def save_tensors(path: Path, value: Any) -> None:
    """Replace the file by `value`: tensors, numbers, strings, and dicts and lists of them.

    torch.load(weights_only=True) reads it.
    """
    with whole(path) as temporary:
        torch.save(value, temporary)
