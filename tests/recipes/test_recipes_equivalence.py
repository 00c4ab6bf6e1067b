"""The check CSLA = GR of a job."""

from __future__ import annotations

import pytest
from cases_recipes import TINY

from gradrep_kernels import csla
from gradrep_kernels.recipes.equivalence import TOLERANCE, csla_equals_gr
from gradrep_kernels.recipes.options import resolve

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
        monkeypatch.setattr(csla, "grad_mults", lambda model, scales: {})
    else:
        monkeypatch.setattr(csla, "reinitialize", lambda model, scales: None)
    assert not csla_equals_gr(options, data, scales)["agrees"]
