"""Who computes an op where: (op, device type) -> implementations in order of preference.

`GRADREP_BACKEND` (read once, at import) or `use_backend(name)` forces one backend for all ops. A request that cannot be
met raises RuntimeError with the reason, at the first op. A value that names no backend raises ValueError there. `auto`
takes the first that is available, down to the reference. It warns once where that is for want of the compiled module.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from gradrep_kernels.messages import warn_outside
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
        return getattr(cpp, op, registered(op))

    return load


def _no_cuda() -> str | None:
    if torch.version.cuda is None:
        return "torch is not a CUDA build here"
    return None if torch.cuda.is_available() else "torch sees no GPU here"


def _no_device(device: str) -> str | None:
    """Why nothing can run on a device type here, None where it can. ROCm's devices are called cuda too."""
    return None if device != "cuda" or torch.cuda.is_available() else _no_cuda()


def _triton(op: str, device: str) -> Callable:
    kernels = _module("ops.triton")
    if isinstance(kernels, str):
        raise Unavailable(kernels)
    reason = kernels.supports(op, device) or _no_device(device)
    if reason is not None:
        raise Unavailable(reason)
    if not hasattr(kernels, op):
        raise Unavailable(f"gradrep_kernels.ops.triton has no {op}")
    return getattr(kernels, op)


# The flags also help where the package was installed without kernels, or pip kept a wheel of it.
_INSTALL = "pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation PATH-TO-THE-SOURCES"
_BUILD = f"build it where torch and a C++ compiler are: GRADREP_BUILD=require {_INSTALL}"
_BUILD_CUDA = f"build it where nvcc is: GRADREP_BUILD=require GRADREP_CUDA=1 {_INSTALL}"

_PACKAGE = Path(__file__).parents[1]

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


# Checked at the first op, not here: an import that raises could not be reported in one line, nor mended in the process.
_forced: ContextVar[str] = ContextVar("gradrep_backend", default=os.environ.get("GRADREP_BACKEND") or "auto")


class _Block(NamedTuple):
    """An open `with` block, and what holds again when it ends: a name, and the call that set it."""

    owner: object
    name: str
    call: object | None


class _Scope(NamedTuple):
    """The call of `use_backend` that set the name and has no block of its own yet, and the open blocks."""

    call: object | None
    blocks: tuple[_Block, ...]


_OUTERMOST = _Scope(None, ())
# Apart from the name, which is read at every step. Both values are immutable, so that a task's copy is its own.
_scope: ContextVar[_Scope] = ContextVar("gradrep_backend_scope", default=_OUTERMOST)
_Function = TypeVar("_Function", bound=Callable[..., Any])


class use_backend:
    """Force a backend: 'auto', 'reference', 'cpp', 'triton' or 'cuda'.

    It works as torch.set_grad_enabled does. A call takes effect at once, in this thread and context. In a `with`
    statement the effect ends with the block, and so does that of calls inside the block. As a decorator it forces the
    backend during each call of the function, and the decoration itself changes nothing.

    Raises ValueError for another name. An op that cannot be served raises RuntimeError and says why. `triton` on CPU
    tensors needs TRITON_INTERPRET=1 in the environment before Python starts.
    """

    def __init__(self, name: str) -> None:
        self._name = _checked(name, "the backend's name")
        self._call = object()  # A mark, so that calls in a loop do not hold on to one another.
        scope = _scope.get()
        self._before = _forced.get(), scope.call
        _set(name, scope._replace(call=self._call))

    def __enter__(self) -> None:
        scope = _scope.get()
        # The block takes over what its own call has set.
        covered = self._before if scope.call is self._call else (_forced.get(), scope.call)
        _set(self._name, _Scope(None, (*scope.blocks, _Block(self, *covered))))

    def __exit__(self, *_: object) -> None:
        call, blocks = _scope.get()
        owners = [block.owner for block in blocks]
        if self not in owners:
            return  # entered in another context, whose name this one never had
        at = len(owners) - 1 - owners[::-1].index(self)
        ended, later = blocks[at], blocks[at + 1 :]
        if later:  # A block that was entered after this one is open still. It ends where this one would have.
            heir = ended._replace(owner=later[0].owner)
            _scope.set(_Scope(call, (*blocks[:at], heir, *later[1:])))
        else:
            _set(ended.name, _Scope(ended.call, blocks[:at]))

    def __call__(self, function: _Function) -> _Function:
        scope = _scope.get()
        if scope.call is self._call:
            name, call = self._before
            _set(name, scope._replace(call=call))

        @functools.wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return inside  # type: ignore[return-value]


def _set(name: str, scope: _Scope) -> None:
    _forced.set(name)
    _scope.set(scope)


