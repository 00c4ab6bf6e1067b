"""Differences of accuracy between two rows, seed by seed, with their 95 % intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from gradrep_kernels.messages import counted
from gradrep_kernels.recipes.errors import extra

__all__ = ["Difference", "expected_misses", "half_width", "paired_difference"]

_MISSED = 0.05  # the share of 95 % intervals that leave the true value out


def half_width(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean of `values`, by Student's t.

    It is infinite for a single value.
    """
    if len(values) < 2:
        return math.inf
    t = float(extra("scipy.stats", "scipy").t.ppf(0.975, len(values) - 1))
    return t * statistics.stdev(values) / math.sqrt(len(values))


@dataclass(frozen=True)
class Difference:
    """`row` minus `other`, in points of accuracy, over seeds that both were trained with."""

    row: str
    other: str
    mean: float
    half_width: float
    """Of the 95 % interval. None of less than one test image: finer than that the test cannot tell."""
    better: int
    """Seeds for which `row` has the higher accuracy."""
    worse: int
    seeds: int

    @property
    def shown(self) -> bool:
        """Whether the interval leaves 0 out."""
        return abs(self.mean) > self.half_width

    def sentence(self) -> str:
        """What the interval allows to say."""
        if self.seeds < 2:
            return f"{self.row} against {self.other}: one seed allows no statement."
        low, high = self.mean - self.half_width, self.mean + self.half_width
        interval = f"(95 % interval {low:+.1f} to {high:+.1f}, higher for {self.better} of {self.seeds} seeds)"
        if not self.shown:
            return f"{self.row} against {self.other}: {self.mean:+.1f} points {interval}: no difference is shown."
        word = "better" if self.mean > 0 else "worse"
        return f"{self.row} is {word} than {self.other} by {abs(self.mean):.1f} points {interval}."


def paired_difference(
    row: str, other: str, accuracies: Sequence[float], others: Sequence[float], test_images: int
) -> Difference:
    """Compare two rows. Accuracies are shares in the order of the same seeds."""
    points = [100 * (a - b) for a, b in zip(accuracies, others)]
    width = max(half_width(points), 100 / test_images)
    better, worse = sum(p > 0 for p in points), sum(p < 0 for p in points)
    return Difference(row, other, statistics.fmean(points), width, better, worse, len(points))


def expected_misses(intervals: int) -> str:
    """How many of so many 95 % intervals leave the true difference out, in one sentence.

    It is the mean number, whether or not the intervals depend on each other. Those of one table do.
    """
    return f"Of {counted(intervals, 'such interval')} {_MISSED * intervals:.2g} are expected to miss."
