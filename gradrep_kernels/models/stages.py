"""Networks whose stages can be asked for, as detection, segmentation and pose estimation need them.

Where: RepOptimizers (Ding et al., 2023), Table 7, and SGS (Detkov et al., 2023), Tables 7 and 8. The convention for
what a backbone returns, and says of it, is that of timm's `features_only=True`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

__all__ = ["FeatureInfo", "Stage", "StagedNetwork", "features"]


@dataclass(frozen=True)
class Stage:
    """One stage of a network: names of the modules that run one after the other, and what comes out.

    `reduction` is how many pixels of the input, along one side, a pixel of the output stands for.
    """

    modules: tuple[str, ...]
    channels: int
    reduction: int


@dataclass(frozen=True)
class FeatureInfo:
    """What a backbone returns: the stages `out_indices` of a network, in their order."""

    out_indices: tuple[int, ...]
    stages: tuple[Stage, ...]

    def channels(self) -> list[int]:
        """Channels of each output."""
        return [self.stages[index].channels for index in self.out_indices]

    def reduction(self) -> list[int]:
        """How many pixels of the input, along one side, a pixel of each output stands for."""
        return [self.stages[index].reduction for index in self.out_indices]

    def module_name(self) -> list[str]:
        """Name of the last module of each stage."""
        return [self.stages[index].modules[-1] for index in self.out_indices]


class StagedNetwork(nn.Module):
    """A sequence of stages, and a head behind them.

    [N, C, H, W] -> what `classify` makes of the last stage, or in the form that `features` gives a list of stages
    [N, channels, H / reduction, W / reduction]. A subclass has `stages()`, `classify(x)`, and `head`.
    """

    head: ClassVar[tuple[str, ...]] = ("gap", "linear")
    """Children that only the classifier has."""
    feature_info: FeatureInfo = None  # type: ignore[assignment]  # so that backbones need no check for None
    """What a backbone returns, None for a classifier."""

    def stages(self) -> tuple[Stage, ...]:
        """Return the stages in the order in which they run."""
        raise NotImplementedError

    def classify(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> [N, num_classes]
        """Apply the head: global average pooling and a linear layer."""
        return self.linear(self.gap(x).flatten(1))

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        info = self.feature_info
        if info is None:
            for stage in self.stages():
                x = self._run(stage, x)
            return self.classify(x)
        outputs = []
        for index, stage in enumerate(info.stages[: info.out_indices[-1] + 1]):
            x = self._run(stage, x)
            if index in info.out_indices:
                outputs.append(x)
        return outputs

    def _run(self, stage: Stage, x: Tensor) -> Tensor:
        for name in stage.modules:
            x = self.get_submodule(name)(x)
        return x


def features(model: nn.Module, out_indices: Sequence[int] | None = None) -> StagedNetwork:
    """Return a backbone: a new model that returns the outputs of stages instead of class scores.

    [N, in_channels, H, W] -> list of [N, channels, H / reduction, W / reduction], from the largest to the smallest.
    `model.feature_info.channels()`, `.reduction()` and `.module_name()` tell of each output, as for a backbone of timm
    (`features_only=True`). Sides that `reduction` does not divide are rounded up.

    Args:
        model:       a RepOpt-VGG in any mode, VGG, ResNet, PreAct-ResNet or PyramidNet of `gradrep_kernels.models`. A
                     model of timm becomes a backbone by timm's own `create_model(NAME, features_only=True)`.
        out_indices: which stages, counted from 0. Those below 0 count from the end. None: all of them.

    Stages are those of timm's networks: the stem, then one for each resolution. VGG's end before its pools, and the
    last is the last pool. Modules and parameters keep their names, so that weights, scales files and `csla` functions
    of the classifier serve the backbone. What is not needed is left out: the head, and stages behind the last of
    `out_indices`, whose scales are then to be left out too. `model` itself is not changed.

    A backbone may be frozen in part: parameters without gradients are left out by `gr.param_groups`, and norms in eval
    mode keep their statistics.

    Raises TypeError for another model, ValueError for indices that are empty, twice the same or beyond the stages, and
    for a model that is a backbone already.
    """
    if not isinstance(model, StagedNetwork):
        raise TypeError(
            f"features takes networks of gradrep_kernels.models that have stages, got {type(model).__name__}; timm's "
            "become backbones by timm.create_model(NAME, features_only=True)"
        )
    if model.feature_info is not None:
        raise ValueError(f"the model is a backbone already, with out_indices {model.feature_info.out_indices}")
    stages = model.stages()
    chosen = _chosen(out_indices, len(stages))
    backbone = copy.deepcopy(model)
    dropped = [name for stage in stages[chosen[-1] + 1 :] for name in stage.modules]
    for name in (*dropped, *backbone.head):
        parent, _, child = name.rpartition(".")
        delattr(backbone.get_submodule(parent), child)
    backbone.feature_info = FeatureInfo(chosen, stages)
    return backbone


def _chosen(out_indices: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """Return the indices of stages, counted from 0, in rising order."""
    if out_indices is None:
        return tuple(range(count))
    chosen = sorted(index + count if index < 0 else index for index in out_indices)
    if not chosen or len(set(chosen)) < len(chosen) or not 0 <= chosen[0] <= chosen[-1] < count:
        raise ValueError(f"out_indices must be different stages out of 0 to {count - 1}, got {tuple(out_indices)}")
    return tuple(chosen)
