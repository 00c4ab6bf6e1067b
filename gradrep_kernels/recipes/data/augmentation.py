"""Augmentation of batches of images: mirrored, cropped, partly cut out.

A process that trains on a part of each batch draws for the whole of it and does its own part, so that the images of
all processes together are those that one process would make.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gradrep_kernels.recipes.data.library import torchvision
from gradrep_kernels.recipes.errors import InputError

__all__ = [
    "AUGMENTATIONS",
    "OF_TORCHVISION",
    "WHOLE",
    "Part",
    "check_augmentations",
    "cutout",
    "flip",
    "pad_and_crop",
]

AUGMENTATIONS = ("resized", "crop", "flip", "randaugment", "jitter", "cutout")
OF_TORCHVISION = ("resized", "randaugment", "jitter")
"""Those that torchvision does, picture by picture (`picture_augmentation.py`)."""

Part = tuple[int | None, slice]
"""How many images the whole batch has (None: those that are given) and which of them are given."""
WHOLE: Part = (None, slice(None))


def check_augmentations(names: Sequence[str], flag: str = "--augment") -> None:
    """Raise InputError where augmentations exclude each other, or need a torchvision that is not there."""
    if "resized" in names and "crop" in names:
        raise InputError(f"{flag} resized,crop: each says which part of a picture is seen; leave one of them out")
    needing = [name for name in names if name in OF_TORCHVISION]
    if needing:
        others = ", ".join(name for name in AUGMENTATIONS if name not in OF_TORCHVISION)
        torchvision("transforms.v2", f"{flag} {','.join(needing)}", f"{others} need none")


def flip(x: Tensor, generator: torch.Generator, part: Part = WHOLE) -> Tensor:
    """Mirror each image of x [n, C, H, W] left to right with probability 1/2."""
    whole, mine = part
    mirrored = torch.rand(len(x) if whole is None else whole, generator=generator)[mine] < 0.5
    return torch.where(mirrored.reshape(-1, 1, 1, 1), x.flip(3), x)


def pad_and_crop(x: Tensor, generator: torch.Generator, part: Part = WHOLE) -> Tensor:
    """Shift each image of x [n, C, H, W] at random.

    It is padded with zeros (black) by an eighth of its side and cropped back.
    """
    n, channels, height, width = x.shape
    whole, mine = part
    by = max(1, height // 8)
    top, left = torch.randint(0, 2 * by + 1, (2, n if whole is None else whole), generator=generator)[:, mine]
    rows = (top[:, None] + torch.arange(height)).reshape(n, 1, height, 1)
    columns = (left[:, None] + torch.arange(width)).reshape(n, 1, 1, width)
    padded = F.pad(x, (by, by, by, by))
    return padded[torch.arange(n).reshape(n, 1, 1, 1), torch.arange(channels).reshape(1, channels, 1, 1), rows, columns]


def cutout(x: Tensor, generator: torch.Generator, part: Part = WHOLE) -> Tensor:
    """Set a square of half the side to 0 in each image of x [n, C, H, W].

    Its centre lies anywhere in the image, and the border cuts off what lies outside.
    """
    n, _, height, width = x.shape
    whole, mine = part
    half = height // 4
    row = torch.randint(0, height, (n if whole is None else whole, 1), generator=generator)[mine]
    column = torch.randint(0, width, (n if whole is None else whole, 1), generator=generator)[mine]
    rows = (torch.arange(height) >= row - half) & (torch.arange(height) < row + half)
    columns = (torch.arange(width) >= column - half) & (torch.arange(width) < column + half)
    return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)
