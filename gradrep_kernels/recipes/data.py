"""Data sets: scikit-learn's digits, the binary CIFAR distribution, folders of images.

Every set reads images as float32 [n, C, H, W] in [0, 1]. They are standardised per channel after augmentation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gradrep_kernels.recipes.errors import InputError, extra

__all__ = ["FOLDER_SIDE", "KINDS", "Data", "DataSource", "Images", "load_data"]

log = logging.getLogger(__name__)

KINDS = ("digits", "cifar10", "cifar100", "mnist", "fashion", "svhn", "folder")
FOLDER_SIDE = 224
"""The side that images of a folder are brought to unless another is given."""
_SIDE, _PLANE = 32, 32 * 32  # CIFAR
# Name -> (classes of each label byte before the pixels, training files, test file, folder inside the archive).
_CIFAR = {
    "cifar10": ((10,), [f"data_batch_{n}.bin" for n in range(1, 6)], "test_batch.bin", "cifar-10-batches-bin"),
    "cifar100": ((20, 100), ["train.bin"], "test.bin", "cifar-100-binary"),
}
_PUBLISHED_RECORDS = {"train.bin": 50000}  # all other files hold 10000
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_LARGEST = 258, 262, 341  # tags
_IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# Folders are standardised with ImageNet's statistics, because computing their own would read as much as an epoch.
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DataSource:
    """The value of `--data`: a kind of data set and its folder.

    The folder is an absolute path, or None for digits.
    """

    kind: str
    folder: Path | None = None

    @classmethod
    def parse(cls, text: str) -> DataSource:
        """From 'digits', 'cifar10:DIR', 'cifar100:DIR' or 'folder:DIR'.

        Raises InputError for any other text.
        """
        kind, colon, folder = text.partition(":")
        if kind not in KINDS or (kind == "digits") == bool(colon) or (colon and not folder):
            others = ", ".join(f"{name}:DIR" for name in KINDS[1:])
            raise InputError(f"--data must be digits, {others}, got {text!r}")
        return cls(kind, Path(folder).absolute() if folder else None)

    def __str__(self) -> str:
        return self.kind if self.folder is None else f"{self.kind}:{self.folder}"


@dataclass(frozen=True)
class Images:
    """A labelled set.

    `read` gives float32 [n, C, H, W] in [0, 1] for indices [n], from files where `lazy` is set.
    """

    labels: Tensor  # [N] int64
    read: Callable[[Tensor], Tensor]
    lazy: bool = False

    def __len__(self) -> int:
        return self.labels.numel()


@dataclass(frozen=True)
class Data:
    """Training and test set, their classes, and the statistics [C] to standardise both with."""

    name: str
    train: Images
    test: Images
    classes: tuple[str, ...]
    side: int  # images are side x side
    mean: Tensor
    std: Tensor

    @property
    def channels(self) -> int:
        return self.mean.numel()

    def standardise(self, x: Tensor) -> Tensor:
        return (x - self.mean.reshape(-1, 1, 1)) / self.std.reshape(-1, 1, 1)

    def description(self) -> dict[str, object]:
        """The facts that a resumed run must find again."""
        shape = [self.channels, self.side, self.side]
        return {
            "name": self.name,
            "train": len(self.train),
            "test": len(self.test),
            "classes": len(self.classes),
            "shape": shape,
        }


def load_data(source: DataSource | str, image_size: int | None = None) -> Data:
    """Read the data set of `source`, a DataSource or the text that gives one ('folder:DIR').

    Of images in a folder it reads names and headers alone. `image_size` is the side that they are brought to: the
    shorter side is scaled to it and the centre cropped (None: 224). The other sets have a size of their own.

    Raises InputError that names the file or folder and what is wrong with it.
    """
    if isinstance(source, str):
        source = DataSource.parse(source)
    if source.folder is None:
        return _digits()
    if not source.folder.is_dir():
        raise InputError(f"{source.folder}: no such folder")
    if source.kind == "folder":
        return _folder(source.folder, image_size or FOLDER_SIDE)
    return _cifar(source.kind, source.folder)


def _in_memory(images: np.ndarray, labels: np.ndarray) -> Images:
    """Of uint8 or float32 images [N, C, H, W]."""
    pixels = torch.from_numpy(images)

    def read(indices: Tensor) -> Tensor:
        x = pixels[indices]
        return x.float() / 255 if x.dtype == torch.uint8 else x

    return Images(torch.from_numpy(labels.astype(np.int64)), read)


def _statistics(images: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C] of images [N, C, H, W] in units of [0, 1].

    They are computed in float64 and rounded once.
    """
    means, stds = [], []
    for channel in range(images.shape[1]):
        values, counts = np.unique(images[:, channel], return_counts=True)
        values = values.astype(np.float64) / (255 if images.dtype == np.uint8 else 1)
        mean = np.average(values, weights=counts)
        std = np.sqrt(np.average((values - mean) ** 2, weights=counts))
        means.append(mean)
        stds.append(max(std, 1e-6))  # A constant channel is divided by it and must stay finite.
    return torch.tensor(means).float(), torch.tensor(stds).float()


