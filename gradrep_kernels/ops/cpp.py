"""The compiled kernels' fronts: what a kernel does not take goes to the reference, tensor by tensor, silently and rightly."""

from __future__ import annotations

import torch
from torch import Tensor

from gradrep_kernels.ops import reference

DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


def is_dense(t: Tensor) -> bool:
    """Whether no two elements share memory and none of the memory between them is unused: kernels may walk it flat."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape) if n != 1):
        if stride != expected:
            return t.numel() == 0
        expected *= size
    return True


def lies_alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have the same strides, but for sizes of 1, where a stride says nothing."""
    return a.stride() == b.stride() or all(x == y or n == 1 for x, y, n in zip(a.stride(), b.stride(), a.shape))


def takes(p: Tensor, grad: Tensor, buffer: Tensor | None) -> bool:
    """Whether the step's kernels take this parameter: all share one dtype they know, one device, and dense strides."""
    others = (grad,) if buffer is None else (grad, buffer)
    return (
        p.dtype in DTYPES
        and is_dense(p)
        and all(t.dtype == p.dtype and t.device == p.device and t.shape == p.shape and lies_alike(t, p) for t in others)
    )


def rep_sgd_step(
    params, grads, momentum_buffers, scales, identities, first_steps, groups, hyper, grad_scale=None, found_inf=None
) -> None:
    """As reference.rep_sgd_step, on CPU tensors."""
    momentum = [row[1] != 0 for row in hyper.tolist()]
    rows = list(zip(params, grads, momentum_buffers, scales, identities, first_steps, groups))
    taken = [takes(p, g, buffer if momentum[group] else None) for p, g, buffer, _, _, _, group in rows]
    if found_inf is not None:
        found_inf = found_inf.float()
    if grad_scale is not None:
        grad_scale = grad_scale.float()
    for step, wanted in ((torch.ops.gradrep_kernels.rep_sgd_step.default, True), (reference.rep_sgd_step, False)):
        columns = [list(column) for column in zip(*(row for row, take in zip(rows, taken) if take is wanted))]
        if columns:
            step(*columns, hyper, grad_scale, found_inf)


def rep_grad_norm(grads, scales, identities) -> Tensor:
    """As reference.rep_grad_norm, on CPU tensors; the order of summation differs, so the last bit may."""
    if not grads or any(g.dtype not in DTYPES for g in grads):
        return reference.rep_grad_norm(grads, scales, identities)
    return torch.ops.gradrep_kernels.rep_grad_norm.default(
        [g if is_dense(g) else g.contiguous() for g in grads], scales, identities
    )
