"""A planned step costs the host the same for any number of parameters."""

from __future__ import annotations

import host_work
import pytest

from gradrep_kernels.ops import backends


@pytest.mark.parametrize("way", host_work.GRADIENTS)
@pytest.mark.skipif(backends.planner("rep_sgd_step", "cpu") is None, reason="the reference plans nothing")
def test_the_work_of_the_cpu_does_not_grow_with_the_parameters(way):
    host_work.check(way)


def test_the_work_of_triton_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    import interpreter

    interpreter.run("interpreted_host_work.py")
