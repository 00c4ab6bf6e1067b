"""Who reads a batch: this process, others, or each rank its part. The bits are the same."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
import torchvision_alone
from cases_recipes import load, train, write_cifar, write_folder, write_image

from gradrep_kernels.recipes.data.load import load_data
from gradrep_kernels.recipes.data.loader import Loader
from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.training import repeatable

needs_torchvision = torchvision_alone.needed
SIDE = 12
EVERY_WAY = [
    pytest.param(("crop", "flip", "cutout"), id="own"),
    pytest.param(("resized", "flip", "randaugment", "jitter", "cutout"), id="torchvision", marks=needs_torchvision),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """22 pictures to train on, each of another colour and size."""
    root = write_folder(tmp_path_factory.mktemp("reading"), per_class=11)
    for n in range(11):
        write_image(root / "train" / "bee" / f"{n}.png", (30 + 3 * n, 25 + n), (20 * n, 90, 250 - 20 * n))
    return root


@pytest.fixture
def pictures(folder):
    return load_data(f"folder:{folder}", SIDE, test_size=10)


def batches(data, images, size, **settings):
    return list(Loader(data, images, size, **settings))


def assert_same(first, second):
    assert len(first) == len(second)
    for (x, labels), (y, others) in zip(first, second):
        assert torch.equal(x, y)
        assert torch.equal(labels, others)


@pytest.mark.parametrize("augment", EVERY_WAY)
def test_bits_do_not_depend_on_the_number_of_readers(pictures, augment):
    first, one, two = (
        batches(pictures, pictures.train, 5, seed=4, augment=augment, readers=readers) for readers in (0, 1, 2)
    )
    assert len(first) == 4
    assert_same(first, one)
    assert_same(first, two)


@needs_torchvision
def test_nor_on_the_number_of_threads(tmp_path):
    image = pytest.importorskip("PIL.Image")
    folder, noise = write_folder(tmp_path, per_class=4), np.random.default_rng(0)
    for n in range(8):  # of 16 bits: in 8, what is rounded is rounded away
        greys = noise.integers(0, 65536, (230, 250)).astype(np.uint16)
        image.fromarray(greys).save(folder / "train" / ("ant", "bee")[n % 2] / f"{n // 2}.png")
    pictures = load_data(f"folder:{folder}", 224)  # above 32768 pixels torch sums on several threads
    found = []
    for threads, readers in ((1, 0), (2, 0), (2, 1)):
        with repeatable(threads, "cpu"):
            augment = ("crop", "flip", "jitter")
            found.append(batches(pictures, pictures.train, 8, seed=2, augment=augment, readers=readers))
            assert torch.get_num_threads() == threads
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


def test_a_test_set_is_read_whole_and_in_order_by_readers_too(pictures):
    here, there = (batches(pictures, pictures.test, 6, readers=readers) for readers in (0, 2))
    assert [len(x) for x, _ in there] == [6, 6, 6, 4]
    assert there[0][0].shape == (6, 3, 10, 10)
    assert_same(here, there)


@needs_torchvision
def test_images_in_memory_are_augmented_by_readers_too(tmp_path):
    data = load(f"cifar10:{write_cifar(tmp_path, 'cifar10')}")
    augment = ("crop", "flip", "randaugment", "cutout")
    assert_same(*(batches(data, data.train, 5, seed=1, augment=augment, readers=readers) for readers in (0, 2)))
    plain = batches(data, data.train, 5, seed=1, augment=("crop", "flip", "cutout"), readers=2)  # needs none
    assert_same(plain, batches(data, data.train, 5, seed=1, augment=("crop", "flip", "cutout")))


def test_readers_leave_the_default_generator_and_no_process(pictures):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    reading = iter(Loader(pictures, pictures.train, 3, seed=1, augment=("crop",), readers=2))
    next(reading)
    assert multiprocessing.active_children()
    reading.close()  # as the statistics of SGS do, which take a few batches
    assert torch.equal(torch.get_rng_state(), state)
    deadline = time.monotonic() + 20
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


def test_a_file_that_a_reader_cannot_read_is_named_in_one_line(pictures, folder):
    bad = dataclasses.replace(pictures.train, picture=None, read=Refuses(str(folder / "x.png")))
    with pytest.raises(InputError) as wrong:
        batches(pictures, bad, 5, readers=1)
    assert str(wrong.value) == f"{folder / 'x.png'}: not a readable image"


class Refuses:
    def __init__(self, path):
        self.path = path

    def __call__(self, indices):
        raise InputError(f"{self.path}: not a readable image")


class Dies:
    def __call__(self, indices):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_reader_that_is_killed_is_told_in_one_line(pictures):
    with pytest.raises(InputError) as wrong:
        batches(pictures, dataclasses.replace(pictures.train, read=Dies()), 5, readers=1)
    assert str(wrong.value).startswith("DataLoader worker")
    assert "--readers 0 reads in this process" in str(wrong.value)
    assert "\n" not in str(wrong.value)


class SendsInterrupt:
    def __init__(self, read):
        self.read = read

    def __call__(self, indices):
        os.kill(os.getpid(), signal.SIGINT)
        return self.read(indices)


def test_a_reader_does_not_hear_ctrl_c(pictures):
    images = dataclasses.replace(pictures.test, read=SendsInterrupt(pictures.test.read))
    assert_same(batches(pictures, images, 6, readers=2), batches(pictures, pictures.test, 6))


def test_trainings_in_processes_of_their_own_have_readers(folder, tmp_path, no_pictures):
    source = f"folder:{folder}"
    given = ["--recipe", "sgd,sgs", "--seeds", "1", "--model", "small", "--image-size", "16", "--epochs", "1"]
    given += ["--augment", "crop,flip", "--batch-size", "8", "--lr", "0.1", "--check-steps", "0"]
    train(source, tmp_path, "--name", "here", *given)
    train(source, tmp_path, "--name", "there", *given, "--workers", "2", "--readers", "1")
    for name in ("sgd-seed0.pt", "sgs-seed0.pt"):
        a, b = (torch.load(tmp_path / run / "weights" / name, weights_only=True) for run in ("here", "there"))
        assert all(torch.equal(a[key], b[key]) for key in a)


# ---- ranks


@pytest.mark.parametrize("ranks", [2, 3, 7])
@pytest.mark.parametrize("augment", EVERY_WAY)
def test_the_pieces_of_all_ranks_are_the_batches_of_one_process(pictures, tmp_path, augment, ranks):
    digits = load("digits")
    sets = [pictures] if "resized" in augment else [pictures, digits]
    for data in sets:
        images = data.train.part(torch.arange(22))
        whole = batches(data, images, 7, seed=6, augment=augment)
        loaders = [Loader(data, images, 7, seed=6, augment=augment, rank=rank, ranks=ranks) for rank in range(ranks)]
        assert [len(loader) for loader in loaders] == [3] * ranks
        pieces = [list(loader) for loader in loaders]
        for n, (x, labels) in enumerate(whole):
            assert {len(piece[n][0]) for piece in pieces} <= {7 // ranks, 7 // ranks + 1}
            assert torch.equal(torch.cat([piece[n][0] for piece in pieces]), x)
            assert torch.equal(torch.cat([piece[n][1] for piece in pieces]), labels)


@pytest.mark.parametrize("ranks", [1, 2, 5, 30])
def test_each_test_image_comes_once_on_one_rank(pictures, ranks):
    loaders = [Loader(pictures, pictures.test, 4, rank=rank, ranks=ranks) for rank in range(ranks)]
    found = [list(loader) for loader in loaders]
    assert [len(loader) for loader in loaders] == [len(of_rank) for of_rank in found]
    sizes = [sum(len(labels) for _, labels in of_rank) for of_rank in found]
    assert max(sizes) - min(sizes) <= 1
    x = torch.cat([x for of_rank in found for x, _ in of_rank])
    assert torch.equal(x, torch.cat([x for x, _ in Loader(pictures, pictures.test, 4)]))


def test_ranks_that_cannot_be_are_refused(pictures):
    for rank, ranks in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="rank must be from 0 to"):
            Loader(pictures, pictures.train, 8, seed=0, rank=rank, ranks=ranks)
    with pytest.raises(InputError, match="a batch of 2 images is too small for 3 processes"):
        Loader(pictures, pictures.train, 2, seed=0, rank=0, ranks=3)
