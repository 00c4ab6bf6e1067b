"""A part of the training images that chooses a learning rate and is not trained on."""

from __future__ import annotations

import dataclasses
import functools

import torch

from gradrep_kernels.recipes.data.augmentation import check_augmentations
from gradrep_kernels.recipes.data.load import Data, Images, load_data
from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.options.resolve import Options

__all__ = ["hold_out", "keep", "load_job_data", "split_data"]


def hold_out(data: Data, share: float) -> tuple[Data, Images]:
    """Split the training images into those to train on, as `data`, and a validation part.

    Every class gives about `share` of its images, the same whatever the seed of a run: of a class with a few images,
    all or none. The statistics to standardise with stay those of all training images. Without a seed a `Loader` reads
    the validation part as test images are read, whatever the augmentation.
    """
    by_class = _mixed_by_class(data)
    labels = data.train.labels[by_class]
    # Along the images sorted by class, every (1 / share)-th is held out, so that each class gives its share.
    held = (torch.arange(1, len(labels) + 1) * share).floor() > (torch.arange(len(labels)) * share).floor()
    trained, validation = (data.train.part(by_class[chosen].sort().values) for chosen in (~held, held))
    return dataclasses.replace(data, train=trained), validation


def keep(data: Data, images: int) -> Data:
    """Keep so many training images, of every class as large a part, the same whatever the seed of a run.

    Raises InputError where there are fewer.
    """
    if images > len(data.train):
        raise InputError(f"--images {images}: {data.name} has {len(data.train)} training images")
    by_class = _mixed_by_class(data)
    place = torch.arange(len(by_class))
    kept = (place + 1) * images // len(by_class) > place * images // len(by_class)
    return dataclasses.replace(data, train=data.train.part(by_class[kept].sort().values))


def _mixed_by_class(data: Data) -> torch.Tensor:
    """The training images in an order that is mixed within each class, one class after the other."""
    mixed = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    return mixed[data.train.labels[mixed].argsort(stable=True)]


@functools.lru_cache(maxsize=1)  # A process does many trainings on the same data.
def split_data(options: Options) -> tuple[Data, Images]:
    """Read a data set and hold a share of its training images out."""
    return hold_out(load_job_data(options), options.validation)


def load_job_data(options: Options, download: bool = False) -> Data:
    """Read the data set of a job.

    Raises InputError as `load_data` does, also where the augmentation of the Hyper-Search cannot be done.
    """
    if options.searches:
        check_augmentations(options.search_augment, "--search-augment" if options.recipe else "--augment")
    data = load_data(
        options.data,
        options.image_size,
        test_size=options.test_size,
        test_resize=options.test_resize,
        augment=options.augment,
        download=download,
    )
    return data if options.images is None else keep(data, options.images)
