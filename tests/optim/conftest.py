"""The backends that the contract's tests run on: the kernels that are there, and the reference."""

from __future__ import annotations

import pytest
import torch

import gradrep_kernels as gr


@pytest.fixture(params=["auto", "reference"])
def backend(request):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with gr.use_backend(request.param):
        yield request.param
    torch.set_num_threads(threads)
