"""Compare spatial gradient scaling with plain SGD, seed by seed: VGG-11 on Fashion-MNIST.

    python bench/study_fashion.py FOLDER [--seconds 300] [--seeds 3] [--results runs/study-fashion]

FOLDER holds the four files of the distribution, packed by gzip or not. On Debian the package dataset-fashion-mnist puts
them into /usr/share/datasets/fashion-mnist. Images lie on the GPU and are augmented there. All trainings have as many
epochs as `--seconds` hold, by the time that a few steps of each kind take, or as many as --epochs says. The accuracy is
that after the last epoch. study.json and study.md are written anew after each seed that both ways were trained with.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from harness import commit, machine, versions
from report import number, table
from torch import Tensor

from gradrep_kernels.recipes import files
from gradrep_kernels.recipes.build import Trainee, build
from gradrep_kernels.recipes.data.augmentation import flip, pad_and_crop
from gradrep_kernels.recipes.data.idx import FASHION_CLASSES, read_parts
from gradrep_kernels.recipes.data.load import Data, Images
from gradrep_kernels.recipes.data.loader import derived_seed
from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.intervals import paired_difference
from gradrep_kernels.recipes.networks import MODELS
from gradrep_kernels.recipes.options.resolve import Options, resolve
from gradrep_kernels.recipes.schedules import learning_rate
from gradrep_kernels.recipes.table import RECIPES
from gradrep_kernels.recipes.training import accuracy, now, train_step

ROWS = ("sgd", "sgs")
ORDER, STATISTICS = 2, 3  # purposes for derived_seed
WARM, TIMED = 5, 30  # steps that tell how long an epoch takes
SPENT = 0.9  # of the seconds, by plan: updates of SGS and other work on the machine take the rest


# -- data


def load(folder: Path, device: str) -> Data:
    """Fashion-MNIST, or what has its files, on a device."""
    parts = [
        (torch.from_numpy(pixels).to(device), torch.from_numpy(labels).long().to(device))
        for pixels, labels in read_parts(folder, len(FASHION_CLASSES))
    ]
    train, test = (Images(labels, lambda at, pixels=pixels: pixels[at] / 255) for pixels, labels in parts)
    pixels = parts[0][0] / 255
    return Data("fashion", train, test, FASHION_CLASSES, pixels.shape[-1], pixels.mean()[None], pixels.std()[None])


class Batches:
    """One epoch of training batches, shuffled and augmented by a seed on the data's device.

    The incomplete last batch is left out.
    """

    def __init__(self, data: Data, size: int, seed: int):
        self.data, self.seed = data, seed
        self.size = min(size, len(data.train))

    def __len__(self) -> int:
        return len(self.data.train) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.data.train.labels.device
        generator = torch.Generator(device).manual_seed(self.seed)
        order = torch.randperm(len(self.data.train), generator=generator, device=device)
        for chosen in order.split(self.size)[: len(self)]:
            with device:  # where the augmentations draw and count
                x = flip(pad_and_crop(self.data.train.read(chosen), generator), generator)
            yield self.data.standardise(x), self.data.train.labels[chosen]


# -- training


def epoch(trainee: Trainee, options: Options, data: Data, seed: int, n: int, epochs: int) -> None:
    if trainee.sgs is not None:
        trainee.sgs.update_if_due(n, Batches(data, options.batch_size, derived_seed(seed, STATISTICS, n)))
    batches = Batches(data, options.batch_size, derived_seed(seed, ORDER, n))
    steps, warmup = epochs * len(batches), min(options.warmup, epochs // 10) * len(batches)
    trainee.model.train()
    for step, (x, labels) in enumerate(batches, n * len(batches)):
        for group in trainee.optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, warmup, trainee.lr)
        train_step(trainee, options, x, labels)


def train(row: str, options: Options, data: Data, seed: int, epochs: int) -> dict[str, object]:
    """Accuracy after the last epoch, seconds, and each layer's G where there is one."""
    trainee = build(RECIPES[row], options, data, None, seed, options.lr[0])
    start = now(options.device)
    for n in range(epochs):
        epoch(trainee, options, data, seed, n, epochs)
    seconds = now(options.device) - start
    scalings = {name: g.tolist() for name, g in trainee.sgs.scalings.items()} if trainee.sgs else None
    right = accuracy(trainee.model, data, data.test, options.device)
    return {"accuracy": right, "seconds": seconds, "scalings": scalings}


