"""The convolutions of a model that can be scaled, and the input maps of their calls."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradrep_kernels.sgs.taps import flat, half_displacements, resolve_padding, scalable_kernel

_WRAPPED = ("module", "_orig_mod")  # the attribute of DistributedDataParallel and of torch.compile that holds the model


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
        return torch.ones(self.kernel_size) if self.g is None else self.g.clone()


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside its wrappers, which is the one that a pass calls.

    The forward of DistributedDataParallel broadcasts buffers, so all ranks would have to call it equally often. Here
    they may bring different numbers of batches.
    """
    while isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def named_root(model: nn.Module) -> nn.Module:
    """Return the module that names are relative to.

    A wrapper of any class is recognised by the name of its only child.
    """
    while [name for name, _ in model.named_children()] in ([name] for name in _WRAPPED):
        model = next(model.children())
    return model


def find_layers(root: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[list[Layer], dict[str, str]]:
    """Return the layers whose weights the optimizer holds, and for each other nn.Conv2d why it is skipped."""
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
            reason = "it shares its weight with a convolution of another number of input channels"
            skipped.update({name: reason for name in layer.convs})
            del layers[key]
    return list(layers.values()), skipped


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
