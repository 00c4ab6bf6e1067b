"""What the optimizer's tests share: a small network with multipliers of every form, and torch's SGD on M ⊙ g as the oracle."""

from __future__ import annotations

import torch
from torch import nn

import gradrep_kernels as gr

MOMENTUM = {"momentum": 0.9, "weight_decay": 0.01}
STEADY = 4  # steps after which a cached plan, where there is one, is in use


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
    found = {}
    for p in model.parameters():
        if p.dim() == 4:
            scale, identity = (
                0.3 + torch.rand(p.shape[0], 1, *p.shape[2:], generator=g),
                torch.rand(p.shape[0], generator=g),
            )
            found[p] = gr.GradMult(scale, identity if len(found) % 2 == 0 else None)
        elif p.dim() == 2:
            found[p] = gr.GradMult(torch.rand(p.shape, generator=g) * 2)
    return found


def dense(mult: gr.GradMult, shape, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """M at full size; its parts are brought to `dtype` before they are added."""
    identity = None if mult.identity is None else mult.identity.to(dtype)
    return gr.GradMult(mult.scale.to(dtype), identity).dense(shape)


def set_grads(params, seed: int) -> None:
    """Gradients that do not depend on the weights, so that trajectories can be compared."""
    g = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=g, dtype=torch.float64))


def oracle_step(sgd: torch.optim.SGD, masks: dict[nn.Parameter, torch.Tensor]) -> None:
    """One step of torch's SGD on M ⊙ g; the gradients are put back."""
    kept = {p: p.grad for p in masks if p.grad is not None}
    for p, grad in kept.items():
        p.grad = grad * masks[p].to(grad.dtype)
    sgd.step()
    for p, grad in kept.items():
        p.grad = grad


class Pair:
    """The same network twice: `ours` under FusedRepSGD, `twin` under torch.optim.SGD with dense multipliers.

    The parameters are dealt to `groups` groups with learning rates lr, 2 lr, ... float64 unless another dtype is asked for.
    """

    def __init__(
        self, dtype: torch.dtype = torch.float64, multiplied: bool = True, groups: int = 1, lr=0.05, fused=None, **hyper
    ):
        self.ours, self.twin = net(dtype), net(dtype)
        self.mults = mults(self.ours) if multiplied else {}
        self.masks = {
            q: dense(self.mults[p], p.shape)
            for p, q in zip(self.ours.parameters(), self.twin.parameters())
            if p in self.mults
        }
        self.opt = gr.FusedRepSGD(
            self._split(self.ours, groups, lr), **hyper, fused=fused, grad_mults=self.mults or None
        )
        self.sgd = torch.optim.SGD(self._split(self.twin, groups, lr), **hyper, foreach=False)

    @staticmethod
    def _split(model, groups, lr):
        params = list(model.parameters())
        return [{"params": params[n::groups], "lr": lr * (n + 1)} for n in range(groups)]

    def set_grads(self, seed: int) -> None:
        set_grads(self.ours.parameters(), seed)
        set_grads(self.twin.parameters(), seed)

    def train(self, steps: int = 3, seed: int = 10) -> Pair:
        """Steps on the same forced gradients; with three of them the steady state of our step is reached."""
        for step in range(steps):
            self.set_grads(seed + step)
            self.opt.step()
            oracle_step(self.sgd, self.masks)
        return self

    def assert_equal(self, tolerance: float = 1e-13) -> None:
        """Weights and momentum agree to `tolerance` of the parameter's largest (default: some steps of float64)."""
        for p, q in zip(self.ours.parameters(), self.twin.parameters()):
            assert_close(p, q, tolerance)
            a, b = self.opt.state.get(p, {}).get("momentum_buffer"), self.sgd.state.get(q, {}).get("momentum_buffer")
            assert (a is None) == (b is None)
            if a is not None:
                assert_close(a, b, tolerance)


def assert_close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-13) -> None:
    assert a.dtype == b.dtype
    torch.testing.assert_close(
        a.detach().double(),
        b.detach().double(),
        rtol=0,
        atol=tolerance * (1.0 + (float(b.detach().abs().max()) if b.numel() else 0.0)),
    )


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def buffers(opt) -> list[torch.Tensor]:
    return [state["momentum_buffer"].clone() for state in opt.state.values()]


def all_equal(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def overflow(pair) -> None:
    next(pair.ours.parameters()).grad.view(-1)[1] = float("inf")


def scaled_step(scaler, opt) -> None:
    scaler.scale(torch.zeros(()))  # makes the scale; gradients are set by hand
    scaler.step(opt)
    scaler.update()


def clip_twin(pair: Pair, max_norm: float) -> None:
    norm = (
        sum(float((q.grad.double().square() * pair.masks.get(q, torch.ones(()))).sum()) for q in pair.twin.parameters())
        ** 0.5
    )
    for q in pair.twin.parameters():
        q.grad.mul_(min(1.0, max_norm / (norm + 1e-6)))


def amp_steps(pair: Pair, scaler, steps: int = STEADY, clip: float | None = None) -> None:
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
        oracle_step(pair.sgd, pair.masks)