def seconds_of_an_epoch(options: Options, data: Data) -> dict[str, float]:
    """By row, from a few steps after some that warm up. Updates of SGS are not among them."""
    found = {}
    for row in ROWS:
        trainee = build(RECIPES[row], options, data, None, options.seed, options.lr[0])
        batches = Batches(data, options.batch_size, options.seed)
        start, done = now(options.device), 0
        for n, (x, labels) in enumerate(batches):
            if n == min(WARM, len(batches) - 1):
                start, done = now(options.device), 0
            if done == TIMED:
                break
            train_step(trainee, options, x, labels)
            done += 1
        found[row] = (now(options.device) - start) / done * len(batches)
    return found


def epochs_that_fit(seconds: float, seeds: int, of_an_epoch: dict[str, float]) -> int:
    return max(1, int(SPENT * seconds / (seeds * sum(of_an_epoch.values()))))


# -- what is told


def page(found: dict) -> str:
    accuracies = {row: [run[row]["accuracy"] for run in found["runs"]] for row in ROWS}
    try:
        difference = paired_difference(
            "sgs", "sgd", accuracies["sgs"], accuracies["sgd"], found["test_images"]
        ).sentence()
    except InputError as missing:  # a training on a lent GPU is worth more than its interval
        difference = f"No interval: {missing}."
    rows = [
        [
            str(run["seed"]),
            *(f"{100 * run[row]['accuracy']:.2f}" for row in ROWS),
            *(number(run[row]["seconds"]) for row in ROWS),
        ]
        for run in found["runs"]
    ]
    means = [f"{100 * statistics.fmean(accuracies[row]):.2f}" for row in ROWS]
    where = found["machine"].get("gpu", {}).get("name") or found["machine"]["cpu"]
    lines = [
        "# Fashion-MNIST: spatial gradient scaling against plain SGD",
        "",
        f"{found['options']['model']}, {found['epochs']} epochs, batches of {found['options']['batch_size']}, "
        f"{where}, torch {found['versions']['torch']}, commit {found['commit']}. `{found['command']}`",
        "",
        f"{len(found['runs'])} of {found['seeds']} seeds. {difference}",
        "",
        *table(
            ["seed", *(f"{row}, %" for row in ROWS), *(f"{row}, s" for row in ROWS)], [*rows, ["mean", *means, "", ""]]
        ),
    ]
    return "\n".join(lines)


def study(options: Options, data: Data, seconds: float, epochs: int | None, results: Path, command: str) -> dict:
    """Train both ways with each seed, as far as the seconds allow, and write what they give."""
    end = time.monotonic() + seconds
    of_an_epoch = seconds_of_an_epoch(options, data) if epochs is None else None
    epochs = epochs or epochs_that_fit(end - time.monotonic(), options.seeds, of_an_epoch)
    device = torch.device(options.device)
    found = {
        "command": command, "commit": commit(), "versions": versions(), "machine": machine(device),
        "options": {**options.to_json(), "data": data.name, "epochs": epochs}, "epochs": epochs,
        "seconds_of_an_epoch": of_an_epoch, "seeds": options.seeds,
        "train_images": len(data.train), "test_images": len(data.test), "runs": [],
    }  # fmt: skip
    longest = 0.0
    for n in range(options.seeds):
        start = time.monotonic()
        if n and start + longest > end:
            print(f"no time for seed {options.seed + n}", flush=True)
            break
        run: dict = {"seed": options.seed + n}
        for row in ROWS if n % 2 == 0 else ROWS[::-1]:  # a machine drifts
            run[row] = train(row, options, data, options.seed + n, epochs)
            print(f"seed {run['seed']}, {row}: {100 * run[row]['accuracy']:.2f} %", flush=True)
        longest = max(longest, time.monotonic() - start)
        found["runs"].append(run)
        files.write_json(results / "study.json", found)
        files.write_text(results / "study.md", page(found))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", type=Path, help="with train-images-idx3-ubyte and the other three files, or their .gz"
    )
    parser.add_argument("--results", type=Path, default=Path("runs/study-fashion"), help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=300, help="for everything but reading (default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="of each training (default: as many as the seconds hold)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", choices=tuple(MODELS), default="vgg11")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, help="default: that of the commands for CIFAR")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(argv)
    names = ("epochs", "seeds", "model", "batch_size", "lr", "device")
    # The options of a job on CIFAR, whose images are of about this size.
    options = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    try:
        options = resolve({"data": f"cifar10:{given.folder}", "recipe": ROWS, "augment": ("flip", "crop"), **options})
        data = load(given.folder, options.device)
        given.results.mkdir(parents=True, exist_ok=True)
        words = ["python", "bench/study_fashion.py", *(sys.argv[1:] if argv is None else argv)]
        found = study(options, data, given.seconds, given.epochs, given.results, " ".join(words))
    except InputError as reason:
        print(f"study_fashion: {reason}", file=sys.stderr)
        return 2
    print(page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