def forced() -> str:
    """The name that holds now, 'auto' where none is forced.

    Raises ValueError where GRADREP_BACKEND names no backend.
    """
    return _checked(_forced.get(), "GRADREP_BACKEND")


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
        loaded = _load(forced(), op, device)
        if isinstance(loaded, str):
            raise Unavailable(f"backend {name!r} was asked for, but cannot serve {op} on {device}: {loaded}")
        return name, loaded
    for backend in PREFERENCE.get(device, _ANY_DEVICE):
        loaded = _load(backend, op, device)
        if not isinstance(loaded, str):
            return backend, loaded
        if backend == "cpp" and not _told:
            _tell()
    raise AssertionError("the reference serves every op")


@functools.cache
def _build_record() -> dict[str, str]:
    """What setup.py left in the package: the switch GRADREP_BUILD, and of each module 'built' or why it was not.

    Empty where there is no record.
    """
    try:
        record = json.loads((_PACKAGE / "_build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _state(module: str, failure: str) -> str:
    """The state of a compiled module that is not loaded, for a sentence: not built and why, or what its import said."""
    if not failure.startswith(ModuleNotFoundError.__name__):
        return f"is there but does not load ({failure})"
    reason = _build_record().get(module, "")
    if reason == "built":
        reason = "it was once, but this Python finds no file of it"
    return f"is not built ({reason})" if reason else "is not built"


def compiled() -> dict[str, str]:
    """Each compiled module, and in words whether it is loaded, else why not and how to get it. For `env`."""
    states = {}
    for module, how, lacking in (("_C", _BUILD, None), ("_C_cuda", _BUILD_CUDA, _no_cuda())):
        if lacking is None:
            library = _module(module)
            failed = isinstance(library, str)
            states[module] = f"{_state(module, library)}; {how}" if failed else f"is loaded from {library.__file__}"
        elif spec := importlib.util.find_spec(f"gradrep_kernels.{module}"):  # not imported: it may need what is lacking
            states[module] = f"is built ({spec.origin}), but {lacking}"
        else:
            states[module] = _state(module, ModuleNotFoundError.__name__)
    return states


_told: set[str] = set()  # the modules whose absence this process has been warned of


def _tell() -> None:
    """Warn that plain torch serves the CPU for want of the module _C.

    The warning is given once in a process, before anything is changed. Where GRADREP_BUILD=none built the package, the
    user wants no kernels, and there is none.
    """
    if torch.compiler.is_compiling():
        return
    _told.add("_C")  # Before the warning: under `-W error` the next step must not fail again.
    failure = _module("_C")
    if not isinstance(failure, str):
        return  # The module is there. It has no kernel for this op.
    state = _state("_C", failure)
    if state.startswith("is not built") and _build_record().get("GRADREP_BUILD") == "none":
        return
    warn_outside(
        f"CPU tensors are computed by plain torch, more slowly than by the C++ kernels: gradrep_kernels._C {state}. "
        f"To get it, {_BUILD}. GRADREP_BACKEND=reference asks for plain torch, without this warning"
    )


def implementation(op: str, device: str) -> Callable:
    """The callable that serves `op` on tensors of a device type. Its signature is the reference's."""
    return _serving(op, device)[1]


@dataclass(frozen=True)
class Planner:
    """How a backend plans the steps of an op: by which ops (see `schema.plan_ops`), and for which parameters."""

    make: Callable[..., int]
    step: Callable[..., bool]
    norm: Callable[[int, list[Tensor], Tensor], bool]
    free: Callable[[Tensor, int], None]
    takes: Callable[..., bool]  # see ops/cpp/step.py


def planner(op: str, device: str) -> Planner | None:
    """Return the planner of the backend that serves the step `op` on a device type now, None where it plans nothing.

    Raises RuntimeError as `implementation` does.
    """
    return _planner(_serving(op, device)[0], op, device)


@functools.cache
def _planner(backend: str, op: str, device: str) -> Planner | None:
    if backend == "reference":
        return None
    loaded = [_load(backend, row.name, device) for row in plan_ops(OPS[op])]
    if any(isinstance(reason, str) for reason in loaded):
        return None
    return Planner(*loaded, functools.partial(takes, layered=OPS[op].step.layered))


def report(devices: tuple[str, ...] = ("cpu", "cuda")) -> list[dict[str, str]]:
    """Per op and device: which backend serves it now, and why each other one does not. For `env` and bug reports."""
    rows = []
    for op in (row.name for row in OPS.values() if row.reference is not None):
        for device in devices:
            missing, others = _no_device(device), {}
            for backend in NAMES[1:]:
                loaded = _load(backend, op, device)
                others[backend] = loaded if isinstance(loaded, str) else missing or "available"
            name = forced()
            if missing is not None:
                name = f"none: {missing}"
            elif name == "auto":
                name = next(b for b in PREFERENCE.get(device, _ANY_DEVICE) if others[b] == "available")
            elif others[name] != "available":
                name = f"none: {name} was asked for"
            rows.append({"op": op, "device": device, "serves": name, **others})
    return rows
