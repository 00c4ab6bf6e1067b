"""Compare trainings with momentum in bfloat16 and in float32, and averages with weights, pair by pair.

    python bench/study_momentum.py digits [--pairs 12] [--seed 0]
    python bench/study_momentum.py /usr/share/datasets/fashion-mnist [--pairs 5] [--images 12000] [--epochs 3]

Both trainings of a pair begin with the same weights and read the same batches. They train a plain RepOpt-VGG with Grad
Mults of the scales that Hyper-Search starts from. Both keep moving averages, which change nothing in a training, so the
same pairs tell how averages and weights differ. Digits are those of the commands. A folder holds Fashion-MNIST, as
study_fashion.py describes it. --images trains on the first so many. The results are written anew after each pair.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import study_fashion
import torch
from harness import ROOT, commit, machine, versions
from report import table

from gradrep_kernels.recipes import files
from gradrep_kernels.recipes.build import build
from gradrep_kernels.recipes.data.load import Data, Images, load_data
from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.intervals import paired_difference
from gradrep_kernels.recipes.options.resolve import Options, resolve
from gradrep_kernels.recipes.table import ablated
from gradrep_kernels.recipes.training import accuracies, accuracy, repeatable, train_epoch

ROW = ablated("hs-init")
WAYS = {"float32": None, "bfloat16": "bfloat16"}  # momentum_dtype by name
TITLES = {"digits": "Digits", "fashion": "Fashion-MNIST"}
DIGITS = {"data": "digits", "model": "deep", "lr": "0.1"}
WEIGHTS, AVERAGES, STALE = "weights_accuracy", "accuracy", "accuracy_with_statistics_of_weights"  # names in a run
FASHION = {"model": "small", "lr": "0.1", "augment": ("flip", "crop"), "batch_size": 64, "warmup": 1, "epochs": 3}


def train(options: Options, data: Data, seed: int) -> dict[str, float | None]:
    """Loss of the last epoch, and the accuracies of averages and weights after it."""
    with repeatable(options.threads, options.device):
        trainee = build(ROW, options, data, None, seed, options.lr[0])
        start = time.monotonic()
        for n in range(options.epochs):
            record = train_epoch(trainee, data, options, seed, n, options.epochs, lambda: None)
        found = accuracies(trainee, data, data.test, options, seed, "accuracy")
        with trainee.optimizer.swap_ema():
            found[STALE] = accuracy(trainee.model, data, data.test, options.device)
    return {**found, "train_loss": record["train_loss"], "seconds": time.monotonic() - start}


def first_images(data: Data, count: int) -> Data:
    train = Images(data.train.labels[:count], data.train.read, data.train.lazy)
    return dataclasses.replace(data, train=train)


# -- what is told


def statements(found: dict) -> list[str]:
    def of(way: str, what: str) -> list[float]:
        return [run[way][what] for run in found["runs"]]

    compared = [
        ("momentum in bfloat16", "float32, by the weights", ("bfloat16", WEIGHTS), ("float32", WEIGHTS)),
        ("momentum in bfloat16", "float32, by the averages", ("bfloat16", AVERAGES), ("float32", AVERAGES)),
        ("averages", "weights, momentum in float32", ("float32", AVERAGES), ("float32", WEIGHTS)),
        ("averages with norm statistics of the weights", "of their own", ("float32", STALE), ("float32", AVERAGES)),
    ]
    images = found["test_images"]
    return [paired_difference(row, other, of(*a), of(*b), images).sentence() for row, other, a, b in compared]


def page(found: dict) -> str:
    options, runs = found["options"], found["runs"]
    columns = [(way, what) for what in (WEIGHTS, AVERAGES) for way in WAYS] + [("float32", STALE)]
    words = {WEIGHTS: "weights", AVERAGES: "averages", STALE: "averages, statistics of the weights"}
    head = ["seed", *(f"{words[what]}, {way}, %" for way, what in columns)]
    rows = [[str(run["seed"]), *(f"{100 * run[way][what]:.2f}" for way, what in columns)] for run in runs]
    means = [f"{100 * statistics.fmean(run[way][what] for run in runs):.2f}" for way, what in columns]
    lines = [
        f"### {TITLES[found['data']]}",
        "",
        f"{options['model']}, {found['train_images']} training and {found['test_images']} test images, "
        f"{options['epochs']} epochs in batches of {options['batch_size']}, learning rate {options['lr'][0]:g}, "
        f"averages with a decay of {options['ema_decay']:g}.",
        "",
        *(f"- {statement}" for statement in statements(found)),
        "",
        *table(head, [*rows, ["mean", *means]]),
        f"{found['machine']['cpu']}, torch {found['versions']['torch']}, commit {found['commit']}. "
        f"`{found['command']}`",
        "",
    ]
    return "\n".join(lines)


def study(options: Options, data: Data, results: Path, command: str) -> dict:
    """Train both ways with each seed, and write what they give."""
    where = machine(torch.device(options.device))
    found: dict = {
        "command": command, "commit": commit(), "versions": versions(), "machine": where,
        "options": {**options.to_json(), "data": data.name}, "data": data.name, "row": ROW.name,
        "train_images": len(data.train), "test_images": len(data.test), "runs": [],
    }  # fmt: skip
    results.mkdir(parents=True, exist_ok=True)
    for n in range(options.seeds):
        run: dict = {"seed": options.seed + n}
        for way in list(WAYS) if n % 2 == 0 else list(WAYS)[::-1]:
            run[way] = train(dataclasses.replace(options, momentum_dtype=WAYS[way]), data, options.seed + n)
            print(f"seed {run['seed']}, {way}: {run[way]}", flush=True)
        found["runs"].append(run)
        files.write_json(results / f"study-momentum-{data.name}.json", found)
        files.write_text(results / f"study-momentum-{data.name}.md", page(found))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="digits, or the folder of Fashion-MNIST")
    parser.add_argument("--pairs", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the first pair (default: %(default)s)")
    parser.add_argument("--images", type=int, help="train on the first so many (default: all)")
    parser.add_argument("--epochs", type=int, help="default: 6 of the digits, 3 of a folder")
    parser.add_argument("--batch-size", type=int, help="default: 32 of the digits, 64 of a folder")
    parser.add_argument("--ema-decay", type=float, default=0.98, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="default: %(default)s")
    given = parser.parse_args(argv)
    on_digits = given.data == "digits"
    options = dict(DIGITS) if on_digits else {"data": f"cifar10:{given.data}", **FASHION}
    options |= {"seeds": given.pairs, "seed": given.seed, "ema_decay": given.ema_decay, "threads": given.threads}
    options |= {name: getattr(given, name) for name in ("epochs", "batch_size") if getattr(given, name) is not None}
    try:
        resolved = resolve(options)
        data = load_data(resolved.data, None) if on_digits else study_fashion.load(Path(given.data), resolved.device)
        if given.images is not None:
            data = first_images(data, given.images)
        words = ["python", "bench/study_momentum.py", *(sys.argv[1:] if argv is None else argv)]
        found = study(resolved, data, given.results, " ".join(words))
        print(page(found))
    except InputError as reason:
        print(f"study_momentum: {reason}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
