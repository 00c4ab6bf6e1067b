"""The parameters of the networks that the step is timed on, and the branch scales that their blocks give."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import gradrep_kernels as gr


@dataclass(frozen=True)
class Parameter:
    shape: tuple[int, ...]
    shortcut: bool = False  # whether the convolution's CSLA block has an identity branch

    def branch_scales(self, generator: torch.Generator) -> gr.BranchScales | None:
        """Those of a block with a k x k and a 1 x 1 branch.

        A parameter that is no convolution with k > 1 has none.
        """
        if len(self.shape) != 4 or self.shape[-1] == 1:
            return None
        kxk, one_by_one = torch.rand(2, self.shape[0], generator=generator) + 0.5
        return gr.BranchScales(kxk, one_by_one, identity=self.shortcut)

    def grad_mult(self, generator: torch.Generator) -> gr.GradMult | None:
        """M of that block (RepOptimizers, Eq. 3)."""
        scales = self.branch_scales(generator)
        return None if scales is None else scales.grad_mult(self.shape[2:])


def _conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1) -> Iterator[Parameter]:
    yield Parameter((outputs, inputs, kernel, kernel), shortcut=kernel > 1 and inputs == outputs and stride == 1)
    yield from (Parameter((outputs,)), Parameter((outputs,)))


def _linear(inputs: int) -> Iterator[Parameter]:
    yield from (Parameter((1000, inputs)), Parameter((1000,)))


def repopt_vgg_b1() -> list[Parameter]:
    """86 tensors, 51.84 M parameters."""
    found, channels = list(_conv_norm(3, 64, 3, 2)), 64
    for blocks, width in ((4, 128), (6, 256), (16, 512), (1, 2048)):
        for n in range(blocks):
            found += _conv_norm(channels, width, 3, 2 if n == 0 else 1)
            channels = width
    return [*found, *_linear(channels)]


def resnet18() -> list[Parameter]:
    """ImageNet form: 62 tensors, 11.69 M parameters."""
    found, channels = list(_conv_norm(3, 64, 7, 2)), 64
    for stage, width in enumerate((64, 128, 256, 512)):
        for n in range(2):
            stride = 2 if n == 0 and stage > 0 else 1
            found += [*_conv_norm(channels, width, 3, stride), *_conv_norm(width, width, 3)]
            if stride == 2:
                found += _conv_norm(channels, width, 1, 2)
            channels = width
    return [*found, *_linear(channels)]


def resnet50() -> list[Parameter]:
    """ImageNet form: 161 tensors, 25.56 M parameters."""
    found, channels = list(_conv_norm(3, 64, 7, 2)), 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
        for n in range(blocks):
            stride = 2 if n == 0 and stage > 0 else 1
            found += [
                *_conv_norm(channels, width, 1),
                *_conv_norm(width, width, 3, stride),
                *_conv_norm(width, 4 * width, 1),
            ]
            if n == 0:
                found += _conv_norm(channels, 4 * width, 1, stride)
            channels = 4 * width
    return [*found, *_linear(channels)]


def small_tensors(count: int = 62) -> list[Parameter]:
    """Tensors of 1000 floats, of a shape that takes a structured multiplier with an identity.

    As many as ResNet-18 (62) or ResNet-50 (161) has, with next to nothing to compute.
    """
    return [Parameter((8, 5, 5, 5), shortcut=True) for _ in range(count)]


SETS: dict[str, Callable[[], list[Parameter]]] = {
    "62 x 1000": small_tensors,
    "161 x 1000": partial(small_tensors, 161),
    "ResNet-18": resnet18,
    "ResNet-50": resnet50,
    "RepOpt-VGG-B1": repopt_vgg_b1,
}


class Tensors:
    """Parameters, gradients, momentum buffers and, where they are asked for, averages or squares of a set.

    All optimizers of a comparison share them: B1 alone takes 0.6 GB, and 0.2 more with averages or squares.
    """

    def __init__(self, parameters: list[Parameter], device: torch.device, channels_last: bool = False):
        def new(shape: tuple[int, ...]) -> Tensor:
            tensor = torch.randn(shape, device=device) * 1e-2
            return tensor.contiguous(memory_format=torch.channels_last) if channels_last and len(shape) == 4 else tensor

        self.params = [new(p.shape).requires_grad_() for p in parameters]
        self.buffers = [torch.zeros_like(p) for p in self.params]
        for p, parameter in zip(self.params, parameters):
            p.grad = new(parameter.shape)
        self._describe(parameters)

    def _describe(self, parameters: list[Parameter]) -> None:
        generator = torch.Generator().manual_seed(0)
        named = [(p, parameter.branch_scales(generator)) for p, parameter in zip(self.params, parameters)]
        self.branch_scales = {p: scales for p, scales in named if scales is not None}
        self.grad_mults = {p: scales.grad_mult(p.shape[2:]) for p, scales in self.branch_scales.items()}
        self.numel = sum(p.numel() for p in self.params)
        self._averages: list[Tensor] | None = None
        self._squares: list[Tensor] | None = None

    def seen_as(self, parameters: list[Parameter]) -> Tensors:
        """The same memory as parameters of other shapes, each of which lies in one of these."""

        def seen(tensor: Tensor, parameter: Parameter) -> Tensor:
            return tensor.detach().flatten()[: math.prod(parameter.shape)].view(parameter.shape)

        other = copy.copy(self)
        other.params = [seen(p, parameter).requires_grad_() for p, parameter in zip(self.params, parameters)]
        other.buffers = [seen(buffer, parameter) for buffer, parameter in zip(self.buffers, parameters)]
        for p, own, parameter in zip(other.params, self.params, parameters):
            p.grad = seen(own.grad, parameter)
        other._describe(parameters)
        return other

    def _groups(self, count: int) -> list[dict]:
        return [{"params": self.params[n::count], "weight_decay": 1e-4 * (n + 1)} for n in range(count)]

    def adamw(self, cls: type[torch.optim.AdamW], groups: int = 1, **options) -> torch.optim.AdamW:
        """AdamW over groups whose hyper-parameters differ. Its first moments are the momentum buffers."""
        optimizer = cls(self._groups(groups), lr=1e-4, **options)
        self._squares = self._squares or [torch.zeros_like(p) for p in self.params]
        for p, average, square in zip(self.params, self.buffers, self._squares):
            optimizer.state[p].update(exp_avg=average, exp_avg_sq=square)
            # torch's fused step counts on the device. So does ours where it may unscale.
            optimizer.state[p]["step"] = torch.zeros((), device=p.device if options.get("fused") else "cpu")
        return optimizer

    def optimizer(self, cls: type[torch.optim.SGD], groups: int = 1, **options) -> torch.optim.SGD:
        """SGD with momentum and weight decay, past its first step, over groups whose hyper-parameters differ."""
        optimizer = cls(self._groups(groups), lr=1e-4, momentum=0.9, **options)
        states = {"momentum_buffer": self.buffers}
        if options.get("momentum_dtype") is not None:
            states["momentum_buffer"] = [buffer.to(options["momentum_dtype"]) for buffer in self.buffers]
        if options.get("ema_decay") is not None:
            states["ema"] = self.averages()
        for key, tensors in states.items():
            for p, tensor in zip(self.params, tensors):
                optimizer.state[p][key] = tensor
        return optimizer

    def averages(self) -> list[Tensor]:
        """A moving average of each parameter, which begins as the parameter."""
        if self._averages is None:
            self._averages = [p.detach().clone() for p in self.params]
        return self._averages

    def dense_ones(self) -> list[Tensor]:
        """A full-size mask of ones for each parameter that has a Grad Mult.

        Masks multiply .grad in place, round after round.
        """
        return [torch.ones_like(p) for p in self.grad_mults]
