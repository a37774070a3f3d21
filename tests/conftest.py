"""What every test shares: fixed seeds, and one thread, so that nothing depends on the machine's cores."""

import random

import numpy
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Each test starts from the same random state, whichever tests ran before it."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
