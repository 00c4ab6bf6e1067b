"""What exists and what it means: one row per op. The schema is defined here, once; backends only supply implementations.

The registered default of every op is its reference, so `torch.ops.gradrep_kernels.<op>` works with or without compiled
code, in either load order, and under torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gradrep_kernels.ops import reference

NAMESPACE = "gradrep_kernels"


@dataclass(frozen=True)
class Op:
    name: str
    schema: str
    meaning: str
    reference: Callable
    fake: Callable | None = (
        None  # shapes without data; an op that returns nothing needs none unless its reference looks at values
    )


def _fake_norm(grads, scales, identities):
    return grads[0].new_empty(
        (), dtype=torch.float64 if any(g.dtype in (torch.float64, torch.complex128) for g in grads) else torch.float32
    )


def _fake_pair_ranges(x, displacements, padding, remove_near):
    channels, pairs = x.shape[1], len(displacements) // 2
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((channels, pairs, 2, 2), dtype=dtype), x.new_empty((channels, pairs), dtype=torch.int64)


def _fake_joint_histogram(x, displacements, ranges, bins, max_bins, padding, remove_near):
    return x.new_empty((x.shape[1], len(displacements) // 2, max_bins, max_bins), dtype=torch.int64)


def _fake_joint_histogram_(counts, x, displacements, ranges, bins, padding, remove_near):
    return None


OPS = {
    op.name: op
    for op in (
        Op(
            "rep_sgd_step",
            "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor?[] scales, Tensor?[] identities, "
            "bool[] first_steps, int[] groups, Tensor hyper, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()",
            "one SGD-momentum update of all parameters of all groups, with M ⊙ g in place of g",
            reference.rep_sgd_step,
        ),
        Op(
            "rep_grad_norm",
            "(Tensor[] grads, Tensor?[] scales, Tensor?[] identities) -> Tensor",
            "√(Σ M ⊙ g²), the global gradient norm of the CSLA model",
            reference.rep_grad_norm,
            _fake_norm,
        ),
        Op(
            "pair_ranges",
            "(Tensor x, int[] displacements, int[2] padding, bool remove_near) -> (Tensor ranges, Tensor n)",
            "per channel and displacement: [min, max] of both sides of the pairs, and how many pairs",
            reference.pair_ranges,
            _fake_pair_ranges,
        ),
        Op(
            "joint_histogram",
            "(Tensor x, int[] displacements, Tensor ranges, Tensor bins, int max_bins, int[2] padding, bool remove_near) -> Tensor",
            "per channel and displacement: how often a pixel in bin p has its displaced neighbour in bin q",
            reference.joint_histogram,
            _fake_joint_histogram,
        ),
        Op(
            "joint_histogram_",
            "(Tensor(a!) counts, Tensor x, int[] displacements, Tensor ranges, Tensor bins, int[2] padding, bool remove_near) -> ()",
            "the same, added to counts: a table that many batches share is neither made anew nor added up for each",
            reference.joint_histogram_,
            _fake_joint_histogram_,
        ),
    )
}

# The cached plan of an optimizer for the C++ step: the same update, without the lists of tensors that do not change. It has
# no reference and no default: who has no compiled code makes no plan.
PLAN_SCHEMAS = {
    "rep_sgd_plan": "(Tensor[] params, Tensor?[] momentum_buffers, Tensor?[] scales, Tensor?[] identities, int[] groups) -> int",
    "rep_sgd_plan_step": "(int plan, Tensor[] grads, float[] hyper, Tensor? grad_scale, Tensor? found_inf) -> bool",
    "rep_sgd_plan_free": "(int plan) -> ()",
}

_library = torch.library.Library(NAMESPACE, "DEF")
for _op in OPS.values():
    _library.define(_op.name + _op.schema)
    _library.impl(_op.name, _op.reference, "CompositeExplicitAutograd")
    if _op.fake is not None:
        torch.library.register_fake(f"{NAMESPACE}::{_op.name}", _op.fake)
for _name, _schema in PLAN_SCHEMAS.items():
    _library.define(_name + _schema)
