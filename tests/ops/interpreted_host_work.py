"""The host's work of planned steps in Triton, with launches that launch nothing.

tests/optim/test_host_work.py runs this file with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import host_work
import pytest

import gradrep_kernels as gr
from gradrep_kernels.ops.triton import launching


@pytest.mark.parametrize("way", host_work.GRADIENTS)
def test_the_work_does_not_grow_with_the_parameters(way, monkeypatch):
    launched = []
    monkeypatch.setattr(launching, "launch", lambda *arguments, **named: launched.append(arguments))
    with gr.use_backend("triton"):
        host_work.check(way)
    assert launched
