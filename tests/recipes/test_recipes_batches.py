"""Augmentation and batches: what is drawn, from which generator, and what is left out."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from cases_recipes import load, write_cifar

from gradrep_kernels.recipes.data.augmentation import cutout, flip, pad_and_crop
from gradrep_kernels.recipes.data.load import Images
from gradrep_kernels.recipes.data.loader import Loader, derived_seed


def some_images(n: int = 64, channels: int = 3, side: int = 16) -> torch.Tensor:
    return torch.rand((n, channels, side, side), generator=torch.Generator().manual_seed(1)) + 0.01


def test_flip_mirrors_about_half_of_the_images():
    x = some_images()
    y = flip(x, torch.Generator().manual_seed(0))
    mirrored = [bool(torch.equal(b, a.flip(2))) for a, b in zip(x, y)]
    kept = [bool(torch.equal(b, a)) for a, b in zip(x, y)]
    assert all(m != k for m, k in zip(mirrored, kept))
    assert 16 < sum(mirrored) < 48


def test_pad_and_crop_gives_every_window_of_the_padded_image():
    x = some_images(300)
    y = pad_and_crop(x, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    seen = set()
    for a, b in zip(padded, y):
        windows = [(i, j) for i in range(5) for j in range(5) if torch.equal(b, a[:, i : i + 16, j : j + 16])]
        assert len(windows) == 1
        seen.update(windows)
    assert len(seen) == 25


def test_cutout_clears_one_square_that_the_border_may_cut():
    x = some_images(300)
    y = cutout(x, torch.Generator().manual_seed(0))
    areas = set()
    for a, b in zip(x, y):
        gone = b[0] == 0
        rows, columns = gone.any(1).nonzero().flatten(), gone.any(0).nonzero().flatten()
        expected = a.clone()
        expected[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = 0
        assert torch.equal(b, expected)
        areas.add((len(rows), len(columns)))
    assert max(areas) == (8, 8)
    assert min(min(area) for area in areas) == 4


@pytest.mark.parametrize("augment", [flip, pad_and_crop, cutout])
def test_augmentation_draws_from_its_own_generator_and_leaves_its_input(augment):
    x = some_images(8)
    before, state = x.clone(), torch.get_rng_state()
    first, again, other = (augment(x, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_shuffled_batches_hold_each_image_once_and_leave_the_rest_out():
    data = load("digits")
    loader = Loader(data, data.train, 100, seed=3)
    batches = list(loader)
    assert len(loader) == len(batches) == 11
    assert all(len(x) == len(labels) == 100 for x, labels in batches)
    images = torch.cat([x for x, _ in batches]).flatten(1)
    assert len(torch.unique(images, dim=0)) == 1100
    of_image = {
        x.numpy().tobytes(): int(label)
        for x, label in zip(data.standardise(data.train.read(torch.arange(1197))), data.train.labels)
    }
    assert all(of_image[x.numpy().tobytes()] == int(label) for batch in batches for x, label in zip(*batch))


def test_an_epoch_comes_again_from_its_seed_and_from_nothing_else():
    data = load("digits")

    def epoch(seed):
        return torch.cat([x for x, _ in Loader(data, data.train, 300, seed=seed, augment=("flip", "crop", "cutout"))])

    torch.manual_seed(1)
    first, state = epoch(9), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, epoch(9))
    assert not torch.equal(first, epoch(10))
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


def test_the_test_set_comes_whole_and_in_order():
    data = load("digits")
    loader = Loader(data, data.test, 100)
    assert len(loader) == 6
    assert torch.equal(torch.cat([labels for _, labels in loader]), data.test.labels)


def test_a_set_smaller_than_a_batch_is_one_batch(tmp_path):
    data = load(f"cifar100:{write_cifar(tmp_path, 'cifar100')}")
    assert [len(x) for x, _ in Loader(data, data.train, 64, seed=0)] == [4]


def test_whoever_leaves_early_does_not_wait_for_the_batch_that_is_read_ahead():
    data, go_on = load("digits"), threading.Event()

    def read(indices):
        if read.calls:
            assert go_on.wait(60)
        read.calls += 1
        return data.train.read(indices)

    read.calls = 0
    images = Images(data.train.labels, read, lazy=True)
    try:
        batches = iter(Loader(data, images, 100, seed=0))
        next(batches)
        start = time.monotonic()
        batches.close()
        assert time.monotonic() - start < 30
    finally:
        go_on.set()


def test_derived_seeds_differ_and_stay():
    seeds = {derived_seed(seed, purpose, epoch) for seed in range(5) for purpose in range(4) for epoch in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed(0, 1) == derived_seed(0, 1) != derived_seed(1, 0)
