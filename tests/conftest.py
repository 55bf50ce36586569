import os

# Two cores and many small tensors: more threads only get in each other's way, in the processes that tests
# start too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture
def float64():
    """Run a test in double precision: the Trainer adds up losses in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
