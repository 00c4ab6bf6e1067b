"""What the optimizers' tests share: the optimizers, a small network with multipliers of every form, and the oracle.

The oracle of an optimizer is torch's of the same rule, on M ⊙ g.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cases
import torch
from implementations import INTERPRETED
from rep_adamw import AdamWOfMasks, BranchedAdamW
from rep_signum import RepSignum, Signum
from torch import nn
from torch.optim import Optimizer

import gradrep_kernels as gr
from gradrep_kernels.ops import backends
from gradrep_kernels.ops.registry import OPS
from gradrep_kernels.optim.rep_optimizer import RepOptimizer

STEADY = 4  # steps after which a cached plan, where there is one, is in use


def _sgd_terms(state: dict[str, Any], grad: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    return sum((state[key].abs() for key in ("momentum_buffer", "exp_avg") if key in state), 2 * grad.abs())


def _adamw_terms(state: dict[str, Any], grad: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    (beta1, beta2), t = options.get("betas", (0.9, 0.999)), float(state["step"])
    v = state["max_exp_avg_sq" if options.get("amsgrad") else "exp_avg_sq"] / (1 - beta2**t)
    return (2 * grad.abs() + state["exp_avg"].abs()) / (1 - beta1**t) / (v.sqrt() + options.get("eps", 1e-8))


@dataclass(frozen=True)
class OptimizerCase:
    """An optimizer with Grad Mult, and all that the contract must know of its rule."""

    name: str
    make: type[RepOptimizer]
    oracle: Callable[..., Optimizer]
    states: tuple[str, ...]  # keys of the arrays that it keeps for each parameter
    hyper: dict[str, Any]  # hyper-parameters with which it keeps all of them, and weights decay; lr apart
    plain: dict[str, Any]  # those of its shortest form, without weight decay
    variants: tuple[cases.Hyper, ...]  # every branch of its rule, lr included
    changes: dict[str, tuple[Any, Any]]  # values that a hyper-parameter takes one after the other in mid-run
    takes_complex: bool = True
    not_with_sparse: tuple[tuple[dict[str, Any], str], ...] = ()  # options that keep sparse gradients out: the reason
    kernels: bool = True  # whether the package has kernels of it, or only a reference
    counts: bool = False  # whether it counts the steps of each parameter
    takes_other_dtypes: bool = True  # whether its oracle takes gradients and arrays of another dtype than the weight's
    scales_gradients: bool = False  # whether G of SGS scales the gradient, and is no factor of M
    of_a_grad_mult: frozenset[str] = frozenset({"scale", "identity"})  # what a checkpoint has of one, but for the name
    # (state, gradient, options) -> what a step of lr = 1 is a difference of, beside the weight
    terms: Callable[[dict[str, Any], torch.Tensor, dict[str, Any]], torch.Tensor] = _sgd_terms

    def packed(self, scale: torch.Tensor) -> dict[str, Any]:
        """What a checkpoint has of a Grad Mult with this scale."""
        values = {"scale": scale, "alphas": scale.sqrt()[None]}
        return {key: values.get(key) for key in self.of_a_grad_mult}

    @property
    def entries(self) -> tuple[str, ...]:
        """The keys of a parameter's state."""
        return (*self.states, *(["step"] if self.counts else []))

    @property
    def backends(self) -> tuple[str, ...]:
        """Where its contract is tested: without kernels one backend is as good as another."""
        if INTERPRETED:
            return ("triton",) if self.kernels else ()
        return ("auto", "reference") if self.kernels else ("auto",)

    @property
    def without_decay(self) -> dict[str, Any]:
        return {**self.hyper, "weight_decay": 0.0}

    def is_served_by_kernels(self, device: str) -> bool:
        """Whether its step is now served by something else than the reference."""
        op = self.make.update_rule.op
        return backends.implementation(op, device) is not OPS[op].reference


