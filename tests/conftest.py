import os

# Two cores and many small tensors: more threads only get in each other's way, in the processes that tests
# start too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What deterministic_mode needs. Before the first product on a GPU: it is read then, and not again.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from tests.helpers import float16_on_cpu


@pytest.fixture
def float64():
    """Run a test in double precision: the Trainer adds up losses in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def half():
    """Train in float16 on the CPU: the settings for a Trainer."""
    with float16_on_cpu() as settings:
        yield settings


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
