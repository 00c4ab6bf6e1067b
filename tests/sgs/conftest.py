import pytest
import torch


@pytest.fixture
def one_thread():
    """Maps of a few hundred pixels: on a busy machine, threads that wait for each other take 50 times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
