"""The check CSLA = GR of a job."""

from __future__ import annotations

import pytest
import torch
from cases_recipes import TINY

import gradrep_kernels as gr
from gradrep_kernels import equivalence
from gradrep_kernels.equivalence import TOLERANCE
from gradrep_kernels.recipes.build import plain_model
from gradrep_kernels.recipes.equivalence import csla_equals_gr
from gradrep_kernels.recipes.options.resolve import resolve
from gradrep_kernels.recipes.scale_sources import initial_scales

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
    wild = resolve({**TINY, "data": str(options.data), "check_steps": 12, "search_lr": 1e200})
    result = csla_equals_gr(wild, data, scales)
    assert (result["steps"], result["lr"], result["agrees"]) == (12, 1e200, False)
    assert (result["outputs"], result["weights"], result["at_search_lr"]) == (None, None, None)


def test_a_difference_that_is_not_finite_is_none(options, data, scales, monkeypatch):
    found = equivalence.Equivalence(2, float("inf"), 0.25)
    monkeypatch.setattr("gradrep_kernels.recipes.equivalence.check_equivalence", lambda *args, **kwargs: found)
    result = csla_equals_gr(options, data, scales)
    assert (result["steps"], result["lr"], result["agrees"]) == (2, 0.1, False)
    assert (result["outputs"], result["weights"]) == (None, 0.25)


def test_rounding_that_grows_is_told_from_a_wrong_rule(data, options, tiny_ghost, monkeypatch):
    """Norms over maps of 1 x 1 magnify rounding, which passes 1e-10 within few steps."""
    wild = resolve({**TINY, "data": str(options.data), "model": tiny_ghost, "check_steps": 6})
    scales = initial_scales(plain_model(wild, data, 0))
    result = csla_equals_gr(wild, data, scales)
    assert result["at_search_lr"] > TOLERANCE
    assert result["agrees"]
    assert result["lr"] == pytest.approx(1e-5)
    assert 0 < result["outputs"] < 1e-3 * TOLERANCE
    right = equivalence.grad_mults

    def off(*args, **kwargs):
        return {p: gr.GradMult(m.scale * (1 + 1e-3), m.identity) for p, m in right(*args, **kwargs).items()}

    monkeypatch.setattr(equivalence, "grad_mults", off)
    result = csla_equals_gr(wild, data, scales)
    assert result["lr"] == pytest.approx(1e-5)
    assert not result["agrees"]


def test_constant_branches_are_compared_without_weight_decay(data, options):
    constant = resolve({**TINY, "data": str(options.data), "branches": "qarepvgg", "weight_decay": 0.05})
    result = csla_equals_gr(constant, data, initial_scales(plain_model(constant, data, 0)))
    assert (result["weight_decay"], result["agrees"], result["lr"]) == (0.0, True, 0.1)
    plain = csla_equals_gr(options, data, initial_scales(plain_model(options, data, 0)))
    assert plain["weight_decay"] == options.weight_decay > 0
