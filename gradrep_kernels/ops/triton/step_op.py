"""The host's part of every optimizer's step in Triton. An op adds its kernel and its table of hyper-parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradrep_kernels.ops.triton import plans, staging


class StepOp:
    """A step in Triton: one launch per device and dtype for all parameters of all groups.

    It takes the reference's arguments (see `schema.StepRule`) and gives the same results: the bits of float32 and
    float64.

    hyper, grad_scale and found_inf may live on the device. The host then waits for nothing, and a CUDA graph reads
    their values at a replay. The host cannot see then which states are used, so all must be like their parameter (or be
    the parameter itself).

    Parameters that the kernels do not take (strides that differ, gaps, complex, mixed dtypes) go to the reference. So
    does the whole call where its tensors overlap each other. Version counters are the caller's to move, as with the C++
    kernels: the optimizer does it once, in 6 µs for 124 tensors.

    Args:
        reference: the op in plain torch, declared by `schema.op`
        kernel:    a @triton.jit function that takes step_frame.ARGUMENTS, DTYPE and BLOCK
        pack:      (hyper, dtype) -> the kernel's table of hyper-parameters, one row per group, in that dtype
    """

    def __init__(self, reference: Callable[..., None], kernel: Any, pack: Callable[[Tensor, torch.dtype], Tensor]):
        functools.update_wrapper(self, reference)
        self.reference, self.kernel, self.pack = reference, kernel, pack
        self.rule = reference.op.step
        self.plans = plans.Plans(self.__name__, plans.BLOCK, writes=True)
        self.hyper_tables: dict[tuple, Tensor] = {}

    @torch.no_grad()
    def __call__(self, *arguments: Any, **named: Any) -> None:
        columns, hyper, grad_scale, found_inf = self.rule.dealt(arguments, named)
        params, grads, states, (scales, identities), first_steps, groups = self.rule.taken_apart(columns)
        if not params:
            return
        used = self.rule.keeps_state(hyper) if hyper.device.type == "cpu" else [True] * len(hyper)
        alike = [2 + len(states) * keeps for keeps in used]
        call = self.plans.prepare((grads, params, *states), scales, identities, groups, alike, first_steps)
        rest = range(len(params)) if call.pointers is None else call.plan.rest
        if rest:
            self.reference(*([column[n] for n in rest] for column in columns), hyper, grad_scale, found_inf)
        if call.pointers is None:
            return
        for batch, pointers in zip(call.plan.batches, call.pointers):
            dtype = plans.COMPUTE[batch.dtype]
            self.plans.launch(
                batch,
                self.kernel,
                pointers,
                self._hyper_table(call, hyper, batch.device, dtype),
                None if grad_scale is None else grad_scale.to(device=batch.device, dtype=dtype),
                None if found_inf is None else _flag(found_inf).to(batch.device),
            )

    def _hyper_table(self, call: plans.Call, hyper: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        if hyper.device.type != "cpu":
            return self.pack(hyper, dtype).to(device)
        values = hyper.flatten().tolist()
        if staging.capturing(device):  # only the table of an earlier step of these tensors is there at a replay
            last, table = call.hyper.get((device, dtype), (None, None))
            if last != values:
                return staging.upload(self.pack(hyper, dtype), device)
            staging.keep(table)
            return table
        key = (*values, device, dtype, staging.stream(device))
        if key not in self.hyper_tables:
            staging.remember(self.hyper_tables, key, staging.upload(self.pack(hyper, dtype), device))
        call.hyper[device, dtype] = values, self.hyper_tables[key]
        return self.hyper_tables[key]


def _flag(found_inf: Tensor) -> Tensor:
    return found_inf if found_inf.dtype == torch.float32 else (found_inf != 0).float()
