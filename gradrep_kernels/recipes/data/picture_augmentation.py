"""Augmentation of pictures one by one, each from a seed of its own.

So an image gets the same bits whoever reads it: this process, a reader, or another rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from gradrep_kernels.recipes.data.augmentation import OF_TORCHVISION, pad_and_crop
from gradrep_kernels.recipes.data.folders import pixels_of, scaled
from gradrep_kernels.recipes.data.images import Picture
from gradrep_kernels.recipes.data.library import torchvision

__all__ = ["PictureAugmentation", "own_default_generator"]

JITTER = 0.06
"""Of brightness, contrast and saturation. SGS's ImageNet setting: `color_jitter` in its code's SGS/resnet.yaml."""
RANDAUGMENT = {"num_ops": 2, "magnitude": 15, "num_magnitude_bins": 31}
_GREY = {torch.uint8: 128, torch.float32: 128 / 255}
"""What RandAugment fills in at the borders, as RepOptimizers' code does."""


class PictureAugmentation:
    """Makes a tensor [C, side, side] of a decoded picture.

    The order is that of the published pipelines: `resized` or `crop`, `flip`, `randaugment`, `jitter`. What is left,
    standardising and `cutout`, is for batches.

    `resized` is RandomResizedCrop, with 0.08 to 1 of the area of the whole picture and sides from 3:4 to 4:3, brought
    to `side` by a bilinear filter. `crop` of a picture from a file scales its shorter side to `side` and cuts a square
    anywhere out of it. Images in memory, which have that side, are padded and shifted (`pad_and_crop`). Without either,
    it is the middle. `randaugment` is torchvision's: 2 of 14 operations, each at level 15 of 31. RepOptimizers' code
    ("raug15") has 16 operations, of which inversion, added solarization and cut-out squares are not among those of
    torchvision, and draws the level of each from 0 to 14, where 10 is what others call the largest. Deep greyscale
    images stay floating-point numbers throughout; histograms are equalized in 256 steps.
    """

    def __init__(self, augment: tuple[str, ...], side: int):
        self.augment, self.side = augment, side
        self._resized = self._randaugment = self._jitter = None
        if self.uses_torchvision:
            wanted_by = f"--augment {','.join(name for name in augment if name in OF_TORCHVISION)}"
            v2 = torchvision("transforms.v2", wanted_by)
            bilinear = v2.InterpolationMode.BILINEAR
            if "resized" in augment:
                self._resized = v2.RandomResizedCrop(side, interpolation=bilinear, antialias=True)
            if "randaugment" in augment:
                self._randaugment = {
                    dtype: v2.RandAugment(**RANDAUGMENT, interpolation=bilinear, fill=grey)
                    for dtype, grey in _GREY.items()
                }
            if "jitter" in augment:
                self._jitter = v2.ColorJitter(JITTER, JITTER, JITTER)

    @property
    def uses_torchvision(self) -> bool:
        """Whether it draws from the default generator, as torchvision does. Call it in `own_default_generator` then."""
        return any(name in OF_TORCHVISION for name in self.augment)

    def __call__(self, picture: Picture, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.uses_torchvision:
            # A seed of its own: with the same, the first number that torchvision draws would be the first one here.
            torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        x = self._cropped(picture, generator)
        if "flip" in self.augment and float(torch.rand((), generator=generator)) < 0.5:
            x = x.flip(2)
        if self._randaugment is not None:
            x = self._randaugment[x.dtype](x)
        return x if self._jitter is None else self._jitter(x)

    def _cropped(self, picture: Picture, generator: torch.Generator) -> Tensor:
        in_memory = isinstance(picture, Tensor)
        if self._resized is not None:
            picture = self._resized(picture)
            return picture if in_memory else pixels_of(picture)
        if in_memory:
            return pad_and_crop(picture[None], generator)[0] if "crop" in self.augment else picture
        picture = scaled(picture, self.side)
        left, top = ((n - self.side) // 2 for n in picture.size)
        if "crop" in self.augment:
            left, top = (int(torch.randint(n - self.side + 1, (), generator=generator)) for n in picture.size)
        return pixels_of(picture.crop((left, top, left + self.side, top + self.side)))


@contextlib.contextmanager
def own_default_generator() -> Iterator[None]:
    """Give the default generator of the CPU back as it was, and compute on one thread meanwhile.

    A reader has one thread, and sums (the mean that contrast is about) round otherwise on more.
    """
    state, threads = torch.default_generator.get_state(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.default_generator.set_state(state)
