"""The host's part of every optimizer's step in Triton. An op adds its kernel and its table of hyper-parameters."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor

from gradrep_kernels.ops.triton import plans, staging
from gradrep_kernels.ops.triton.planned_step import PlannedStep, have_states


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

    `plan`, `plan_step` and `plan_free` are the ops of its plan (see `schema.plan_ops`).

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
        self.hyper_tables: dict[tuple, list[Tensor]] = {}
        self.planned: dict[int, PlannedStep] = {}
        self._handles = itertools.count(1)

    @torch.no_grad()
    def __call__(self, *arguments: Any, **named: Any) -> None:
        dealt = self.rule.dealt(arguments, named)
        columns, hyper, grad_scale, found_inf, *tail = dealt
        if any(argument is not None for argument in tail):
            self.reference(*columns, hyper, grad_scale, found_inf, *tail)
            return
        params, grads, states, (scales, identities), first_steps, groups = self.rule.taken_apart(columns)
        if not params:
            return
        on_host = hyper.device.type == "cpu"
        used = self.rule.keeps_state(hyper) if on_host else have_states(params, states, groups, len(hyper))
        alike = [2 + len(states) * keeps for keeps in used]
        call = self.plans.prepare((grads, params, *states), scales, identities, groups, alike, first_steps)
        rest = range(len(params)) if call.pointers is None else call.plan.rest
        if rest:
            self.reference(*([column[n] for n in rest] for column in columns), hyper, grad_scale, found_inf)
        if call.pointers is not None:
            self.launch(call, tuple(hyper.flatten().tolist()) if on_host else hyper, grad_scale, found_inf)

    def plan(
        self,
        params: list[Tensor],
        *columns: list,
        averages: list[Tensor | None] | None = None,
        numbers: list[int] | None = None,
        elements: list[Tensor | None] | None = None,
    ) -> int:
        """Plan the steps of these parameters. Returns the plan's number, or 0 where the kernels do not take them all.

        `columns` are the states (None where a group has none), scales, identities and groups.
        """
        *states, scales, identities, groups = columns
        if any(argument is not None for argument in (averages, numbers, elements)):
            return 0
        made = PlannedStep.of(self, params, states, (scales, identities), groups)
        if made is None:
            return 0
        number = next(self._handles)
        self.planned[number] = made
        return number

    def plan_step(self, plan: int, *arguments: Any) -> bool:
        return self.planned[plan].take(*arguments)

    def plan_norm(self, plan: int, grads: list[Tensor], norm: Tensor) -> bool:
        return False

    def plan_free(self, param: Tensor, plan: int) -> None:
        del self.planned[plan]

    def launch(
        self,
        call: plans.Call,
        hyper: Tensor | tuple[float, ...],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Launch the kernel for each batch. `hyper` is the reference's table: its numbers, or on a device itself."""
        for batch, pointers in zip(call.plan.batches, call.pointers):
            dtype = plans.COMPUTE[batch.dtype]
            if isinstance(hyper, Tensor):
                table = self.pack(hyper, dtype).to(batch.device)
            else:
                (table,) = self._uploaded(
                    call, batch.device, dtype, hyper, lambda dtype=dtype: [self.pack(self.table(hyper), dtype)]
                )
            self.plans.launch(
                batch,
                self.kernel,
                pointers,
                table,
                None if grad_scale is None else grad_scale.to(device=batch.device, dtype=dtype),
                None if found_inf is None else _flag(found_inf).to(batch.device),
            )

    def table(self, numbers: Sequence[float]) -> Tensor:
        """The table of hyper-parameters that has these numbers  # [G, H] float64, on the CPU"""
        return torch.tensor(numbers, dtype=torch.float64, device="cpu").view(-1, len(self.rule.hyper))

    @torch.no_grad()
    def completed(
        self, call: plans.Call, numbers: tuple[float, ...], on_device: list[Tensor], places: tuple[int, ...]
    ) -> Tensor:
        """The table of hyper-parameters of which some lie on the device, at `places`: there, without waiting for it.

        It takes three launches, however many there are.
        """

        def make() -> list[Tensor]:
            given, which = self.table(numbers).flatten(), torch.full((len(numbers),), -1, device="cpu")
            which[list(places)] = torch.arange(len(places), device="cpu")
            return [given, which >= 0, which.clamp(min=0)]

        given, there, which = self._uploaded(call, on_device[0].device, torch.float64, (numbers, places), make)
        found = torch.cat(list(map(methodcaller("reshape", 1), on_device)))
        return torch.where(there, found[which], given).view(-1, len(self.rule.hyper))

    def _uploaded(
        self,
        call: plans.Call,
        device: torch.device,
        dtype: torch.dtype,
        source: tuple,
        make: Callable[[], list[Tensor]],
    ) -> list[Tensor]:
        """What `make` makes from `source`, on the device. It is kept there under the source and the dtype."""
        if staging.capturing(device):  # only the tables of an earlier step of these tensors are there at a replay
            last, tables = call.hyper.get((device, dtype), (None, None))
            if last != source:
                return [staging.upload(table, device) for table in make()]
            staging.keep(*tables)
            return tables
        key = (source, device, dtype, staging.stream(device))
        if key not in self.hyper_tables:
            # Read by one stream, in its order. A rate that changes with each step fills this memory.
            staging.remember(self.hyper_tables, key, [staging.upload(table, device) for table in make()], wait=False)
        call.hyper[device, dtype] = source, self.hyper_tables[key]
        return self.hyper_tables[key]


def _flag(found_inf: Tensor) -> Tensor:
    return found_inf if found_inf.dtype == torch.float32 else (found_inf != 0).float()
