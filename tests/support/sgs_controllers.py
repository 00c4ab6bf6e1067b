"""Models, batches and optimizers that the tests of SpatialGradientScaling share."""

from __future__ import annotations

import gc

import torch
from torch import nn
from torch.nn import functional as F

import gradrep_kernels as gr

TAPS = [(0, 1), (1, -1), (1, 0), (1, 1)]  # half of a 3 x 3 kernel


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, (3, 5), padding=(0, 2), groups=2),
        nn.BatchNorm2d(4),
        nn.Dropout(0.5),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, padding_mode="reflect"),
        nn.Conv2d(4, 3, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def make_batches(number=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [F.avg_pool2d(torch.randn(5, 2, 14, 13, generator=generator), 3, 1) for _ in range(number)]


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def controller(model, **options):
    return gr.SpatialGradientScaling(model, sgd(model), **options)


def maps_of(model, batches):
    """The input maps of each convolution, in eval mode, batch by batch."""
    maps, handles = {}, []
    for name, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d):
            handles.append(
                conv.register_forward_pre_hook(lambda _, args, name=name: maps.setdefault(name, []).append(args[0]))
            )
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    model.train()
    for handle in handles:
        handle.remove()
    return maps


def all_hooks(model):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def live_tensors():
    """The ids of all tensors that Python code holds. Collect garbage before the first call: ids are used again."""
    return {id(thing) for thing in gc.get_objects() if type(thing) in (torch.Tensor, nn.Parameter)}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, image, gain=1.0):
        return self.conv(image * gain)


class WithScaling(torch.optim.SGD):
    """An optimizer that does the rest itself."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.told = []

    def set_spatial_scaling(self, param, g):
        self.told.append((param, g))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
}


def train(model, optimizer, batches, closure=False):
    for batch in batches:

        def evaluate(batch=batch):
            optimizer.zero_grad()
            loss = model(batch).square().sum()
            loss.backward()
            return loss

        optimizer.step(evaluate) if closure else (evaluate(), optimizer.step())


def sturges_bins(n):
    """1 + ceil(log2 n), in integers."""
    return torch.tensor([[1 + (int(pairs) - 1).bit_length() for pairs in row] for row in n])


def scaling_of(nmi):
    """G [3, 3] from the NMI [C, 4] at `TAPS`, with k = 5."""
    s = torch.ones(9, dtype=torch.float64)
    s[5:] = (5 * nmi / (4 * nmi + 1)).mean(0)
    s[:4] = s[5:].flip(0)
    return (s / s.mean()).float().view(3, 3)


class FailingOnce(torch.optim.SGD):
    """Raises in its first step."""

    fail = True

    @torch.no_grad()
    def step(self, closure=None):
        if self.fail:
            self.fail = False
            raise RuntimeError("the step fails")
        return super().step(closure)
