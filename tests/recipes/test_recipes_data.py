"""Data sets for the commands: what is read and what is refused."""

from __future__ import annotations

import dataclasses
import struct
import zlib

import numpy as np
import pytest
import torch
from cases_recipes import CIFAR, load, record, write_cifar, write_folder, write_image

from gradrep_kernels.recipes.data.load import DataSource, load_data
from gradrep_kernels.recipes.data.loader import Loader
from gradrep_kernels.recipes.errors import InputError


def test_digits_are_split_by_class_and_complete():
    data = load("digits")
    assert (len(data.train), len(data.test), len(data.classes)) == (1197, 600, 10)
    whole = torch.bincount(torch.cat([data.train.labels, data.test.labels]))
    torch.testing.assert_close(torch.bincount(data.test.labels) / 600, whole / 1797, atol=0.003, rtol=0)
    images = torch.cat([data.train.read(torch.arange(1197)), data.test.read(torch.arange(600))])
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
    sets = [dataclasses.replace(data.train, picture=None, lazy=lazy) for lazy in (True, False)]
    ahead, at_once = (list(Loader(data, of, 3, seed=4, augment=("crop", "flip", "cutout"))) for of in sets)
    assert len(ahead) == 3
    for (x, labels), (y, others) in zip(ahead, at_once):
        assert torch.equal(x, y)
        assert torch.equal(labels, others)


def garbage(path):
    path.write_bytes(b"GIF87 no, not really")


FOLDER_FAULTS = {
    "no val": (lambda root: (root / "val").rename(root / "dev"), "val", "no such folder"),
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
    "class only in test": (
        lambda root: write_image((root / "val").rename(root / "test") / "cow" / "0.png", (9, 9), 0),
        "test/cow",
        "not in train",
    ),
    "empty class": (lambda root: [p.unlink() for p in (root / "val" / "ant").iterdir()], "val/ant", "no images"),
    "not an image": (lambda root: garbage(root / "train" / "bee" / "1.png"), "train/bee/1.png", "not a readable image"),
}


def test_a_folder_test_is_taken_where_there_is_no_val(tmp_path, caplog):
    write_folder(tmp_path)
    (tmp_path / "val").rename(tmp_path / "test")
    data = load(f"folder:{tmp_path}", 8)
    assert len(data.test) == 6
    assert float(data.test.read(torch.tensor([0]))[0, 2, 4, 4]) == 1.0  # write_folder makes blue what it holds out
    assert not caplog.text
    write_folder(tmp_path, per_class=2)  # val again
    assert len(load(f"folder:{tmp_path}", 8).test) == 4
    assert f"{tmp_path} has val and test: accuracies are those of val" in caplog.text


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


# ---- images of more than 8 bits

GREYS = np.random.default_rng(0).integers(0, 65536, (8, 8)).astype(np.uint16)
GREYS[0, :4] = 0, 255, 256, 65535
TENS = GREYS >> 6  # 10 bits, as scanners write them with maxval 1023


def png(colour_type: int, pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel. Pillow writes none in colour."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(
    pixels: np.ndarray, order: str = "<", sample_format: int = 1, photometric: int = 1, bits: int = 0, largest: int = 0
) -> bytes:
    """An uncompressed greyscale TIFF, little- or big-endian. Sample formats: 1 unsigned, 2 signed, 3 floating.

    `largest` is its SMaxSampleValue, 0 for none.
    """
    body = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    bits = bits or 8 * pixels.itemsize
    shorts = {256: 8, 257: 8, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: 8, 279: len(body)}
    shorts |= {339: sample_format} | ({341: largest} if largest else {})
    shorts[273] = 8 + 2 + 12 * len(shorts) + 4  # where the pixels begin
    entries = (struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in shorts.items())
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HIH", 42, 8, len(shorts))
    return head + b"".join(entries) + struct.pack(f"{order}I", 0) + body


def packed_12_bits(greys: np.ndarray) -> np.ndarray:
    """Two pixels in three bytes, the high bits first."""
    a, b = (greys.reshape(-1, 2) >> 4).T
    return np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], axis=1).astype(np.uint8)


def pnm(kind: str, pixels: np.ndarray, top: int) -> bytes:
    return f"{kind}\n8 8\n{top}\n".encode() + pixels.astype(">u2" if top > 255 else "u1").tobytes()


