"""What a data set is: labelled images, how they are read, and the statistics to standardise them with.

Every set reads images as float32 [n, C, H, W] in [0, 1]. They are standardised per channel after augmentation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Data", "Images", "as_floats", "in_memory", "statistics"]

Picture = Any
"""A decoded image: a tensor [C, H, W], uint8 or floating in [0, 1], or Pillow's of mode RGB, or of mode F in [0, 1]."""


@dataclass(frozen=True)
class Images:
    """A labelled set.

    `read` gives float32 [n, C, H, W] in [0, 1] for indices [n], as they are tested, from files where `lazy` is set.
    `picture` gives one image as it was decoded, before anything is scaled or cropped. Without it, that is what `read`
    gives. Both can be pickled where other processes read (`Loader`, readers).
    """

    labels: Tensor  # [N] int64
    read: Callable[[Tensor], Tensor]
    lazy: bool = False
    picture: Callable[[int], Picture] | None = None

    def __len__(self) -> int:
        return self.labels.numel()

    def decoded(self, index: int) -> Picture:
        """One image for a random augmentation to work on."""
        return self.read(torch.tensor([index]))[0] if self.picture is None else self.picture(index)

    def part(self, indices: Tensor) -> Images:
        """Those at `indices` [n], as a set of their own."""
        picture = None if self.picture is None else functools.partial(_picture_of_part, self.picture, indices)
        return Images(self.labels[indices], functools.partial(_read_of_part, self.read, indices), self.lazy, picture)


def _read_of_part(read: Callable[[Tensor], Tensor], indices: Tensor, at: Tensor) -> Tensor:
    return read(indices[at])


def _picture_of_part(picture: Callable[[int], Picture], indices: Tensor, at: int) -> Picture:
    return picture(int(indices[at]))


@dataclass(frozen=True)
class Data:
    """Training and test set, their classes, and the statistics [C] to standardise both with.

    Images are square. A training sees `side` x `side`. Validation and test images have `test_side` x `test_side`.
    """

    name: str
    train: Images
    test: Images
    classes: tuple[str, ...]
    side: int
    mean: Tensor
    std: Tensor
    other_test_side: int | None = None
    """The side of validation and test images where it is not `side`."""

    @property
    def test_side(self) -> int:
        return self.other_test_side or self.side

    @property
    def channels(self) -> int:
        return self.mean.numel()

    def standardise(self, x: Tensor) -> Tensor:
        return (x - self.mean.reshape(-1, 1, 1)) / self.std.reshape(-1, 1, 1)

    def description(self) -> dict[str, object]:
        """The facts that a resumed run must find again."""
        shape = [self.channels, self.side, self.side]
        return {
            "name": self.name,
            "train": len(self.train),
            "test": len(self.test),
            "classes": len(self.classes),
            "shape": shape,
        }


def as_floats(x: Tensor) -> Tensor:
    """In [0, 1], of bytes or of floating-point numbers that are there already."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


def in_memory(images: np.ndarray, labels: np.ndarray) -> Images:
    """A set of uint8 or float32 images [N, C, H, W]."""
    pixels = torch.from_numpy(images)
    return Images(
        torch.from_numpy(labels.astype(np.int64)),
        functools.partial(_floats_at, pixels),
        picture=functools.partial(_pixels_at, pixels),
    )


def _floats_at(pixels: Tensor, indices: Tensor) -> Tensor:
    return as_floats(pixels[indices])


def _pixels_at(pixels: Tensor, index: int) -> Tensor:
    return pixels[index]


def statistics(images: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C] of images [N, C, H, W] in units of [0, 1].

    They are computed in float64 and rounded once.
    """
    means, stds = [], []
    for channel in range(images.shape[1]):
        values, counts = np.unique(images[:, channel], return_counts=True)
        values = values.astype(np.float64) / (255 if images.dtype == np.uint8 else 1)
        mean = np.average(values, weights=counts)
        std = np.sqrt(np.average((values - mean) ** 2, weights=counts))
        means.append(mean)
        stds.append(max(std, 1e-6))  # A constant channel is divided by it and must stay finite.
    return torch.tensor(means).float(), torch.tensor(stds).float()
