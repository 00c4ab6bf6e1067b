"""Cases of the equivalence CSLA = GR, and the set-up that the tests of branches share."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradrep_kernels import BranchScales
from gradrep_kernels.branches.algebra import has_shortcut
from gradrep_kernels.branches.sites import conv_sites

# Both sides do the same sums in another order: 60 float64 steps leave about 1e-15 in weights of size 1. A wrong formula
# leaves 1e-6 and more.
EQUIVALENCE_TOLERANCE = 1e-12
# One forward in float64, outputs of size 1 to 10.
FORWARD_TOLERANCE = 1e-12


def shared_data() -> Path:
    """The folder of the published scales.

    They are no part of a checkout, so tests that read them may be skipped.
    """
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    return Path(os.environ.get("GRADREP_SHARED_DATA", default))


def official(name: str) -> Path:
    """One of the published scales files. The test that asks for it is skipped where it is not."""
    path = shared_data() / "official_scales" / name
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    return path


def randomise_norms(model: nn.Module) -> None:
    """Draw the statistics, weights and biases of norms, as if they had been trained."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)


@dataclass(frozen=True)
class Geometry:
    """A convolution of `channels` (in, out), and the branches that its block must have."""

    name: str
    channels: tuple[int, int] = (8, 8)
    kernel: int | tuple[int, int] = 3
    options: dict[str, Any] = field(default_factory=lambda: {"padding": 1})
    shortcut: bool = True

    def conv(self) -> nn.Conv2d:
        return nn.Conv2d(*self.channels, self.kernel, **self.options)


GEOMETRIES = [
    Geometry("3x3"),
    Geometry("other_width", (8, 6), shortcut=False),
    Geometry("bias", options={"padding": 1, "bias": True}),
    Geometry("stride2", options={"padding": 1, "stride": 2}, shortcut=False),
    Geometry("stride_1x2", options={"padding": 1, "stride": (1, 2)}, shortcut=False),
    Geometry("groups2", options={"padding": 1, "groups": 2}),
    Geometry("groups4_wider", (8, 16), options={"padding": 1, "groups": 4}, shortcut=False),
    Geometry("depthwise", options={"padding": 1, "groups": 8}),
    Geometry("depthwise_x2", (8, 16), options={"padding": 1, "groups": 8}, shortcut=False),
    Geometry("5x5", kernel=5, options={"padding": 2}),
    Geometry("3x5", kernel=(3, 5), options={"padding": (1, 2)}),
    Geometry("dilation2", options={"padding": 2, "dilation": 2}),
    Geometry("same", kernel=5, options={"padding": "same", "dilation": (1, 2)}),
    Geometry("reflect", options={"padding": 1, "padding_mode": "reflect"}),
    # Off 'same' no identity; the 1x1 crops or pads its input so that it stays on the centre tap.
    Geometry("valid", options={"padding": "valid"}, shortcut=False),
    Geometry("unpadded_stride2", kernel=5, options={"padding": 0, "stride": 2}, shortcut=False),
    Geometry("padded_more", options={"padding": 2}, shortcut=False),
    Geometry("padded_more_circular", options={"padding": 3, "padding_mode": "circular", "stride": 2}, shortcut=False),
    Geometry("pads_rows_crops_columns", options={"padding": (2, 0)}, shortcut=False),
]
GEOMETRY = {geometry.name: geometry for geometry in GEOMETRIES}


@dataclass(frozen=True)
class Equivalence:
    """One training: torch.optim.SGD on explicit branches, FusedRepSGD on the merged convolution."""

    name: str
    sgd: dict[str, Any] = field(default_factory=dict)
    geometry: str = "3x3"
    max_norm: float | None = None
    one_by_one: bool = True
    searched_identity: bool = True
    lr: float = 0.02


_MOMENTUM = {"momentum": 0.9}
EQUIVALENCES = [
    Equivalence("plain", lr=0.05),
    Equivalence("momentum", _MOMENTUM),
    Equivalence("nesterov", {**_MOMENTUM, "nesterov": True}),
    Equivalence("dampening", {**_MOMENTUM, "dampening": 0.3}),
    Equivalence("weight_decay", {**_MOMENTUM, "weight_decay": 0.05}),
    Equivalence("maximize", {**_MOMENTUM, "maximize": True}, lr=0.001),
    Equivalence("clipped", {**_MOMENTUM, "weight_decay": 0.01}, max_norm=0.5),
    Equivalence("everything", {**_MOMENTUM, "nesterov": True, "weight_decay": 0.02}, "groups2", max_norm=1.0),
    Equivalence("identity_not_searched", _MOMENTUM, searched_identity=False),
    Equivalence("no_1x1", _MOMENTUM, "depthwise", one_by_one=False),
    *(
        Equivalence(f"geometry_{g.name}", {**_MOMENTUM, "weight_decay": 0.01}, g.name)
        for g in GEOMETRIES
        if g.name != "3x3"
    ),
]


def random_scales(
    model: nn.Module, *, negative: float = 0.4, one_by_one: bool = True, searched: bool = True, dtype=torch.float64
) -> dict[str, BranchScales]:
    """Draw branch scales for every site of `model`, 0.3 to 1.3 in size.

    The given share of them, rounded up, is below 0.
    """

    def vector(channels: int) -> torch.Tensor:
        size = 0.3 + torch.rand(channels, dtype=dtype)
        size[torch.randperm(channels)[: -int(-negative * channels // 1)]] *= -1
        return size

    scales = {}
    for site in conv_sites(model):
        channels = site.conv.out_channels
        identity = has_shortcut(site.conv) and (vector(channels) if searched else True)
        scales[site.name] = BranchScales(vector(channels), vector(channels) if one_by_one else None, identity)
    return scales
