"""A value as it comes back from a file."""

from __future__ import annotations

import io
from typing import Any

import torch


def through_a_file(value: Any, weights_only: bool = True) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)
