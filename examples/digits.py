"""What the examples share: scikit-learn's digits, 8 x 8, and a plain network for them."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

images = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16  # [1797, 1, 8, 8]
labels = torch.tensor(load_digits().target)
is_test = torch.arange(len(labels)) % 5 == 0


def training_data(batch_size: int = 32, seed: int = 0) -> DataLoader[tuple[Tensor, ...]]:
    """The order of an epoch is drawn from the loader's generator. Seed that to repeat the epoch."""
    dataset = TensorDataset(images[~is_test], labels[~is_test])
    order = torch.Generator().manual_seed(seed)
    return DataLoader(dataset, batch_size, shuffle=True, drop_last=True, generator=order)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)

    def conv(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        layer = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]

    layers = [*conv(1, 16), *conv(16, 16), *conv(16, 32, stride=2), *conv(32, 32)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Percent of the test images."""
    was_training, device = model.training, next(model.parameters()).device
    found = model.eval()(images[is_test].to(device)).argmax(1).cpu()
    model.train(was_training)
    return 100 * float((found == labels[is_test]).float().mean())
