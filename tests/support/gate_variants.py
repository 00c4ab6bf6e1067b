"""The variants of the Triton kernels that launches make, compiled as the launches do."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from typing import Any

import compile_gate
import torch

from gradrep_kernels.ops.reference.pair_rule import arithmetic_dtype
from gradrep_kernels.ops.triton import pair_walk, plans
from gradrep_kernels.ops.triton.step_frame import NUMBERS

joint_histogram = importlib.import_module("gradrep_kernels.ops.triton.joint_histogram")  # not the op of that name
TYPE = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
TABLES = {"chunks": "*i32", "geometry": "*i32", "pointers": "*i64"}
"""Of the kernels over parameters."""
OPTIONAL = ("grad_scale", "found_inf", "clip", "tail")
"""Tensors of a step that a launch may not have."""
POINTERS = {"displacements": "*i32", "bins": "*i32", "counts": "*i64", "n": "*i64"}
"""Of the kernels over pairs of pixels."""


def compiled_over_parameters(
    kernel, dtype, target, types, constants, many_states: bool = False, **variant
) -> compile_gate.Compiled:
    """`variant` are the constants by which launches differ, as `plans.options` takes them."""
    constants = {"DTYPE": plans.TRITON_DTYPE[dtype], "BLOCK": plans.BLOCK[dtype], **constants, **variant}
    options = plans.options(dtype, compile_gate.TARGETS[target].warp_size, many_states=many_states, **variant)
    return compile_gate.compile_variant(kernel, {**TABLES, **types}, constants, target, **options)


def compiled_step(
    kernel,
    dtype,
    target,
    given: Collection[str] = (),
    averaged: bool = False,
    narrow: int = 0,
    many_states: bool = False,
) -> compile_gate.Compiled:
    """A step in the variant of launches that have those of OPTIONAL which are `given`."""
    wide = TYPE[plans.COMPUTE[dtype]]
    types = {"hyper": wide, **dict.fromkeys(NUMBERS, "i64")}
    types |= {"grad_scale": wide, "found_inf": "*fp32", "clip": wide, "tail": "*i64"}
    constants = {name: None for name in OPTIONAL if name not in given}
    variant = {"AVERAGED": averaged, "NARROW": narrow}
    return compiled_over_parameters(kernel, dtype, target, types, constants, many_states, **variant)


def compiled_over_pairs(
    kernel, dtype, target, constants, types: Mapping[str, str] | None = None, options: Mapping[str, Any] | None = None
) -> compile_gate.Compiled:
    wide = TYPE[arithmetic_dtype(dtype)]
    types = {"x": TYPE[dtype], "ranges": wide, "ends": wide, **POINTERS, **(types or {})}
    options = options or pair_walk.options(compile_gate.TARGETS[target].warp_size)
    return compile_gate.compile_variant(
        kernel, {name: types.get(name, "i32") for name in kernel.arg_names}, constants, target, **options
    )


def compiled_histogram(dtype, target, cells: int, types: Mapping[str, str] | None = None) -> compile_gate.Compiled:
    """joint_histogram for a table of `cells` (0: none), with the block and the options that its launch chooses."""
    variant = cells, arithmetic_dtype(dtype), compile_gate.TARGETS[target].warp_size
    constants = {"CELLS": cells, "BLOCK": joint_histogram.block(*variant)}
    kernel, options = joint_histogram.joint_histogram_kernel, joint_histogram.options(*variant)
    return compiled_over_pairs(kernel, dtype, target, constants, types, options)
