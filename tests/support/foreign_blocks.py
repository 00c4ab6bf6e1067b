"""Blocks as code beside this package writes them, with scales behind their branches, and their plain form."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Scale(nn.Module):
    """A scale layer as others write it."""

    def __init__(self, channels, value, shape=(-1,), bias=None):
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), value).reshape(shape))
        self.bias = None if bias is None else nn.Parameter(torch.full((channels,), bias))

    def forward(self, x):
        y = x * self.weight.reshape(1, -1, 1, 1)
        return y if self.bias is None else y + self.bias.reshape(1, -1, 1, 1)


class Foreign(nn.Module):
    """Branches with scales, norm and activation in one block. It lacks the attribute of a branch that it lacks."""

    def __init__(self, inputs, outputs, stride=1, **layer):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.scale_conv = Scale(outputs, -1.5, **layer)
        self.conv_1x1 = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.scale_1x1 = Scale(outputs, 0.5, **layer)
        if inputs == outputs and stride == 1:
            self.scale_identity = Scale(outputs, 0.25, **layer)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x):
        y = self.scale_conv(self.conv(x)) + self.scale_1x1(self.conv_1x1(x))
        return F.relu(self.bn(y + self.scale_identity(x) if hasattr(self, "scale_identity") else y))


class Plain(nn.Module):
    """The block's plain form."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))
