"""The convolutions of a model that can be scaled, and the input maps of their calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradrep_kernels.sgs.taps import flat, half_displacements, resolve_padding, scalable_kernel
from gradrep_kernels.wrappers import plain_name

_OTHER_CHANNELS = "it shares its weight with a convolution of another number of input channels"


@dataclass(eq=False)
class Layer:
    """One weight and the convolutions that use it. Tied convolutions pool their maps, as the calls of one do."""

    weight: nn.Parameter
    convs: dict[str, nn.Conv2d]  # by name
    g: Tensor | None = None  # [kh, kw] float32 on the CPU; None: not scaled

    @property
    def name(self) -> str:
        return next(iter(self.convs))

    @property
    def kernel_size(self) -> tuple[int, int]:
        return tuple(self.weight.shape[2:])

    @property
    def statistics_shape(self) -> tuple[int, int]:
        """(C, D): input channels, and displacements of half the kernel."""
        kh, kw = self.kernel_size
        return next(iter(self.convs.values())).in_channels, kh * kw // 2

    def scaling(self) -> Tensor:
        """A copy of G, ones where there is none."""
        return self.copy_of(self.g)

    def copy_of(self, g: Tensor | None) -> Tensor:
        """Return a copy of a G of this layer, ones for None."""
        return torch.ones(self.kernel_size) if g is None else g.clone()


def number_of_parameters(optimizer: torch.optim.Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def find_layers(
    root: nn.Module, optimizer: torch.optim.Optimizer, known: Sequence[Layer] = ()
) -> tuple[list[Layer], dict[str, str]]:
    """Return the layers whose weights the optimizer holds, and for each other nn.Conv2d why it is skipped.

    Layers are in the order of the modules.

    Args:
        known: layers that were found before. They stay, whatever the optimizer holds by now
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    known_convs = {id(conv): layer for layer in known for conv in layer.convs.values()}
    layers = {id(layer.weight): layer for layer in known}
    order: dict[Layer, None] = {}
    skipped: dict[str, str] = {}
    for name, conv in _named_convs(root):
        layer = known_convs.get(id(conv))
        if layer is None and (reason := _why_not(conv, held)) is not None:
            skipped[name] = reason
            continue
        if layer is None:
            weight = conv._parameters["weight"]
            layer = layers.setdefault(id(weight), Layer(weight, {}))
            if layer in known and conv.in_channels != layer.statistics_shape[0]:
                skipped[name] = _OTHER_CHANNELS
                continue
            layer.convs[name] = conv
        order[layer] = None
    for layer in list(order):
        if len({conv.in_channels for conv in layer.convs.values()}) > 1:
            skipped.update({name: _OTHER_CHANNELS for name in layer.convs})
            del order[layer]
    return list(order) + [layer for layer in known if layer not in order], skipped


def _named_convs(root: nn.Module) -> list[tuple[str, nn.Conv2d]]:
    """Return (name, convolution), names without what wrappers add. Where two would be alike, both stay whole."""
    convs = [(name, module) for name, module in root.named_modules() if isinstance(module, nn.Conv2d)]
    times = Counter(plain_name(name) for name, _ in convs)
    return [(name if times[plain_name(name)] > 1 else plain_name(name), conv) for name, conv in convs]


def _why_not(conv: nn.Conv2d, held: set[int]) -> str | None:
    """Say why a convolution has no layer, or return None. `held` has the ids of the optimizer's parameters."""
    reason = scalable_kernel(conv.kernel_size)
    if reason is not None:
        return reason
    weight = conv._parameters.get("weight")  # None where a parametrization computes it
    if weight is None or id(weight) not in held:
        return "its weight is not a parameter that the optimizer holds"
    if weight.is_complex():
        return "its weight is complex"
    if weight.dim() != 4:
        return "its weight is stored flat, as FullyShardedDataParallel does"
    return None


def input_map(conv: nn.Conv2d, args: tuple, kwargs: dict) -> Tensor | None:
    """Return the argument of a call of `conv` as [N, C, H, W], or None if it is empty or does not fit.

    An argument that does not fit is left to the convolution, which has its own message for it.
    """
    x = args[0] if args else kwargs["input"]
    x = (x.unsqueeze(0) if x.dim() == 3 else x).detach()
    return x if x.dim() == 4 and x.shape[1] == conv.in_channels and x.numel() > 0 else None


def taps_and_padding(conv: nn.Conv2d) -> tuple[list[int], list[int]]:
    """Return (displacements, padding) as the ops take them. Every padding mode counts as zeros."""
    displacements = half_displacements(conv.kernel_size, conv.dilation)
    return flat(displacements), list(resolve_padding(conv.padding, conv.kernel_size, conv.dilation))
