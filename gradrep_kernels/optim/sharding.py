"""DTensor parameters (FSDP2, tensor parallelism): a step sees this rank's shard, and the part of M that lies on it.

The caller gives multipliers for the whole weight. Checkpoints and fingerprints hold those, whatever the sharding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from gradrep_kernels.dtensor import is_dtensor, local
from gradrep_kernels.grad_mult import GradMult
from gradrep_kernels.ops.reference.multiply import compute_dtype
from gradrep_kernels.ops.reference.rounding_rule import element_numbers


def aligned_grad(p: Tensor) -> Tensor:
    """Return p.grad spread over the ranks as p is.

    A pending sum (Partial) is done, and another sharding is brought to the parameter's.
    """
    grad = p.grad
    if is_dtensor(p) and grad.placements != p.placements:
        grad = grad.redistribute(p.device_mesh, p.placements)
    return grad


def norm_over_shards(norm: Tensor, p: Tensor) -> Tensor:
    """Return the norm of the whole  # [] from that of this rank's shards of parameters placed as `p` is.

    Replicas count once.
    """
    if not is_dtensor(p):
        return norm
    from torch.distributed.tensor import DTensor, Partial, Replicate

    over = [Partial() if hasattr(placement, "dim") else Replicate() for placement in p.placements]
    square = DTensor.from_local(norm.double().square(), p.device_mesh, over, run_check=False).full_tensor()
    return square.sqrt().to(norm.dtype)


def part_on(p: Tensor, mult: GradMult) -> GradMult:
    """The part of `mult`, given for the whole weight, that lies on this rank's shard of the DTensor `p`.

    It stays structured but in one case. A shard that starts at row r has the identity at (o, (o + r) mod I). Where the
    diagonal is shifted so, or cut, GradMult cannot say it, and M becomes dense on the shard.
    """
    mult = mult.to(local(p).device)
    index = [_held(p, dim) for dim in range(p.dim())]
    if [len(held) for held in index] != list(local(p).shape):
        raise RuntimeError(
            f"cannot tell which part of a parameter with placements {p.placements} lies on this rank; "
            "its Grad Mult would be misplaced"
        )
    scale = mult.scale.reshape((1,) * (p.dim() - mult.scale.dim()) + tuple(mult.scale.shape))
    for dim, held in enumerate(index):
        if scale.shape[dim] > 1:
            scale = scale.index_select(dim, held)
    if mult.identity is None:
        return GradMult.of_parts(scale, None)
    identity, column = mult.identity[index[0]], index[0] % p.shape[1]
    # on the diagonal: o mod I is the global input channel, and the tap is the centre of the whole kernel
    o, i = (column[:, None] == index[1]).nonzero(as_tuple=True)
    y, x = ((held == p.shape[dim] // 2).nonzero() for dim, held in ((2, index[2]), (3, index[3])))
    whole = [len(held) for held in index[1:]] == list(p.shape[1:])
    if whole and torch.equal(i, torch.arange(len(i), device=i.device) % p.shape[1]):
        return GradMult.of_parts(scale, identity)
    dtype = compute_dtype(p.dtype.to_real())  # the dtype in which the step adds the two parts
    dense = scale.to(dtype).expand(local(p).shape).clone(memory_format=torch.contiguous_format)
    dense[o, i, y, x] += identity[o].to(dtype)
    return GradMult.of_parts(dense, None)


_numbers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter -> (placements, its element numbers)


def element_numbers_of(p: Tensor) -> Tensor | None:
    """Which elements of the whole parameter this rank holds, as `rounding_rule.element_numbers` takes it.

    None for a plain tensor, which is the whole. A run of the whole, such as FSDP2's rows, is told by its first number
    # [1] int64 on the CPU. Any other shard has the number of each element, 8 bytes of memory for each.
    """
    if not is_dtensor(p):
        return None
    placements, numbers = _numbers.get(p, (None, None))
    if placements != p.placements:
        numbers = _element_numbers(p)
        _numbers[p] = p.placements, numbers
    return numbers


def _element_numbers(p: Tensor) -> Tensor:
    shard, numbers, inside = local(p), torch.zeros((), dtype=torch.int64, device="cpu"), 1
    for dim in sorted(range(p.dim()), key=lambda d: p.stride(d)):  # from the innermost in memory
        along = [-1 if d == dim else 1 for d in range(p.dim())]
        numbers = numbers + (_held(p, dim).cpu() * inside).view(along)
        inside *= p.shape[dim]
    first = numbers.reshape(-1)[:1] if shard.numel() else torch.zeros(1, dtype=torch.int64, device="cpu")
    run = element_numbers(shard, first).cpu()
    return first.clone() if torch.equal(run, numbers.expand(shard.shape)) else numbers.to(shard.device)


def _held(p: Tensor, dim: int) -> Tensor:
    """Which indices of dimension `dim` of the whole weight this rank holds, in their order  # [n] int64"""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def along(placement):
        if getattr(placement, "dim", None) != dim:
            return Replicate()
        # FSDP2 over tensor parallelism on one dimension interleaves: _StridedShard
        return (
            type(placement)(0, split_factor=placement.split_factor) if hasattr(placement, "split_factor") else Shard(0)
        )

    every = torch.arange(p.shape[dim], device=p.device_mesh.device_type)
    placements = [along(placement) for placement in p.placements]
    return distribute_tensor(every, p.device_mesh, placements, src_data_rank=None).to_local()  # None: nothing is sent
