"""MNIST and Fashion-MNIST: where their files lie, what they hold, and what is refused."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
import torch
from cases_recipes import load, write_idx, write_mnist

from gradrep_kernels.recipes.data.loader import Loader
from gradrep_kernels.recipes.errors import InputError

PLACES = {
    "mnist": ["", "MNIST/raw", "raw"],
    "fashion": ["", "FashionMNIST/raw", "raw"],
}


@pytest.mark.parametrize(("kind", "place"), [(kind, place) for kind in PLACES for place in PLACES[kind]])
def test_every_pixel_and_label_is_where_it_belongs(tmp_path, kind, place, caplog):
    folder = write_mnist(tmp_path / place)
    data = load(f"{kind}:{tmp_path}")
    assert data.description() == {"name": kind, "train": 40, "test": 20, "classes": 10, "shape": [1, 28, 28]}
    for part, images in {"train": data.train, "t10k": data.test}.items():
        path = folder / f"{part}-images-idx3-ubyte"
        raw = path.read_bytes() if path.exists() else gzip.decompress(path.with_name(f"{path.name}.gz").read_bytes())
        for index, row, column in ((0, 0, 0), (3, 0, 27), (17, 5, 0), (len(images) - 1, 27, 27)):
            pixel = raw[16 + 784 * index + 28 * row + column]
            assert float(images.read(torch.tensor([index]))[0, 0, row, column]) == pytest.approx(pixel / 255, abs=1e-7)
        assert images.labels.tolist() == [n % 10 for n in range(len(images))]
    assert f"{folder}: train holds 40 images, the published file 60000" in caplog.text
    standard = torch.cat([x for x, _ in Loader(data, data.train, 40)])
    torch.testing.assert_close(torch.stack([standard.mean(), standard.std(correction=0)]), torch.tensor([0.0, 1.0]))


def test_fashion_names_what_it_shows(tmp_path):
    classes = load(f"fashion:{write_mnist(tmp_path)}").classes
    assert (classes[0], classes[9], len(classes)) == ("T-shirt", "boot", 10)


def header(*sizes: int) -> bytes:
    return bytes((0, 0, 8, len(sizes))) + struct.pack(f">{len(sizes)}I", *sizes)


FAULTS = {
    # what: (file, its content or None to remove it, what is said)
    "missing": ("train-labels-idx1-ubyte.gz", None, "train-labels-idx1-ubyte: neither it nor"),
    "no gzip": ("train-images-idx3-ubyte.gz", b"PNG", "train-images-idx3-ubyte.gz: cannot be read"),
    "gzip cut": ("train-images-idx3-ubyte.gz", gzip.compress(bytes(99))[:-9], "cannot be read"),
    "gzip damaged": ("train-images-idx3-ubyte.gz", gzip.compress(bytes(99))[:10] + b"\xff" * 20, "cannot be read"),
    "empty": ("t10k-images-idx3-ubyte", b"", "does not begin as an IDX file"),
    "labels for images": ("t10k-images-idx3-ubyte", header(20) + bytes(20), "of bytes with 3 dimensions"),
    "truncated": ("t10k-images-idx3-ubyte", header(20, 28, 28) + bytes(100), "100 bytes are not the 20 x 28 x 28"),
    "no image": ("t10k-images-idx3-ubyte", header(0, 28, 28), "t10k has 0 images and 20 labels"),
    "too few labels": ("t10k-labels-idx1-ubyte", header(3) + bytes(3), "t10k has 20 images and 3 labels"),
    "label 10": ("t10k-labels-idx1-ubyte", header(20) + bytes([10] * 20), "up to 10; needed are as many labels, from"),
    "no squares": ("t10k-images-idx3-ubyte", header(20, 28, 27) + bytes(20 * 28 * 27), "28 x 28 and 28 x 27"),
    "other size": ("t10k-images-idx3-ubyte", header(20, 8, 8) + bytes(20 * 64), "images are 28 x 28 and 8 x 8"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_file_is_named_in_one_line(tmp_path, fault):
    name, content, said = FAULTS[fault]
    write_mnist(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as wrong:
        load(f"mnist:{tmp_path}")
    assert str(tmp_path) in str(wrong.value)
    assert said in str(wrong.value)
    assert "\n" not in str(wrong.value)


def test_a_folder_without_them_is_named_with_what_was_looked_for(tmp_path):
    with pytest.raises(InputError, match=r"neither there nor in FashionMNIST/raw; --download gets them"):
        load(f"fashion:{tmp_path}")


def test_images_of_another_size_than_published_are_taken(tmp_path):
    data = load(f"mnist:{write_mnist(tmp_path, side=11)}")
    assert data.side == data.test_side == 11
    write_idx(tmp_path, "t10k-labels-idx1-ubyte", np.full(20, 3, dtype=np.uint8))
    assert load(f"mnist:{tmp_path}").test.labels.tolist() == [3] * 20
