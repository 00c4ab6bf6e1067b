"""Data sets by name: digits, CIFAR, the MNIST family, SVHN, folders of images.

scikit-learn's digits, the binary CIFAR, IDX files and folders need no torchvision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from gradrep_kernels.recipes.data.augmentation import check_augmentations
from gradrep_kernels.recipes.data.cifar import CIFAR_KINDS, binary_cifar, binary_folder
from gradrep_kernels.recipes.data.folders import FOLDER_SIDE, folder_data
from gradrep_kernels.recipes.data.idx import IDX_KINDS, TORCHVISION_FOLDERS, idx_data, idx_folder
from gradrep_kernels.recipes.data.images import Data, Images, in_memory, statistics
from gradrep_kernels.recipes.data.torchvision_data import DOWNLOADS, download_data, pickled_cifar, pickled_root, svhn
from gradrep_kernels.recipes.errors import InputError, extra

__all__ = ["FOLDER_SIDE", "KINDS", "Data", "DataSource", "Images", "load_data"]

KINDS = ("digits", *CIFAR_KINDS, *IDX_KINDS, "svhn", "folder")


@dataclass(frozen=True)
class DataSource:
    """The value of `--data`: a kind of data set and its folder.

    The folder is an absolute path, or None for digits.
    """

    kind: str
    folder: Path | None = None

    @classmethod
    def parse(cls, text: str) -> DataSource:
        """From 'digits', or 'KIND:DIR' of another kind.

        Raises InputError for any other text.
        """
        kind, colon, folder = text.partition(":")
        if kind not in KINDS or (kind == "digits") == bool(colon) or (colon and not folder):
            others = [f"{name}:DIR" for name in KINDS[1:]]
            raise InputError(f"--data must be digits, {', '.join(others[:-1])} or {others[-1]}, got {text!r}")
        return cls(kind, Path(folder).absolute() if folder else None)

    def __str__(self) -> str:
        return self.kind if self.folder is None else f"{self.kind}:{self.folder}"


def load_data(
    source: DataSource | str,
    image_size: int | None = None,
    *,
    test_size: int | None = None,
    test_resize: int | None = None,
    augment: Sequence[str] = (),
    download: bool = False,
) -> Data:
    """Read the data set of `source`, a DataSource or the text that gives one ('folder:DIR').

    Of images in a folder it reads names and headers alone. A training sees squares of `image_size` (None: 224). For
    validation and test, the shorter side is scaled to `test_resize` (None: `test_size`) and a square of `test_size`
    (None: `image_size`) cut out of the middle. The other sets have a size of their own. `augment` is what a `Loader`
    will do with them: that it can be done is found out here. `download` lets torchvision put into the folder what is
    not there yet.

    Raises InputError that names the file, folder or option and what is wrong with it.
    """
    if isinstance(source, str):
        source = DataSource.parse(source)
    check_augmentations(augment)
    if download and source.kind not in DOWNLOADS:
        download_data(source.kind, source.folder or Path())  # which says so
    if source.folder is None:
        return _digits()
    if download and not _is_there(source):
        download_data(source.kind, source.folder)
    if not source.folder.is_dir():
        more = "; --download makes it" if source.kind in DOWNLOADS else ""
        raise InputError(f"{source.folder}: no such folder{more}")
    if source.kind == "folder":
        return _folder(source.folder, image_size or FOLDER_SIDE, test_size, test_resize)
    if source.kind in IDX_KINDS:
        return _idx(source.kind, source.folder)
    return svhn(source.folder) if source.kind == "svhn" else _cifar(source.kind, source.folder)


def _is_there(source: DataSource) -> bool:
    """Whether the folder has files that torchvision would not look for. It looks for its own itself."""
    if source.kind in CIFAR_KINDS:
        return binary_folder(source.kind, source.folder) is not None
    return source.kind in IDX_KINDS and idx_folder(source.kind, source.folder) == source.folder


def _folder(root: Path, side: int, test_size: int | None, test_resize: int | None) -> Data:
    test_side = test_size or side
    resize = test_resize or test_side
    if resize < test_side:
        raise InputError(f"--test-resize {resize} is less than the {test_side} pixels of --test-size that are cut out")
    return folder_data(root, side, test_side, resize)


def _idx(kind: str, root: Path) -> Data:
    if idx_folder(kind, root) is None:
        names = "train-images-idx3-ubyte and its like, packed by gzip or not"
        raise InputError(f"{root}: {names}, are neither there nor in {TORCHVISION_FOLDERS[kind]}; --download gets them")
    return idx_data(kind, root)


def _cifar(kind: str, root: Path) -> Data:
    """Recognise the form by the files that are there. The binary one needs no torchvision."""
    binary, pickled = binary_folder(kind, root), pickled_root(kind, root)
    if binary is None and pickled is None:
        forms = f"neither the binary {kind} ({CIFAR_KINDS[kind][2]}) nor the pickled one that torchvision leaves"
        raise InputError(f"{root}: {forms} is there; --download gets it")
    return pickled_cifar(kind, pickled) if binary is None else binary_cifar(kind, binary)


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
        in_memory(images[train], digits.target[train]),
        in_memory(images[test], digits.target[test]),
        tuple(str(n) for n in digits.target_names),
        16,
        *statistics(images[train]),
    )
