"""The check CSLA = GR of a job."""

from __future__ import annotations

import pytest
import torch
from cases_recipes import TINY

from gradrep_kernels import equivalence
from gradrep_kernels.equivalence import TOLERANCE
from gradrep_kernels.recipes.equivalence import csla_equals_gr
from gradrep_kernels.recipes.options import resolve

ONE = torch.ones(())
pytestmark = pytest.mark.usefixtures("one_thread")


def test_csla_equals_gr_on_the_jobs_own_network(options, data, scales):
    longer = resolve({**TINY, "data": str(options.data), "check_steps": 12})
    result = csla_equals_gr(longer, data, scales)
    assert result["steps"] == 12
    assert result["agrees"]
    assert 0 < max(result["outputs"], result["weights"]) <= TOLERANCE


@pytest.mark.parametrize("broken", ["multipliers", "initialisation"])
def test_the_check_sees_a_broken_rule(options, data, scales, monkeypatch, broken):
    if broken == "multipliers":
        right = equivalence.grad_mults
        monkeypatch.setattr(
            equivalence, "grad_mults", lambda *args, **kwargs: dict.fromkeys(right(*args, **kwargs), ONE)
        )
    else:
        monkeypatch.setattr(equivalence, "reinitialize", lambda model, scales, **kwargs: None)
    assert not csla_equals_gr(options, data, scales)["agrees"]


def test_a_training_that_diverges_has_no_figures(data, options, scales):
    wild = resolve({**TINY, "data": str(options.data), "check_steps": 12, "lr": 1e200})
    assert csla_equals_gr(wild, data, scales) == {"steps": 12, "outputs": None, "weights": None, "agrees": False}


def test_a_difference_that_is_not_finite_is_none(options, data, scales, monkeypatch):
    found = equivalence.Equivalence(2, float("inf"), 0.25)
    monkeypatch.setattr("gradrep_kernels.recipes.equivalence.check_equivalence", lambda *args, **kwargs: found)
    assert csla_equals_gr(options, data, scales) == {"steps": 2, "outputs": None, "weights": 0.25, "agrees": False}
