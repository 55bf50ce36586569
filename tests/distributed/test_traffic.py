"""The collectives of two real ranks, counted: one launch for every method, the tests read the results."""

import json
from collections import Counter

import pytest

from tests.distributed.launch import launch
from tests.distributed.traffic import CASES, CountedStep, main

# Until then DDP has not yet sorted its buckets by the order in which the gradients come.
SETTLED = 3


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    out = tmp_path_factory.mktemp("traffic")
    return out, launch(main, out)


def counted(launched, case: str, rank: int = 0) -> list[CountedStep]:
    out, logs = launched
    file = out / f"{case}.rank{rank}"
    assert file.exists(), f"rank {rank} did not get there: {logs}"
    content = file.read_text()
    assert content.startswith("["), content
    return [CountedStep(*step) for step in json.loads(content)]


@pytest.mark.timeout(1300)  # the first waits for all
@pytest.mark.parametrize("case", CASES)
def test_the_plan_counts_what_is_really_issued(case: str, launched) -> None:
    for step in counted(launched, case)[SETTLED:]:
        expected = Counter(size for _, size in step.predicted)
        assert Counter(size for _, size in step.issued) == expected, step


@pytest.mark.parametrize("case", CASES)
def test_the_ranks_issue_the_same(case: str, launched) -> None:
    first, second = (counted(launched, case, rank) for rank in range(2))
    assert [step.issued for step in first] == [step.issued for step in second]


@pytest.mark.parametrize("method", ["sam_sgd", "sassha"])
def test_buckets_go_in_the_order_in_which_they_fill(method: str, launched) -> None:
    """Also after a first step whose gradients a refresh has handed out."""
    for step in counted(launched, f"several_buckets[{method}]")[SETTLED:]:
        predicted = [size for purpose, size in step.predicted if purpose in ("gradient", "Hessian")]
        assert len(predicted) > 1 + step.kind[1]
        assert [size for operation, size in step.issued if size > 10_000] == predicted


def per_step(launched, method: str) -> tuple[float, float]:
    """Collectives and bytes of a step of the digits recipe, over its longest interval: ten steps."""
    period = counted(launched, f"recipe[{method}]")[10:20]
    issued = [collective for step in period for collective in step.issued]
    return len(issued) / 10, sum(size for _, size in issued) / 10


def test_what_the_methods_of_the_recipe_send(launched) -> None:
    """A refresh on every tenth step sends a tenth of a gradient more, in one more collective."""
    collectives, sent = zip(
        *(per_step(launched, method) for method in ("sgd", "sam", "sassha", "msassha")), strict=True
    )
    sgd, sam, sassha, msassha = sent
    assert sgd > 4 * 75_002  # a gradient and the Trainer's own
    assert sam == sgd + 8  # the batch size, before the second pass
    assert sassha == sam + (msassha - sgd) and msassha <= sassha <= 1.15 * sgd
    assert [count - collectives[0] for count in collectives] == pytest.approx([0, 1, 1.1, 0.1])
