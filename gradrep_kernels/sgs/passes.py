"""Runs a model for its feature maps alone, and leaves nothing behind."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from gradrep_kernels.dtensor import PLAIN


@contextmanager
def undisturbed(model: nn.Module, loader: object) -> Iterator[Callable[[], None]]:
    """Put the model into eval mode without autograd, then restore modes, buffers and random states.

    Yields a function to call before each pass over the same batches. It gives the model the buffers of the beginning,
    and the random states of its first call: a model that moves its buffers in eval mode too (observers of quantization)
    shows the same maps in each pass.

    Each restoration is tried, after an exception and after a restoration that failed too. Modes are set as attributes,
    because `.eval()` and `.train()` may be overridden, for example to merge weights.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [_Buffers(module) for module, _ in modes]
    parameters = list(model.parameters())
    gpus = sorted({p.device.index for p in parameters if p.is_cuda})
    of_first_pass: list[Callable[[], None]] = []

    def begin_pass() -> None:
        for module, _ in modes:
            module.training = False
        if of_first_pass:
            _call_all([*(part.restore for part in buffers), *of_first_pass])
        else:
            of_first_pass.extend(random_states(gpus))

    restorations = [partial(setattr, module, "training", training) for module, training in modes]
    restorations += [part.restore for part in buffers]
    restorations += random_states(gpus) + [partial(g.set_state, g.get_state()) for g in generators(loader)]
    restorations.append(partial(_shard_again, model, parameters))
    try:
        with torch.no_grad(), _eager():
            for module, _ in modes:
                module.training = False
            yield begin_pass
    finally:
        _call_all(restorations)


def _call_all(actions: list[Callable[[], object]]) -> None:
    """Call each of them, even if one raises."""
    with ExitStack() as stack:
        for action in reversed(actions):
            stack.callback(action)


class _Buffers:
    """The buffers of one module: which tensors they are, where those lie, and their values."""

    def __init__(self, module: nn.Module):
        self._module = module
        self._buffers = dict(module._buffers)
        self._not_saved = set(vars(module)["_non_persistent_buffers_set"])
        # An alias keeps place, shape and dtype of a buffer that a forward resizes or points elsewhere.
        self._values = [(b, b.data, b.clone()) for b in self._buffers.values() if b is not None]

    @torch.no_grad()
    def restore(self) -> None:
        module = self._module
        if _identities(module._buffers) != _identities(self._buffers):
            for name in self._buffers.keys() - module._buffers.keys():
                vars(module).pop(name, None)  # assigned after its removal, a plain attribute would hide the buffer
            module._buffers.clear()
            module._buffers.update(self._buffers)
        vars(module)["_non_persistent_buffers_set"] = set(self._not_saved)
        for buffer, alias, value in self._values:
            if not (_is_expanded(alias) and torch.equal(alias, value)):  # elsewhere the comparison would wait for a GPU
                alias.copy_(value)  # leaves the version counter alone, as batch norm does when it writes
            if _place(buffer) != _place(alias):
                buffer.data = alias


def _is_expanded(t: Tensor) -> bool:
    """Whether elements lie on one another, as `expand` leaves them. Nothing can be written there."""
    return t.layout == torch.strided and any(n > 1 and step == 0 for n, step in zip(t.shape, t.stride()))


def _identities(buffers: dict[str, Tensor | None]) -> list[tuple[str, int]]:
    return [(name, id(buffer)) for name, buffer in buffers.items()]


def _place(t: Tensor) -> tuple:
    where = (t.stride(), t.data_ptr()) if type(t) in PLAIN and t.layout == torch.strided else ()
    return t.shape, t.dtype, t.device, t.layout, *where


def generators(loader: object) -> list[torch.Generator]:
    """Return the generators of a loader and its samplers."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)
    generators = {getattr(holder, "generator", None) for holder in holders}
    return [generator for generator in generators if isinstance(generator, torch.Generator)]


def random_states(gpus: list[int]) -> list[Callable[[], None]]:
    """Return what sets the random states of torch, numpy and Python to those of now, in a list to call."""
    restorations = [
        partial(torch.set_rng_state, torch.get_rng_state()),
        partial(random.setstate, random.getstate()),
        partial(np.random.set_state, np.random.get_state()),
    ]
    return restorations + [partial(torch.cuda.set_rng_state, torch.cuda.get_rng_state(i), i) for i in gpus]


def _shard_again(model: nn.Module, before: list[nn.Parameter]) -> None:
    """Shard what FSDP gathered for a forward: the root keeps its parameters whole until a backward comes."""
    known = set(map(id, before))
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(id(p) not in known for p in model.parameters()):
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


def _eager() -> AbstractContextManager:
    """Switch compiled code off, because it does not see hooks that came after it.

    The switch imports torch._dynamo, which takes seconds. If it is not yet imported, nothing is compiled.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def run(
    model: nn.Module,
    inputs: list,
    call: Callable[[nn.Module, object], object],
    hooks: list[tuple[nn.Module, Callable]],
    calls: int,
) -> None:
    """Call the model on each input, with forward pre-hooks (module, args, kwargs) that are gone afterwards.

    Args:
        calls: how often the model is called. The calls beyond `inputs` repeat the last one without the hooks
    """
    with ExitStack() as handles:
        for module, hook in hooks:
            handles.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for item in inputs:
            call(model, item)
    for _ in range(calls - len(inputs)):
        call(model, inputs[-1])
