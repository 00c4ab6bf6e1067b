"""Where the CUDA C++ steps run in tests, a GPU or the emulation, their plans, and problems with a tail."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

import cases
import implementations
import pytest
import torch
from cases import Problem, assert_same_bits

from gradrep_kernels.ops import backends
from gradrep_kernels.ops.reference.multiply import compute_dtype

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CHUNK = 1024  # elements that 256 threads take in float32 at least


class OnGpu:
    device = "cuda"

    def __init__(self):
        self.step = implementations.get("rep_sgd_step", "cuda", "cuda")
        self.scale = implementations.get("scale_gradients_", "cuda", "cuda")
        self.adamw_step = implementations.get("rep_adamw_step", "cuda", "cuda")
        with backends.use_backend("cuda"):
            self.planner = backends.planner("rep_sgd_step", "cuda")
            self.adamw_planner = backends.planner("rep_adamw_step", "cuda")

    @contextlib.contextmanager
    def capture(self) -> Iterator:
        warm = Planned(self, Problem([(40,)], device="cuda"))  # a module may not be loaded inside a capture
        assert warm.step(on_device={0: torch.tensor(0.1, device="cuda")})
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            yield graph.replay


_HERE = [param.values[0] for param in implementations.of("rep_sgd_step") if param.values[0] == "cuda"]
PLACES = ["emulated", *(pytest.param(name, marks=pytest.mark.gpu) for name in _HERE)]


class Planned:
    """A plan of the steps of a problem that is where the kernels are."""

    def __init__(self, where, problem: Problem):
        self.planner, self.problem = where.planner, problem
        buffers = list(problem.buffers)
        lists = [problem.params, buffers, problem.scales, problem.identities, problem.groups]
        if isinstance(problem, Tailed):
            lists += [problem.averages, problem.numbers, problem.elements]
        self.handle = self.planner.make(*lists)
        weakref.finalize(self, self.planner.free, problem.params[0], self.handle)

    def step(self, hyper=None, on_device=None, grad_scale=None, found_inf=None, **more) -> bool:
        """`on_device`: {place: tensor}."""
        hyper = (self.problem.hyper if hyper is None else hyper).flatten().tolist()
        on_device = on_device or {}
        numbers = hyper, list(on_device.values()), list(on_device)
        if isinstance(self.problem, Tailed):
            more.setdefault("tail", self.problem.tail.tolist())
        return self.planner.step(self.handle, self.problem.grads, *numbers, grad_scale, found_inf, **more)

    def norm(self, to: torch.Tensor) -> bool:
        return self.planner.norm(self.handle, self.problem.grads, to)


class Tailed(Problem):
    """A problem with averages, numbers of parameters and of elements, and with states in bfloat16 where `narrow`.

    Of three parameters one has no average.
    """

    def __init__(self, shapes, *args, averages=True, narrow=True, decay=0.99, seed=2**40 + 7, count=5, **more):
        super().__init__(shapes, *args, **more)
        self.averages = [
            torch.empty_like(p, dtype=compute_dtype(p.dtype)).copy_(cases.tensor(p.shape, 900 + n))
            if averages and n % 3 != 2
            else None
            for n, p in enumerate(self.params)
        ]
        if narrow:
            self.buffers = [b.to(torch.bfloat16) for b in self.buffers]
        self.numbers: list[int] | None = [3 * n + 1 for n in range(len(self.params))]
        self.elements: list[torch.Tensor | None] = [None] * len(self.params)
        self.tail = torch.tensor([decay, float(narrow), seed, count], dtype=torch.float64)

    def clone(self, device=None) -> Tailed:
        twin = super().clone(device)
        tailed = object.__new__(Tailed)
        tailed.__dict__.update(twin.__dict__)
        tailed.averages = [e if e is None else e.clone().to(device or e.device) for e in self.averages]
        tailed.tail = self.tail.clone()
        return tailed

    def run(self, step, **more) -> Tailed:
        tail = {"averages": self.averages, "numbers": self.numbers, "elements": self.elements, "tail": self.tail}
        return super().run(step, **tail, **more)


def assert_same_tails(actual: Tailed, expected: Tailed) -> None:
    """All arrays have the same bits, averages too."""
    assert_same_bits(actual, expected)
    for a, b in zip(actual.averages, expected.averages):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0, equal_nan=True)
