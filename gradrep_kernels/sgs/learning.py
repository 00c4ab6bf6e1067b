"""From gathered statistics to the scalings G.

Statistics are pooled over the ranks and evaluated, and each G that they define is set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from gradrep_kernels.messages import warn_outside
from gradrep_kernels.ops.reference.pair_rule import ranges_of
from gradrep_kernels.sgs.dependence import normalize, spatial_dependence
from gradrep_kernels.sgs.gathering import Binning, Dependence, Ranges, Tables
from gradrep_kernels.sgs.layers import Layer
from gradrep_kernels.sgs.ranks import Ranks, raise_together
from gradrep_kernels.sgs.transfers import on_device, on_host


@dataclass
class Options:
    """Options of the controller that its parts read too. A caller may change them between updates."""

    k: float
    remove_near: bool
    every_steps: int | None


class ScalingTarget(Protocol):
    """Receives the scalings: an optimizer that scales by itself, or the hooks that do it for another one."""

    def set_spatial_scaling(self, parameter: nn.Parameter, g: Tensor | None) -> None: ...


def warn_not_finite(layers: list[Layer]) -> None:
    if layers:
        names = ", ".join(name for layer in layers for name in layer.convs)
        warn_outside(f"the input of {names} is not finite; the scaling stays as it was", RuntimeWarning)


def warn_forgotten(epoch: int, warmup: int, until: str) -> None:
    warn_outside(
        f"scalings were neither learned nor loaded, though epoch {epoch} is past the warm-up ({warmup}). Convolutions "
        f"train unscaled until {until}. A resumed run must load the controller's state_dict too"
    )


class Learning:
    """Learns the scalings of some layers.

    Args:
        layers:     in the same order on every rank
        dependence: the kind of table and what it is evaluated to
        ranks:      pool their statistics; all of them must call `bin` and `learn` at the same time
        target:     is told each scaling that is set
    """

    def __init__(
        self, layers: list[Layer], dependence: Dependence, options: Options, ranks: Ranks, target: ScalingTarget
    ):
        self.layers, self.ranks = layers, ranks
        self._dependence, self._options, self._target = dependence, options, target

    def new_tables(self, binnings: dict[Layer, Binning]) -> Tables:
        """Return empty tables for maps that are binned by `binnings`."""
        return Tables(self._dependence, binnings)

    def bin(
        self, ranges: Ranges, drawn: int, failure: Exception | None = None
    ) -> tuple[dict[Layer, Binning], list[Layer]]:
        """Pool the ranges, and return (binnings, layers whose maps are not finite).

        A layer has a binning if it has pairs. Both results are the same on every rank.

        Args:
            drawn:   how many batches this rank has
            failure: what went wrong on this rank; the update then fails on all of them

        Raises:
            ValueError:   no batch on any rank.
            RuntimeError: another rank failed.
        """
        device = self._device
        status = torch.tensor([drawn, failure is not None], device="cpu")
        sums = self.ranks.reduce([*(ranges.n(layer) for layer in self.layers), status], "sum", device)
        ends = self.ranks.reduce([ranges.ends(self.layers, device)], "max", device)
        *sums, status, ends = on_host([*sums, *ends])
        total_drawn, failures = status.tolist()
        raise_together(failure, failures)
        if total_drawn == 0:
            raise ValueError("batches is empty: an update needs at least one")
        binnings, not_finite_layers = {}, []
        for layer, n, own in zip(self.layers, sums, ends.split([4 * n.numel() for n in sums])):
            if not bool((own < torch.inf).all()):
                not_finite_layers.append(layer)
            elif (n > 0).any():
                binnings[layer] = Binning(ranges_of(own.view(*n.shape, 2, 2)), n)
        return binnings, not_finite_layers

    def learn(self, tables: Tables, binnings: dict[Layer, Binning], failure: Exception | None = None) -> bool:
        """Pool the tables, set each G that they define, and leave `tables` empty. Returns whether there was any.

        Args:
            binnings: as `bin` returned them for the maps in `tables`; layers without one are passed over
            failure:  what went wrong on this rank; the update then fails on all of them

        Raises:
            RuntimeError: another rank failed.
        """
        device = self._device
        layers = [layer for layer in binnings if layer in tables.binnings]
        most_pairs = max((int(binning.n.max()) for binning in binnings.values()), default=0)
        own = tables.take(layers, device)
        own.append(torch.tensor([failure is not None], device="cpu").to(self._dependence.dtype))
        *pooled, failures = self.ranks.reduce(own, "sum", device, most_pairs)
        del own  # up to 100 MB where several ranks pool
        raise_together(failure, int(failures))
        scalings: dict[torch.device, dict[Layer, Tensor]] = {}
        for layer, dependence in zip(layers, self._evaluate(pooled)):
            s = spatial_dependence(dependence, layer.kernel_size, self._options.k, self._options.remove_near)
            if s is not None:
                scalings.setdefault(layer.weight.device, {})[layer] = normalize(s)
        for device, by_layer in scalings.items():
            for (layer, g), there in zip(by_layer.items(), on_device(list(by_layer.values()), device)):
                self._set(layer, g, there)
        return bool(scalings)

    def set(self, layer: Layer, g: Tensor | None) -> None:
        """Give G [kh, kw] to the layer and to the optimizer. None: not scaled."""
        self._set(layer, g, None if g is None else on_device([g], layer.weight.device)[0])

    def _set(self, layer: Layer, g: Tensor | None, there: Tensor | None) -> None:
        """Set G, which is also where the weight is."""
        layer.g = g
        self._target.set_spatial_scaling(layer.weight, there)

    @property
    def _device(self) -> torch.device:
        return self.layers[0].weight.device

    def _evaluate(self, tables: list[Tensor]) -> list[Tensor]:
        """Return the dependence [C, D] of each table, on the CPU.

        Tables of one size are computed together, which saves calls. Large ones on the CPU are computed alone: together
        their temporaries would leave the cache, which takes 1.8 to 2.2 times as long for VGG-16.
        """
        groups: dict[tuple, list[int]] = {}
        for i, table in enumerate(tables):
            alone = table.is_cpu and table.numel() > 2**16
            groups.setdefault((i if alone else table.device, table.shape[2:]), []).append(i)
        parts = [[tables[i].flatten(0, 1) for i in group] for group in groups.values()]
        values = on_host([self._dependence.evaluate(torch.cat(part) if len(part) > 1 else part[0]) for part in parts])
        by_table = {}
        for group, together in zip(groups.values(), values):
            for i, part in zip(group, together.split([tables[i].shape[:2].numel() for i in group])):
                by_table[i] = part.view(tables[i].shape[:2])
        return [by_table[i] for i in range(len(tables))]
