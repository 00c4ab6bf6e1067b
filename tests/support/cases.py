"""Cases and tolerances of the step and of Grad Mult, as data with names and reasons."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from gradrep_kernels import GradMult

CHUNK = 32768  # elements of one piece of work in the C++ step (csrc/step_plan.h)

# Sizes that break things: none, one, around the vector tile (16 K) and the chunk, primes, non-square and even kernels.
SHAPES = {
    "empty": (0, 3),
    "scalar": (),
    "one": (1,),
    "prime": (257,),
    "chunk": (CHUNK,),
    "chunk_minus_1": (CHUNK - 1,),
    "chunk_plus_1": (CHUNK + 1,),
    "linear": (129, 65),
    "conv_3x3": (16, 8, 3, 3),
    "conv_3x3_square": (17, 17, 3, 3),
    "conv_3x3_one_tile": (4, 16, 3, 3),
    "conv_3x3_many_chunks": (67, 61, 3, 3),
    "conv_5x5": (6, 7, 5, 5),
    "conv_7x7": (3, 5, 7, 7),
    "conv_3x5": (5, 7, 3, 5),
    "conv_1x1": (65, 70, 1, 1),
    "conv_2x2": (5, 6, 2, 2),
    "grouped": (12, 4, 3, 3),
    "depthwise": (19, 1, 3, 3),
    "one_output": (1, 300, 3, 3),
}


def scale_shapes(shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Every way in which the papers' multipliers, and a user's, broadcast to a weight of `shape`."""
    if len(shape) != 4:
        return {
            "none": None,
            "number": (),
            "dense": shape,
            "last": shape[-1:],
            **({"rows": (shape[0], 1)} if len(shape) == 2 else {}),
        }
    o, i, kh, kw = shape
    return {
        "none": None,
        "number": (),
        "repopt": (o, 1, kh, kw),
        "spatial": (1, 1, kh, kw),
        "kernel": (kh, kw),
        "per_output": (o, 1, 1, 1),
        "per_input": (1, i, 1, 1),
        "dense": shape,
    }


@dataclass(frozen=True)
class Hyper:
    """Hyper-parameters of one parameter group, as torch.optim.SGD takes them."""

    name: str
    options: dict = field(default_factory=dict)


HYPERS = [
    Hyper("plain", {"lr": 0.1}),
    Hyper("weight_decay", {"lr": 0.1, "weight_decay": 0.05}),
    Hyper("momentum", {"lr": 0.03, "momentum": 0.9}),
    Hyper("momentum_weight_decay", {"lr": 0.03, "momentum": 0.9, "weight_decay": 5e-4}),
    Hyper("dampening", {"lr": 0.03, "momentum": 0.8, "dampening": 0.3}),
    Hyper("nesterov", {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
    Hyper("nesterov_weight_decay", {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 4e-5}),
    Hyper("maximize", {"lr": 0.1, "maximize": True}),
    Hyper("maximize_all", {"lr": 0.02, "momentum": 0.7, "nesterov": True, "weight_decay": 0.01, "maximize": True}),
]

# Of max(|W|, lr |d|) per element, against torch.optim.SGD(foreach=False) on pre-multiplied float64 gradients.
# torch contracts g + wd·W and W − lr·d to FMA, we round both: an ulp here and there.
FLOAT64_TOLERANCE = 1e-15
# float32 against the same in float64: 4 ulp of that, 2⁻²⁴ being half an ulp of a number in [1, 2).
FLOAT32_TOLERANCE = 4 * 2**-23


def tensor(shape, seed: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def unaligned(t: torch.Tensor, elements: int = 1) -> torch.Tensor:
    """A copy of `t` that starts `elements` after an aligned place, as a view into a bucket or an FSDP shard may."""
    beside = torch.full((t.numel() + elements + 8,), torch.inf, dtype=t.dtype, device=t.device)
    return beside[elements:].as_strided(t.shape, t.stride()).copy_(t)


def multiplier(shape, form: str, identity: bool, dtype=torch.float32, seed: int = 7) -> GradMult | None:
    """A Grad Mult of one of the forms of `scale_shapes`, spanning the published files' range (1e-11 to 2e2)."""
    scale_shape = scale_shapes(shape)[form]
    if scale_shape is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** (torch.rand(scale_shape, generator=generator, dtype=torch.float64) * 4 - 2)
    scale = scale.reshape(-1)
    if scale.numel() > 2:
        scale[0], scale[-1] = 1e-11, 2e2
    ones = torch.rand(shape[0], generator=generator, dtype=torch.float64) + 0.5 if identity else None
    return GradMult(scale.reshape(scale_shape).to(dtype), None if ones is None else ones.to(dtype))


def takes_identity(shape) -> bool:
    return len(shape) == 4 and shape[2] % 2 == 1 and shape[3] % 2 == 1


class Problem:
    """Parameters, gradients and buffers of a set of shapes, as the op takes them."""

    def __init__(
        self,
        shapes,
        form="repopt",
        identity=True,
        dtype=torch.float32,
        hypers=(HYPERS[3],),
        channels_last=False,
        first=False,
        device="cpu",
    ):
        def make(seed):
            tensors = [tensor(shape, 100 * seed + n, dtype) for n, shape in enumerate(shapes)]
            if channels_last:
                tensors = [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]
            return [t.to(device) for t in tensors]

        mults = []
        for n, shape in enumerate(shapes):
            there = form if form in scale_shapes(shape) else "none"
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            mults.append(multiplier(shape, there, identity and takes_identity(shape), wide, seed=n))
        self.params, self.grads, self.buffers = make(1), make(2), make(3)
        self.scales = [None if m is None else m.scale.to(device) for m in mults]
        self.identities = [None if m is None or m.identity is None else m.identity.to(device) for m in mults]
        self.groups = [n % len(hypers) for n in range(len(shapes))]
        self.first = [first] * len(shapes)
        self.hyper = torch.tensor(
            [
                [
                    float(h.options.get(key, 0))
                    for key in ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
                ]
                for h in hypers
            ],
            dtype=torch.float64,
        )

    def lists(self):
        return self.params, self.grads, self.buffers, self.scales, self.identities, self.first, self.groups

    def clone(self, device=None):
        twin = object.__new__(Problem)
        twin.__dict__.update(self.__dict__)
        for name in ("params", "grads", "buffers"):
            setattr(
                twin,
                name,
                [t.clone(memory_format=torch.preserve_format).to(device or t.device) for t in getattr(self, name)],
            )
        for name in ("scales", "identities"):
            setattr(twin, name, [None if t is None else t.to(device or t.device) for t in getattr(self, name)])
        return twin

    def run(self, step, **more):
        step(*self.lists(), self.hyper, **more)
        return self


def assert_same_bits(actual: Problem, expected: Problem):
    for name in ("params", "buffers", "grads"):
        for n, (a, b) in enumerate(zip(getattr(actual, name), getattr(expected, name))):
            a = a.cpu()
            assert a.stride() == b.stride()
            # NaN payloads are the processor's own affair
            others = {"nan": 12345.0, "posinf": torch.inf, "neginf": -torch.inf}
            assert torch.equal(a.nan_to_num(**others), b.nan_to_num(**others)), (
                f"{name}[{n}] of shape {tuple(b.shape)}: {(a != b).sum()} elements differ"
            )
