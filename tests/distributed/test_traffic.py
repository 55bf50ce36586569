"""Count the collectives of two real ranks: one launch trains every method, the tests read the results."""

import json
from collections import Counter

import pytest

from tests.distributed.launch import launch, launches, selected
from tests.distributed.traffic import CASES, RECIPE, CountedStep, main

# Until then DDP has not yet sorted its buckets by the order in which the gradients come.
SETTLED = 3
pytestmark = launches


# Each sends as another case does: a schedule, a norm, a rule and samples change values alone.
SLOW = {"sassha_scheduled", "sam_follows_lr", "sam_inf_sgd", "sophia_gauss_newton", "none_adahessian"}
SLOW |= {"none_sophia", "gsam_sassha", "several_buckets[plain_sgd]", "several_buckets[sam_synced]"}
OF_THE_RECIPE = [f"recipe[{method}]" for method in RECIPE]
each_case = pytest.mark.parametrize(
    "check",
    [pytest.param(case, id=case, marks=[pytest.mark.slow] if case in SLOW else []) for case in CASES],
)


@pytest.fixture(scope="module")
def launched(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("traffic")
    return out, launch(main, out, [*selected(request), *OF_THE_RECIPE])


def counted(launched, case: str, rank: int = 0) -> list[CountedStep]:
    out, logs = launched
    file = out / f"{case}.rank{rank}"
    assert file.exists(), f"rank {rank} did not get there: {logs}"
    content = file.read_text()
    assert content.startswith("["), content
    return [CountedStep(*step) for step in json.loads(content)]


@pytest.mark.timeout(1300)  # the first waits for all
@each_case
def test_the_plan_counts_what_is_really_issued(check: str, launched) -> None:
    for step in counted(launched, check)[SETTLED:]:
        expected = Counter(size for _, size in step.predicted)
        assert Counter(size for _, size in step.issued) == expected, step


@each_case
def test_the_ranks_issue_the_same(check: str, launched) -> None:
    first, second = (counted(launched, check, rank) for rank in range(2))
    assert [step.issued for step in first] == [step.issued for step in second]


@pytest.mark.parametrize("check", ["several_buckets[sam_sgd]", "several_buckets[sassha]"])
def test_buckets_go_in_the_order_in_which_they_fill(check: str, launched) -> None:
    """Buckets keep this order after a first step whose gradients a refresh has handed out."""
    for step in counted(launched, check)[SETTLED:]:
        predicted = [size for purpose, size in step.predicted if purpose in ("gradient", "Hessian")]
        assert len(predicted) > 1 + step.kind[1]
        assert [size for operation, size in step.issued if size > 10_000] == predicted


def per_step(launched, method: str) -> tuple[float, float]:
    """Return the collectives and bytes of a step of the digits recipe, over its longest interval."""
    period = counted(launched, f"recipe[{method}]")[SETTLED:]
    assert len(period) == 10
    issued = [collective for step in period for collective in step.issued]
    return len(issued) / 10, sum(size for _, size in issued) / 10


def test_a_refresh_sends_one_more_gradient_every_ten_steps(launched) -> None:
    collectives, sent = zip(*(per_step(launched, method) for method in RECIPE), strict=True)
    sgd, sam, sassha, msassha = sent
    assert sgd > 4 * 75_002  # a gradient and the Trainer's own
    assert sam == sgd + 8  # the batch size, before the second pass
    assert sassha == sam + (msassha - sgd) and msassha <= sassha <= 1.15 * sgd
    assert [count - collectives[0] for count in collectives] == pytest.approx([0, 1, 1.1, 0.1])
