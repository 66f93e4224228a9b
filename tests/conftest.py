import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh():
    """The same start for every test, whichever ran before."""
    torch.manual_seed(0)
    torch.compiler.reset()