COLOURS = np.stack([GREYS, GREYS[::-1], GREYS.T], axis=2)
DEEP = {
    # name of the file: what is in it, the pixels [8, 8] or [8, 8, 3] in [0, 1], how far off they may be
    "png16.png": (png(0, GREYS), GREYS / 65535, 0),
    "tiff16_little.tif": (tiff(GREYS, "<"), GREYS / 65535, 0),
    "tiff16_big.tiff": (tiff(GREYS, ">"), GREYS / 65535, 0),
    "tiff16_white_is_zero.tif": (tiff(GREYS, photometric=0), 1 - GREYS / 65535, 6e-8),
    "tiff12.tif": (tiff(packed_12_bits(GREYS), bits=12), (GREYS >> 4) / 4095, 0),
    "tiff_says_10_bits.tif": (tiff(TENS, largest=1023), TENS / 1023, 0),
    "tiff_says_12_bits.tif": (tiff(GREYS >> 4, ">", largest=4095), (GREYS >> 4) / 4095, 0),
    "tiff_says_14_bits.tif": (tiff(GREYS >> 2, photometric=0, largest=16383), 1 - (GREYS >> 2) / 16383, 6e-8),
    # The largest of one picture says nothing of others.
    "tiff_says_its_own_largest.tif": (tiff(TENS, largest=1022), TENS / 65535, 0),
    "tiff_of_10_bits_says_nothing.tif": (tiff(TENS), TENS / 65535, 0),
    "maxval65535.pgm": (pnm("P5", GREYS, 65535), GREYS / 65535, 0),
    "maxval1023.pgm": (pnm("P5", TENS, 1023), TENS / 1023, 0.5 / 65535),
    "maxval100.pgm": (pnm("P5", GREYS % 101, 100), GREYS % 101 / 100, 0.5 / 255),
    # Pillow brings colours to 8 bits: it drops the low byte of a PNG and rounds a PPM.
    "colours16.png": (png(2, COLOURS), (COLOURS >> 8) / 255, 0),
    "colours_and_alpha16.png": (png(6, np.dstack([COLOURS, GREYS])), (COLOURS >> 8) / 255, 0),
    "grey_and_alpha16.png": (png(4, np.dstack([GREYS, GREYS])), (GREYS >> 8) / 255, 0),
    "colours16.ppm": (pnm("P6", COLOURS, 65535), COLOURS / 65535, 0.5 / 255),
}


def one_more(root, name: str, content: bytes, size=(8, 8)):
    """A folder of 8-bit images and this file, which is the last of its class; its path."""
    path = write_folder(root, size=size) / "train" / "ant" / f"deep_{name}"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", DEEP)
def test_deep_images_are_as_bright_as_they_were_written(tmp_path, name):
    content, pixels, tolerance = DEEP[name]
    one_more(tmp_path, name, content)
    x = load(f"folder:{tmp_path}", 8).train.read(torch.tensor([3]))[0]
    assert x.dtype == torch.float32
    expected = np.broadcast_to(pixels if pixels.ndim == 3 else pixels[:, :, None], (8, 8, 3)).transpose(2, 0, 1)
    np.testing.assert_allclose(x.numpy(), expected.astype(np.float32), rtol=0, atol=tolerance)


def test_a_batch_may_mix_depths_and_8_bits_are_as_ever(tmp_path):
    image = pytest.importorskip("PIL.Image")
    one_more(tmp_path, "16.png", png(0, GREYS))
    ramp = np.arange(192).reshape(8, 8, 3).astype(np.uint8) + 64
    image.fromarray(ramp).save(tmp_path / "train" / "ant" / "0.png")
    x = load(f"folder:{tmp_path}", 8).train.read(torch.tensor([3, 0, 3]))
    assert torch.equal(x[1], torch.from_numpy(ramp).permute(2, 0, 1).float() / 255)  # bit for bit
    for deep in (x[0], x[2]):
        assert torch.equal(deep, torch.from_numpy(GREYS.astype(np.float32) / np.float32(65535)).expand(3, 8, 8))


def test_deep_images_are_scaled_and_cropped_as_those_of_8_bits(tmp_path):
    image = pytest.importorskip("PIL.Image")
    shallow = np.random.default_rng(1).integers(0, 256, (20, 33)).astype(np.uint8)
    write_folder(tmp_path)
    image.fromarray(shallow).save(tmp_path / "train" / "ant" / "a.png")
    (tmp_path / "train" / "ant" / "b.png").write_bytes(png(0, shallow.astype(np.uint16) * 257))
    x = load(f"folder:{tmp_path}", 8).train.read(torch.tensor([3, 4]))
    torch.testing.assert_close(x[1], x[0], rtol=0, atol=1.01 / 255)  # of 8 bits each of the two passes is rounded
    assert not torch.equal(x[1], x[0])


@pytest.mark.parametrize(
    ("pixels", "sample_format", "said"),
    [
        (GREYS.astype(np.int32), 2, "signed or 32-bit integers"),
        (GREYS.astype(np.uint32), 1, "signed or 32-bit integers"),
        ((GREYS >> 1).astype(np.int16), 2, "signed or 32-bit integers"),
        (GREYS.astype(np.float32), 3, "floating-point numbers"),
    ],
    ids=["int32", "uint32", "int16", "float32"],
)
def test_images_of_unknown_range_are_refused_before_the_training(tmp_path, pixels, sample_format, said):
    path = one_more(tmp_path, "wide.tif", tiff(pixels, sample_format=sample_format))
    with pytest.raises(InputError) as wrong:
        load(f"folder:{tmp_path}", 8)
    assert str(wrong.value) == (
        f"{path}: its pixels are {said}, whose black and white are unknown; save it as 8 or 16 unsigned bits"
    )


def test_an_image_that_grows_wide_later_is_refused_too(tmp_path):
    path = one_more(tmp_path, "wide.tif", tiff(GREYS))
    data = load(f"folder:{tmp_path}", 8)
    path.write_bytes(tiff(GREYS.astype(np.float32), sample_format=3))
    with pytest.raises(InputError, match=r"deep_wide\.tif: its pixels are floating-point numbers"):
        data.train.read(torch.tensor([3]))


def test_a_source_may_be_text(tmp_path):
    write_folder(tmp_path)
    data, same = load_data(f"folder:{tmp_path}", 8), load_data(DataSource("folder", tmp_path), 8)
    assert data.description() == same.description()
    assert torch.equal(data.train.read(torch.arange(6)), same.train.read(torch.arange(6)))
    with pytest.raises(InputError, match="got 'folder'"):
        load_data("folder")
