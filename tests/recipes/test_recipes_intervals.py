"""Paired differences: against scipy's paired t test, and the sentences that they allow."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gradrep_kernels.recipes.intervals import expected_misses, half_width, paired_difference


@pytest.mark.parametrize("seeds", [2, 3, 8, 31])
def test_the_interval_is_that_of_the_paired_t_test(seeds):
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(seeds)
    a, b = rng.uniform(0.5, 1, seeds), rng.uniform(0.4, 0.9, seeds)
    found = paired_difference("a", "b", a.tolist(), b.tolist(), test_images=10**9)
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert found.mean - found.half_width == pytest.approx(100 * low)
    assert found.mean + found.half_width == pytest.approx(100 * high)
    assert (found.better, found.worse, found.seeds) == (int((a > b).sum()), int((a < b).sum()), seeds)


def test_an_interval_is_not_finer_than_the_test():
    found = paired_difference("a", "b", [0.75, 0.75, 0.75], [0.746, 0.746, 0.746], test_images=200)
    assert found.half_width == pytest.approx(0.5)
    assert not found.shown
    assert paired_difference("a", "b", [0.75] * 3, [0.74] * 3, test_images=200).shown


def test_one_seed_has_no_interval():
    assert half_width([3.0]) == math.inf
    found = paired_difference("a", "b", [0.9], [0.1], test_images=100)
    assert not found.shown
    assert found.sentence() == "a against b: one seed allows no statement."


def test_sentences_say_what_the_interval_allows():
    better = paired_difference("a", "b", [0.90, 0.92, 0.91], [0.80, 0.81, 0.82], test_images=1000)
    assert better.sentence() == (
        "a is better than b by 10.0 points (95 % interval +7.5 to +12.5, higher for 3 of 3 seeds)."
    )
    worse = paired_difference("b", "a", [0.80, 0.81, 0.82], [0.90, 0.92, 0.91], test_images=1000)
    assert worse.sentence().startswith("b is worse than a by 10.0 points (95 % interval -12.5 to -7.5, higher for 0 of")
    unclear = paired_difference("a", "b", [0.9, 0.7, 0.8], [0.8, 0.8, 0.8], test_images=1000)
    assert unclear.sentence().endswith("higher for 1 of 3 seeds): no difference is shown.")


@pytest.mark.parametrize(
    ("intervals", "misses"), [(1, "1 such interval 0.05"), (20, "20 such intervals 1"), (56, "56 such intervals 2.8")]
)
def test_one_interval_of_twenty_misses(intervals, misses):
    assert expected_misses(intervals) == f"Of {misses} are expected to miss."
