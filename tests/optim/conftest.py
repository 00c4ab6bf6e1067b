"""The optimizers that the contract's tests run over, each on the backends that can tell it apart."""

from __future__ import annotations

import pytest
import rep_signum
import torch
from cases_optim import CASES, served

import gradrep_kernels as gr


@pytest.fixture(scope="module", autouse=True)
def _signum():
    """The second leaf's op is in the table of ops while the tests of this folder run, and of no other."""
    rep_signum.enter()
    yield
    rep_signum.leave()


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(**served(CASES))
def case(request):
    """An OptimizerCase. Modules about one optimizer alone, or one backend, override this."""
    optimizer, backend = request.param
    with gr.use_backend(backend):
        yield optimizer
