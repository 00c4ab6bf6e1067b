"""The host's part of every optimizer's step in Triton. An op adds its kernel and its table of hyper-parameters."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradrep_kernels.ops.triton import plans, staging

_OF_ALL_STEPS = {"params", "grads", "scales", "identities", "first_steps", "groups"}


class StepOp:
    """A step in Triton: one launch per device and dtype for all parameters of all groups.

    It is called as its reference, with the same results: the bits of float32 and float64. The reference's signature is
    the only one. Its lists have one entry per parameter: params, grads, scales, identities, first_steps, groups, and
    the op's states under other names. Then come hyper, grad_scale and found_inf, and nothing else.

    hyper, grad_scale and found_inf may live on the device. The host then waits for nothing, and a CUDA graph reads
    their values at a replay. The host cannot see then which states are used, so all must be like their parameter (or be
    the parameter itself).

    Parameters that the kernels do not take (strides that differ, gaps, complex, mixed dtypes) go to the reference. So
    does the whole call where its tensors overlap each other. Version counters are the caller's to move, as with the C++
    kernels: the optimizer does it once, in 6 µs for 124 tensors.

    Args:
        reference:   the op in plain torch
        kernel:      a @triton.jit function that takes step_frame.ARGUMENTS, DTYPE and BLOCK
        states:      arrays that the kernel keeps per parameter
        pack:        (hyper, dtype) -> the kernel's table of hyper-parameters, one row per group, in that dtype
        states_used: the row of hyper of a group -> how many of the states, from the first on, a step of that group uses
    """

    def __init__(
        self,
        reference: Callable[..., None],
        kernel: Any,
        states: int,
        pack: Callable[[Tensor, torch.dtype], Tensor],
        states_used: Callable[[list[float]], int],
    ):
        functools.update_wrapper(self, reference)
        self.reference, self.kernel, self.pack, self.states_used = reference, kernel, pack, states_used
        self.signature = inspect.signature(reference)
        parameters = list(self.signature.parameters.values())
        self.columns = [p.name for p in parameters if str(p.annotation).startswith("list[")]
        self.states = [name for name in self.columns if name not in _OF_ALL_STEPS]
        rest = [p.name for p in parameters[len(self.columns) :]]
        if not _OF_ALL_STEPS.issubset(self.columns) or rest != ["hyper", "grad_scale", "found_inf"]:
            raise TypeError(f"{self.__name__}{self.signature} has not the form of a step")
        if len(self.states) != states:
            raise TypeError(f"{self.__name__} takes the states {self.states}, its kernel {states} of them")
        self.plans = plans.Plans(self.__name__, plans.BLOCK, writes=True)
        self.hyper_tables: dict[tuple, Tensor] = {}

    @torch.no_grad()
    def __call__(self, *arguments: Any, **named: Any) -> None:
        if named or len(arguments) != len(self.signature.parameters):  # looked at only here: binding takes 5 µs
            bound = self.signature.bind(*arguments, **named)
            bound.apply_defaults()
            arguments = bound.args
        *lists, hyper, grad_scale, found_inf = arguments
        columns = dict(zip(self.columns, lists, strict=True))
        params, groups = columns["params"], columns["groups"]
        if not params:
            return
        on_host = hyper.device.type == "cpu"
        used = [self.states_used(row) for row in hyper.tolist()] if on_host else [len(self.states)] * len(hyper)
        call = self.plans.prepare(
            (columns["grads"], params, *(columns[name] for name in self.states)),
            columns["scales"],
            columns["identities"],
            groups,
            [2 + n for n in used],
            columns["first_steps"],
        )
        rest = range(len(params)) if call.pointers is None else call.plan.rest
        if rest:
            self.reference(*([column[n] for n in rest] for column in lists), hyper, grad_scale, found_inf)
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
        if staging.capturing(
            device
        ):  # only the table of an earlier step of these tensors is sure to be there at a replay
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
