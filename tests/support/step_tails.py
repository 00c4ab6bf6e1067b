"""A problem with the arguments of a step's tail: averages, states in bfloat16, numbers and elements."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import cases
import torch
from cases import Problem

from gradrep_kernels.ops import reference
from gradrep_kernels.ops.reference.multiply import compute_dtype
from gradrep_kernels.ops.reference.step_tail import COLUMNS
from gradrep_kernels.ops.triton import rep_sgd_plan, rep_sgd_plan_step
from gradrep_kernels.optim.tail import clip_factor

WITH_AND_WITHOUT_MOMENTUM = (cases.HYPERS[6], cases.HYPERS[4], cases.HYPERS[1])


def bits(t: torch.Tensor) -> torch.Tensor:
    """As integers, in which NaN is equal to itself; all NaNs are one."""
    t = torch.where(t.isnan(), torch.full_like(t, torch.nan), t)
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.itemsize])


class Tailed(Problem):
    """A problem whose parameters of the numbers `averaged` have averages, and `narrow` states in bfloat16.

    None: all but every third, all but every fourth.
    """

    def __init__(
        self,
        shapes: Sequence,
        dtype: torch.dtype = torch.float32,
        averaged: Collection[int] | None = None,
        narrow: Collection[int] | None = None,
        hypers=WITH_AND_WITHOUT_MOMENTUM,
        device: str = "cpu",
    ):
        super().__init__(shapes, dtype=dtype, hypers=hypers, device=device)
        count = len(shapes)
        averaged = [n for n in range(count) if n % 3 != 1] if averaged is None else averaged
        narrow = [n for n in range(count) if n % 4 != 3] if narrow is None else narrow
        self.averages = [
            torch.full_like(p, 0.5, dtype=compute_dtype(p.dtype)) if n in averaged else None
            for n, p in enumerate(self.params)
        ]
        for n in narrow:
            self.buffers[n] = self.buffers[n].bfloat16()
        self.numbers = [3 * n + 1 for n in range(count)]
        self.elements = [torch.tensor([8 * n]) if n % 2 else None for n in range(count)]
        self.tail = torch.tensor([0.99, 1, 2**40 + 17, 5], dtype=torch.float64)

    def clone(self, device=None):
        twin = super().clone(device)
        twin.__class__ = Tailed
        if self.averages is not None:
            twin.averages = [None if a is None else a.clone().to(device or a.device) for a in self.averages]
        twin.tail = self.tail.clone()
        return twin

    def run(self, step, **more):
        columns = {name: getattr(self, name) for name in ("averages", "numbers", "elements", "tail")}
        return super().run(step, **columns, **more)

    def at_odd_places(self) -> None:
        """Every array begins beside a place where wide accesses can."""
        for name in ("params", "grads", "buffers", "averages"):
            moved = [None if t is None else cases.unaligned(t, 1 + n % 3) for n, t in enumerate(getattr(self, name))]
            setattr(self, name, moved)

    def change_dtype(self, n: int, dtype: torch.dtype) -> None:
        self.params[n], self.grads[n] = self.params[n].to(dtype), self.grads[n].to(dtype)
        if self.buffers[n].dtype != torch.bfloat16:
            self.buffers[n] = self.buffers[n].to(dtype)
        if self.averages[n] is not None:
            self.averages[n] = self.averages[n].to(compute_dtype(dtype))
        parts = (self.scales, self.identities)
        for part in parts:
            part[n] = None if part[n] is None else part[n].to(compute_dtype(dtype))

    def new_step(self, gradients: bool = True) -> None:
        """The next count, and other gradients, which lie elsewhere."""
        self.tail[3] += 1
        if gradients:
            self.grads = [g * -1.5 for g in self.grads]

    def assert_same_bits(self, twin: Tailed) -> None:
        for name in ("params", "grads", "buffers", "averages"):
            for n, (a, b) in enumerate(zip(getattr(self, name) or (), getattr(twin, name) or ())):
                if a is not None:
                    a = a.detach().cpu()
                    assert torch.equal(bits(a), bits(b.detach().cpu())), f"{name}[{n}]: {(a != b.cpu()).sum()} differ"

    def assert_step(self, step, **more) -> None:
        """A step has the bits of the reference's."""
        twin = self.clone()
        self.run(step, **more)
        self.assert_same_bits(twin.run(reference.rep_sgd_step, **more))

    def planned(self) -> int:
        columns = self.params, self.buffers, self.scales, self.identities, self.groups
        return rep_sgd_plan(*columns, averages=self.averages, numbers=self.numbers, elements=self.elements)

    def planned_step(self, handle, max_norm=None, norm=None, on_device=(), lr_on_device=False, **amp) -> bool:
        """Take a planned step of which the named numbers are on the device, and are 0 on the host."""
        hyper, tail = self.hyper.flatten().tolist(), self.tail.tolist()
        places = [0] * lr_on_device + [len(hyper) + COLUMNS.index(name) for name in on_device]
        both = hyper + tail
        device = self.params[0].device
        tensors = [torch.tensor(both[n], dtype=torch.float64, device=device) for n in places]
        for n in places:
            both[n] = 0.0
        hyper, tail = both[: len(hyper)], both[len(hyper) :]
        amp = [amp.get(name) for name in ("grad_scale", "found_inf")]
        return rep_sgd_plan_step(handle, self.grads, hyper, tensors, places, *amp, tail, max_norm or 0.0, norm)

    def assert_planned_step(self, max_norm=None, handle=None, grad_scale=None, found_inf=None, **on_device) -> None:
        """A planned step has the reference's norm, and with the factor that follows from it the reference's bits."""
        twin, norm, clip = self.clone("cpu"), None, None
        amp = {"grad_scale": grad_scale, "found_inf": found_inf}
        if max_norm is not None:
            double = any(p.dtype == torch.float64 for p in self.params)
            norm = self.params[0].new_full((), -1, dtype=torch.float64 if double else torch.float32)
        handle = handle or self.planned()
        assert handle
        assert self.planned_step(handle, max_norm, norm, **on_device, **amp)
        amp = {name: None if number is None else number.cpu() for name, number in amp.items()}
        if norm is not None:
            norm = norm.cpu()
            wanted = reference.rep_grad_norm(twin.grads, twin.scales, twin.identities)
            wanted = wanted if grad_scale is None else wanted / amp["grad_scale"].to(wanted.dtype)
            torch.testing.assert_close(norm, wanted.to(norm.dtype), rtol=1e-6, atol=0, equal_nan=True)
            clip = clip_factor(norm, max_norm)
        self.assert_same_bits(twin.run(reference.rep_sgd_step, clip=clip, **amp))
