"""Time contestants that take turns step by step, so that a drifting machine slows all of them alike."""

import gc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

from scipy.stats import quantile_test

from composer_sassha.benchmark.steps import Kind, Timing

# Ratios are read for differences of a few hundredths, so a median must be known this well.
RESOLUTION = 0.03
_CONFIDENCE = 0.95
_FEWEST = 6  # values for which there is an interval of that confidence: 2 / 2**6 < 0.05


class Contestant(Protocol):
    """An object that can take a step of a kind: a method in a Trainer, its floor, or bare passes."""

    schedule: Counter[Kind]

    def take(self, kind: Kind) -> Timing:
        """Take one step and return its time."""


@dataclass(frozen=True)
class MedianInterval:
    """A median with its 95 % confidence interval, whatever the distribution.

    Args:
        median: of the values.
        low: lower bound; the smallest value where there are fewer than 6, too few for this confidence.
        high: upper bound, likewise.
        number: of values.
    """

    median: float
    low: float
    high: float
    number: int

    @property
    def vague(self) -> bool:
        """Return whether the interval hides a difference of `RESOLUTION`, seen as a ratio."""
        return self.number < _FEWEST or self.high - self.low > 2 * RESOLUTION * abs(self.median)


def median_interval(values: Sequence[float]) -> MedianInterval:
    """Return the median and its confidence interval, whose bounds are two of the values.

    Args:
        values: independent, at least one.

    >>> median_interval([3.0, 1.0, 2.0, 5.0, 4.0, 6.0, 7.0, 8.0, 9.0])
    MedianInterval(median=5.0, low=2.0, high=8.0, number=9)
    """
    if len(values) < _FEWEST:
        return MedianInterval(median(values), min(values), max(values), len(values))
    interval = quantile_test(values, p=0.5).confidence_interval(_CONFIDENCE)
    return MedianInterval(median(values), float(interval.low), float(interval.high), len(values))


def ratio(times: Sequence[float], others: Sequence[float]) -> MedianInterval:
    """Return the ratio of two contestants' times, round by round.

    Args:
        times: of one, a value for each round.
        others: of the other.

    >>> ratio([2.0, 6.0, 3.0], [1.0, 2.0, 1.0]).median
    3.0
    """
    return median_interval([a / b for a, b in zip(times, others, strict=True)])


@dataclass
class Times:
    """The times of one contestant's steps, each kind by itself, one in every round.

    Args:
        schedule: how often each kind occurs in a period of the method's intervals.
        kinds: seconds of each kind of step, round by round.
    """

    schedule: Counter[Kind]
    kinds: dict[Kind, list[float]]

    @property
    def steps(self) -> list[float]:
        """Return the seconds of a step in each round, averaged over a period."""
        rounds = zip(*(self.kinds[kind] for kind in self.schedule), strict=True)
        weights = [count / self.schedule.total() for count in self.schedule.values()]
        return [sum(w * t for w, t in zip(weights, one, strict=True)) for one in rounds]

    def over(self, other: "Times") -> MedianInterval:
        """Return the ratio of two contestants' steps, round by round.

        Args:
            other: the one whose time is the unit.
        """
        return ratio(self.steps, other.steps)


def race(
    contestants: Mapping[str, Contestant], rounds: int, clock: Callable[[Timing], float]
) -> dict[str, Times]:
    """Let every contestant take a step of each of its kinds, round after round.

    Steps of one kind follow each other, those of a method and of its floor. Every other round runs in
    reverse, so that no contestant always comes after the same one.

    Args:
        contestants: by name; warmed up.
        rounds: number of rounds.
        clock: selects the time that counts.
    """
    everyone = {kind for contestant in contestants.values() for kind in contestant.schedule}
    turns = [
        (name, kind)
        for kind in sorted(everyone, reverse=True)
        for name, contestant in contestants.items()
        if kind in contestant.schedule
    ]
    found = {
        name: Times(contestant.schedule, {kind: [] for kind in contestant.schedule})
        for name, contestant in contestants.items()
    }
    gc.collect()
    gc.freeze()  # so that no collection walks through the objects of other contestants
    try:
        for number in range(rounds):
            for name, kind in turns if number % 2 == 0 else reversed(turns):
                found[name].kinds[kind].append(clock(contestants[name].take(kind)))
    finally:
        gc.unfreeze()
    return found
