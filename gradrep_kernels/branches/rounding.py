"""Weights rounded to few bits, as a network is stored for integer arithmetic."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from gradrep_kernels.branches.sites import refuse_blocks
from gradrep_kernels.wrappers import unwrapped

__all__ = ["round_symmetric", "rounded_weights"]

_LEAST_BITS, _MOST_BITS = 2, 16
_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)  # Their kernels are [I, O, kh, kw].


def round_symmetric(weight: Tensor, bits: int, axis: int | None = None) -> Tensor:
    """Round `weight` to a symmetric grid of 2^bits - 1 steps around 0.

    A step is max |w| / (2^(bits - 1) - 1). Halves go to the even step, as in torch. The dtype stays.

    Args:
        axis: each slice along it has a step of its own. None: one step for all.
    """
    wide = weight.detach().double()
    others = tuple(n for n in range(weight.ndim) if n != axis)
    step = wide.abs().amax(others, keepdim=True) if weight.numel() else wide.new_zeros(())
    step = step / (2 ** (bits - 1) - 1)
    # Where all weights are 0, any step does.
    step = torch.where(step > 0, step, 1.0)
    return (wide / step).round().mul_(step).to(weight.dtype)


def rounded_weights(model: nn.Module, bits: int, per_channel: bool = False) -> nn.Module:
    """Return a new model whose convolutions and linear layers have weights rounded to `bits` bits.

    Rounding is symmetric, from the largest weight, as in torch.fake_quantize_per_tensor_affine with zero point 0 and
    the range ±(2^(bits - 1) - 1). Biases, norms and activations stay as they are: this alone shows what the
    distribution of the weights costs. Fold norms first, because a deployed network rounds its folded kernels:
    `csla.merge(model, fold_norm=True)`.

    Args:
        bits: 2 to 16.
        per_channel: whether each output channel has a step of its own. Otherwise a layer has one.

    `model` itself is not changed. Raises ValueError for other numbers of bits, for blocks of branches that are not
    merged, and for a weight that is computed (weight norm, pruning).
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not _LEAST_BITS <= bits <= _MOST_BITS:
        raise ValueError(f"bits must be a whole number from {_LEAST_BITS} to {_MOST_BITS}, got {bits!r}")
    model = unwrapped(model)
    refuse_blocks(model)
    for name, module in model.named_modules():
        if isinstance(module, _LAYERS) and "weight" not in module._parameters:
            raise ValueError(f"{name}: its weight is not a parameter (weight norm, pruning); remove that first")
    model = copy.deepcopy(model)
    done: set[nn.Parameter] = set()  # A weight that two layers share is rounded once.
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _LAYERS) and module.weight not in done:
                done.add(module.weight)
                axis = int(isinstance(module, _TRANSPOSED)) if per_channel else None
                module.weight.copy_(round_symmetric(module.weight, bits, axis))
    return model
