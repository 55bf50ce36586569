"""Two real processes over gloo: one launch runs every selected check, and the tests read the results."""

from pathlib import Path

import pytest
import torch

from tests.distributed.launch import assert_passed, finish, launch, launches, selected, start
from tests.distributed.replicas import REPLICAS, long
from tests.distributed.topology import LOOPS, groups_of, save_alone
from tests.distributed.worker import checks_in, main
from tests.helpers import assert_same
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
    save_alone(out)
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


@pytest.mark.slow
def test_groups_of_two_among_four_ranks_train_as_two_ranks(tmp_path):
    """Two models, each on a group of two ranks: the end of each is that of two ranks alone, bit for bit."""
    assert finish(start(4, tmp_path / "log", groups_of, 2, tmp_path)), (tmp_path / "log").read_text()
    assert_passed("groups", tmp_path, "", ranks=4)
    assert finish(start(2, tmp_path / "log", groups_of, 2, tmp_path)), (tmp_path / "log").read_text()
    assert_passed("groups", tmp_path, "")
    for loop in LOOPS:
        ends = {
            (world, rank): torch.load(tmp_path / f"{loop}.{world}.{rank}.pt", weights_only=False)
            for world, ranks in ((4, 4), (2, 2))
            for rank in range(ranks)
        }
        assert_same(ends[2, 0], ends[4, 0])
        assert_same(ends[2, 1], ends[4, 1])
        assert_same(ends[4, 2][:2], ends[4, 3][:2])  # the replicas of the other model
        assert not torch.equal(ends[4, 0][0][0], ends[4, 2][0][0])
