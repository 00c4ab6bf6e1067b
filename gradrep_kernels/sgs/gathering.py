"""Statistics of feature maps on one rank.

`gather_map` shows a map to the statistics, which call the ops. The first pass gathers `Ranges`. They give a `Binning`
per layer, within which the second pass gathers `Tables`. Nothing else keeps a result: statistics that are dropped are
gone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradrep_kernels.ops.backends import implementation
from gradrep_kernels.ops.reference.pair_rule import arithmetic_dtype, number_of_pairs, sturges
from gradrep_kernels.sgs.arrays import Arrays
from gradrep_kernels.sgs.dependence import absolute_correlation, normalized_mutual_information, pair_moments
from gradrep_kernels.sgs.layers import Layer, input_map, taps_and_padding
from gradrep_kernels.sgs.transfers import on_device


@dataclass
class Binning:
    """Where the bins of one layer lie. It is the same on every rank."""

    ranges: Tensor  # [C, D, 2, 2] float64, which holds float32 ranges exactly; on the CPU
    n: Tensor  # [C, D] int64, on the CPU

    def __post_init__(self):
        self.bins = sturges(self.n)
        self.max_bins = int(self.bins.max())


class MutualInformation:
    """Dependence from counts: tables [C, D, B, B] int64 give NMI [C, D]."""

    dtype = torch.int64
    ranges_dtype = staticmethod(arithmetic_dtype)
    evaluate = staticmethod(normalized_mutual_information)

    @staticmethod
    def table_shape(binning: Binning) -> tuple[int, ...]:
        return (*binning.n.shape, binning.max_bins, binning.max_bins)

    @staticmethod
    def add(
        counts: Tensor,
        x: Tensor,
        displacements: list[int],
        ranges: Tensor,
        bins: Tensor,
        padding: list[int],
        remove_near: bool,
    ) -> None:
        implementation("joint_histogram_", x.device.type)(counts, x, displacements, ranges, bins, padding, remove_near)


class Autocorrelation:
    """Dependence from moments: tables [C, D, 6] float64 give |r| [C, D]."""

    dtype = torch.float64
    evaluate = staticmethod(absolute_correlation)

    @staticmethod
    def ranges_dtype(map_dtype: torch.dtype) -> torch.dtype:
        return torch.float64

    @staticmethod
    def table_shape(binning: Binning) -> tuple[int, ...]:
        return (*binning.n.shape, 6)

    @staticmethod
    def add(
        moments: Tensor,
        x: Tensor,
        displacements: list[int],
        ranges: Tensor,
        bins: Tensor,
        padding: list[int],
        remove_near: bool,
    ) -> None:
        moments += pair_moments(x, displacements, ranges, padding, remove_near)


Dependence = type[MutualInformation] | type[Autocorrelation]
DEPENDENCES: dict[str, Dependence] = {"nmi": MutualInformation, "autocorrelation": Autocorrelation}


class Ranges:
    """The ends of each layer's ranges, and how many pairs there are.

    Args:
        layers: those that maps may come of; more may join
    """

    def __init__(self, layers: Collection[Layer]):
        self._layers = layers
        self._ends, self._n = Arrays(-torch.inf), Arrays(0)
        # Of each displacement, for each map whose pairs all count. Threads of nn.DataParallel append at the same time.
        self._pairs: dict[Layer, list[list[int]]] = {}

    def __setstate__(self, state: dict) -> None:
        """Restore a copy or a pickle. Those of earlier versions hold (ranges, n) by layer."""
        if "_ends" in state:
            vars(self).update(state)
            return
        self.__init__(list(state["_by_layer"]))
        for layer, (ranges, n) in state["_by_layer"].items():
            self._ends.adopt(layer, torch.stack((-ranges[..., 0], ranges[..., 1]), dim=-1))
            self._n.adopt(layer, n)

    def add(self, layer: Layer, x: Tensor, displacements: list[int], padding: list[int], remove_near: bool) -> None:
        ends = self._ends.of(layer, x.device, arithmetic_dtype(x.dtype), _ends_shape, self._layers)
        if remove_near:
            n = self._n.of(layer, x.device, torch.int64, _n_shape, self._layers)
        else:
            n = None
            self._pairs.setdefault(layer, []).append(number_of_pairs(x.shape, displacements, padding))
        implementation("pair_ranges_", x.device.type)(ends, n, x, displacements, padding, remove_near)

    def ends(self, layers: Iterable[Layer], device: torch.device) -> Tensor:
        """Return the ends of `layers`, one after another, as float64 on `device`. -inf: no pairs.

        A NaN is +inf there, which a maximum over ranks keeps. Both say that a value was not finite.
        """
        parts = []
        for layer in layers:
            own = self._ends.all_of(layer) or [self._ends.of(layer, device, torch.float32, _ends_shape, self._layers)]
            first, *others = (part.reshape(-1).to(device) for part in own)
            for other in others:
                first = torch.maximum(first, other)
            parts.append(first)
        return torch.cat(parts).double().nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)

    def n(self, layer: Layer) -> Tensor:
        """Return how many pairs there are  # [C, D] int64, on the CPU where their number follows from shapes"""
        channels, displacements = layer.statistics_shape
        parts = self._n.all_of(layer)
        if layer in self._pairs or not parts:
            pairs = torch.tensor(self._pairs.get(layer, [[0] * displacements]), device="cpu")
            parts.append(pairs.sum(0).repeat(channels, 1))
        n, *others = parts
        for part in others:
            n = n + part.to(n.device)
        return n


