"""Folders of images: train/CLASS/*, and val/CLASS/* or test/CLASS/*."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradrep_kernels.recipes.data.images import Data, Images
from gradrep_kernels.recipes.errors import InputError, extra, one_line

__all__ = ["FOLDER_SIDE", "folder_data", "pixels_of", "scaled"]

log = logging.getLogger(__name__)

FOLDER_SIDE = 224
"""The side that images of a folder are brought to unless another is given."""
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_LARGEST = 258, 262, 341  # tags
_IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# Folders are standardised with ImageNet's statistics, because computing their own would read as much as an epoch.
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def folder_data(root: Path, side: int, test_side: int, test_resize: int) -> Data:
    """Images in train/CLASS/* and val/CLASS/*, or test/CLASS/* without val, the classes in the order of their names.

    An image is read when a batch needs it. Where it is tested, its shorter side is scaled to `test_resize` and a
    square of `test_side` is cut out of the middle.
    """
    image = _pillow()
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
    parts = [_image_files(image, root / part, names["train"], test_side, test_resize) for part in ("train", held_out)]
    statistics = torch.tensor(_IMAGENET_MEAN), torch.tensor(_IMAGENET_STD)
    return Data("folder", *parts, tuple(names["train"]), side, *statistics, test_side if test_side != side else None)


def _pillow() -> Any:
    return extra("PIL.Image", "Pillow")


def _image_files(image: Any, root: Path, classes: list[str], test_side: int, test_resize: int) -> Images:
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
            raise InputError(f"{path}: not a readable image ({one_line(reason)})") from None

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(check, paths):
            pass
    read = functools.partial(_read_for_test, paths, test_side, test_resize)
    return Images(torch.tensor(labels), read, lazy=True, picture=functools.partial(_decode_at, paths))


def _decode_at(paths: Sequence[Path], index: int) -> Any:
    return _decode(paths[index])


def _decode(path: Path) -> Any:
    """The whole picture, as Pillow's of mode RGB, or of mode F with values in [0, 1] for a deep greyscale image."""
    image = _pillow()
    try:
        with image.open(path) as opened:
            levels = _greyscale_levels(opened)
            if levels is None:
                return opened.convert("RGB")
            black, white = levels
            # float32 holds all 16 bits, and mode F is resized by the same filter as 8 bits are.
            return image.fromarray((np.asarray(opened, dtype=np.float32) - black) / (white - black))
    except InputError as reason:
        raise InputError(f"{path}: {reason}") from None
    except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as reason:
        raise InputError(f"{path}: not a readable image ({one_line(reason)})") from None


def scaled(picture: Any, shorter: int) -> Any:
    """Scale a picture of Pillow so that its shorter side has `shorter` pixels."""
    scale = shorter / min(picture.size)
    width, height = (max(shorter, round(n * scale)) for n in picture.size)
    return picture.resize((width, height), _pillow().Resampling.BILINEAR)


def pixels_of(picture: Any) -> Tensor:
    """Return [3, H, W] of a decoded picture: uint8, or float32 in [0, 1] of a deep greyscale image."""
    pixels = torch.from_numpy(np.array(picture))
    return pixels.expand(3, -1, -1) if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def _read_for_test(paths: Sequence[Path], side: int, resize: int, indices: Tensor) -> Tensor:
    """float32 [n, 3, side, side] in [0, 1]: the middle of each picture."""
    batch = np.empty((len(indices), 3, side, side), dtype=np.float32)

    def fill(place: int, index: int) -> None:
        picture = scaled(_decode(paths[index]), resize)
        left, top = ((n - side) // 2 for n in picture.size)
        pixels = np.asarray(picture.crop((left, top, left + side, top + side)))
        batch[place] = pixels if pixels.ndim == 2 else (pixels.astype(np.float32) / 255).transpose(2, 0, 1)

    # Threads help, because Pillow decodes without the interpreter's lock.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(fill, range(len(indices)), indices.tolist()):
            pass
    return torch.from_numpy(batch)


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
