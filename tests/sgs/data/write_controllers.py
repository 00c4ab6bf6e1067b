"""Write controllers.pkl: controllers with their hooks, as they were pickled before copies hooked their optimizer.

PYTHONPATH=A-CHECKOUT-OF-8edd9c3 python tests/sgs/data/write_controllers.py
"""

import pickle
from pathlib import Path

import torch
from torch import nn

import gradrep_kernels as gr


class Fabric(nn.Module):
    def __init__(self, model):
        super().__init__()
        self._forward_module = model
        self.other = nn.Identity()

    def forward(self, x):
        return self._forward_module(x)


def trained(wrap=lambda model: model, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1)).double()
    x = torch.randn(4, 2, 7, 7, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    sgs = gr.SpatialGradientScaling(wrap(model), optimizer, batches=1, **options)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    if sgs.every_steps is None:
        sgs.update([x])
    state = sgs.state_dict()
    state["ranges"] = {}
    return pickle.dumps((model, optimizer, sgs)) if wrap is not Fabric else None, state, sgs.scalings


if __name__ == "__main__":
    cases = {
        "hooks": {},
        "update": {"apply_to": "update"},
        "every_steps": {"every_steps": 1},
        "fabric": {"wrap": Fabric},
    }
    written = {name: trained(**options) for name, options in cases.items()}
    Path(__file__).with_name("controllers.pkl").write_bytes(pickle.dumps(written))
