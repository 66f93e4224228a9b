import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh():
    """The same start for every test, whichever ran before."""
    torch.manual_seed(0)
    torch.compiler.reset()


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
