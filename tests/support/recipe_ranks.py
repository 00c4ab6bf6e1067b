"""What two processes that train together do in tests/recipes/test_recipes_ranks.py, which forks them."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import gradrep_kernels as gr
from gradrep_kernels.cli import main
from gradrep_kernels.models.repopt_vgg import RepOptVGG
from gradrep_kernels.recipes import plots, ranks, shared_run, steps, trainings
from gradrep_kernels.recipes.build import plain_model
from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.networks import MODELS
from gradrep_kernels.recipes.scale_sources import initial_scales
from gradrep_kernels.recipes.training import train_epoch

RANKS = 2


class FrozenNorm(nn.BatchNorm2d):
    """Of the first statistics, so that an image does not depend on the others of its batch."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class InDouble(RepOptVGG):
    """Its weights are float64, and so are the images that it is given."""

    def forward(self, x):
        return super().forward(x.to(self.linear.weight.dtype))


def frozen(num_classes, in_channels):
    """A network for which a mean over the parts of a batch is that over the batch, in float64."""
    model = gr.models.repopt_vgg_small(num_classes=num_classes, in_channels=in_channels).double()
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = FrozenNorm
    model.__class__ = InDouble
    return model


frozen.__name__ = "frozen"


def prepare() -> None:
    """As fixtures do in the process of the tests."""
    MODELS["frozen"] = frozen
    steps.COMPILER = "aot_eager"
    for name in plots.__all__:
        setattr(plots, name, lambda path, *_: path.write_bytes(b"not drawn"))
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


def digest(trainee) -> str:
    """Of the weights, the buffers, and what the optimizer keeps."""
    found = hashlib.sha256()
    kept = [value for state in trainee.optimizer.state.values() for value in state.values()]
    for tensor in [*trainee.model.state_dict().values(), *(value for value in kept if isinstance(value, torch.Tensor))]:
        found.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def as_rank(rank: int, port: int) -> None:
    """Be one of two processes of torchrun."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # The process of the tests has it, as torchrun has.
    }


def said_to(folder: Path, rank: int) -> None:
    """Let a file have what this process prints."""
    said = os.open(folder / f"said {rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdout, sys.stderr = (os.fdopen(said, "w", closefd=False) for _ in range(2))


def run_commands(rank: int, folder: Path, ports: list[int], commands: list[list[str]]) -> None:
    """Run command lines one after the other, each at a port of its own.

    Keeps their statuses, and a digest of each epoch.
    """
    prepare()
    said_to(folder, rank)
    statuses, digests = [], []

    def recorded(trainee, *rest):
        record = train_epoch(trainee, *rest)
        digests.append(digest(trainee))
        return record

    trainings.train_epoch = recorded
    for port, arguments in zip(ports, commands):
        as_rank(rank, port)
        statuses.append(main(arguments))
        if statuses[-1]:  # A process of torchrun would end.
            break
    torch.save(statuses, folder / f"statuses {rank}")
    torch.save(digests, folder / f"digests {rank}")
    ranks.leave(0)


def fail_on_one(rank: int, folder: Path, ports: list[int], arguments: list[str], failing: int, how: str) -> None:
    """Run a command that fails on one rank, as the process of a user would end."""
    prepare()
    said_to(folder, rank)
    as_rank(rank, *ports)

    def fail(*_, **__):
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise InputError("the pictures are damaged") if how == "input" else KeyboardInterrupt

    if rank == failing:
        if how == "input" and rank == 0:
            shared_run.open_run = fail
        elif how == "input":
            shared_run.load_job_data = fail
        else:
            ranks.share_buffers = fail  # at the end of an epoch
    if how == "killed":  # Who starts these processes ends the others with one, as torchrun does.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    start = time.monotonic()
    status = main(arguments)
    torch.save((status, time.monotonic() - start), folder / f"ended {rank}")
    ranks.leave(0)


def double_scales(options, data) -> dict[str, gr.BranchScales]:
    """Those of the first network of a Hyper-Search, in float64."""
    return {
        name: value.mapped(lambda tensor: tensor.double())
        for name, value in initial_scales(plain_model(options, data, 0)).items()
    }