SGD = OptimizerCase(
    "sgd",
    gr.FusedRepSGD,
    functools.partial(torch.optim.SGD, foreach=False),
    states=("momentum_buffer",),
    hyper={"momentum": 0.9, "weight_decay": 0.01},
    plain={},
    variants=tuple(cases.HYPERS),
    changes={"weight_decay": (0.0, 0.1), "dampening": (0.5, 0.0), "nesterov": (True, False), "maximize": (True, False)},
    not_with_sparse=(({"momentum": 0.9, "weight_decay": 0.1}, "weight decay"),),
)
SIGNUM = OptimizerCase(
    "signum",
    RepSignum,
    Signum,
    states=("exp_avg",),
    hyper={"momentum": 0.9, "weight_decay": 0.01},
    plain={"momentum": 0.0},
    variants=(
        cases.Hyper("no_memory", {"lr": 0.1, "momentum": 0.0}),
        cases.Hyper("momentum_weight_decay", {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.05}),
        cases.Hyper("maximize_all", {"lr": 0.02, "momentum": 0.7, "weight_decay": 0.01, "maximize": True}),
    ),
    changes={"weight_decay": (0.0, 0.1), "momentum": (0.9, 0.5), "maximize": (True, False)},
    takes_complex=False,
    not_with_sparse=(({}, "Signum"),),
    kernels=False,
)
ADAMW = OptimizerCase(
    "adamw",
    AdamWOfMasks,
    BranchedAdamW,
    states=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    hyper={"weight_decay": 0.01, "amsgrad": True, "eps": 1e-3},
    plain={"weight_decay": 0.0},
    variants=(
        cases.Hyper("default", {"lr": 0.01}),
        cases.Hyper("amsgrad", {"lr": 0.01, "amsgrad": True}),
        cases.Hyper("large_epsilon", {"lr": 0.03, "eps": 0.1, "weight_decay": 0.0}),
        cases.Hyper("short_memory", {"lr": 0.02, "betas": (0.3, 0.6)}),  # torch.lerp goes from the other end
        cases.Hyper("no_memory", {"lr": 0.02, "betas": (0.0, 0.0), "eps": 0.1}),
        cases.Hyper("maximize_all", {"lr": 0.02, "amsgrad": True, "weight_decay": 0.1, "maximize": True}),
    ),
    changes={
        "weight_decay": (0.0, 0.1),
        "betas": ((0.9, 0.99), (0.5, 0.9)),
        "eps": (1e-3, 0.1),
        "maximize": (True, False),
    },
    not_with_sparse=(({}, "AdamW"),),
    counts=True,
    takes_other_dtypes=False,
    scales_gradients=True,
    of_a_grad_mult=frozenset({"scale", "identity", "alphas", "diagonal", "branch_scales"}),
    terms=_adamw_terms,
)
CASES = (SGD, ADAMW, SIGNUM)


def named(optimizers: Sequence[OptimizerCase]) -> dict[str, Any]:
    """The arguments of a fixture or a parametrization over optimizers, on the backend that serves anyhow."""
    return {"params": optimizers, "ids": [case.name for case in optimizers]}


def served(optimizers: Sequence[OptimizerCase]) -> dict[str, Any]:
    """The arguments of a fixture over (optimizer, backend)."""
    pairs = [(case, backend) for case in optimizers for backend in case.backends]
    return {"params": pairs, "ids": [f"{case.name}-{backend}" for case, backend in pairs]}


