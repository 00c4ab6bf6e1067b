"""Data sets that torchvision reads or downloads: CIFAR as it leaves it, SVHN, and the files of the MNIST family."""

from __future__ import annotations

import http.client
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from gradrep_kernels.recipes.data.images import Data, in_memory, statistics
from gradrep_kernels.recipes.data.library import torchvision
from gradrep_kernels.recipes.errors import InputError, extra, one_line

__all__ = ["DOWNLOADS", "download_data", "pickled_cifar", "pickled_root", "svhn"]

DOWNLOADS = {
    "cifar10": "CIFAR10", "cifar100": "CIFAR100", "mnist": "MNIST", "fashion": "FashionMNIST", "svhn": "SVHN",
}  # fmt: skip
"""Kind of data -> the class of torchvision.datasets that downloads it."""
_DAMAGED_ARCHIVES = (tarfile.TarError, zipfile.BadZipFile)
_PICKLED = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


def _data_set(kind: str) -> Any:
    """The class that reads and downloads this kind of data."""
    return getattr(torchvision("datasets", f"{kind}:DIR"), DOWNLOADS[kind])


def download_data(kind: str, root: Path) -> None:
    """Let torchvision download what is not in `root` yet, and unpack it there.

    Raises InputError where the library has no such data, is missing or cannot download.
    """
    if kind not in DOWNLOADS:
        raise InputError(f"--download is for {', '.join(f'{name}:DIR' for name in DOWNLOADS)}, not for {kind}")
    data_set = getattr(torchvision("datasets", "--download"), DOWNLOADS[kind])
    parts = [{"split": "train"}, {"split": "test"}] if kind == "svhn" else [{}]  # the others come whole
    try:
        root.mkdir(parents=True, exist_ok=True)
        for part in parts:
            data_set(str(root), download=True, **part)
    except ImportError as reason:  # SVHN is read by scipy.
        raise InputError(f"{kind}:DIR needs scipy: pip install scipy ({reason})") from None
    except (OSError, RuntimeError, ValueError, EOFError, http.client.HTTPException, *_DAMAGED_ARCHIVES) as reason:
        raise InputError(f"{root}: {kind} cannot be downloaded: {one_line(reason)}") from None


def pickled_root(kind: str, root: Path) -> Path | None:
    """The folder that torchvision is given for the pickled CIFAR in `root`. None: it is not there.

    `root` may be that folder, or the unpacked archive itself.
    """
    if (root / _PICKLED[kind]).is_dir():
        return root
    return root.parent if root.name == _PICKLED[kind] and root.is_dir() else None


def pickled_cifar(kind: str, root: Path) -> Data:
    """CIFAR in its distribution for Python, which `download=True` leaves in `root`.

    Raises InputError that names the file that is missing or not the published one.
    """
    data_set = _data_set(kind)
    folder = root / data_set.base_folder
    meta = (data_set.meta["filename"], data_set.meta["md5"])
    for name, md5 in [*data_set.train_list, *data_set.test_list, meta]:
        _check_published(folder / name, md5, kind)
    train, test = (data_set(str(root), train=part) for part in (True, False))
    images = _channels_first(train.data)
    return Data(
        kind,
        in_memory(images, np.array(train.targets)),
        in_memory(_channels_first(test.data), np.array(test.targets)),
        tuple(train.classes),
        images.shape[-1],
        *statistics(images),
    )


def svhn(root: Path) -> Data:
    """Street View House Numbers, cropped: 73257 and 26032 images of 32 x 32, the digits 0 to 9.

    Raises InputError that names the file that is missing or not the published one.
    """
    data_set = _data_set("svhn")
    extra("scipy.io", "scipy")  # torchvision imports it when it reads.
    for part in ("train", "test"):
        _, name, md5 = data_set.split_list[part]
        _check_published(root / name, md5, "svhn")
    train, test = (data_set(str(root), split=part) for part in ("train", "test"))
    # The files hold [H, W, C, N], which torchvision transposes without moving it.
    images = np.ascontiguousarray(train.data)
    return Data(
        "svhn",
        in_memory(images, train.labels),
        in_memory(np.ascontiguousarray(test.data), test.labels),
        tuple("0123456789"),
        images.shape[-1],
        *statistics(images),
    )


def _channels_first(images: np.ndarray) -> np.ndarray:
    """[N, C, H, W] of [N, H, W, C]."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def _check_published(path: Path, md5: str, kind: str) -> None:
    """Raise InputError that names the file and what is wrong with it. torchvision itself says neither."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; --download gets {kind}")
    if not torchvision("datasets.utils", f"{kind}:DIR").check_integrity(str(path), md5):
        found = f"{path.stat().st_size} bytes, whose MD5 is not {md5}"
        raise InputError(f"{path}: not the published file, but truncated, changed or another ({found})")
