"""Who computes an op where: (op, device type) -> implementations in order of preference.

`GRADREP_BACKEND` (read once, at import) or `use_backend(name)` forces one backend for all ops. A request that cannot be
met raises RuntimeError with the reason. `auto` takes the first that is available, down to the reference.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from gradrep_kernels.ops import cpp
from gradrep_kernels.ops.cpp.step import takes
from gradrep_kernels.ops.registry import NAMESPACE, OPS, registered
from gradrep_kernels.ops.schema import plan_ops

NAMES = ("auto", "reference", "cpp", "triton", "cuda")

PREFERENCE: dict[str, tuple[str, ...]] = {  # device type -> backends, best first; the reference serves every device
    "cpu": ("cpp", "reference"),
    "cuda": ("cuda", "triton", "reference"),
}
_ANY_DEVICE = ("reference",)


class Unavailable(RuntimeError):
    """A backend that was asked for cannot serve. The message says why."""


def _reference(op: str, device: str) -> Callable:
    return OPS[op].reference


@functools.cache
def _module(name: str) -> ModuleType | str:
    """Import an optional module of this package, or say why it cannot be had.

    A failed import is slow, so either answer is remembered.
    """
    try:
        return importlib.import_module(f"gradrep_kernels.{name}")
    except Exception as error:  # a compiled module can fail in other ways than ImportError
        return f"{type(error).__name__}: {error}"


def _compiled(
    module: str, device_type: str, how: str, missing: Callable[[], str | None] = lambda: None
) -> Callable[[str, str], Callable]:
    """Make a loader of kernels that registered themselves with torch when their module was imported.

    `missing` says what this machine lacks.
    """

    def load(op: str, device: str) -> Callable:
        if device != device_type:
            raise Unavailable(f"its kernels are for {device_type} tensors")
        reason = missing()
        if reason is not None:
            raise Unavailable(reason)
        library = _module(module)
        if isinstance(library, str):
            raise Unavailable(f"gradrep_kernels.{module} is not usable ({library}); {how}")
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", device_type.upper()):
            raise Unavailable(f"gradrep_kernels.{module} has no {op}")
        return getattr(cpp, op, registered(op)) if module == "_C" else registered(op)

    return load


def _no_cuda() -> str | None:
    if torch.version.cuda is None:
        return "torch is not a CUDA build here"
    return None if torch.cuda.is_available() else "torch sees no GPU here"


def _triton(op: str, device: str) -> Callable:
    kernels = _module("ops.triton")
    if isinstance(kernels, str):
        raise Unavailable(kernels)
    reason = kernels.supports(op, device)
    if reason is not None:
        raise Unavailable(reason)
    if not hasattr(kernels, op):
        raise Unavailable(f"gradrep_kernels.ops.triton has no {op}")
    return getattr(kernels, op)


# The flags also help where the package was installed without kernels, or pip kept a wheel of it.
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

    Raises ValueError for another name. An op that cannot be served raises RuntimeError and says why. `triton` on CPU
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
    """Load the implementation, or say why there is none. Either answer is remembered."""
    try:
        return LOADERS[backend](op, device)
    except Unavailable as reason:
        return str(reason)


def _serving(op: str, device: str) -> tuple[str, Callable]:
    """The backend that serves `op` on a device type now, and its implementation."""
    name = _forced.get()
    if name != "auto":
        loaded = _load(name, op, device)
        if isinstance(loaded, str):
            raise Unavailable(f"backend {name!r} was asked for, but cannot serve {op} on {device}: {loaded}")
        return name, loaded
    for backend in PREFERENCE.get(device, _ANY_DEVICE):
        loaded = _load(backend, op, device)
        if not isinstance(loaded, str):
            return backend, loaded
    raise AssertionError("the reference serves every op")


def implementation(op: str, device: str) -> Callable:
    """The callable that serves `op` on tensors of a device type. Its signature is the reference's."""
    return _serving(op, device)[1]


@dataclass(frozen=True)
class Planner:
    """How a backend plans the steps of an op: by which ops (see `schema.plan_ops`), and for which parameters."""

    make: Callable[..., int]
    step: Callable[..., bool]
    free: Callable[[int], None]
    takes: Callable[[Tensor, Tensor, Sequence[Tensor]], bool]  # parameter, gradient, states


def planner(op: str, device: str) -> Planner | None:
    """Return the planner of the backend that serves the step `op` on a device type now, None where it plans nothing.

    Raises RuntimeError as `implementation` does.
    """
    return _planner(_serving(op, device)[0], op, device)


@functools.cache
def _planner(backend: str, op: str, device: str) -> Planner | None:
    if backend == "reference":
        return None
    make, step, free = plan_ops(OPS[op])
    loaded = [_load(backend, row.name, device) for row in (make, step)]
    if any(isinstance(reason, str) for reason in loaded):
        return None
    return Planner(*loaded, registered(free.name), takes)


def report(devices: tuple[str, ...] = ("cpu", "cuda")) -> list[dict[str, str]]:
    """Per op and device: which backend serves it now, and why each other one does not. For `env` and bug reports."""
    rows = []
    for op in (row.name for row in OPS.values() if row.reference is not None):
        for device in devices:
            others = {}
            for backend in NAMES[1:]:
                loaded = _load(backend, op, device)
                others[backend] = loaded if isinstance(loaded, str) else "available"
            name = _forced.get()
            if name == "auto":
                name = next(b for b in PREFERENCE.get(device, _ANY_DEVICE) if others[b] == "available")
            elif others[name] != "available":
                name = f"none: {name} was asked for"
            rows.append({"op": op, "device": device, "serves": name, **others})
    return rows