def _digits() -> Data:
    """1797 scans of handwritten digits, 1197 for training and 600 for the test.

    They have 8 x 8 pixels in 17 greys and are brought to 16 x 16.
    """
    digits = extra("sklearn.datasets", "scikit-learn").load_digits()
    split = extra("sklearn.model_selection", "scikit-learn").train_test_split
    small = torch.from_numpy(digits.images).float()[:, None] / 16  # [1797, 1, 8, 8]
    images = F.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False).numpy()
    # Fixed whatever the seed of the run: seeds differ in initialisation and order, never in the test set.
    train, test = split(np.arange(len(images)), test_size=600, stratify=digits.target, random_state=0)
    return Data(
        "digits",
        _in_memory(images[train], digits.target[train]),
        _in_memory(images[test], digits.target[test]),
        tuple(str(n) for n in digits.target_names),
        16,
        *_statistics(images[train]),
    )


def _cifar(kind: str, root: Path) -> Data:
    """CIFAR in its binary distribution.

    A record is one or two bytes of labels, then 3 x 32 x 32 bytes, channel by channel.
    """
    label_classes, train_files, test_file, inside = _CIFAR[kind]
    if not (root / test_file).exists() and (root / inside).is_dir():
        root = root / inside
    parts = [_cifar_file(kind, root / name, label_classes) for name in train_files]
    images, labels = (np.concatenate(part) for part in zip(*parts))
    return Data(
        kind,
        _in_memory(images, labels),
        _in_memory(*_cifar_file(kind, root / test_file, label_classes)),
        tuple(str(n) for n in range(label_classes[-1])),
        _SIDE,
        *_statistics(images),
    )


