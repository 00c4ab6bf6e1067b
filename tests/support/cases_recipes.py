"""A data set and options so small that a whole job takes seconds."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from gradrep_kernels.cli import main
from gradrep_kernels.recipes.data.load import Data, DataSource, load_data

ROOT = Path(__file__).resolve().parents[2]


def experiments_table(first_column: str) -> list[dict[str, str]]:
    """The rows of the table of docs/experiments.md that begins with this column, by column."""
    lines = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8").splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(f"| {first_column} |"))
    cells = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        cells.append([cell.strip() for cell in line.strip("|").split(" | ")])
    heading, _, *rows = cells
    return [dict(zip(heading, row)) for row in rows]


def write_tiny_cifar10(folder: Path) -> Path:
    """30 training and 12 test images: class c is a bright square at a place of its own on noise."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for n, name in enumerate([*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]):
        count = 12 if name.startswith("test") else 6
        labels = (np.arange(count) + n) % 10
        pixels = rng.integers(0, 80, (count, 3, 32, 32), dtype=np.uint8)
        for image, label in zip(pixels, labels):
            image[:, 3 * label : 3 * label + 4, 3 * label : 3 * label + 4] += 150
        (folder / name).write_bytes(
            np.concatenate([labels[:, None].astype(np.uint8), pixels.reshape(count, -1)], axis=1).tobytes()
        )
    return folder


TINY = {
    "model": "small",
    "schedule": "cosine",
    "search_schedule": "cosine",
    "search_warmup": 1,
    "search_batch_size": 10,
    "batch_size": 10,
    "epochs": 2,
    "search_epochs": 2,
    "seeds": 1,
    "warmup": 1,
    "threads": 1,
    "sgs_every": 9,
    "sgs_batches": 1,
    "check_steps": 3,
    "workers": 1,
}
"""Options by attribute name."""


def as_arguments(given: dict) -> list[str]:
    return [text for name, value in given.items() for text in ("--" + name.replace("_", "-"), str(value))]


def train_arguments(source, out, *more):
    return ["train", "--data", source, "--out", str(out), *as_arguments(TINY), *more]


def train(source, out, *more) -> None:
    """Do a whole run of the command line in this process."""
    assert main(train_arguments(source, out, *more)) == 0


def load(source: str, image_size: int | None = None) -> Data:
    return load_data(DataSource.parse(source), image_size)


def tensors(path):
    return torch.load(path, weights_only=True)


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def bit_repeatable(metrics_file):
    """The lines of metrics.jsonl without what is timed."""
    return [
        {key: value for key, value in json.loads(line).items() if "seconds" not in key}
        for line in metrics_file.read_text().splitlines()
    ]


def assert_same_results(folder, other, ordered=True):
    """`ordered`: whether trainings were done in the same order."""
    weights = sorted(path.name for path in (folder / "weights").iterdir())
    assert weights == sorted(path.name for path in (other / "weights").iterdir())
    for name in weights:
        assert_same_tensors(tensors(folder / "weights" / name), tensors(other / "weights" / name))
    assert_same_tensors(tensors(folder / "scales.pt"), tensors(other / "scales.pt"))
    lines = [bit_repeatable(path / "metrics.jsonl") for path in (folder, other)]
    if not ordered:
        lines = [sorted(of_one, key=lambda line: (line["run"], line["epoch"])) for of_one in lines]
    assert lines[0] == lines[1]
    a, b = (json.loads((path / "summary.json").read_text()) for path in (folder, other))
    for label in a["recipes"]:
        assert a["recipes"][label]["test_accuracy"] == b["recipes"][label]["test_accuracy"]
        assert a["recipes"][label].get("scalings") == b["recipes"][label].get("scalings")
    assert a["csla_equals_gr"] == b["csla_equals_gr"]


CIFAR = {
    "cifar10": [f"data_batch_{n}.bin" for n in range(1, 6)] + ["test_batch.bin"],
    "cifar100": ["train.bin", "test.bin"],
}


def record(kind: str, label: int, seed: int) -> bytes:
    """One record by the format's words: label byte (cifar100: coarse and fine), then red, green, blue, row by row."""
    pixels = np.random.default_rng(seed).integers(0, 256, 3 * 32 * 32, dtype=np.uint8)
    labels = bytes([label]) if kind == "cifar10" else bytes([label % 20, label])
    return labels + pixels.tobytes()


def write_cifar(folder, kind: str, per_file: int = 4):
    folder.mkdir(parents=True, exist_ok=True)
    for n, name in enumerate(CIFAR[kind]):
        (folder / name).write_bytes(
            b"".join(
                record(kind, (37 * n + 23 * i) % (10 if kind == "cifar10" else 100), 100 * n + i)
                for i in range(per_file)
            )
        )
    return folder


IDX = {"train": 40, "t10k": 20}
"""Part of the files of MNIST -> images that `write_mnist` makes."""


def write_idx(folder: Path, name: str, array: np.ndarray, packed: bool = False) -> None:
    """An IDX file of bytes by the format's words, packed by gzip or not."""
    content = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path = folder / (f"{name}.gz" if packed else name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if packed else content)


def write_mnist(folder: Path, side: int = 28) -> Path:
    """Images of MNIST's form, one grey by its class on noise. The training part is packed, the test part is not."""
    generator = np.random.default_rng(0)
    for name, count in IDX.items():
        labels = (np.arange(count) % 10).astype(np.uint8)
        pixels = (generator.integers(0, 100, (count, side, side)) + 15 * labels[:, None, None]).astype(np.uint8)
        write_idx(folder, f"{name}-images-idx3-ubyte", pixels, packed=name == "train")
        write_idx(folder, f"{name}-labels-idx1-ubyte", labels, packed=name == "train")
    return folder


def write_image(path, size, colour, mode="RGB"):
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.new(mode, size, colour).save(path)


def write_folder(root, classes=("ant", "bee"), per_class=3, size=(20, 12)):
    for part in ("train", "val"):
        for c, name in enumerate(classes):
            for n in range(per_class):
                write_image(root / part / name / f"{n}.png", size, (40 * c, 10 * n, 255 if part == "val" else 0))
    return root
