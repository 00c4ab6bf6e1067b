"""Pictures augmented one by one: what is seen of them, in which range, and from which numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchvision_alone
from cases_recipes import write_cifar, write_folder

from gradrep_kernels.recipes.data.augmentation import AUGMENTATIONS
from gradrep_kernels.recipes.data.load import load_data
from gradrep_kernels.recipes.data.loader import Loader
from gradrep_kernels.recipes.data.picture_augmentation import PictureAugmentation, own_default_generator
from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.validation import hold_out

image = pytest.importorskip("PIL.Image")
needs_torchvision = torchvision_alone.needed
pytestmark = pytest.mark.filterwarnings("error::UserWarning")
SIDE = 16


def columns(width: int, height: int, scale: float = 1.0):
    """A picture whose red is its column, whose green is its row, and whose blue is never black."""
    rows, places = np.mgrid[:height, :width]
    return image.fromarray(np.stack([places * scale, rows * scale, 0 * rows + 200], 2).astype(np.uint8))


def epoch(augment: tuple[str, ...], picture, count: int = 200, side: int = SIDE) -> torch.Tensor:
    augmentation = PictureAugmentation(augment, side)
    with own_default_generator():
        return torch.stack([augmentation(picture, seed) for seed in range(count)]).float()


@pytest.mark.parametrize("size", [(32, 16), (16, 32), (40, 20)])
def test_a_crop_sees_a_picture_of_2_to_1_whole_and_no_black_border(size):
    x = epoch(("crop",), columns(*size, scale=255 / 40))
    assert float(x[:, 2].min()) == 200  # where it was padded, it would be 0
    seen = x[:, 0 if size[0] > size[1] else 1]
    assert float(seen.min()) <= 255 / 40 * 1.3  # of the scaled picture's first column
    assert float(seen.max()) >= 255 / 40 * (max(size) - 2.3)
    firsts = {round(float(one.min())) for one in seen}
    assert len(firsts) == 17  # all places that there are: 0 to 32 - 16


@needs_torchvision
@pytest.mark.parametrize("size", [(250, 125), (125, 250), (200, 200)])
def test_a_resized_crop_is_of_the_whole_picture_in_the_published_range(size):
    x = epoch(("resized",), columns(*size))
    assert float(x[:, 2].min()) == 200
    assert float(x[:, 0].max()) > size[0] - 15  # close to the edge: each pixel of 16 is a mean over its place
    assert float(x[:, 1].max()) > size[1] - 15
    assert max(float(x[:, 0].min()), float(x[:, 1].min())) < 14
    # Columns rise evenly, so the first and the last pixel tell how much was cut out.
    widths = (x[:, 0, 8, -1] - x[:, 0, 8, 0]) * SIDE / (SIDE - 1)
    heights = (x[:, 1, -1, 8] - x[:, 1, 0, 8]) * SIDE / (SIDE - 1)
    shares, ratios = widths * heights / math.prod(size), widths / heights
    assert 0.07 < float(shares.min()) < 0.15
    assert float(shares.max()) > (0.6 if size[0] == size[1] else 0.4)  # at 4:3 a picture of 2:1 gives 2/3
    assert float(ratios.min()) > 0.68
    assert float(ratios.max()) < 1.45
    assert float(ratios.max()) / float(ratios.min()) > 1.5


def test_without_either_it_is_the_middle():
    x = epoch(("flip",), columns(48, 16), 40)
    assert {float(one[0, 0, 0]) for one in x} == {16.0, 31.0}  # as it is, or mirrored
    assert 8 < sum(float(one[0, 0, 0]) == 16 for one in x) < 32


@needs_torchvision
def test_what_is_seen_and_whether_it_is_mirrored_are_independent():
    x = epoch(("resized", "flip"), columns(200, 200), 400)
    mirrored = x[:, 0, 8, 0] > x[:, 0, 8, -1]
    widths = (x[:, 0, 8, -1] - x[:, 0, 8, 0]).abs()
    assert 160 < int(mirrored.sum()) < 240
    assert abs(float(torch.corrcoef(torch.stack([widths, mirrored.float()]))[0, 1])) < 0.15  # 3 standard deviations


# ---- deep greyscale images


def deep(kind: str):
    """Greys from 0 to 1 in steps far below 1/255, and the same picture in 8 bits."""
    grey = np.linspace(0, 1, 60 * 40, dtype=np.float32).reshape(40, 60)
    eight = np.repeat((grey * 255).round().astype(np.uint8)[:, :, None], 3, 2)
    return image.fromarray(grey if kind == "deep" else eight)


@needs_torchvision
@pytest.mark.parametrize("augment", [("resized", "flip"), ("crop", "flip")])
def test_a_deep_picture_keeps_its_greys(augment):
    fine, coarse = epoch(augment, deep("deep"), 30), epoch(augment, deep("8 bits"), 30)
    assert fine.shape == coarse.shape == (30, 3, SIDE, SIDE)
    torch.testing.assert_close(fine, coarse / 255, rtol=0, atol=2 / 255)
    assert float(fine.max()) > 0.95
    assert not torch.equal((fine * 255).round(), fine * 255)  # more than 8 bits
    assert len(fine.unique()) > 256


@needs_torchvision
def test_a_16_bit_file_keeps_its_range_through_a_loader(tmp_path):
    folder = write_folder(tmp_path, size=(60, 40))
    greys = np.linspace(0, 65535, 60 * 40).reshape(40, 60).astype(np.uint16)
    image.fromarray(greys).save(folder / "train" / "ant" / "16.png")
    data = load_data(f"folder:{folder}", SIDE, augment=("resized", "flip"))
    seen = []
    for seed in range(20):
        for x, labels in Loader(data, data.train, 7, seed=seed, augment=("resized", "flip")):
            assert (x.shape, x.dtype, len(labels)) == ((7, 3, SIDE, SIDE), torch.float32, 7)
            x = x * data.std.reshape(3, 1, 1) + data.mean.reshape(3, 1, 1)
            grey = [one for one in x if torch.allclose(one[0], one[1], atol=1e-5) and float(one.std()) > 0.01]
            assert len(grey) == 1  # the 8-bit pictures are of one colour each
            seen.append(grey[0])
    seen = torch.stack(seen)
    assert 0 <= float(seen.min()) < 0.05
    assert 0.95 < float(seen.max()) <= 1 + 1e-5
    assert 0.3 < float(seen.mean()) < 0.7  # clamped to 8 bits, nearly all would be white


@needs_torchvision
def test_every_operation_takes_a_deep_picture_as_one_of_8_bits():
    augment = ("crop", "flip", "randaugment", "jitter")
    fine, coarse = epoch(augment, deep("deep"), 300), epoch(augment, deep("8 bits"), 300)
    assert float(fine.min()) >= 0
    assert float(fine.max()) <= 1
    # Bit depths and thresholds round a grey to another step here and there; a lost range would show in every picture.
    apart = (fine - coarse / 255).abs().mean((1, 2, 3))
    assert float(apart.median()) < 0.01
    assert float((apart < 0.05).float().mean()) > 0.95


# ---- what the operations do


@needs_torchvision
def test_jitter_changes_brightness_by_six_hundredths_and_not_the_hue():
    grey = image.new("RGB", (SIDE, SIDE), (100, 100, 100))
    levels = epoch(("jitter",), grey)[:, :, 0, 0]
    assert torch.equal(levels[:, 0], levels[:, 2])
    assert 91 <= float(levels.min()) < 96  # 100 x 0.94, and three roundings down
    assert 104 < float(levels.max()) <= 107


@needs_torchvision
def test_randaugment_does_two_operations_of_level_15_of_31():
    v2 = pytest.importorskip("torchvision.transforms.v2")
    augmentation = PictureAugmentation(("randaugment",), SIDE)
    for made in augmentation._randaugment.values():
        assert isinstance(made, v2.RandAugment)
        assert (made.num_ops, made.magnitude, made.num_magnitude_bins) == (2, 15, 31)
    white = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    with own_default_generator():
        x = torch.stack([augmentation(white, seed) for seed in range(200)])
    assert 128 in x.unique().tolist()  # what turns or shifts fills with grey
    assert torch.equal(white, torch.full_like(white, 255))


@needs_torchvision
def test_flip_comes_before_randaugment_and_jitter_as_published():
    augmentation, done = PictureAugmentation(("resized", "flip", "randaugment", "jitter"), SIDE), []

    def told(name, original):
        def call(x):
            done.append((name, x.clone() if isinstance(x, torch.Tensor) else x))
            return original(x)

        return call

    augmentation._resized = told("resized", augmentation._resized)
    augmentation._randaugment = {torch.uint8: told("randaugment", augmentation._randaugment[torch.uint8])}
    augmentation._jitter = told("jitter", augmentation._jitter)
    picture, mirrored = columns(200, 200), 0
    with own_default_generator():
        for seed in range(20):
            augmentation(picture, seed)
            names, (_, x, _) = zip(*done)
            assert names == ("resized", "randaugment", "jitter")
            mirrored += bool(x[0, 8, 0] > x[0, 8, -1])
            done.clear()
    assert 0 < mirrored < 20


def test_the_names_are_all_that_there_are():
    assert set(AUGMENTATIONS) == {"flip", "crop", "cutout", "resized", "randaugment", "jitter"}
    with pytest.raises(InputError, match="--augment resized,crop: each says which part"):
        load_data("digits", augment=("resized", "crop"))


# ---- numbers


@needs_torchvision
@pytest.mark.parametrize("source", ["folder", "cifar10", "digits"])
def test_an_epoch_comes_from_its_seed_and_leaves_the_default_generator(tmp_path, source):
    if source == "folder":
        data = load_data(f"folder:{write_folder(tmp_path, per_class=5)}", SIDE)
    else:
        data = load_data("digits" if source == "digits" else f"cifar10:{write_cifar(tmp_path, 'cifar10')}")
    augment = ("resized", "flip", "randaugment", "jitter", "cutout")

    def first(seed):
        return next(iter(Loader(data, data.train, 5, seed=seed, augment=augment)))[0]

    torch.manual_seed(1)
    state, x = torch.get_rng_state(), first(9)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(x, first(9))
    assert not torch.equal(x, first(10))
    assert x.shape == (5, data.channels, data.side, data.side)


# ---- validation and test


def test_test_pictures_are_scaled_and_their_middle_cut_out(tmp_path):
    folder = write_folder(tmp_path)
    columns(80, 40).save(folder / "val" / "ant" / "0.png")
    data = load_data(f"folder:{folder}", 8, test_size=10, test_resize=40)
    x = data.test.read(torch.tensor([0]))[0] * 255
    assert x.shape == (3, 10, 10)
    torch.testing.assert_close(x[0, 0], torch.arange(35.0, 45))  # 80 / 2 - 5 on
    torch.testing.assert_close(x[1, :, 0], torch.arange(15.0, 25))
    assert (data.side, data.test_side) == (8, 10)
    assert load_data(f"folder:{folder}", 8).test.read(torch.tensor([0])).shape == (1, 3, 8, 8)
    smaller = load_data(f"folder:{folder}", 8, test_size=10).test.read(torch.tensor([0]))[0] * 255
    torch.testing.assert_close(smaller[0, 0], torch.arange(10) * 4 + 80 / 2 - 20 + 1.5, atol=0.6, rtol=0)
    with pytest.raises(InputError, match="--test-resize 9 is less than the 10 pixels of --test-size"):
        load_data(f"folder:{folder}", 8, test_size=10, test_resize=9)


def test_a_validation_part_is_read_as_test_pictures_are(tmp_path):
    folder = write_folder(tmp_path, per_class=10)
    for n in range(10):
        columns(80, 40).save(folder / "train" / "ant" / f"{n}.png")
    data = load_data(f"folder:{folder}", 8, test_size=10, test_resize=40)
    trained, validation = hold_out(data, 0.3)
    (x, labels), (again, _) = (next(iter(Loader(trained, validation, 99))) for _ in range(2))
    assert (x.shape, labels.tolist()) == ((6, 3, 10, 10), [0, 0, 0, 1, 1, 1])
    assert torch.equal(x, again)
    assert torch.equal(x[0], x[1])
    red = (x[0, 0] * data.std[0] + data.mean[0]) * 255
    torch.testing.assert_close(red[0], torch.arange(35.0, 45))
    x, _ = next(iter(Loader(trained, trained.train, 14, seed=0, augment=("crop",))))
    assert x.shape == (14, 3, 8, 8)
