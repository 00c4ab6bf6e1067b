"""The pictures of a report and their captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradrep_kernels.csla import Scales
from gradrep_kernels.recipes import plots
from gradrep_kernels.recipes.table import RECIPES
from gradrep_kernels.recipes.trainings import kept_weights

__all__ = ["draw_pictures"]


def draw_pictures(
    folder: Path,
    summary: Mapping[str, Any],
    trainings: Mapping[str, list[dict[str, Any]]],
    seeds: Sequence[int],
    scales: Scales | None,
    initial: Scales | None,
    search_epochs: Sequence[Mapping[str, Any]],
) -> dict[str, str]:
    """Draw the pictures into `folder` and return {file name: caption}. `search_epochs`: those of the Hyper-Search."""
    captions: dict[str, str] = {}
    if trainings:
        plots.accuracy_against_cost(folder / "cost.png", summary["recipes"])
        captions["cost.png"] = (
            "Test accuracy against the time of a training step. Small points are seeds, large ones their means, bars "
            "95 % intervals of the mean"
        )
        epochs = {name: [training["epochs"] for training in runs] for name, runs in trainings.items()}
        plots.curves(folder / "curves.png", epochs)
        captions["curves.png"] = (
            "Training loss and test accuracy: mean over the seeds, and one standard deviation either side"
        )
    for name, runs in trainings.items():
        scalings = runs[0].get("scalings")
        if scalings and scalings["start"]:
            file_name = f"spatial_scaling_{name.replace('+', '_')}.png"
            plots.spatial_scalings(folder / file_name, scalings["start"], scalings["end"])
            captions[file_name] = (
                f"G of the first, middle and last layer under {name}, seed {seeds[0]}, "
                "after its first update and at the end"
            )
    networks = _networks(folder, summary["recipes"], seeds[0])
    if networks:
        plots.kernels(folder / "kernels.png", networks)
        captions["kernels.png"] = (
            f"Mean absolute kernel of the first, middle and last layer after training, and of all layers, seed "
            f"{seeds[0]}. An average tap is 1"
        )
    if scales is not None:
        plots.scales_over_depth(folder / "scales.png", scales, initial)
        captions["scales.png"] = (
            "Mean scales over depth with the standard deviation over channels; curves join layers with a shortcut; "
            "dashed: initial values"
        )
    by_epoch = [means for means in (record.get("layer_scale_means") for record in search_epochs) if means]
    if by_epoch:
        plots.scale_means(folder / "scale_means.png", by_epoch)
        captions["scale_means.png"] = "Mean scales after each epoch of the Hyper-Search"
    if summary["identity_ratio"]:
        plots.identity_ratios(folder / "identity.png", summary["identity_ratio"])
        captions["identity.png"] = (
            "Share of the identity in the variance of a block's output before the first step of the Hyper-Search, for "
            "scales that start by depth and at 1"
        )
    return captions


def _networks(folder: Path, recipes: Mapping[str, Mapping[str, Any]], seed: int) -> dict[str, dict[str, Tensor]]:
    """{row: its weights} of the rows of plain networks, where one of them has spatial scalings. Else none."""
    rows = [name for name in recipes if name in RECIPES and RECIPES[name].plain_network]
    if len(rows) < 2 or not any(RECIPES[name].sgs for name in rows):
        return {}
    networks = {}
    for name in rows:
        path = kept_weights(folder, name, seed, recipes[name]["learning_rate"])
        if path is not None:
            weights = torch.load(path, map_location="cpu", weights_only=True)
            kernels = [tensor for tensor in weights.values() if tensor.ndim == 4 and tensor[0, 0].numel() > 1]
            if kernels and all(kernel.isfinite().all() for kernel in kernels):
                networks[name] = weights
    return networks if len(networks) > 1 and any(RECIPES[name].sgs for name in networks) else {}
