"""Problems of the AdamW step over branches, as data with names and reasons."""

from __future__ import annotations

import math

import cases
import torch

KEYS = ("lr", "beta1", "beta2", "eps", "weight_decay", "amsgrad", "maximize", "step")

HYPERS = {  # name -> a row of the table
    "default": (1e-3, 0.9, 0.999, 1e-8, 1e-2, 0, 0, 7),
    "first_step": (1e-2, 0.9, 0.999, 1e-8, 0.0, 0, 0, 0),
    "amsgrad": (1e-2, 0.9, 0.99, 1e-6, 0.1, 1, 0, 3),
    "maximize": (1e-2, 0.8, 0.95, 1e-3, 0.1, 0, 1, 30_000),
    "from_the_other_end": (1e-2, 0.3, 0.5, 1e-8, 0.01, 0, 0, 2),  # as torch.lerp goes for a weight of 0.5 and more
    "no_memory": (1e-2, 0.0, 0.0, 0.1, 0.01, 1, 1, 5),
    "no_epsilon": (1e-2, 0.9, 0.999, 0.0, 0.01, 0, 0, 5),
}
FOUR = ("default", "amsgrad", "maximize", "from_the_other_end")

# In float64 the reference takes MKL's square root on a CPU, which may be an ulp off; the update is some roundings more.
FLOAT64_TOLERANCE = 1e-15


class Problem:
    """Parameters, gradients and states of a set of shapes, as the op takes them. Each row of HYPERS is a group."""

    states = ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")
    written = ("params", *states, "grads")

    def __init__(
        self,
        shapes,
        form="repopt",
        identity=True,
        dtype=torch.float32,
        hypers=FOUR,
        channels_last=False,
        device="cpu",
        branches=2,
    ):
        def make(seed):
            tensors = [cases.tensor(shape, 100 * seed + n, dtype) for n, shape in enumerate(shapes)]
            if channels_last:
                tensors = [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]
            return [t.to(device) for t in tensors]

        self.params, self.grads, self.exp_avgs = make(1), make(2), [t * 0.1 for t in make(3)]
        self.exp_avg_sqs, self.max_exp_avg_sqs = ([t.abs() for t in make(seed)] for seed in (4, 5))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.factors = [self._factors(shape, form, branches, wide, n) for n, shape in enumerate(shapes)]
        self.factors = [None if f is None else f.to(device) for f in self.factors]
        self.identities = [
            torch.ones(shape[0], dtype=wide, device=device)
            if identity and f is not None and cases.takes_identity(shape)
            else None
            for f, shape in zip(self.factors, shapes)
        ]
        self.groups = [n % len(hypers) for n in range(len(shapes))]
        self.first = [False] * len(shapes)
        self.hyper = torch.tensor([HYPERS[name] for name in hypers], dtype=torch.float64)

    @staticmethod
    def _factors(shape, form, branches, dtype, seed) -> torch.Tensor | None:
        """[1 + B, ...]: G, α of every tap, and further α that reach some taps only. 1e-6 to 2e2, as published ones."""
        own = cases.scale_shapes(shape).get(form)
        if own is None:
            return None
        own = (1,) * (len(shape) - len(own)) + tuple(own)
        g = torch.Generator().manual_seed(seed)
        factors = 10 ** (torch.rand((1 + branches, *own), generator=g, dtype=torch.float64) * 4 - 2)
        factors[0] = torch.rand(own, generator=g, dtype=torch.float64) + 0.5
        for n in range(2, 1 + branches):
            factors[n] *= torch.rand(own, generator=g) < 0.4
        flat = factors[1].reshape(-1)
        if flat.numel() > 2:
            flat[0], flat[-1] = 1e-6, 2e2
        return factors.to(dtype)

    def lists(self):
        states = (getattr(self, name) for name in self.states)
        return self.params, self.grads, *states, self.factors, self.identities, self.first, self.groups

    def clone(self, device=None, dtype=None):
        twin = object.__new__(Problem)
        twin.__dict__.update(self.__dict__)
        for name in self.written:
            own = [t.clone(memory_format=torch.preserve_format) for t in getattr(self, name)]
            setattr(twin, name, [t.to(device or t.device, dtype or t.dtype) for t in own])
        for name in ("factors", "identities"):
            setattr(twin, name, [None if t is None else t.to(device or t.device) for t in getattr(self, name)])
        return twin

    def run(self, step, **more):
        step(*self.lists(), self.hyper, **more)
        return self

    def multiplier(self, n: int) -> torch.Tensor:
        """M = Σ α² of parameter n, float64, at full size."""
        p = self.params[n]
        if self.factors[n] is None:
            return torch.ones(p.shape, dtype=torch.float64)
        m = self.factors[n][1:].double().square().sum(0).expand(p.shape).clone()
        if self.identities[n] is not None:
            for o in range(p.shape[0]):
                m[o, o % p.shape[1], p.shape[2] // 2, p.shape[3] // 2] += float(self.identities[n][o]) ** 2
        return m


def assert_same(actual: Problem, expected: Problem) -> None:
    """The same bits, but of float64 on a CPU: FLOAT64_TOLERANCE says why."""
    for name in Problem.written:
        for n, (a, b) in enumerate(zip(getattr(actual, name), getattr(expected, name))):
            a = a.cpu()
            assert a.stride() == b.stride()
            others = {"nan": 12345.0, "posinf": math.inf, "neginf": -math.inf}
            a, b = a.nan_to_num(**others), b.nan_to_num(**others)
            if name == "params" and b.dtype == torch.float64:
                # Of the weight and of its change, which is a sum over branches of 2e2 and less.
                torch.testing.assert_close(a, b, rtol=FLOAT64_TOLERANCE, atol=1e2 * FLOAT64_TOLERANCE)
            else:
                assert torch.equal(a, b), f"{name}[{n}] of {tuple(b.shape)}: {(a != b).sum()} elements differ"
