"""Batches of a set read from files or augmented picture by picture, in this process or in others.

The bits do not depend on who reads: each picture has a seed of its own.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gradrep_kernels.recipes import interrupts
from gradrep_kernels.recipes.data.images import Images, as_floats
from gradrep_kernels.recipes.data.picture_augmentation import PictureAugmentation, own_default_generator
from gradrep_kernels.recipes.errors import InputError, one_line
from gradrep_kernels.recipes.seeds import derived_seed

__all__ = ["BatchReader", "read_batches"]

_HOW = "fork" if sys.platform == "linux" else None
"""How readers start. A fork takes 0.1 s for each epoch. Other ways import torch again, and would be taken where the
training itself is in a process that was started so."""

Wanted = tuple[Tensor, int | None]
"""Indices [n] of a batch, and the seed of the epoch (None: pictures are read as they are tested)."""


@dataclass(frozen=True)
class BatchReader(Dataset):
    """Reads a batch: `reader[indices, seed]`. It can be pickled where the set can."""

    images: Images
    augmentation: PictureAugmentation | None = None

    def __getitem__(self, wanted: Wanted) -> Tensor | InputError:
        """uint8 [n, C, H, W], or floating-point numbers in [0, 1] where a picture of the batch has them.

        An InputError is returned, because a DataLoader would raise it with a traceback of the other process as text.
        """
        indices, seed = wanted
        try:
            if self.augmentation is None:
                return self.images.read(indices)
            # A seed of its own for each picture, which does not depend on who else is in the batch.
            return self._augmented(indices.tolist(), [derived_seed(seed, index) for index in indices.tolist()])
        except InputError as reason:
            return reason

    @property
    def draws_from_default(self) -> bool:
        """Whether reading takes numbers from the default generator, and so cannot be done beside a training."""
        return self.augmentation is not None and self.augmentation.uses_torchvision

    def _augmented(self, indices: Sequence[int], seeds: Sequence[int]) -> Tensor:
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(threads) as pool:  # Pillow decodes without the interpreter's lock.
            if not self.draws_from_default:
                return _stacked(list(pool.map(self._picture, indices, seeds)))
            pictures = []
            with own_default_generator():
                # A few at a time: decoded pictures may be a hundred times the size of what is cut out of them.
                for start in range(0, len(indices), threads):
                    some = slice(start, start + threads)
                    decoded = pool.map(self.images.decoded, indices[some])
                    pictures += [self.augmentation(*one) for one in zip(decoded, seeds[some])]
            return _stacked(pictures)

    def _picture(self, index: int, seed: int) -> Tensor:
        return self.augmentation(self.images.decoded(index), seed)


def _stacked(pictures: list[Tensor]) -> Tensor:
    if len({picture.dtype for picture in pictures}) > 1:  # deep greyscale images among others
        pictures = [as_floats(picture) for picture in pictures]
    return torch.stack(pictures)


def read_batches(reader: BatchReader, wanted: Sequence[Wanted], readers: int) -> Iterator[Tensor]:
    """float32 [n, C, H, W] in [0, 1] of each batch, in order.

    `readers` processes read ahead. With none this process does: while a batch is used, a thread reads the next one,
    but where the augmentation draws from the default generator, which belongs to the training meanwhile.

    Raises InputError that names the file, or says that a reader has ended.
    """
    if not wanted:
        return
    if readers:
        reading = _from_processes(reader, wanted, readers)
    elif reader.images.lazy and not reader.draws_from_default:
        reading = _read_ahead(reader, wanted)
    else:
        reading = (reader[each] for each in wanted)
    with contextlib.closing(reading) as batches:
        for batch in batches:
            if isinstance(batch, InputError):
                raise batch
            yield as_floats(batch)


def _read_ahead(reader: BatchReader, wanted: Sequence[Wanted]) -> Iterator[Tensor | InputError]:
    thread = ThreadPoolExecutor(1)  # It reads the next batch while this one is used.
    try:
        pending = thread.submit(reader.__getitem__, wanted[0])
        for following in wanted[1:]:
            batch = pending.result()
            pending = thread.submit(reader.__getitem__, following)
            yield batch
        yield pending.result()
    finally:
        # Whoever leaves early does not wait for a batch that nobody will use.
        thread.shutdown(wait=False, cancel_futures=True)


def _from_processes(reader: BatchReader, wanted: Sequence[Wanted], readers: int) -> Iterator[Tensor | InputError]:
    loader = DataLoader(
        reader,
        batch_size=None,  # A reader does a batch, so that it comes in one piece.
        sampler=wanted,
        num_workers=min(readers, len(wanted)),
        multiprocessing_context=_HOW,
        worker_init_fn=_begin_reader,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # else it would draw from the training's
    )
    batches = None
    try:
        with interrupts.kept_from_children():
            batches = iter(loader)
        yield from batches
    except RuntimeError as reason:
        if "DataLoader worker" not in str(reason):
            raise
        raise InputError(
            f"{one_line(reason)} (out of memory, or of /dev/shm?); "
            "fewer --readers take less, --readers 0 reads in this process"
        ) from None
    finally:
        # This ends the readers now, whoever keeps an error whose traceback refers to the iterator.
        if batches is not None:
            batches.__del__()


def _as_it_is(batch: Any) -> Any:
    return batch


def _begin_reader(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group, and the parent ends its readers.
