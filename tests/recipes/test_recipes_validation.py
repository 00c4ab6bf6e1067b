"""The part of the training images that chooses a learning rate."""

from __future__ import annotations

import pytest
import torch

from gradrep_kernels.recipes.data.load import Data, Images
from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.validation import hold_out, keep


def numbered(labels):
    """Images whose one pixel is their number."""
    labels = torch.as_tensor(labels)
    images = Images(labels, lambda at: at.reshape(-1, 1, 1, 1).float())
    return Data("numbers", images, images, tuple("abc"), 1, torch.zeros(1), torch.ones(1))


def numbers(images):
    return images.read(torch.arange(len(images))).flatten().int().tolist()


@pytest.mark.parametrize("share", [0.1, 0.2, 0.25, 0.5])
def test_both_parts_together_are_the_training_images(share):
    data = numbered(torch.randint(0, 3, (97,), generator=torch.Generator().manual_seed(1)))
    trained, validation = hold_out(data, share)
    assert sorted(numbers(trained.train) + numbers(validation)) == list(range(97))
    assert len(validation) == int(97 * share)
    for part in (trained.train, validation):
        assert torch.equal(part.labels, data.train.labels[numbers(part)])
    assert trained.test is data.test


def test_every_class_gives_its_share():
    _, validation = hold_out(numbered([0] * 50 + [1] * 20 + [2] * 10), 0.2)
    assert torch.bincount(validation.labels).tolist() == [10, 4, 2]


def test_it_is_the_same_each_time_and_leaves_the_generator_alone():
    data, state = numbered([0, 1, 2] * 20), torch.get_rng_state()
    first, again = (hold_out(data, 0.3)[1] for _ in range(2))
    assert numbers(first) == numbers(again)
    assert torch.equal(torch.get_rng_state(), state)
    assert numbers(first) != list(range(len(first)))


@pytest.mark.parametrize("images", [1, 2, 7, 15, 59, 60])
def test_so_many_images_are_kept_of_every_class_as_large_a_part(images):
    data, state = numbered([0] * 30 + [1] * 20 + [2] * 10), torch.get_rng_state()
    kept = keep(data, images).train
    assert len(kept) == len(set(numbers(kept))) == images
    assert numbers(kept) == numbers(keep(data, images).train)
    counts = torch.bincount(kept.labels, minlength=3)
    assert (counts - torch.tensor([30, 20, 10]) * images / 60).abs().max() < 1
    assert torch.equal(torch.get_rng_state(), state)


def test_more_images_than_there_are_is_an_error():
    with pytest.raises(InputError, match=r"--images 16: .* has 15 training images"):
        keep(numbered([0, 1, 2] * 5), 16)


def test_nothing_held_out_leaves_everything():
    data = numbered([0, 1, 2] * 5)
    trained, validation = hold_out(data, 0.0)
    assert numbers(trained.train) == list(range(15))
    assert len(validation) == 0
