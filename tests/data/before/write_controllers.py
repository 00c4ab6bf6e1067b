"""Write controllers.pkl: a pickled SpatialGradientScaling with its model and optimizer, and what it must then learn.

PYTHONPATH=A-CHECKOUT-OF-e990224 python tests/data/before/write_controllers.py
"""

import pickle
from pathlib import Path

import torch
from torch import nn

import gradrep_kernels as gr

FOLDER = Path(__file__).parent


def controller(optimizer_class, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1)).double()
    x = torch.randn(4, 2, 7, 7, dtype=torch.float64)
    optimizer = optimizer_class(model.parameters(), lr=0.01, momentum=0.9)
    sgs = gr.SpatialGradientScaling(model, optimizer, batches=1, **options)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    if sgs.every_steps is None:
        sgs.update([x])
    return model, optimizer, sgs, x


def go_on(model, optimizer, sgs, x):
    """Scalings as they are, and the weights and scalings after another step and update."""
    before = sgs.scalings
    model(x).square().sum().backward()
    optimizer.step()
    if sgs.every_steps is None:
        sgs.update([x * x])
    return before, [p.detach().clone() for p in model.parameters()], sgs.scalings


if __name__ == "__main__":
    written = {}
    for name, made in {
        "fused": (gr.FusedRepSGD, {}),
        "hooks": (torch.optim.SGD, {"k": 4.0, "remove_near": True}),
        "every_steps": (gr.FusedRepSGD, {"every_steps": 1, "dependence": "autocorrelation"}),
    }.items():
        parts = controller(made[0], **made[1])
        pickled = pickle.dumps(parts)
        written[name] = pickled, go_on(*pickle.loads(pickled))
    with open(FOLDER / "controllers.pkl", "wb") as file:
        pickle.dump(written, file)
