"""Statistics of feature maps on one rank.

`gather_map` shows a map to the statistics, which call the ops. The first pass gathers `Ranges`. They give a `Binning`
per layer, within which the second pass gathers `Tables`. Nothing else keeps a result: statistics that are dropped are
gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradrep_kernels.ops.backends import implementation
from gradrep_kernels.ops.reference.pair_rule import arithmetic_dtype, sturges
from gradrep_kernels.sgs.dependence import absolute_correlation, normalized_mutual_information, pair_moments
from gradrep_kernels.sgs.layers import Layer, input_map, taps_and_padding


@dataclass
class Binning:
    """Where the bins of one layer lie. It is the same on every rank."""

    ranges: Tensor  # [C, D, 2, 2] float64, which holds float32 ranges exactly; on the CPU
    n: Tensor  # [C, D] int64, on the CPU

    def __post_init__(self):
        self.bins = sturges(self.n)
        self.max_bins = int(self.bins.max())
        self._copies: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def on(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return (ranges, bins) on `device`, ranges in `dtype`. They are copied there once."""
        key = (device, dtype)
        if key not in self._copies:
            self._copies[key] = self.ranges.to(device, dtype), self.bins.to(device)
        return self._copies[key]


class MutualInformation:
    """Dependence from counts: tables [C, D, B, B] int64 give NMI [C, D]."""

    dtype = torch.int64
    evaluate = staticmethod(normalized_mutual_information)

    @staticmethod
    def table_shape(binning: Binning) -> tuple[int, ...]:
        return (*binning.n.shape, binning.max_bins, binning.max_bins)

    @staticmethod
    def add(
        counts: Tensor, x: Tensor, displacements: list[int], padding: list[int], binning: Binning, remove_near: bool
    ) -> None:
        ranges, bins = binning.on(x.device, arithmetic_dtype(x.dtype))
        implementation("joint_histogram_", x.device.type)(counts, x, displacements, ranges, bins, padding, remove_near)


class Autocorrelation:
    """Dependence from moments: tables [C, D, 6] float64 give |r| [C, D]."""

    dtype = torch.float64
    evaluate = staticmethod(absolute_correlation)

    @staticmethod
    def table_shape(binning: Binning) -> tuple[int, ...]:
        return (*binning.n.shape, 6)

    @staticmethod
    def add(
        moments: Tensor, x: Tensor, displacements: list[int], padding: list[int], binning: Binning, remove_near: bool
    ) -> None:
        moments += pair_moments(x, displacements, binning.on(x.device, torch.float64)[0], padding, remove_near)


Dependence = type[MutualInformation] | type[Autocorrelation]
DEPENDENCES: dict[str, Dependence] = {"nmi": MutualInformation, "autocorrelation": Autocorrelation}


class Ranges:
    """The ranges of each layer's pairs, and how many pairs there are."""

    def __init__(self):
        self._by_layer: dict[Layer, tuple[Tensor, Tensor]] = {}

    def add(self, layer: Layer, x: Tensor, displacements: list[int], padding: list[int], remove_near: bool) -> None:
        ranges, n = implementation("pair_ranges", x.device.type)(x, displacements, padding, remove_near)
        if layer in self._by_layer:
            others, others_n = self._by_layer[layer]
            lo = torch.minimum(others[..., 0], ranges[..., 0])
            hi = torch.maximum(others[..., 1], ranges[..., 1])
            ranges, n = torch.stack((lo, hi), dim=-1), others_n + n
        self._by_layer[layer] = ranges, n

    def of(self, layer: Layer, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return ranges [C, D, 2, 2] and n [C, D]: no pairs, on `device`, if the layer was not called."""
        if layer in self._by_layer:
            return self._by_layer[layer]
        nothing = torch.tensor([torch.inf, -torch.inf], device=device).expand(*layer.statistics_shape, 2, 2)
        return nothing, torch.zeros(layer.statistics_shape, dtype=torch.int64, device=device)


class Tables:
    """The counts or moments of each layer that has a binning. The maps of other layers are passed over."""

    def __init__(self, dependence: Dependence, binnings: Mapping[Layer, Binning]):
        self.dependence, self.binnings = dependence, binnings
        self._by_layer: dict[Layer, Tensor] = {}

    def add(self, layer: Layer, x: Tensor, displacements: list[int], padding: list[int], remove_near: bool) -> None:
        if layer not in self.binnings:
            return
        if layer not in self._by_layer:
            self._by_layer[layer] = self._zeros(layer, x.device)
        self.dependence.add(self._by_layer[layer], x, displacements, padding, self.binnings[layer], remove_near)

    def take(self, layers: Iterable[Layer], device: torch.device) -> list[Tensor]:
        """Return the tables of `layers`, zeros on `device` for one that was not called, and forget all tables.

        Of a large model they take 100 MB, which would be held twice while ranks add theirs up.
        """
        tables, self._by_layer = self._by_layer, {}
        return [tables[layer] if layer in tables else self._zeros(layer, device) for layer in layers]

    def _zeros(self, layer: Layer, device: torch.device) -> Tensor:
        shape = self.dependence.table_shape(self.binnings[layer])
        return torch.zeros(shape, dtype=self.dependence.dtype, device=device)


def gather_map(
    statistics: Iterable[Ranges | Tables], remove_near: bool, layer: Layer, conv: nn.Conv2d, args: tuple, kwargs: dict
) -> None:
    """Add the input map of one call of a convolution to each of `statistics`."""
    x = input_map(conv, args, kwargs)
    if x is not None:
        displacements, padding = taps_and_padding(conv)
        for part in statistics:
            part.add(layer, x, displacements, padding, remove_near)
