"""Batches of one epoch, shuffled and augmented from a seed.

Every random number comes from a generator of the epoch's own, so that an epoch can be replayed.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from gradrep_kernels.recipes import interrupts
from gradrep_kernels.recipes.augmentation import cutout, flip, pad_and_crop
from gradrep_kernels.recipes.data import Data, Images

__all__ = ["Loader", "derived_seed"]


def derived_seed(*parts: int) -> int:
    """Return a seed for one purpose from (seed, purpose, epoch, ...).

    Seeds of neighbours are independent.
    """
    # torch takes seeds of 63 bits without a sign.
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


class Loader:
    """Batches (x [n, C, H, W] standardised, labels [n]) of one epoch.

    Iterating again gives the same batches. With a seed, images are shuffled and augmented from it. The incomplete last
    batch is left out, because its images would weigh more, but a set smaller than one batch is one batch. Without a
    seed all images come in order, unchanged.
    """

    def __init__(
        self,
        data: Data,
        images: Images,
        batch_size: int,
        *,
        seed: int | None = None,
        augment: tuple[str, ...] = (),
        device: str = "cpu",
    ):
        self.data, self.images, self.seed, self.augment, self.device = data, images, seed, augment, device
        self.batch_size = min(batch_size, len(images))

    def __len__(self) -> int:
        whole, rest = divmod(len(self.images), self.batch_size)
        return whole + (self.seed is None and rest > 0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator()
        order = torch.arange(len(self.images))
        if self.seed is not None:
            generator.manual_seed(self.seed)
            order = order[torch.randperm(len(order), generator=generator)]
        chosen = order.split(self.batch_size)[: len(self)]
        # The reader first: zip asks it once more after the last batch, and so it ends before it is destroyed.
        for x, indices in zip(self._read(chosen), chosen):
            interrupts.check()
            yield self._prepared(x, generator).to(self.device), self.images.labels[indices].to(self.device)

    def _read(self, chosen: tuple[Tensor, ...]) -> Iterator[Tensor]:
        if not self.images.lazy:
            yield from map(self.images.read, chosen)
            return
        reader = ThreadPoolExecutor(1)  # It reads the next batch while this one is used.
        try:
            pending = reader.submit(self.images.read, chosen[0])
            for following in chosen[1:]:
                x = pending.result()
                pending = reader.submit(self.images.read, following)
                yield x
            yield pending.result()
        finally:
            # Whoever leaves early does not wait for a batch that nobody will use.
            reader.shutdown(wait=False, cancel_futures=True)

    def _prepared(self, x: Tensor, generator: torch.Generator) -> Tensor:
        if "crop" in self.augment:
            x = pad_and_crop(x, generator)
        if "flip" in self.augment:
            x = flip(x, generator)
        x = self.data.standardise(x)
        return cutout(x, generator) if "cutout" in self.augment else x
