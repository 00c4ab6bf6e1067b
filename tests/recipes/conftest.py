"""A tiny data set, the options of a tiny job on it, and the folder of a whole run, for all tests of the recipes."""

from __future__ import annotations

import pytest
import torch
from cases_recipes import TINY, train, write_tiny_cifar10

import gradrep_kernels as gr
from gradrep_kernels.recipes import plots
from gradrep_kernels.recipes.build import plain_model
from gradrep_kernels.recipes.data.load import DataSource, load_data
from gradrep_kernels.recipes.networks import MODELS
from gradrep_kernels.recipes.options.resolve import resolve
from gradrep_kernels.recipes.scale_sources import initial_scales
from gradrep_kernels.recipes.training import repeatable


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    return f"cifar10:{write_tiny_cifar10(tmp_path_factory.mktemp('data') / 'cifar')}"


@pytest.fixture(scope="session")
def data(source):
    return load_data(DataSource.parse(source))


@pytest.fixture
def options(source):
    return resolve({"data": source, **TINY, "recipe": ("all",), "sgs_alpha": 1.7, "sgs_beta": 5.0})


@pytest.fixture
def scales(options, data):
    """Scales that differ in every channel, some of them negative."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: gr.BranchScales(
            *(torch.randn(value.channels, generator=generator) for _ in range(2)), identity=value.identity
        )
        for name, value in initial_scales(plain_model(options, data, 0)).items()
    }


@pytest.fixture
def tiny_ghost(monkeypatch):
    """The name of a RepOpt-GhostNet of a twentieth of the width, a model of the commands."""

    def tiny_ghost(num_classes, in_channels):
        return gr.models.repopt_ghostnet(num_classes=num_classes, in_channels=in_channels, width=0.05)

    monkeypatch.setitem(MODELS, "tiny_ghost", tiny_ghost)
    return "tiny_ghost"


@pytest.fixture
def no_pictures(monkeypatch):
    """Whole runs without their pictures, which take longer to draw than a tiny network takes to train."""
    monkeypatch.setattr(plots, "write", lambda path, *_: path.write_bytes(b"not drawn"))


@pytest.fixture
def one_thread():
    with repeatable(1, "cpu"):
        yield


@pytest.fixture(scope="session")
def finished(source, tmp_path_factory):
    """The folder of a whole run, never interrupted."""
    out = tmp_path_factory.mktemp("finished")
    train(source, out, "--name", "whole", "--recipe", "repopt+sgs,csla", "--epochs", "3")
    return out / "whole"
