"""Data sets for the commands: what is read and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases_recipes import CIFAR, load, record, write_cifar, write_folder, write_image

from gradrep_kernels.recipes.data import DataSource
from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.loader import Loader


def test_digits_are_split_by_class_and_complete():
    data = load("digits")
    assert (len(data.train), len(data.test), len(data.classes)) == (1437, 360, 10)
    whole = torch.bincount(torch.cat([data.train.labels, data.test.labels]))
    torch.testing.assert_close(torch.bincount(data.test.labels) / 360, whole / 1797, atol=0.003, rtol=0)
    images = torch.cat([data.train.read(torch.arange(1437)), data.test.read(torch.arange(360))])
    assert images.shape == (1797, 1, 16, 16)
    assert len(torch.unique(images.flatten(1), dim=0)) == 1797  # no image twice, in neither part


def test_digits_are_standardised_by_the_training_set_alone():
    data = load("digits")
    x = torch.cat([x for x, _ in Loader(data, data.train, 500)])
    torch.testing.assert_close(torch.stack([x.mean(), x.std()]), torch.tensor([0.0, 1.0]), atol=1e-3, rtol=0)
    y = torch.cat([x for x, _ in Loader(data, data.test, 500)])
    assert abs(float(y.mean())) > 1e-3 or abs(float(y.std()) - 1) > 1e-3


@pytest.mark.parametrize("kind", CIFAR)
def test_cifar_reads_every_pixel_where_it_belongs(tmp_path, kind):
    data = load(f"{kind}:{write_cifar(tmp_path, kind)}")
    training_files = len(CIFAR[kind]) - 1
    assert (len(data.train), len(data.test), len(data.classes)) == (
        4 * training_files,
        4,
        10 if kind == "cifar10" else 100,
    )
    raw = (tmp_path / CIFAR[kind][0]).read_bytes()
    labels = 1 if kind == "cifar10" else 2
    start = 2 * (labels + 3072)  # of the third record
    image = data.train.read(torch.tensor([2]))[0]
    assert int(data.train.labels[2]) == raw[start + labels - 1] == (6 if kind == "cifar10" else 46)
    for channel, row, column in ((0, 0, 0), (0, 0, 31), (0, 31, 0), (1, 5, 7), (2, 31, 31)):
        assert float(image[channel, row, column]) == pytest.approx(
            raw[start + labels + 1024 * channel + 32 * row + column] / 255, abs=1e-7
        )
    pixels = np.stack([data.train.read(torch.tensor([n]))[0].numpy() for n in range(len(data.train))]).astype(
        np.float64
    )
    np.testing.assert_allclose(data.mean, pixels.mean((0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(data.std, pixels.std((0, 2, 3)), atol=1e-6)


def test_cifar_takes_the_folder_that_holds_the_unpacked_archive(tmp_path):
    write_cifar(tmp_path / "cifar-10-batches-bin", "cifar10")
    assert len(load(f"cifar10:{tmp_path}").train) == 20


def test_cifar_of_another_length_than_published_is_told(tmp_path, caplog):
    load(f"cifar100:{write_cifar(tmp_path, 'cifar100')}")
    assert "train.bin holds 4 records, the published file 50000" in caplog.text


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def relabel(path, at: int, label: int):
    raw = bytearray(path.read_bytes())
    raw[at] = label
    path.write_bytes(raw)


CIFAR_FAULTS = {
    "missing file": ("cifar10", "data_batch_3.bin", lambda p: p.unlink(), "No such file"),
    "empty": ("cifar10", "data_batch_1.bin", lambda p: p.write_bytes(b""), "0 bytes are not a whole number"),
    "truncated": (
        "cifar10",
        "test_batch.bin",
        truncate,
        "12287 bytes are not a whole number of cifar10 records of 3073 bytes (truncated",
    ),
    "other format": (
        "cifar10",
        "data_batch_2.bin",
        lambda p: p.write_bytes(record("cifar100", 1, 1)),
        "looks like cifar100",
    ),
    "label 10": (
        "cifar10",
        "data_batch_5.bin",
        lambda p: relabel(p, 3073, 10),
        "record 1 has label 10, cifar10 has 0 to 9",
    ),
    "coarse label": (
        "cifar100",
        "train.bin",
        lambda p: relabel(p, 0, 20),
        "record 0 has label 20, cifar100 has 0 to 19",
    ),
    "fine label": (
        "cifar100",
        "test.bin",
        lambda p: relabel(p, 3 * 3074 + 1, 100),
        "record 3 has label 100, cifar100 has 0 to 99",
    ),
}


@pytest.mark.parametrize("fault", CIFAR_FAULTS)
def test_a_wrong_cifar_file_is_named_in_one_line(tmp_path, fault):
    kind, name, break_it, said = CIFAR_FAULTS[fault]
    break_it(write_cifar(tmp_path, kind) / name)
    with pytest.raises(InputError) as wrong:
        load(f"{kind}:{tmp_path}")
    assert str(tmp_path / name) in str(wrong.value)
    assert said in str(wrong.value)
    assert "\n" not in str(wrong.value)


@pytest.mark.parametrize("source", ["cifar", "cifar10", "cifar10:", "digits:x", "folder", ""])
def test_a_source_that_is_none_is_refused(source):
    with pytest.raises(InputError, match="--data must be"):
        DataSource.parse(source)


@pytest.mark.parametrize("kind", ["cifar10", "cifar100", "folder"])
def test_a_missing_folder_is_named(tmp_path, kind):
    with pytest.raises(InputError, match=r"nowhere: no such folder"):
        load(f"{kind}:{tmp_path / 'nowhere'}")


def test_folders_give_sorted_classes_and_square_images(tmp_path):
    write_folder(tmp_path)
    write_image(tmp_path / "train" / "bee" / "grey.png", (9, 30), 77, mode="L")
    write_image(tmp_path / "train" / "bee" / "palette.gif", (16, 16), 0, mode="P")
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "ant" / ".hidden.png").write_text("not one either")
    data = load(f"folder:{tmp_path}", 8)
    assert data.classes == ("ant", "bee")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    x = data.train.read(torch.tensor([5, 6]))  # 2.png and grey.png of bee
    assert x.shape == (2, 3, 8, 8)
    assert x[:, :, 4, 4].mul(255).round().tolist() == [[40, 20, 0], [77, 77, 77]]


def test_folder_images_are_scaled_by_the_shorter_side_and_cropped_in_the_middle(tmp_path):
    image = pytest.importorskip("PIL.Image")
    write_folder(tmp_path)
    stripes = np.zeros((10, 40, 3), dtype=np.uint8)  # left and right quarter black, middle half white
    stripes[:, 10:30] = 255
    image.fromarray(stripes).save(tmp_path / "train" / "ant" / "0.png")
    x = load(f"folder:{tmp_path}", 10).train.read(torch.tensor([0]))
    assert x.shape == (1, 3, 10, 10)
    assert bool((x == 1).all())


def test_folder_images_are_read_when_a_batch_needs_them(tmp_path):
    data = load(f"folder:{write_folder(tmp_path)}", 8)
    write_image(tmp_path / "train" / "ant" / "0.png", (8, 8), (255, 255, 255))
    assert bool((data.train.read(torch.tensor([0])) == 1).all())


def test_batches_that_are_read_ahead_are_the_same(tmp_path):
    data = load(f"folder:{write_folder(tmp_path, per_class=5)}", 8)
    ahead = list(Loader(data, data.train, 3, seed=4, augment=("crop", "flip", "cutout")))
    at_once = list(
        Loader(
            data, type(data.train)(data.train.labels, data.train.read), 3, seed=4, augment=("crop", "flip", "cutout")
        )
    )
    assert len(ahead) == 3
    for (x, labels), (y, others) in zip(ahead, at_once):
        assert torch.equal(x, y)
        assert torch.equal(labels, others)


def garbage(path):
    path.write_bytes(b"GIF87 no, not really")


FOLDER_FAULTS = {
    "no val": (lambda root: (root / "val").rename(root / "test"), "val", "no such folder"),
    "no classes": (
        lambda root: [(root / "train" / name).rename(root / name) for name in ("ant", "bee")],
        "train",
        "no class folders",
    ),
    "class only in val": (
        lambda root: write_image(root / "val" / "cow" / "0.png", (9, 9), 0),
        "val/cow",
        "not in train",
    ),
    "class only in train": (
        lambda root: write_image(root / "train" / "cow" / "0.png", (9, 9), 0),
        "train/cow",
        "not in val",
    ),
    "empty class": (lambda root: [p.unlink() for p in (root / "val" / "ant").iterdir()], "val/ant", "no images"),
    "not an image": (lambda root: garbage(root / "train" / "bee" / "1.png"), "train/bee/1.png", "not a readable image"),
}


@pytest.mark.parametrize("fault", FOLDER_FAULTS)
def test_a_wrong_folder_is_named_in_one_line(tmp_path, fault):
    break_it, name, said = FOLDER_FAULTS[fault]
    break_it(write_folder(tmp_path))
    with pytest.raises(InputError) as wrong:
        load(f"folder:{tmp_path}", 8)
    assert str(tmp_path / name) in str(wrong.value)
    assert said in str(wrong.value)
    assert "\n" not in str(wrong.value)


def test_an_image_with_a_damaged_body_is_named_when_it_is_read(tmp_path):
    image = pytest.importorskip("PIL.Image")
    write_folder(tmp_path)
    path = tmp_path / "train" / "ant" / "1.png"
    image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    data = load(f"folder:{tmp_path}", 8)
    with pytest.raises(InputError, match=r"train/ant/1\.png: not a readable image"):
        list(Loader(data, data.train, 6))
