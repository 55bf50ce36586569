"""Two real processes over gloo: one launch runs every check, the tests read the results."""

import pytest

from tests.distributed.launch import assert_passed, launch
from tests.distributed.worker import FAULTS, REPLICAS, STRATEGIC, TAKING_TURNS, main
from tests.methods import METHODS

CHECKS = [
    *[f"{check}[{method}]" for method in METHODS for check in ("replicas", "resumes")],
    *[f"{check}[{microbatch}]" for microbatch in (10, 3) for check in ("separable", "one_process_agrees")],
    "one_process_agrees[uneven]",
    *[f"sync_strategies[{name}]" for name in STRATEGIC],
    *[f"an_overflow_on_one_rank[{number}]" for number in (1, 2)],
    *[f"{check}[{name}]" for check, name in FAULTS],
    *[f"branches_that_take_turns[{name}]" for name in TAKING_TURNS],
    *[f"gsam_combines[{sync}]" for sync in (False, True)],
    *[f"a_parameter_that_one_rank_uses[{name}]" for name in ("sam_sgd", "gsam_sgd", "looksam_sgd")],
    "a_rank_without_a_gradient",
    "optimizer_of_the_head_alone",
    "evaluates_with_the_buffers_of_rank_zero",
    *[f"leaves_no_trace[{fraction}]" for fraction in (1.0, 0.4)],
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("two_ranks")
    return out, launch(main, out)


@pytest.mark.timeout(1300)  # the first waits for all
@pytest.mark.parametrize("check", CHECKS)
def test_on_two_ranks(check, results):
    assert_passed(check, *results)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_replicas_are_equal_after_500_steps(tmp_path):
    """Of every method: with overflows, and without gradients, on one rank."""
    log = launch(main, tmp_path, 500, seconds=7000)
    for check, method in REPLICAS:
        assert_passed(f"{check}[{method}]", tmp_path, log)
