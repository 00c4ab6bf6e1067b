"""The pictures of a report and their captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradrep_kernels.csla import Scales
from gradrep_kernels.recipes import plots

__all__ = ["draw_pictures"]


def draw_pictures(
    folder: Path,
    summary: Mapping[str, Any],
    trainings: Mapping[str, list[dict[str, Any]]],
    seeds: Sequence[int],
    scales: Scales | None,
    initial: Scales | None,
) -> dict[str, str]:
    """Draw the pictures into `folder` and return {file name: caption}."""
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
    if scales is not None:
        plots.scales_over_depth(folder / "scales.png", scales, initial)
        captions["scales.png"] = (
            "Mean scales over depth with the standard deviation over channels; curves join layers with a shortcut; "
            "dashed: initial values"
        )
    return captions
