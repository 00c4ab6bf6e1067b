"""metrics.jsonl: one line for each epoch of a job, written as the job goes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradrep_kernels.recipes import files

__all__ = ["append", "rewrite"]


def append(path: Path, training: str, epoch: int, record: Mapping[str, Any]) -> None:
    """Add the record of one epoch (counted from 1) of a training."""
    files.append_text(path, _line(training, epoch, record))


def rewrite(path: Path, records: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Make the file hold the records {training: its epochs so far}, and no other.

    Lines that are there keep their order. A killed job may have written a line less than its states hold, or an
    incomplete one.
    """
    lines = [_line(name, n, record) for name, epochs in records.items() for n, record in enumerate(epochs, 1)]
    written = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    place = {line: n for n, line in enumerate(written)}
    files.write_text(path, "".join(sorted(lines, key=lambda line: place.get(line, len(place)))))


def _line(training: str, epoch: int, record: Mapping[str, Any]) -> str:
    return json.dumps({"run": training, "epoch": epoch, **record}, allow_nan=False) + "\n"