def _cifar_file(kind: str, path: Path, label_classes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images [N, 3, 32, 32] and the (fine) labels [N]."""
    record = len(label_classes) + 3 * _PLANE
    try:
        raw = np.fromfile(path, dtype=np.uint8)
    except OSError as reason:
        raise InputError(f"{path}: {reason.strerror or reason}; {kind} needs the binary distribution") from None
    if raw.size == 0 or raw.size % record:
        other = next(
            (
                name
                for name, (labels, *_) in _CIFAR.items()
                if name != kind and raw.size and raw.size % (len(labels) + 3 * _PLANE) == 0
            ),
            None,
        )
        hint = f"looks like {other}" if other else "truncated, or not the binary distribution"
        raise InputError(
            f"{path}: {raw.size} bytes are not a whole number of {kind} records of {record} bytes ({hint})"
        )
    records = raw.reshape(-1, record)
    for column, classes in enumerate(label_classes):
        wrong = np.flatnonzero(records[:, column] >= classes)
        if wrong.size:
            raise InputError(
                f"{path}: record {wrong[0]} has label {records[wrong[0], column]}, {kind} has 0 to {classes - 1} there"
            )
    published = _PUBLISHED_RECORDS.get(path.name, 10000)
    if len(records) != published:
        log.warning("%s holds %d records, the published file %d", path, len(records), published)
    pixels = np.ascontiguousarray(records[:, len(label_classes) :]).reshape(-1, 3, _SIDE, _SIDE)
    return pixels, records[:, len(label_classes) - 1]


def _folder(root: Path, side: int) -> Data:
    """Images in train/CLASS/* and val/CLASS/*, or test/CLASS/* without val, the classes in the order of their names.

    An image is read when a batch needs it.
    """
    image = extra("PIL.Image", "Pillow")
    held_out = "test" if (root / "test").is_dir() and not (root / "val").is_dir() else "val"
    for part in ("train", held_out):
        if not (root / part).is_dir():
            needed = "images are expected in train/CLASS/* and val/CLASS/* (or test/CLASS/*)"
            raise InputError(f"{root / part}: no such folder; {needed}")
    if held_out == "val" and (root / "test").is_dir():
        log.warning("%s has val and test: accuracies are those of val, and test is not read", root)
    names = {
        part: sorted(
            entry.name for entry in (root / part).iterdir() if entry.is_dir() and not entry.name.startswith(".")
        )
        for part in ("train", held_out)
    }
    if not names["train"]:
        raise InputError(f"{root / 'train'}: no class folders")
    if names["train"] != names[held_out]:
        lone = sorted(set(names["train"]) ^ set(names[held_out]))
        here, there = ("train", held_out) if lone[0] in names["train"] else (held_out, "train")
        needed = f"both must have the same classes ({len(lone)} differ)"
        raise InputError(f"{root / here / lone[0]}: this class is not in {there}; {needed}")
    parts = [_image_files(image, root / part, names["train"], side) for part in ("train", held_out)]
    return Data(
        "folder", *parts, tuple(names["train"]), side, torch.tensor(_IMAGENET_MEAN), torch.tensor(_IMAGENET_STD)
    )


def _image_files(image, root: Path, classes: list[str], side: int) -> Images:
    paths, labels = [], []
    for label, name in enumerate(classes):
        images = sorted(
            path
            for path in (root / name).iterdir()
            if path.suffix.lower() in _IMAGE_SUFFIXES and not path.name.startswith(".")
        )
        if not images:
            raise InputError(f"{root / name}: no images")
        paths += images
        labels += [label] * len(images)

    def check(path: Path) -> None:
        try:
            with image.open(path) as opened:  # This reads the header only. A damaged body shows when the image is read.
                _greyscale_levels(opened)
        except InputError as reason:
            raise InputError(f"{path}: {reason}") from None
        except (OSError, image.DecompressionBombError) as reason:
            raise InputError(f"{path}: not a readable image ({_one_line(reason)})") from None

    def decode(path: Path) -> np.ndarray:
        """The pixels as float32 [side, side, 3], or [side, side, 1] of a deep greyscale image."""
        try:
            with image.open(path) as opened:
                levels = _greyscale_levels(opened)
                if levels is None:
                    picture = opened.convert("RGB")
                else:
                    black, white = levels
                    # float32 holds all 16 bits, and mode F is resized by the same filter as 8 bits are.
                    grey = (np.asarray(opened, dtype=np.float32) - black) / (white - black)
                    picture = image.fromarray(grey)
        except InputError as reason:
            raise InputError(f"{path}: {reason}") from None
        except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as reason:
            raise InputError(f"{path}: not a readable image ({_one_line(reason)})") from None
        scale = side / min(picture.size)
        width, height = (max(side, round(n * scale)) for n in picture.size)
        picture = picture.resize((width, height), image.Resampling.BILINEAR)
        left, top = (width - side) // 2, (height - side) // 2
        pixels = np.asarray(picture.crop((left, top, left + side, top + side)))
        return pixels.astype(np.float32) / 255 if levels is None else pixels[:, :, None]

    def read(indices: Tensor) -> Tensor:
        batch = np.empty((len(indices), 3, side, side), dtype=np.float32)

        def fill(place: int, index: int) -> None:
            batch[place] = decode(paths[index]).transpose(2, 0, 1)

        # Threads help, because Pillow decodes without the interpreter's lock.
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for _ in pool.map(fill, range(len(indices)), indices.tolist()):
                pass
        return torch.from_numpy(batch)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(check, paths):
            pass
    return Images(torch.tensor(labels), read, lazy=True)


def _greyscale_levels(opened) -> tuple[int, int] | None:
    """The values of black and white in an opened greyscale image of more than 8 bits, by its header.

    None for every other image: Pillow brings it to 8 bits itself. Of a deep one, its `convert` would keep the values
    from 0 to 255 and make all others white.

    White is the largest number of the bits that the file has, never the largest of this picture: one grey must be as
    bright in all pictures. A camera's 10, 12 or 14 bits in a TIFF of 16 are read so where the file says it, by a
    SMaxSampleValue of 1023, 4095 or 16383. Other values of that tag are some writers' largest of the picture, and pass
    for 16 bits. A PNG needs no such rule: by its standard (sBIT) a writer spreads fewer bits over all 16.

    Raises InputError where the range of the values is not known.
    """
    if opened.mode.startswith("I;16"):
        tags = getattr(opened, "tag_v2", {})  # TIFF's
        bits = _bits_of_largest(tags.get(_TIFF_LARGEST)) or tags.get(_TIFF_BITS, (16,))[0]  # there are 12 bits too
        white = 2**bits - 1
        return (white, 0) if tags.get(_TIFF_PHOTOMETRIC) == 0 else (0, white)
    # Pillow brings both to 16 bits, whatever the file has. Before Pillow 10.1 its mode for such a PNG was I.
    if opened.mode == "I" and opened.format in ("PNG", "PPM"):
        return 0, 65535
    if opened.mode in ("I", "F"):
        kind = "signed or 32-bit integers" if opened.mode == "I" else "floating-point numbers"
        raise InputError(f"its pixels are {kind}, whose black and white are unknown; save it as 8 or 16 unsigned bits")
    return None


def _bits_of_largest(value: object) -> int | None:
    """How many bits, from 9 to 16, have this largest number. None where they are no whole number of bits."""
    (value, *_) = value if isinstance(value, tuple) and value else (value,)
    return next((bits for bits in range(9, 17) if value == 2**bits - 1), None)


def _one_line(reason: Exception) -> str:
    return " ".join(str(reason).split()) or type(reason).__name__
