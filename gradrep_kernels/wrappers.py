"""What wrappers hold: the model inside, the optimizer inside, and names without their prefixes."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

__all__ = ["inner_optimizer", "named_root", "plain_name", "root_prefix", "saved_name", "unwrapped"]

# Children by which torch.compile and Lightning Fabric hold the model, and those of wrappers whose attribute is `module`
# (DistributedDataParallel, DataParallel, AveragedModel, averages of timm).
_COMPILED, _FABRIC, _MODULE = "_orig_mod", "_forward_module", "module"
# Wrappers of a part of a model (compiled blocks, checkpointed blocks, FSDP) put these into the middle of names.
_NEVER_A_NAME = {_COMPILED, _FABRIC, "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
_HOLD_MODULE = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside DataParallel, DistributedDataParallel, AveragedModel, torch.compile and Fabric.

    Other classes that hold a model stay, for they may have a forward of their own.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    while True:
        if isinstance(model, _HOLD_MODULE):
            model = model.module
        elif _COMPILED in model._modules:
            model = model._modules[_COMPILED]
        elif _FABRIC in model._modules:
            model = model._modules[_FABRIC]
        else:
            return model


def named_root(model: nn.Module) -> nn.Module:
    """Return the module that names are relative to.

    A wrapper of any other class is recognised by the name of its only child.
    """
    while True:
        inner = unwrapped(model)
        if [name for name, _ in inner.named_children()] == [_MODULE]:
            inner = inner.module
        if inner is model:
            return model
        model = inner


def root_prefix(model: nn.Module) -> str:
    """Return what the names of `model` have in front of those of `named_root(model)`: nothing, or a name and a dot."""
    root = named_root(model)
    return next(f"{name}." if name else "" for name, module in model.named_modules() if module is root)


def plain_name(name: str) -> str:
    """Return a name, relative to `named_root`, without what wrappers of parts of the model add to it."""
    return ".".join(part for part in name.split(".") if part not in _NEVER_A_NAME)


def saved_name(name: str) -> str:
    """Return a name out of a file without what any wrapper adds to it, the wrapper of the whole model included."""
    name = plain_name(name)
    while name.startswith(f"{_MODULE}."):
        name = name.removeprefix(f"{_MODULE}.")
    return name


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the torch optimizer inside the wrappers of Accelerate, Lightning and the like (their `.optimizer`).

    Raises TypeError for what is no optimizer, and for a wrapper that cannot be opened. The message names the attribute
    that holds the optimizer.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer) and inner is not optimizer:
        optimizer = inner
    if isinstance(optimizer, Optimizer) and hasattr(optimizer, "_optimizer_step_pre_hooks"):
        return optimizer
    kind = type(optimizer).__name__
    attributes = getattr(optimizer, "__dict__", {})
    holders = [name for name, value in attributes.items() if isinstance(value, Optimizer)]
    if holders:
        raise TypeError(f"optimizer is a {kind} around another one: pass its attribute {holders[0]!r}")
    if isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer is a {kind} that never called torch.optim.Optimizer.__init__, so it has no hooks")
    raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {kind}")
