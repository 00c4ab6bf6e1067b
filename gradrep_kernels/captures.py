"""Captures of CUDA graphs: what must not happen while one runs is asked for in several rooms."""

from __future__ import annotations

import torch


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph captures what is done on a device now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
