"""A data set and options so small that a whole job takes seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np


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
    "batch_size": 10,
    "epochs": 2,
    "search_epochs": 2,
    "seeds": 1,
    "warmup": 1,
    "threads": 1,
    "sgs_every": 9,
    "sgs_batches": 1,
    "check_steps": 3,
}
"""Options by attribute name."""


def as_arguments(given: dict) -> list[str]:
    return [text for name, value in given.items() for text in ("--" + name.replace("_", "-"), str(value))]
