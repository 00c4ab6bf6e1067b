"""CIFAR-10 and CIFAR-100: the binary distribution, and the pickled one that torchvision leaves."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from gradrep_kernels.recipes.data.images import Data, in_memory, statistics
from gradrep_kernels.recipes.errors import InputError

__all__ = ["CIFAR_KINDS", "binary_cifar", "binary_folder"]

log = logging.getLogger(__name__)

_SIDE, _PLANE = 32, 32 * 32
CIFAR_KINDS = {
    "cifar10": ((10,), [f"data_batch_{n}.bin" for n in range(1, 6)], "test_batch.bin", "cifar-10-batches-bin"),
    "cifar100": ((20, 100), ["train.bin"], "test.bin", "cifar-100-binary"),
}
"""Kind of data -> (classes of each label byte before the pixels, training files, test file, folder in the archive)."""
_PUBLISHED_RECORDS = {"train.bin": 50000}  # all other files hold 10000


def binary_folder(kind: str, root: Path) -> Path | None:
    """The folder with the binary files, `root` or that of the archive within it. None: no file is there."""
    _, train_files, test_file, inside = CIFAR_KINDS[kind]
    for folder in (root, root / inside):
        if any((folder / name).exists() for name in (*train_files, test_file)):
            return folder
    return None


def binary_cifar(kind: str, folder: Path) -> Data:
    """CIFAR in its binary distribution.

    A record is one or two bytes of labels, then 3 x 32 x 32 bytes, channel by channel. Raises InputError that names
    the file and what is wrong with it.
    """
    label_classes, train_files, test_file, _ = CIFAR_KINDS[kind]
    parts = [_read_file(kind, folder / name, label_classes) for name in train_files]
    images, labels = (np.concatenate(part) for part in zip(*parts))
    return Data(
        kind,
        in_memory(images, labels),
        in_memory(*_read_file(kind, folder / test_file, label_classes)),
        tuple(str(n) for n in range(label_classes[-1])),
        _SIDE,
        *statistics(images),
    )


def _read_file(kind: str, path: Path, label_classes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images [N, 3, 32, 32] and the (fine) labels [N]."""
    record = len(label_classes) + 3 * _PLANE
    try:
        raw = np.fromfile(path, dtype=np.uint8)
    except OSError as reason:
        needed = f"{kind} needs the binary distribution, or {kind}:DIR where torchvision left the pickled one"
        raise InputError(f"{path}: {reason.strerror or reason}; {needed}") from None
    if raw.size == 0 or raw.size % record:
        other = next(
            (
                name
                for name, (labels, *_) in CIFAR_KINDS.items()
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
