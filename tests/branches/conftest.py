"""Every test of this room draws the same numbers and sums in the same order."""

from __future__ import annotations

import warnings

import pytest
import torch


@pytest.fixture(autouse=True)
def _repeatable():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_warnings():
    """A warning of this package is an error, but where a test waits for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield
