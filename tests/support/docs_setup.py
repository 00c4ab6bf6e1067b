"""What the pages' code takes from its reader: a loop, loaders, a number of epochs. `make types` reads it too."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["epochs", "small_loader", "train", "train_loader", "val_loader"]


def _loader(images: int) -> DataLoader:
    pictures = torch.rand(images, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(pictures, torch.arange(images) % 10), batch_size=8)


epochs = 2
small_loader, train_loader, val_loader = _loader(8), _loader(16), _loader(8)


def train(model: nn.Module, loader: DataLoader, optimizer: torch.optim.Optimizer) -> None:
    """Train one epoch."""
    model.train()
    for images, labels in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
