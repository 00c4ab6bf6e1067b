"""Runs a model for its feature maps alone, and leaves nothing behind."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def undisturbed(model: nn.Module, loader: object) -> Iterator[None]:
    """Put the model into eval mode without autograd, then restore modes, buffers and random states.

    They are restored after an exception too. Modes are set as attributes, because `.eval()` and `.train()` may be
    overridden, for example to merge weights.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module, _ in modes
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)
    generators = {getattr(holder, "generator", None) for holder in holders} - {None}
    states = [(generator, generator.get_state()) for generator in generators]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    gpus = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    try:
        with torch.random.fork_rng(devices=gpus), torch.no_grad(), _eager():
            for module, _ in modes:
                module.training = False
            yield
    finally:
        for module, training in modes:
            module.training = training
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
            buffer.data.copy_(value)  # leaves the version counter alone, as batch norm does when it writes
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for generator, state in states:
            generator.set_state(state)


def _eager() -> AbstractContextManager:
    """Switch compiled code off, because it does not see hooks that came after it.

    The switch imports torch._dynamo, which takes seconds. If it is not yet imported, nothing is compiled.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def run(model: nn.Module, batches: list, forward: Callable | None, hooks: list[tuple[nn.Module, Callable]]) -> None:
    """Call the model on each batch, with forward pre-hooks (module, args, kwargs) that are gone afterwards."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with ExitStack() as handles:
        for module, hook in hooks:
            handles.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for batch in batches:
            (forward or _call)(model, _copied(batch, device))


def _call(model: nn.Module, batch: object) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, Tensor):
        return model(batch)
    raise TypeError(
        "a batch must be a Tensor, a tuple or list that starts with one, or a dict; "
        f"got {type(batch).__name__} (or give forward=)"
    )


def _copied(item: object, device: torch.device) -> object:
    """Return a copy on `device`. A model may write into its input, and both passes must see the same."""
    if isinstance(item, Tensor):
        return item.to(device, copy=True)
    if isinstance(item, Mapping):
        return {key: _copied(value, device) for key, value in item.items()}
    if isinstance(item, (tuple, list)):
        copies = [_copied(value, device) for value in item]
        return type(item)(*copies) if hasattr(item, "_fields") else type(item)(copies)
    return item
