"""The convolutions that can be scaled, and what is gathered from their input maps."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gradrep_kernels.ops.backends import implementation
from gradrep_kernels.ops.reference.pair_rule import compute_dtype, sturges
from gradrep_kernels.sgs.dependence import (
    absolute_correlation,
    normalized_mutual_information,
    pair_moments,
)
from gradrep_kernels.sgs.taps import half_displacements, resolve_padding, scalable_kernel

_WRAPPED = ("module", "_orig_mod")  # what DistributedDataParallel and its kin, and torch.compile, call the model inside


@dataclass
class Plan:
    """Where the bins of one layer lie; the same on every rank."""

    ranges: Tensor  # [C, D, 2, 2] float64, which holds float32 ranges exactly; on the CPU
    n: Tensor  # [C, D] int64, on the CPU

    def __post_init__(self):
        self.bins = sturges(self.n)
        self.max_bins = int(self.bins.max())
        self._near: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def near(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(ranges, bins) where the maps are; copied there once."""
        key = (device, dtype)
        if key not in self._near:
            self._near[key] = self.ranges.to(device, dtype), self.bins.to(device)
        return self._near[key]


@dataclass(eq=False)
class Layer:
    """One weight and the convolutions that use it: more than one if it is tied; they pool, as the calls of one do."""

    weight: nn.Parameter
    convs: dict[str, nn.Conv2d]  # by name
    g: Tensor | None = None  # [kh, kw] float32 on the CPU; None before the first update
    plan: Plan | None = None  # of the next update from training batches
    # Gathered on this rank since the last reduction, where the maps are:
    ranges: Tensor | None = field(default=None, repr=False)  # [C, D, 2, 2]
    n: Tensor | None = field(default=None, repr=False)  # [C, D]
    table: Tensor | None = field(default=None, repr=False)  # [C, D, B, B] counts, or [C, D, 6] moments

    @property
    def name(self) -> str:
        return next(iter(self.convs))

    @property
    def kernel_size(self) -> tuple[int, int]:
        return tuple(self.weight.shape[2:])

    @property
    def statistics_shape(self) -> tuple[int, int]:
        """(C, D)"""
        kh, kw = self.kernel_size
        return next(iter(self.convs.values())).in_channels, kh * kw // 2

    def scaling(self) -> Tensor:
        return torch.ones(self.kernel_size) if self.g is None else self.g.clone()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that a pass may call: a DistributedDataParallel forward broadcasts buffers, and ranks may bring unlike numbers of batches."""
    while isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def named_root(model: nn.Module) -> nn.Module:
    """The module that names are relative to: a wrapper is known by the name of its only child, whatever its class."""
    while [name for name, _ in model.named_children()] in ([name] for name in _WRAPPED):
        model = next(model.children())
    return model


def find_layers(root: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[list[Layer], dict[str, str]]:
    """The layers whose weights the optimizer holds, and why each other nn.Conv2d is skipped."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    layers: dict[int, Layer] = {}
    skipped: dict[str, str] = {}
    for name, conv in root.named_modules():
        if not isinstance(conv, nn.Conv2d):
            continue
        weight = conv._parameters.get("weight")  # None where a parametrization computes it
        reason = scalable_kernel(conv.kernel_size)
        if reason is None and (weight is None or id(weight) not in held):
            reason = "its weight is not a parameter that the optimizer holds"
        if reason is None and weight.is_complex():
            reason = "its weight is complex"
        if reason is not None:
            skipped[name] = reason
        else:
            layers.setdefault(id(weight), Layer(weight, {})).convs[name] = conv
    for key, layer in list(layers.items()):
        if len({conv.in_channels for conv in layer.convs.values()}) > 1:
            skipped.update(
                {
                    name: "it shares its weight with a convolution of another number of input channels"
                    for name in layer.convs
                }
            )
            del layers[key]
    return list(layers.values()), skipped


def _input_map(conv: nn.Conv2d, args: tuple, kwargs: dict) -> Tensor | None:
    """The argument of `conv` as [N, C, H, W]; None if it is empty or does not fit (the convolution has its own message)."""
    x = args[0] if args else kwargs["input"]
    x = (x.unsqueeze(0) if x.dim() == 3 else x).detach()
    return x if x.dim() == 4 and x.shape[1] == conv.in_channels and x.numel() > 0 else None


def _geometry(conv: nn.Conv2d) -> tuple[list[int], list[int]]:
    """(displacements, padding) as the ops take them; padding modes other than zeros count as zeros."""
    displacements = half_displacements(conv.kernel_size, conv.dilation)
    return [v for d in displacements for v in d], list(resolve_padding(conv.padding, conv.kernel_size, conv.dilation))


def gather_ranges(layer: Layer, conv: nn.Conv2d, args: tuple, kwargs: dict, remove_near: bool) -> None:
    """What the first pass takes from one call of a convolution."""
    x = _input_map(conv, args, kwargs)
    if x is None:
        return
    ranges, n = implementation("pair_ranges", x.device.type)(x, *_geometry(conv), remove_near)
    if layer.n is None:
        layer.ranges, layer.n = ranges, n
    else:
        lo, hi = (
            torch.minimum(layer.ranges[..., 0], ranges[..., 0]),
            torch.maximum(layer.ranges[..., 1], ranges[..., 1]),
        )
        layer.ranges, layer.n = torch.stack((lo, hi), dim=-1), layer.n + n


def gather_table(
    layer: Layer, conv: nn.Conv2d, args: tuple, kwargs: dict, remove_near: bool, plan: Plan, dependence: Dependence
) -> None:
    """What the second pass takes from one call of a convolution."""
    x = _input_map(conv, args, kwargs)
    if x is None:
        return
    if layer.table is None:
        layer.table = torch.zeros(dependence.shape(plan), dtype=dependence.dtype, device=x.device)
    dependence.gather(layer.table, x, *_geometry(conv), plan, remove_near)


class MutualInformation:
    """counts [C, D, B, B] int64 -> NMI [C, D]"""

    dtype = torch.int64
    evaluate = staticmethod(normalized_mutual_information)

    @staticmethod
    def shape(plan: Plan) -> tuple[int, ...]:
        return (*plan.n.shape, plan.max_bins, plan.max_bins)

    @staticmethod
    def gather(
        counts: Tensor, x: Tensor, displacements: list[int], padding: list[int], plan: Plan, remove_near: bool
    ) -> None:
        ranges, bins = plan.near(x.device, compute_dtype(x.dtype))
        implementation("joint_histogram_", x.device.type)(counts, x, displacements, ranges, bins, padding, remove_near)


class Autocorrelation:
    """moments [C, D, 6] float64 -> |r| [C, D]"""

    dtype = torch.float64
    evaluate = staticmethod(absolute_correlation)

    @staticmethod
    def shape(plan: Plan) -> tuple[int, ...]:
        return (*plan.n.shape, 6)

    @staticmethod
    def gather(
        moments: Tensor, x: Tensor, displacements: list[int], padding: list[int], plan: Plan, remove_near: bool
    ) -> None:
        moments += pair_moments(x, displacements, plan.near(x.device, torch.float64)[0], padding, remove_near)


Dependence = type[MutualInformation] | type[Autocorrelation]
DEPENDENCES: dict[str, Dependence] = {"nmi": MutualInformation, "autocorrelation": Autocorrelation}