def _ends_shape(layer: Layer) -> tuple[int, ...]:
    return (*layer.statistics_shape, 2, 2)


def _n_shape(layer: Layer) -> tuple[int, ...]:
    return layer.statistics_shape


class PlacedBinnings:
    """The ranges and bins of each layer on the devices of its maps. Those of all layers travel there in one copy."""

    def __init__(self, binnings: Mapping[Layer, Binning], ranges_dtype: Callable[[torch.dtype], torch.dtype]):
        self._binnings, self._ranges_dtype = binnings, ranges_dtype
        self._copies: dict[tuple[Layer, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def __getstate__(self) -> dict:
        return {**vars(self), "_copies": {}}

    def place(self) -> None:
        """Send those of all layers to where their weights are, so that no forward has to."""
        self._send([(layer, layer.weight.device, layer.weight.dtype) for layer in self._binnings])

    def of(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (ranges, bins) for a map of a layer."""
        key = layer, x.device, self._ranges_dtype(x.dtype)
        if key not in self._copies:
            others = [other for other in self._binnings if other is not layer and other.weight.device == x.device]
            self._send([(each, x.device, x.dtype) for each in (layer, *others)])
        return self._copies[key]

    def _send(self, maps: list[tuple[Layer, torch.device, torch.dtype]]) -> None:
        by_device: dict[torch.device, list[tuple[Layer, torch.dtype]]] = {}
        for layer, device, dtype in maps:
            by_device.setdefault(device, []).append((layer, self._ranges_dtype(dtype)))
        for device, wanted in by_device.items():
            wanted = [(layer, dtype) for layer, dtype in wanted if (layer, device, dtype) not in self._copies]
            binnings = [self._binnings[layer] for layer, _ in wanted]
            ranges = [binning.ranges.to(dtype) for binning, (_, dtype) in zip(binnings, wanted)]
            there = on_device([*ranges, *(binning.bins for binning in binnings)], device)
            for (layer, dtype), *copies in zip(wanted, there, there[len(wanted) :]):
                self._copies[layer, device, dtype] = tuple(copies)


class Tables:
    """The counts or moments of each layer that has a binning. The maps of other layers are passed over."""

    def __init__(self, dependence: Dependence, binnings: Mapping[Layer, Binning]):
        self.dependence, self.binnings = dependence, binnings
        self._arrays, self._placed = Arrays(0), PlacedBinnings(binnings, dependence.ranges_dtype)

    def __setstate__(self, state: dict) -> None:
        """Restore a copy or a pickle. Those of earlier versions hold tables by layer."""
        if "_arrays" in state:
            vars(self).update(state)
            return
        self.__init__(state["dependence"], state["binnings"])
        for layer, table in state["_by_layer"].items():
            self._arrays.adopt(layer, table)

    def place_binnings(self) -> None:
        """Send the binnings to the devices, in one copy that nobody waits for. Else the first map has them sent."""
        self._placed.place()

    def add(self, layer: Layer, x: Tensor, displacements: list[int], padding: list[int], remove_near: bool) -> None:
        if layer in self.binnings:
            table = self._arrays.of(layer, x.device, self.dependence.dtype, self._shape, self.binnings)
            self.dependence.add(table, x, displacements, *self._placed.of(layer, x), padding, remove_near)

    def take(self, layers: Iterable[Layer], device: torch.device) -> list[Tensor]:
        """Return the tables of `layers`, zeros on `device` for one that was not called, and forget all tables.

        Of a large model they take 100 MB, which would be held twice while ranks add theirs up.
        """
        arrays, self._arrays = self._arrays, Arrays(0)
        tables = []
        for layer in layers:
            own = arrays.all_of(layer) or [arrays.of(layer, device, self.dependence.dtype, self._shape, self.binnings)]
            tables.append(own[0] if len(own) == 1 else sum(part.to(device) for part in own))
        return tables

    def _shape(self, layer: Layer) -> tuple[int, ...]:
        return self.dependence.table_shape(self.binnings[layer])


def gather_map(
    statistics: Iterable[Ranges | Tables], remove_near: bool, layer: Layer, conv: nn.Conv2d, args: tuple, kwargs: dict
) -> None:
    """Add the input map of one call of a convolution to each of `statistics`."""
    x = input_map(conv, args, kwargs)
    if x is not None:
        displacements, padding = taps_and_padding(conv)
        for part in statistics:
            part.add(layer, x, displacements, padding, remove_near)
