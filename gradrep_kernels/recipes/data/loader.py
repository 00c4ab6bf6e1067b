"""Batches of one epoch, shuffled and augmented from a seed.

Every random number comes from a generator of the epoch's own, or from one of the image's own, so that an epoch can be
replayed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gradrep_kernels.recipes import interrupts
from gradrep_kernels.recipes.data.augmentation import OF_TORCHVISION, WHOLE, Part, cutout, flip, pad_and_crop
from gradrep_kernels.recipes.data.images import Data, Images
from gradrep_kernels.recipes.data.picture_augmentation import PictureAugmentation
from gradrep_kernels.recipes.data.reading import BatchReader, read_batches
from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.seeds import derived_seed

__all__ = ["Loader", "derived_seed"]


class Loader:
    """Batches (x [n, C, H, W] standardised, labels [n]) of one epoch.

    Iterating again gives the same batches. With a seed, images are shuffled and augmented from it. The incomplete last
    batch is left out, because its images would weigh more, but a set smaller than one batch is one batch. Without a
    seed all images come in order, as they are tested.

    `readers` processes read images from files, and do what torchvision does to them. 0: this process does. The bits
    are the same.

    Of several processes that train together, `rank` (from 0) of `ranks` gets its part. `batch_size` is that of all of
    them. With a seed, each batch is cut into `ranks` pieces of neighbours, whose lengths differ by one at most: the
    pieces of all ranks one behind the other are the batch of one process, bit for bit. Without a seed, the set is cut
    so: each image comes once on one rank, and a rank may have fewer batches than another, or none.

    Raises InputError where a batch has fewer images than there are ranks.
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
        readers: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ):
        if not 0 <= rank < ranks:
            raise ValueError(f"rank must be from 0 to {ranks - 1}, that is below ranks, got {rank}")
        self.data, self.images, self.seed, self.augment, self.device = data, images, seed, augment, device
        self.batch_size = min(batch_size, len(images))
        self.readers, self.rank, self.ranks = readers, rank, ranks
        if seed is not None and self.batch_size < ranks:
            raise InputError(f"a batch of {self.batch_size} images is too small for {ranks} processes")
        # Images in memory are augmented as batches where that can be done: it takes a hundredth of the time.
        one_by_one = images.lazy and images.picture is not None
        self._of_pictures = seed is not None and (one_by_one or any(name in OF_TORCHVISION for name in augment))
        augmentation = PictureAugmentation(augment, data.side) if self._of_pictures else None
        self._reader = BatchReader(images, augmentation)
        self._part: Part = WHOLE
        if ranks > 1 and seed is not None:
            mine = self._mine(torch.arange(self.batch_size))
            self._part = (self.batch_size, slice(int(mine[0]), int(mine[-1]) + 1))

    def __len__(self) -> int:
        if self.seed is not None:
            return len(self.images) // self.batch_size
        return -(-len(self._mine(torch.arange(len(self.images)))) // max(1, self.batch_size))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator()
        order = torch.arange(len(self.images))
        if self.seed is None:
            mine = self._mine(order)
            chosen = list(mine.split(self.batch_size)) if len(mine) else []
        else:
            generator.manual_seed(self.seed)
            order = order[torch.randperm(len(order), generator=generator)]
            chosen = [self._mine(batch) for batch in order.split(self.batch_size)[: len(self)]]
        readers = self.readers if self.images.lazy or self._of_pictures else 0
        seed = self.seed if self._of_pictures else None
        wanted = [(indices, seed) for indices in chosen]
        # The reader first: zip asks it once more after the last batch, and so it ends before it is destroyed.
        for x, indices in zip(read_batches(self._reader, wanted, readers), chosen):
            interrupts.check()
            yield self._prepared(x, generator).to(self.device), self.images.labels[indices].to(self.device)

    def _mine(self, indices: Tensor) -> Tensor:
        """The piece of this rank."""
        return indices.tensor_split(self.ranks)[self.rank]

    def _prepared(self, x: Tensor, generator: torch.Generator) -> Tensor:
        if "crop" in self.augment and not self._of_pictures:
            x = pad_and_crop(x, generator, self._part)
        if "flip" in self.augment and not self._of_pictures:
            x = flip(x, generator, self._part)
        x = self.data.standardise(x)
        return cutout(x, generator, self._part) if "cutout" in self.augment else x
