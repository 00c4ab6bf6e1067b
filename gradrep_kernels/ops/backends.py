"""Who computes an op where: (op, device type) -> implementations in order of preference; forced, loaded, or why not.

`GRADREP_BACKEND` (read once, at import) or `use_backend(name)` forces one backend for all ops; a request that cannot be
met raises RuntimeError with the reason. `auto` takes the first that is available, down to the reference.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType

import torch

from gradrep_kernels.ops import cpp as cpp_impl
from gradrep_kernels.ops.registry import NAMESPACE, OPS

NAMES = ("auto", "reference", "cpp", "triton", "cuda")

PREFERENCE: dict[str, tuple[str, ...]] = {  # device type -> backends, best first; the reference serves every device
    "cpu": ("cpp", "reference"),
    "cuda": ("cuda", "triton", "reference"),
}
_ANY_DEVICE = ("reference",)


class Unavailable(RuntimeError):
    """A backend that was asked for and cannot serve; the message says why."""


def _reference(op: str, device: str) -> Callable:
    return OPS[op].reference


@functools.cache
def _module(name: str) -> ModuleType | str:
    """An optional module of this package, or the reason why it cannot be had (remembered: a failed import is slow)."""
    try:
        return importlib.import_module(f"gradrep_kernels.{name}")
    except Exception as error:  # a compiled module can fail in other ways than ImportError
        return f"{type(error).__name__}: {error}"


def _compiled(
    module: str, device_type: str, how: str, missing: Callable[[], str | None] = lambda: None
) -> Callable[[str, str], Callable]:
    """A loader of kernels that registered themselves with torch when their module was imported; `missing` says what this machine lacks."""

    def load(op: str, device: str) -> Callable:
        if device != device_type:
            raise Unavailable(f"its kernels are for {device_type} tensors")
        reason = missing()
        if reason is not None:
            raise Unavailable(reason)
        found = _module(module)
        if isinstance(found, str):
            raise Unavailable(f"gradrep_kernels.{module} is not usable ({found}); {how}")
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", device_type.upper()):
            raise Unavailable(f"gradrep_kernels.{module} has no {op}")
        registered = getattr(torch.ops.gradrep_kernels, op).default
        return getattr(cpp_impl, op, registered) if module == "_C" else registered

    return load


def _no_cuda() -> str | None:
    if torch.version.cuda is None:
        return "torch is not a CUDA build here"
    return None if torch.cuda.is_available() else "torch sees no GPU here"


def _triton(op: str, device: str) -> Callable:
    found = _module("ops.triton")
    if isinstance(found, str):
        raise Unavailable(found)
    reason = found.supports(op, device)
    if reason is not None:
        raise Unavailable(reason)
    return getattr(found, op)


# Also where the package is installed without kernels, or pip kept a wheel of it.
_INSTALL = "pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation PATH-TO-THE-SOURCES"
_BUILD = f"build it where torch and a C++ compiler are: GRADREP_BUILD=require {_INSTALL}"
_BUILD_CUDA = f"build it where nvcc is: GRADREP_BUILD=require GRADREP_CUDA=1 {_INSTALL}"

LOADERS: dict[str, Callable[[str, str], Callable]] = {
    "reference": _reference,
    "cpp": _compiled("_C", "cpu", _BUILD),
    "triton": _triton,
    "cuda": _compiled("_C_cuda", "cuda", _BUILD_CUDA, _no_cuda),
}


def _checked(name: str, where: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{where} must be one of {', '.join(NAMES)}, got {name!r}")
    return name


_from_environment = _checked(os.environ.get("GRADREP_BACKEND") or "auto", "GRADREP_BACKEND")
_forced: ContextVar[str] = ContextVar("gradrep_backend", default=_from_environment)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend inside a `with` block: 'auto', 'reference', 'cpp', 'triton' or 'cuda'.

    Raises ValueError for another name; the op that cannot be served raises RuntimeError and says why. `triton` on CPU
    tensors needs TRITON_INTERPRET=1 in the environment before Python starts.
    """
    token = _forced.set(_checked(name, "the backend's name"))
    try:
        yield
    finally:
        _forced.reset(token)


def forced() -> str:
    return _forced.get()


@functools.cache
def _load(backend: str, op: str, device: str) -> Callable | str:
    """The implementation, or the reason why there is none (remembered either way)."""
    try:
        return LOADERS[backend](op, device)
    except Unavailable as reason:
        return str(reason)


def implementation(op: str, device: str) -> Callable:
    """The callable that serves `op` on tensors of a device type; its signature is the reference's."""
    name = _forced.get()
    if name != "auto":
        found = _load(name, op, device)
        if isinstance(found, str):
            raise Unavailable(f"backend {name!r} was asked for, but cannot serve {op} on {device}: {found}")
        return found
    for backend in PREFERENCE.get(device, _ANY_DEVICE):
        found = _load(backend, op, device)
        if not isinstance(found, str):
            return found
    raise AssertionError("the reference serves every op")


def report(devices: tuple[str, ...] = ("cpu", "cuda")) -> list[dict[str, str]]:
    """Per op and device: which backend serves it now, and why each other one does not. For `env` and bug reports."""
    rows = []
    for op in OPS:
        for device in devices:
            others = {}
            for backend in NAMES[1:]:
                found = _load(backend, op, device)
                others[backend] = found if isinstance(found, str) else "available"
            name = _forced.get()
            if name == "auto":
                name = next(b for b in PREFERENCE.get(device, _ANY_DEVICE) if others[b] == "available")
            elif others[name] != "available":
                name = f"none: {name} was asked for"
            rows.append({"op": op, "device": device, "serves": name, **others})
    return rows
