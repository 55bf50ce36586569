import os

# Two cores and many small tensors: more threads only get in each other's way, in the processes that tests
# start too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What deterministic_mode needs. Before the first product on a GPU: it is read then, and not again.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from functools import cache

import pytest

# What is imported within the fixtures takes seconds, and the process that hands out tests needs none of it.


@pytest.fixture
def float64():
    """Run a test in double precision: the Trainer adds up losses in the default dtype."""
    import torch

    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def half():
    """Train in float16 on the CPU: the settings for a Trainer."""
    from tests.helpers import float16_on_cpu

    with float16_on_cpu() as settings:
        yield settings


@pytest.fixture(autouse=True, scope="session")
def _asked_once():
    """Each Trainer, each checkpoint asks whence Composer was installed, which looks at hundreds of files."""
    from composer.utils import collect_env

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect_env, "get_composer_commit_hash", cache(collect_env.get_composer_commit_hash))
        yield


@pytest.fixture(autouse=True)
def _seeded():
    import torch

    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests that launch processes first: the worker that runs them all must not begin last."""
    items.sort(key=lambda item: not any("launch" in mark.args for mark in item.iter_markers("xdist_group")))
