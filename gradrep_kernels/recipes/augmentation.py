"""Augmentation of batches of images: mirrored, cropped, partly cut out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["AUGMENTATIONS", "cutout", "flip", "pad_and_crop"]

AUGMENTATIONS = ("resized", "crop", "flip", "randaugment", "jitter", "cutout")


def flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image of x [n, C, H, W] left to right with probability 1/2."""
    mirrored = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(mirrored.reshape(-1, 1, 1, 1), x.flip(3), x)


def pad_and_crop(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image of x [n, C, H, W] at random.

    It is padded with zeros (black) by an eighth of its side and cropped back.
    """
    n, channels, height, width = x.shape
    by = max(1, height // 8)
    top, left = torch.randint(0, 2 * by + 1, (2, n), generator=generator)
    rows = (top[:, None] + torch.arange(height)).reshape(n, 1, height, 1)
    columns = (left[:, None] + torch.arange(width)).reshape(n, 1, 1, width)
    padded = F.pad(x, (by, by, by, by))
    return padded[torch.arange(n).reshape(n, 1, 1, 1), torch.arange(channels).reshape(1, channels, 1, 1), rows, columns]


def cutout(x: Tensor, generator: torch.Generator) -> Tensor:
    """Set a square of half the side to 0 in each image of x [n, C, H, W].

    Its centre lies anywhere in the image, and the border cuts off what lies outside.
    """
    n, _, height, width = x.shape
    half = height // 4
    row = torch.randint(0, height, (n, 1), generator=generator)
    column = torch.randint(0, width, (n, 1), generator=generator)
    rows = (torch.arange(height) >= row - half) & (torch.arange(height) < row + half)
    columns = (torch.arange(width) >= column - half) & (torch.arange(width) < column + half)
    return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)
