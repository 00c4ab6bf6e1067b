"""The host's part of every optimizer's step in Triton. An op adds its kernel and its table of hyper-parameters."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor

from gradrep_kernels.ops.reference.step_tail import Tail, one_each
from gradrep_kernels.ops.triton import launching, plans, staging
from gradrep_kernels.ops.triton.addressing import multiplier
from gradrep_kernels.ops.triton.planned_step import NO_TAIL, PlannedStep, have_states
from gradrep_kernels.ops.triton.routes import chances
from gradrep_kernels.ops.triton.step_tail import tail_kernel, to_bits


class StepOp:
    """A step in Triton: one launch per device and dtype for all parameters of all groups.

    It takes the reference's arguments (see `schema.StepRule`) and gives the same results: the bits of float32 and
    float64.

    hyper, grad_scale, found_inf, clip and tail may live on the device. The host then waits for nothing, and a CUDA
    graph reads their values at a replay. The host cannot see then which states are used, so all must be like their
    parameter (or be the parameter itself).

    Parameters that the kernels do not take (strides that differ, gaps, complex, mixed dtypes) go to the reference. So
    does the whole call where its tensors overlap each other. Version counters are the caller's to move, as with the C++
    kernels: the optimizer does it once, in 6 µs for 124 tensors.

    `plan`, `plan_step`, `plan_norm` and `plan_free` are the ops of its plan (see `schema.plan_ops`).

    Args:
        reference: the op in plain torch, declared by `schema.op`
        kernel:    a @triton.jit function that takes step_frame.TENSORS and NUMBERS, AVERAGED, NARROW, DTYPE and BLOCK
        pack:      (hyper, dtype) -> the kernel's table of hyper-parameters, one row per group, in that dtype
        norm_factor: M of the gradient norm, a device function as FACTOR of step_frame
    """

    def __init__(
        self,
        reference: Callable[..., None],
        kernel: Any,
        pack: Callable[[Tensor, torch.dtype], Tensor],
        norm_factor: Any = multiplier,
    ):
        functools.update_wrapper(self, reference)
        self.norm_factor = norm_factor
        self.reference, self.kernel, self.pack = reference, kernel, pack
        self.rule = reference.op.step
        self.plans = plans.Plans(
            self.__name__, plans.BLOCK, writes=True, layered=self.rule.layered, many_states=len(self.rule.states) > 2
        )
        self.hyper_tables: dict[tuple, list[Tensor]] = {}
        self.planned: dict[int, PlannedStep] = {}
        self._handles = itertools.count(1)

    @torch.no_grad()
    def __call__(self, *arguments: Any, **named: Any) -> None:
        dealt = self.rule.dealt(arguments, named)
        columns, hyper, grad_scale, found_inf, clip, *more, tail = dealt
        params, grads, states, (scales, identities), first_steps, groups = self.rule.taken_apart(columns)
        if not params:
            return
        on_host = hyper.device.type == "cpu"
        used = self.rule.kept_states(hyper) if on_host else have_states(params, states, groups, len(hyper))
        alike = [2 + kept for kept in used]
        more = one_each(len(params), *more)
        averages, numbers, elements = more
        live = None if tail is None or tail.is_cpu else tail
        known = Tail.of(tail) if live is None else NO_TAIL._replace(stochastic=True)  # as it may be
        random = chances(states, numbers, elements) if known.stochastic else None
        call = self.plans.prepare(
            (grads, params, *states), scales, identities, averages, groups, alike, random, first_steps
        )
        rest = range(len(params)) if call.pointers is None else call.plan.rest
        if rest:
            of_rest, more_of_rest = ([[column[n] for n in rest] for column in given] for given in (columns, more))
            self.reference(*of_rest, hyper, grad_scale, found_inf, clip, *more_of_rest, tail)
        if call.pointers is not None:
            table = tuple(hyper.flatten().tolist()) if on_host else hyper
            self.launch(call, table, grad_scale, found_inf, clip, known, live)

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
        more = one_each(len(params), averages, numbers, elements)
        made = PlannedStep.of(self, params, states, (scales, identities), groups, *more)
        if made is None:
            return 0
        number = next(self._handles)
        self.planned[number] = made
        return number

    def plan_step(self, plan: int, *arguments: Any) -> bool:
        return self.planned[plan].take(*arguments)

    def plan_norm(self, plan: int, grads: list[Tensor], norm: Tensor) -> bool:
        return self.planned[plan].norm(grads, norm)

    def plan_free(self, param: Tensor, plan: int) -> None:
        del self.planned[plan]

    def launch(
        self,
        call: plans.Call,
        hyper: Tensor | tuple[float, ...],
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        clip: Tensor | None = None,
        tail: Tail = NO_TAIL,
        live: Tensor | None = None,
    ) -> None:
        """Launch the kernel for each batch.

        `hyper` is the reference's table: its numbers, or on a device itself. `live` is the tail on a device, where -1
        stands for a number that `tail` has. `tail.stochastic` says whether random bits may be asked for.
        """
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
                None if clip is None else clip.to(device=batch.device, dtype=dtype),
                None if live is None else self._converted(live, batch, dtype),
                to_bits(1 - tail.ema_decay, dtype) if batch.averaged else 0,
                tail.seed,
                tail.step,
                AVERAGED=batch.averaged,
                NARROW=batch.narrow if tail.stochastic else 0,
            )

    def _converted(self, tail: Tensor, batch: plans.Batch, dtype: torch.dtype) -> Tensor:
        """The tail on the device as the kernel takes it, in one launch."""
        made = staging.scratch((len(tail),), torch.int64, batch.device)
        launching.launch(
            self.plans.op, batch.device, batch.dtype, tail_kernel, 1, tail.to(batch.device), made,
            compute=plans.TRITON_DTYPE[dtype], enable_fp_fusion=False,
        )  # fmt: skip
        return made

    def table(self, numbers: Sequence[float]) -> Tensor:
        """The table of hyper-parameters that has these numbers  # [G, H] float64, on the CPU"""
        return torch.tensor(numbers, dtype=torch.float64, device="cpu").view(-1, len(self.rule.hyper))

    @torch.no_grad()
    def completed(
        self, call: plans.Call, numbers: tuple[float, ...], on_device: list[Tensor], places: tuple[int, ...]
    ) -> Tensor:
        """A list of numbers of which some lie on the device, at `places`: there, without waiting for it  # float64

        It takes three launches, however many there are.
        """

        def make() -> list[Tensor]:
            given, which = (
                torch.tensor(numbers, dtype=torch.float64, device="cpu"),
                torch.full((len(numbers),), -1, device="cpu"),
            )
            which[list(places)] = torch.arange(len(places), device="cpu")
            return [given, which >= 0, which.clamp(min=0)]

        given, there, which = self._uploaded(call, on_device[0].device, torch.float64, (numbers, places), make)
        found = torch.cat(list(map(methodcaller("reshape", 1), on_device)))
        return torch.where(there, found[which], given)

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
