"""One epoch of training and the evaluation after it.

The same seed gives the same weights again.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from gradrep_kernels.recipes import ranks
from gradrep_kernels.recipes.build import Trainee
from gradrep_kernels.recipes.data.load import Data, Images
from gradrep_kernels.recipes.data.loader import Loader, derived_seed
from gradrep_kernels.recipes.options.resolve import Options
from gradrep_kernels.recipes.schedules import learning_rate
from gradrep_kernels.recipes.steps import TrainingSteps

__all__ = ["accuracies", "accuracy", "averaged", "epoch_batches", "now", "repeatable", "train_epoch", "train_step"]

_ORDER, _STATISTICS, _AVERAGES = 2, 3, 4  # purposes for derived_seed
_AVERAGES_BATCHES = 20  # give the batch norms' statistics of averages
_EVALUATION_BATCH = 512


@contextlib.contextmanager
def repeatable(threads: int, device: str) -> Iterator[None]:
    """Fix the number of threads, and use deterministic algorithms on a GPU.

    All settings are restored afterwards. The default generators are restored too. Another number of threads rounds sums
    in another order, so the number is part of a run's options. A GPU algorithm without a deterministic form (max
    pooling's gradient) warns and runs.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        on_gpu = torch.device(device).type == "cuda"
        # Of all GPUs by default: each process of several would then take memory of all.
        own = [torch.cuda.current_device()] if on_gpu else []
        with torch.random.fork_rng(own), _deterministic_gpu() if on_gpu else contextlib.nullcontext():
            yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _deterministic_gpu() -> Iterator[None]:
    # cuBLAS reads this when it starts, and its deterministic algorithms need it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


def now(device: str) -> float:
    """Seconds on a clock, once the device has done what was asked of it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def train_epoch(
    trainee: Trainee,
    data: Data,
    options: Options,
    seed: int,
    epoch: int,
    epochs: int,
    on_batch: Callable[[], None],
    steps: TrainingSteps | None = None,
) -> dict[str, Any]:
    """Train one epoch (from 0) of `epochs`.

    The same state, seed and epoch give the same bits. Changes the trainee only, and seeds the default generator.
    `steps` are those of the whole training, None for a training of this epoch alone. Afterwards all ranks have the same
    weights and buffers.

    Returns train_loss (mean over the images of all ranks; None where it is not finite), lr (of the last step), seconds
    (training alone), sgs_updated and sgs_seconds.
    """
    steps = TrainingSteps(trainee, options) if steps is None else steps
    # For whatever in a model draws from the default generator. Batches have one of their own.
    torch.manual_seed(derived_seed(seed, _ORDER, epoch))
    start = now(options.device)
    statistics = _training_batches(data, options, derived_seed(seed, _STATISTICS, epoch))
    sgs_updated = trainee.sgs is not None and trainee.sgs.update_if_due(epoch, statistics)
    if trainee.structure is not None:
        trainee.structure.update_if_due(epoch, statistics)
    training_start = now(options.device)
    steps.begin_epoch()
    if not ranks.first():  # What a model drops shall differ between the parts of a batch.
        torch.manual_seed(derived_seed(seed, _ORDER, epoch, ranks.rank()))
    batches = epoch_batches(data, options, seed, epoch)
    total = epochs * len(batches)
    warmup = min(options.warmup, epochs) * len(batches)
    loss_sum, images = torch.zeros((), dtype=torch.float64, device=options.device), 0
    trainee.model.train()
    for n, (x, labels) in enumerate(batches):
        lr = learning_rate(
            epoch * len(batches) + n, total, warmup, trainee.lr,
            warmup_lr=options.warmup_lr, min_lr=options.min_lr, schedule=options.schedule,
        )  # fmt: skip
        for group in trainee.optimizer.param_groups:
            group["lr"] = lr
        loss_sum += steps(x, labels, batches.batch_size) * len(x)
        images += len(x)
        on_batch()
    ranks.share_buffers(trainee.model)
    loss_sum, images = ranks.summed(loss_sum, images, device=options.device)
    train_loss = loss_sum / images
    return {
        "train_loss": train_loss if math.isfinite(train_loss) else None,  # JSON has no NaN.
        "lr": lr,
        "seconds": now(options.device) - training_start,
        "sgs_updated": sgs_updated,
        "sgs_seconds": training_start - start,
    }


def train_step(trainee: Trainee, options: Options, x: Tensor, labels: Tensor) -> Tensor:
    """Do one step on x [n, C, H, W] and labels [n], and return the loss without its graph.

    A loop of steps makes one `TrainingSteps` instead, which compiles once and remembers the scale of --amp fp16.
    """
    return TrainingSteps(trainee, options)(x, labels)


def epoch_batches(data: Data, options: Options, seed: int, epoch: int) -> Loader:
    """The training batches of an epoch (from 0): of each, the part of this rank."""
    return _training_batches(data, options, derived_seed(seed, _ORDER, epoch))


def _training_batches(data: Data, options: Options, seed: int) -> Loader:
    return Loader(
        data, data.train, options.batch_size, seed=seed, augment=options.augment, device=options.device,
        readers=options.readers, rank=ranks.rank(), ranks=ranks.count(),
    )  # fmt: skip


def accuracies(
    trainee: Trainee, data: Data, images: Images, options: Options, seed: int, name: str
) -> dict[str, float]:
    """Return {name: accuracy of the network}. With averages that is theirs, and `weights_NAME` that of the weights."""
    found = {name: accuracy(trainee.model, data, images, options.device, options.readers)}
    if trainee.averages:
        with averaged(trainee, data, options, seed):
            of_averages = accuracy(trainee.model, data, images, options.device, options.readers)
        found = {name: of_averages, f"weights_{name}": found[name]}
    return found


@contextlib.contextmanager
def averaged(trainee: Trainee, data: Data, options: Options, seed: int) -> Iterator[None]:
    """Make the weights the averages, and the statistics of batch norms theirs, of some training batches.

    With the statistics of the weights, averages lose three points on digits (bench/study_momentum.py). Ranks
    pool theirs.
    """
    batches = _training_batches(data, options, derived_seed(seed, _AVERAGES))
    buffers = {name: buffer.clone() for name, buffer in trainee.model.named_buffers()}
    with trainee.optimizer.swap_ema():
        try:
            update_bn((x for x, _ in itertools.islice(batches, _AVERAGES_BATCHES)), trainee.model)
            ranks.average_norms(trainee.model)
            yield
        finally:
            with torch.no_grad():
                for name, buffer in trainee.model.named_buffers():
                    buffer.copy_(buffers[name])


@torch.no_grad()
def accuracy(model: nn.Module, data: Data, images: Images, device: str, readers: int = 0) -> float:
    """Return the share of `images`, a part of `data`, that are classified correctly, in float32.

    `readers` processes read them. Each rank sees its part of them. Leaves the model in eval mode.
    """
    model.eval()
    batches = Loader(
        data, images, _EVALUATION_BATCH, device=device, readers=readers, rank=ranks.rank(), ranks=ranks.count()
    )
    (correct,) = ranks.summed(sum(int((model(x).argmax(1) == labels).sum()) for x, labels in batches), device=device)
    return correct / len(images)
