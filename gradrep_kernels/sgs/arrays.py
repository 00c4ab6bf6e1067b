"""Arrays for the statistics of all layers, filled together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from gradrep_kernels.sgs.layers import Layer
from gradrep_kernels.sgs.transfers import LINE


class Arrays:
    """An array for each layer, device and dtype. Those of one device and dtype are made and filled together.

    VGG-16 has 13 layers. One launch fills the arrays of all of them where the first map is met, and the forwards of the
    other layers launch none.
    """

    def __init__(self, fill: float):
        self._fill = fill
        self._by_place: dict[tuple[torch.device, torch.dtype], dict[Layer, Tensor]] = {}

    def __getstate__(self) -> dict:
        """Give each array memory of its own. Copies and pickles would bring that of all layers along with each."""
        by_place = {
            place: {layer: array.clone() for layer, array in arrays.items()} for place, arrays in self._by_place.items()
        }
        return {**vars(self), "_by_place": by_place}

    def of(
        self,
        layer: Layer,
        device: torch.device,
        dtype: torch.dtype,
        shape: Callable[[Layer], tuple[int, ...]],
        layers: Iterable[Layer],
    ) -> Tensor:
        """Return the array of `layer`, of `shape(layer)`. Where it is missing, those of `layers` are made with it."""
        arrays = self._by_place.setdefault((device, dtype), {})
        if layer not in arrays:
            here = (other for other in layers if other.weight.device == device and other not in arrays)
            together = dict.fromkeys((layer, *here))
            arrays.update(_filled(list(together), shape, device, dtype, self._fill))
        return arrays[layer]

    def all_of(self, layer: Layer) -> list[Tensor]:
        """Return the arrays of `layer`: as they were filled where it had no map of that device and dtype."""
        return [arrays[layer] for arrays in self._by_place.values() if layer in arrays]

    def adopt(self, layer: Layer, array: Tensor) -> None:
        """Take an array that holds statistics already."""
        self._by_place.setdefault((array.device, array.dtype), {})[layer] = array


def _filled(
    layers: list[Layer],
    shape: Callable[[Layer], tuple[int, ...]],
    device: torch.device,
    dtype: torch.dtype,
    value: float,
) -> dict[Layer, Tensor]:
    shapes, step = [shape(layer) for layer in layers], LINE // dtype.itemsize
    numbers = [math.prod(each) for each in shapes]
    sizes = [-(-number // step) * step for number in numbers]
    parts = torch.full((sum(sizes),), value, dtype=dtype, device=device).split(sizes)
    return {layer: part[:n].view(each) for layer, part, n, each in zip(layers, parts, numbers, shapes)}
