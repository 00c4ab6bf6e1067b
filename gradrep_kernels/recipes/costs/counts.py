"""What a network costs by its form: multiply-adds and parameters, in training and deployed."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gradrep_kernels import csla
from gradrep_kernels.recipes import interrupts
from gradrep_kernels.wrappers import unwrapped

__all__ = ["deployed", "form_costs", "forward_macs", "parameters"]


def form_costs(model: nn.Module, shape: Sequence[int], test_shape: Sequence[int] | None = None) -> dict[str, int]:
    """What a network costs by its form: `macs`, `deployed_macs`, `parameters`, `deployed_parameters`.

    Multiply-adds are those of a forward pass of one image. `model` is not changed.

    Args:
        shape:      of an image in training  # (C, H, W)
        test_shape: of one that the deployed network gets, None for the same
    """
    network = deployed(model)
    return {
        "macs": forward_macs(model, (1, *shape)),
        "deployed_macs": forward_macs(network, (1, *(shape if test_shape is None else test_shape))),
        "parameters": parameters(model),
        "deployed_parameters": parameters(network),
    }


def forward_macs(model: nn.Module, shape: Sequence[int]) -> int:
    """Multiply-adds of a forward pass on a batch of `shape`  # [N, C, H, W].

    Those of convolutions and matrix products, as papers count, who call them FLOPs: torch.utils.flop_counter gives two
    for each. Norms, activations and sums of branches are left out. Nothing is computed where the model runs on the meta
    device, and no weight is copied. The model is counted in eval mode, and is as before afterwards.
    """
    model = unwrapped(model)
    tensors = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    weight = next((t for t in tensors.values() if t.is_floating_point()), torch.empty(0))
    with _in_eval_mode(model):
        try:
            on_meta = {name: torch.empty_like(t, device="meta") for name, t in tensors.items()}
            return _counted(lambda x: functional_call(model, on_meta, (x,)), shape, weight.dtype, "meta")
        except (RuntimeError, NotImplementedError):  # It reads values, or holds tensors that are no buffers.
            return _counted(model, shape, weight.dtype, str(weight.device))


def _counted(forward: Callable[[Tensor], object], shape: Sequence[int], dtype: torch.dtype, device: str) -> int:
    with interrupts.held_back():  # It imports Triton, which an interrupt inside its C++ module would end by terminate.
        from torch.utils.flop_counter import FlopCounterMode
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward(torch.zeros(*shape, dtype=dtype, device=device))
    return counter.get_total_flops() // 2


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    before = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in before.items():
            module.training = training


def parameters(model: nn.Module) -> int:
    """How many trainable numbers a network has."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def deployed(model: nn.Module) -> nn.Module:
    """Return a new network for deployment, in eval mode: branches merged, norms folded where `csla.merge` can.

    Where a norm cannot be folded (its convolution has another consumer), all norms stay.
    """
    with _in_eval_mode(unwrapped(model)):
        try:
            return csla.merge(model, fold_norm=True)
        except ValueError:
            return csla.merge(model)
