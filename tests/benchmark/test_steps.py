"""Steps of the kind that is asked for, floors of the same passes, and ratios with their spread."""

import math
import random
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from composer_sassha.benchmark.floor import Floor, Raw, has_floor
from composer_sassha.benchmark.memory import Memory, peaks
from composer_sassha.benchmark.selection import chosen_recipes
from composer_sassha.benchmark.speed import Times, median_interval, race, ratio
from composer_sassha.benchmark.steps import Kind, Stepper, Timing, stepper_of
from composer_sassha.recipes.config import Recipe
from tests.benchmark import quick_collections

SMALL = ["model.width=2", "data.batch_size=8"]


def recipe(method: str, *overrides: str) -> Recipe:
    return chosen_recipes("digits", [*SMALL, *overrides], [method])[method]


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick_collections():
        yield


@pytest.fixture
def run():
    """Makes runs, and closes them."""
    opened: list[Stepper | Floor] = []

    def make(method: str, *overrides: str) -> Stepper:
        opened.append(stepper_of(recipe(method, *overrides), device="cpu"))
        opened[-1].warm_up()
        return opened[-1]

    make.opened = opened
    yield make
    for one in opened:
        one.close()


class Convolutions(TorchDispatchMode):
    """Within it, convolutions are counted: those of forward, of backward and of second derivatives."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution" in func._opname:
            self.counted[func._opname] += 1
        return func(*args, **(kwargs or {}))


def convolutions(contestant, kind: Kind) -> Counter[str]:
    with Convolutions() as within:
        contestant.take(kind)
    return within.counted


CONVOLUTIONS = 7  # of a ResNet-8


@pytest.mark.parametrize("method", ["sam", "gsam", "looksam", "msam", "adahessian", "sassha", "msassha"])
def test_a_floor_has_the_passes_of_its_method(method: str, run) -> None:
    ours = run(method)
    floor, raw = Floor(recipe(method), ours, "cpu"), Raw(ours)
    run.opened.append(floor)
    assert floor.schedule == raw.schedule == ours.schedule
    for kind in ours.schedule:
        expected = convolutions(ours, kind)
        assert convolutions(floor, kind) == convolutions(raw, kind) == expected
        passes = 2 if kind.perturbs and method not in ("msam", "msassha") else 1
        # A second derivative goes back through every convolution once more.
        assert expected["convolution_backward"] == (passes + kind.refreshes) * CONVOLUTIONS
        assert expected["convolution"] == passes * CONVOLUTIONS or kind.refreshes


def test_a_floor_has_a_product_for_every_sample_and_microbatch(run) -> None:
    settings = ("algorithms.msassha.samples=2", "device_train_microbatch_size=4")
    ours = run("msassha", *settings)
    floor, raw = Floor(recipe("msassha", *settings), ours, "cpu"), Raw(ours)
    run.opened.append(floor)
    refresh = Kind(True, True)
    assert convolutions(floor, refresh) == convolutions(raw, refresh) == convolutions(ours, refresh)


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("esam", []),
        ("sophia_g", []),
        ("sassha", ["algorithms.sassha.batch_fraction=0.5"]),
        ("sam", ["algorithms.sam.ascent_fraction=0.5"]),
    ],
)
def test_what_is_not_made_of_whole_passes_has_no_floor(method: str, overrides: list[str], run) -> None:
    assert not has_floor(run(method, *overrides))


def test_a_step_is_of_the_kind_that_is_asked_for(run) -> None:
    ours = run("sassha")
    assert ours.schedule == {Kind(True, True): 1, Kind(True): 9}
    for kind in (Kind(True), Kind(True), Kind(True, True), Kind(True), Kind(True, True), Kind(True, True)):
        refreshes = ours.optimizer.param_groups[0]["refreshes"]
        timing = ours.take(kind)
        assert ours.optimizer.param_groups[0]["refreshes"] - refreshes == kind.refreshes
        assert timing.step > 0 and timing.cpu > 0 and timing.backward == 0


def test_looksam_perturbs_on_some_steps_only(run) -> None:
    ours = run("looksam")
    assert ours.schedule == {Kind(True): 1, Kind(): 4}
    assert "grad_norm" in (ours.take(Kind(True)), ours.optimizer.metrics)[1]
    assert "grad_norm" not in (ours.take(Kind()), ours.optimizer.metrics)[1]


# The ratios


def test_the_bounds_of_a_median_hold_as_often_as_they_say() -> None:
    """Whatever the distribution: here a skewed one, whose median is ln 2."""
    draw, held, tries = random.Random(0), 0, 400
    for _ in range(tries):
        found = median_interval([draw.expovariate(1.0) for _ in range(15)])
        held += found.low <= math.log(2) <= found.high
    # By the binomial distribution: the 4th and the 12th of 15.
    coverage = sum(math.comb(15, k) for k in range(4, 12)) / 2**15
    assert coverage > 0.95
    assert abs(held / tries - coverage) < 4 * math.sqrt(coverage * (1 - coverage) / tries)


@pytest.mark.parametrize("number", range(1, 40))
def test_the_bounds_are_the_closest_that_are_sure_enough(number: int) -> None:
    found = median_interval([float(i) for i in range(1, number + 1)])
    first, last = int(found.low), int(found.high)
    assert first + last == number + 1 and found.median == (number + 1) / 2

    def coverage(first: int) -> float:
        return sum(math.comb(number, k) for k in range(first, number + 1 - first)) / 2**number

    assert coverage(first) >= 0.95 or first == 1
    assert number < 6 or coverage(first + 1) < 0.95


def test_too_few_or_too_different_values_are_vague() -> None:
    assert median_interval([1.0] * 5).vague and not median_interval([1.0] * 6).vague
    steady = [1 + 0.001 * i for i in range(20)]
    assert not median_interval(steady).vague and median_interval([1 + 0.02 * i for i in range(20)]).vague


def test_a_machine_that_slows_down_cancels_out() -> None:
    """All contestants take their turns in the same rounds, and each round gives one ratio."""
    order: list[tuple[str, Kind]] = []
    now = 0.0

    class Works:
        def __init__(self, name: str, work: dict[Kind, float], counts: Counter[Kind]) -> None:
            self.name, self.work, self.schedule = name, work, counts

        def take(self, kind: Kind) -> Timing:
            nonlocal now
            now += 1
            order.append((self.name, kind))
            return Timing(self.work[kind] * (1 + now / 5))

    ordinary, refresh = Kind(True), Kind(True, True)
    kinds = Counter({refresh: 1, ordinary: 3})
    times = race(
        {
            "sgd": Works("sgd", {Kind(): 1.0}, Counter([Kind()])),
            "ours": Works("ours", {ordinary: 4.0, refresh: 8.0}, kinds),
            "floor": Works("floor", {ordinary: 2.0, refresh: 4.0}, kinds),
        },
        rounds=40,
        clock=lambda timing: timing.step,
    )
    first, second = order[:5], order[5:10]
    assert first == [
        ("ours", refresh),
        ("floor", refresh),
        ("ours", ordinary),
        ("floor", ordinary),
        ("sgd", Kind()),
    ]
    assert second == first[::-1]
    assert times["ours"].over(times["floor"]).median == pytest.approx(2, rel=0.02)
    # By 40 rounds the machine is 41 times as slow as at first.
    assert max(times["ours"].steps) > 20 * min(times["ours"].steps)


def test_steps_are_averaged_over_a_period() -> None:
    times = Times(Counter({Kind(True): 1, Kind(): 4}), {Kind(True): [10.0, 20.0], Kind(): [5.0, 2.5]})
    assert times.steps == [6.0, 6.0]
    assert ratio([3.0, 8.0, 5.0], [1.0, 2.0, 1.0]).median == 4.0


# The memory


def test_the_peak_of_each_watched_part() -> None:
    before = torch.zeros(10_000)
    with Memory("cpu") as memory:
        kept = torch.zeros(1000)
        with memory.watched("first"):
            del before  # was there before the start: it is not known how much that was
            first, second = torch.zeros(2000), torch.zeros(3000)
            del first
        with memory.watched("second"):
            third = torch.zeros(500)
            del second, third
        with memory.watched("third"):
            del kept
    assert memory.peaks == {"first": 4 * 6000, "second": 4 * 4500, "third": 4 * 1000}


def test_the_peak_of_a_backward_pass() -> None:
    """A chain of n products keeps n vectors for its backward, which then needs three beside them at most."""
    size, steps = 100_000, 10
    w = torch.randn(size, requires_grad=True)
    with Memory("cpu") as memory, memory.watched("pass"):
        x = w
        for _ in range(steps):
            x = x.exp()
        x.sum().backward()
    assert steps <= memory.peaks["pass"] / (4 * size) <= steps + 3


def test_the_second_pass_needs_one_copy_of_the_parameters() -> None:
    """Beside it there are the buffers and the state of the generator, before the first pass and after it."""
    settings = ("model.width=8", "data.batch_size=32")
    sgd, _ = peaks(recipe("sgd", *settings), "cpu")
    sam, whole = peaks(recipe("sam", *settings), "cpu")
    model = recipe("sgd", *settings).model.build()
    copy = sum(p.nbytes for p in model.parameters())
    snapshot = sum(b.nbytes for b in model.buffers()) + torch.get_rng_state().nbytes
    beyond = sam[Kind(True)] - sgd[Kind()]
    assert whole and copy <= beyond <= copy + 2 * snapshot + 2000  # and some single numbers