def net(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """Plain, grouped, depthwise and 5 x 5 convolutions on 3 x 6 x 6 images, vectors and a matrix."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 5, padding=2, groups=8),
        nn.Flatten(),
        nn.Linear(8 * 6 * 6, 5),
    ).to(dtype)


def batch(dtype: torch.dtype = torch.float32, seed: int = 3, images: int = 4) -> torch.Tensor:
    return torch.randn(images, 3, 6, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mults(model: nn.Module, seed: int = 1) -> dict[nn.Parameter, gr.GradMult]:
    """Convolutions: [O, 1, kh, kw], every second one with an identity; matrices: dense. float32, as real ones are."""
    g = torch.Generator().manual_seed(seed)
    multipliers = {}
    for p in model.parameters():
        if p.dim() == 4:
            scale, identity = (
                0.3 + torch.rand(p.shape[0], 1, *p.shape[2:], generator=g),
                torch.rand(p.shape[0], generator=g),
            )
            multipliers[p] = gr.GradMult(scale, identity if len(multipliers) % 2 == 0 else None)
        elif p.dim() == 2:
            multipliers[p] = gr.GradMult(torch.rand(p.shape, generator=g) * 2)
    return multipliers


def dense(mult: gr.GradMult, shape, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """M at full size; its parts are brought to `dtype` before they are added."""
    identity = None if mult.identity is None else mult.identity.to(dtype)
    return gr.GradMult(mult.scale.to(dtype), identity).dense(shape)


def set_grads(params, seed: int) -> None:
    """Gradients that do not depend on the weights, so that trajectories can be compared."""
    g = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=g, dtype=torch.float64))


def set_both_grads(ours, twins, seed: int) -> None:
    """The same gradients for two lists of parameters."""
    set_grads(ours, seed)
    set_grads(twins, seed)


def oracle_step(
    oracle: Optimizer,
    masks: dict[nn.Parameter, torch.Tensor],
    scalings: dict[nn.Parameter, torch.Tensor] | None = None,
) -> None:
    """One step of the oracle on M ⊙ g, or on G ⊙ g by the rule of its branches; the gradients are put back."""
    branched = isinstance(oracle, BranchedAdamW)
    factors = (scalings or {}) if branched else masks
    kept = {p: p.grad for p in factors if p.grad is not None}
    for p, grad in kept.items():
        p.grad = grad * factors[p].to(grad.dtype)
    if branched:
        oracle.step_with(masks)
    else:
        oracle.step()
    for p, grad in kept.items():
        p.grad = grad


class Pair:
    """The same network twice: `ours` under the optimizer of a case, `twin` under its oracle, with dense multipliers.

    The parameters are dealt to `groups` groups with learning rates lr, 2 lr, ... Where no hyper-parameters are given
    they are the case's. float64 unless another dtype is asked for.
    """

    def __init__(
        self,
        case: OptimizerCase,
        dtype: torch.dtype = torch.float64,
        multiplied: bool = True,
        groups: int = 1,
        lr=0.05,
        fused=None,
        hyper: dict[str, Any] | None = None,
    ):
        hyper = {"lr": lr, **(case.hyper if hyper is None else hyper)}
        self.case, lr = case, hyper.pop("lr")
        self.ours, self.twin = net(dtype), net(dtype)
        self.mults = mults(self.ours) if multiplied else {}
        self.masks = {
            q: dense(self.mults[p], p.shape)
            for p, q in zip(self.ours.parameters(), self.twin.parameters())
            if p in self.mults
        }
        self.scalings: dict[nn.Parameter, torch.Tensor] = {}
        self.opt = case.make(self._split(self.ours, groups, lr), **hyper, fused=fused, grad_mults=self.mults or None)
        self.oracle = case.oracle(self._split(self.twin, groups, lr), **hyper)

    @staticmethod
    def _split(model, groups, lr):
        params = list(model.parameters())
        return [{"params": params[n::groups], "lr": lr * (n + 1)} for n in range(groups)]

    @property
    def optimizers(self) -> tuple[RepOptimizer, Optimizer]:
        return self.opt, self.oracle

    @property
    def models(self) -> tuple[nn.Module, nn.Module]:
        return self.ours, self.twin

    def set_grads(self, seed: int) -> None:
        set_both_grads(self.ours.parameters(), self.twin.parameters(), seed)

    def step(self) -> None:
        """One step of both on the gradients that are there."""
        self.opt.step()
        self.oracle_step()

    def oracle_step(self) -> None:
        oracle_step(self.oracle, self.masks, self.scalings)

    def set_scaling(self, n: int, scaling: torch.Tensor) -> None:
        """Set G of SGS for parameter `n` of both."""
        weight, twin = list(self.ours.parameters())[n], list(self.twin.parameters())[n]
        self.opt.set_spatial_scaling(weight, scaling)
        scaling = scaling.double()
        if self.case.scales_gradients:
            self.scalings[twin] = scaling
        else:
            caller = dense(self.mults[weight], weight.shape) if weight in self.mults else torch.ones_like(twin)
            self.masks[twin] = caller * scaling

    def train(self, steps: int = 3, seed: int = 10) -> Pair:
        """Steps on the same forced gradients; with three of them the steady state of our step is reached."""
        for step in range(steps):
            self.set_grads(seed + step)
            self.step()
        return self

    def weights(self) -> list[torch.Tensor]:
        """Copies of ours."""
        return [p.detach().clone() for p in self.ours.parameters()]

    def arrays(self) -> list[torch.Tensor]:
        """Copies of all arrays that our optimizer keeps."""
        return [state[key].clone() for state in self.opt.state.values() for key in self.case.states]

    def assert_equal(self, tolerance: float = 1e-13) -> None:
        """Weights and states agree to `tolerance` of the parameter's largest (default: some steps of float64)."""
        for p, q in zip(self.ours.parameters(), self.twin.parameters()):
            assert_close(p, q, tolerance)
            for key in self.case.states:
                a, b = self.opt.state.get(p, {}).get(key), self.oracle.state.get(q, {}).get(key)
                assert (a is None) == (b is None)
                if a is not None:
                    assert_close(a, b, tolerance)


def all_equal(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


# ---- torch.amp.GradScaler, and clipping


def overflow(pair: Pair) -> None:
    next(pair.ours.parameters()).grad.view(-1)[1] = float("inf")


def scaled_step(scaler: torch.amp.GradScaler, opt: Optimizer) -> None:
    scaler.scale(torch.zeros(()))  # makes the scale; gradients are set by hand
    scaler.step(opt)
    scaler.update()


def csla_norm(params, masks: dict[nn.Parameter, torch.Tensor]) -> float:
    """√(Σ M ⊙ g²)"""
    squares = (p.grad.double().square() * masks.get(p, torch.ones(())) for p in params)
    return float(sum(s.sum() for s in squares)) ** 0.5


def clip_twin(pair: Pair, max_norm: float) -> None:
    norm = csla_norm(pair.twin.parameters(), pair.masks)
    for q in pair.twin.parameters():
        q.grad.mul_(min(1.0, max_norm / (norm + 1e-6)))


def gradients_of(model: nn.Module) -> list[tuple]:
    """The gradients of a model, their values and versions, for `assert_left_alone`."""
    return [(p.grad, p.grad.clone(), p.grad._version) for p in model.parameters()]


def assert_left_alone(model: nn.Module, before: list[tuple]) -> None:
    for p, (grad, values, version) in zip(model.parameters(), before):
        assert p.grad is grad
        assert torch.equal(grad, values)
        assert grad._version == version


def amp_steps(pair: Pair, scaler: torch.amp.GradScaler, steps: int = STEADY, clip: float | None = None) -> None:
    """Gradients times the scale for ours, as they are for the twin."""
    for step in range(steps):
        pair.set_grads(30 + step)
        scaler.scale(torch.zeros(()))
        for p in pair.ours.parameters():
            p.grad.mul_(scaler.get_scale())
        if clip is not None:
            scaler.unscale_(pair.opt)
            pair.opt.clip_grad_norm_(clip)
            clip_twin(pair, clip)
        scaled_step(scaler, pair.opt)
        pair.oracle_step()


def assert_close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-13) -> None:
    assert a.dtype == b.dtype
    torch.testing.assert_close(
        a.detach().double(),
        b.detach().double(),
        rtol=0,
        atol=tolerance * (1.0 + (float(b.detach().abs().max()) if b.numel() else 0.0)),
    )
