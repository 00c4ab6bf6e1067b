"""The CUDA ops over parameters, run on CPU tensors: as they are but for the launches (see emulated_step.cpp).

The kernels' blocks are compiled for the CPU as nvcc rounds: every product and sum on its own. An access of 16 bytes to
a tensor that is not aligned ends all tests at once (UBSan).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
from collections.abc import Iterator

import builds
import pytest
import torch
from torch.utils import cpp_extension

from gradrep_kernels.ops import backends
from gradrep_kernels.ops.cpp import step as step_fronts
from gradrep_kernels.ops.registry import OPS
from gradrep_kernels.ops.schema import plan_ops

LARGEST_PIECE = 2**30  # csrc/mult_places.h
norm_front = importlib.import_module("gradrep_kernels.ops.cpp.rep_grad_norm")  # the package has its function's name
SECOND_STEP = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] fast, Tensor(c!)[] slow, Tensor?[] scales, "
    "Tensor?[] identities, bool[] first_steps, int[] groups, Tensor hyper, "
    "Tensor? grad_scale=None, Tensor? found_inf=None, Tensor? tail=None) -> ()"
)
OPS_OVER_PARAMETERS = ("rep_sgd_step", "rep_adamw_step", "rep_grad_norm", "scale_gradients_")


class Device(ctypes.Structure):  # as in emulated_step.cpp
    _fields_ = tuple((name, ctypes.c_int64) for name in ("most_of_piece", "stream", "captures", "launches", "blocks"))


@functools.cache
def _library() -> tuple[ctypes.CDLL, torch.library.Library]:
    flags = ["-std=c++20", "-O1", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-ffp-contract=off", "-shared", "-fPIC"]
    flags += ["-fsanitize=undefined", "-fno-sanitize=vptr", "-fsanitize-undefined-trap-on-error", "-fvisibility=hidden"]
    flags += [f"-DTORCH_TARGET_VERSION={builds.setup_py().TORCH_TARGET}"]
    flags += [f"-I{folder}" for folder in (builds.ROOT / "csrc", *cpp_extension.include_paths())]
    flags += [
        "-Wl,--no-as-needed",
        *(f"-L{folder}" for folder in cpp_extension.library_paths()),
        "-ltorch_cpu",
        "-lc10",
    ]
    built = builds.program("emulated_step", flags)
    namespace = torch.library.Library("gradrep_emulated", "DEF")
    for op in map(OPS.get, OPS_OVER_PARAMETERS):
        for row in (op, *(plan_ops(op) if op.step else ())):
            namespace.define(row.name + row.schema)
    namespace.define("second_step" + SECOND_STEP)
    torch.ops.load_library(built)
    library = ctypes.CDLL(str(built))
    library.emulated_device.restype = ctypes.POINTER(Device)
    return library, namespace


class Emulated:
    """The ops, and the device that runs their launches: `told` says what it was told and has counted."""

    device = "cpu"

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        if builds.cpp_compiler() is None:
            pytest.skip("no C++ compiler")
        self._library, _ = _library()
        self._library.forget_graph()
        self.told = self._library.emulated_device().contents
        self.told.most_of_piece, self.told.stream, self.told.captures = LARGEST_PIECE, 1, 0
        self.told.launches = self.told.blocks = 0
        ops = torch.ops.gradrep_emulated
        for front in (step_fronts, norm_front):
            monkeypatch.setattr(front, "registered", lambda name: getattr(ops, name).default)
        self.step, self.norm = step_fronts.step_front("rep_sgd_step"), norm_front.rep_grad_norm
        self.scale, self.second_step = ops.scale_gradients_.default, ops.second_step.default
        self.adamw_step = step_fronts.step_front("rep_adamw_step")
        self.planner, self.adamw_planner = (
            backends.Planner(*(getattr(ops, row.name).default for row in plan_ops(OPS[op])), step_fronts.takes)
            for op in ("rep_sgd_step", "rep_adamw_step")
        )

    def rows_of_a_launch(self) -> int:
        """How many parameters of float32 one launch of the step has room for."""
        return self._library.rows_of_a_launch()

    @contextlib.contextmanager
    def capture(self) -> Iterator:
        """Launches are kept and not run. Yields what runs them, as often as it is called."""
        self.told.captures = 1
        yield self._library.replay
        self.told.captures = 0
