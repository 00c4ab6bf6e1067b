"""MNIST and what has its form: IDX files, packed by gzip or not."""

from __future__ import annotations

import gzip
import logging
import zlib
from pathlib import Path

import numpy as np

from gradrep_kernels.recipes.data.images import Data, in_memory, statistics
from gradrep_kernels.recipes.errors import InputError

__all__ = ["FASHION_CLASSES", "IDX_KINDS", "idx_data", "idx_folder", "read_idx", "read_parts"]

log = logging.getLogger(__name__)

FASHION_CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip
IDX_KINDS = {"mnist": tuple("0123456789"), "fashion": FASHION_CLASSES}
"""Kind of data -> its classes."""
TORCHVISION_FOLDERS = {"mnist": "MNIST/raw", "fashion": "FashionMNIST/raw"}
"""Kind of data -> the folder within DIR where torchvision leaves it."""
_PARTS = {"train": 60000, "t10k": 10000}  # the images of the published files


def idx_folder(kind: str, root: Path) -> Path | None:
    """The folder with the files: `root`, or where torchvision leaves them within it. None: no file is there."""
    for folder in (root, root / TORCHVISION_FOLDERS[kind], root / "raw"):
        names = (f"{part}-{ending}" for part in _PARTS for ending in ("images-idx3-ubyte", "labels-idx1-ubyte"))
        if any(_path(folder, name) for name in names):
            return folder
    return None


def idx_data(kind: str, root: Path) -> Data:
    """MNIST or Fashion-MNIST, 28 x 28 greys in 10 classes.

    Raises InputError that names the file and what is wrong with it.
    """
    folder = idx_folder(kind, root) or root
    (pixels, labels), test = read_parts(folder, len(IDX_KINDS[kind]))
    for part, (images, _) in zip(_PARTS, ((pixels, labels), test)):
        if len(images) != _PARTS[part]:
            log.warning("%s: %s holds %d images, the published file %d", folder, part, len(images), _PARTS[part])
    return Data(
        kind, in_memory(pixels, labels), in_memory(*test), IDX_KINDS[kind], pixels.shape[-1], *statistics(pixels)
    )


def read_parts(folder: Path, classes: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Training and test part: uint8 images [N, 1, side, side] and labels [N] below `classes`."""
    parts = []
    for part in _PARTS:
        pixels = read_idx(folder, f"{part}-images-idx3-ubyte", 3)
        labels = read_idx(folder, f"{part}-labels-idx1-ubyte", 1)
        if not len(pixels) or len(pixels) != len(labels) or labels.max() >= classes:
            needed = f"as many labels, from 0 to {classes - 1}, as images, and at least one"
            largest = f" up to {labels.max()}" if len(labels) else ""
            found = f"{len(pixels)} images and {len(labels)} labels{largest}"
            raise InputError(f"{folder}: {part} has {found}; needed are {needed}")
        parts.append((pixels[:, None], labels))
    sides = {side for pixels, _ in parts for side in pixels.shape[2:]}
    if len(sides) != 1 or 0 in sides:
        sizes = " and ".join(" x ".join(map(str, pixels.shape[2:])) for pixels, _ in parts)
        raise InputError(f"{folder}: images are {sizes}; needed are squares of one size")
    return parts


def _path(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def read_idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """Read the uint8 array of an IDX file: two zeros, the type (8), the number of dimensions, the sizes, the bytes.

    Raises InputError where neither it nor NAME.gz can be read, or the file is not whole.
    """
    path = _path(folder, name)
    if path is None:
        raise InputError(f"{folder / name}: neither it nor {name}.gz is there")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as reason:
        raise InputError(f"{path}: cannot be read: {reason}") from None
    head = 4 + 4 * dimensions
    if raw[:4] != bytes((0, 0, 8, dimensions)) or len(raw) < head:
        raise InputError(f"{path}: it does not begin as an IDX file of bytes with {dimensions} dimensions does")
    sizes = np.frombuffer(raw, ">u4", dimensions, offset=4).tolist()
    if len(raw) != head + np.prod(sizes, dtype=int):
        raise InputError(f"{path}: {len(raw) - head} bytes are not the {' x '.join(map(str, sizes))} that it says")
    return np.frombuffer(raw, np.uint8, offset=head).reshape(sizes).copy()
