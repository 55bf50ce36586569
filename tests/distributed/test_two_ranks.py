"""Two real processes over gloo: one launch runs every selected check, and the tests read the results."""

from pathlib import Path

import pytest

from tests.distributed.launch import assert_passed, launch, launches, selected
from tests.distributed.replicas import REPLICAS, long
from tests.distributed.worker import checks_in, main
from tests.methods import METHODS, by_default

SLOW = {f"trains[{method}]" for method in METHODS if not by_default(method)}
CHECKS = [
    pytest.param(check, id=check, marks=[pytest.mark.slow] if check in SLOW else [])
    for check in checks_in(Path())
]
pytestmark = launches


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("two_ranks")
    return out, launch(main, out, selected(request))


@pytest.mark.timeout(1300)  # the first waits for all
@pytest.mark.parametrize("check", CHECKS)
def test_on_two_ranks(check, results):
    assert_passed(check, *results)


@pytest.mark.slow
@pytest.mark.timeout(4000)
def test_replicas_are_equal_after_150_steps(tmp_path):
    """Run every method, with overflows and without gradients on one rank too.

    In 150 steps every pair of pass and fault comes about twenty times, and every interval fifty times.
    """
    log = launch(long, tmp_path, 150, seconds=3900)
    for check, method in REPLICAS:
        assert_passed(f"{check}[{method}]", tmp_path, log)
