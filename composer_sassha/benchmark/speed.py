"""Contestants that take turns, step by step, so that a machine that drifts slows all of them down alike."""

import gc
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

from composer_sassha.benchmark.steps import Kind, Timing

# Ratios are looked at for differences of a few hundredths; one whose median is known no better says nothing.
RESOLUTION = 0.03
_CONFIDENCE = 0.95


class Contestant(Protocol):
    """What can take a step of a kind: a method in a Trainer, its floor, or bare passes."""

    schedule: Counter[Kind]

    def take(self, kind: Kind) -> Timing:
        """Take one step, and return its time."""


@dataclass(frozen=True)
class Spread:
    """A median, and the bounds that enclose the true one with 95 % confidence, whatever the distribution.

    Args:
        median: of the values.
        low: lower bound; the smallest value where there are fewer than 6, too few for any confidence.
        high: upper bound, likewise.
        number: of the values.
    """

    median: float
    low: float
    high: float
    number: int

    @property
    def vague(self) -> bool:
        """Whether it cannot tell a difference of `RESOLUTION`, seen as a ratio."""
        return self.number < 6 or self.high - self.low > 2 * RESOLUTION * abs(self.median)


def spread(values: Sequence[float]) -> Spread:
    """Find the median, and its bounds among the ordered values: those that a coin tossed so often reaches.

    The true median lies below the k-th smallest of n values if fewer than k are below it, which is as likely
    as fewer than k heads in n tosses.

    Args:
        values: independent, at least one.

    >>> spread([3.0, 1.0, 2.0, 5.0, 4.0, 6.0, 7.0, 8.0, 9.0])
    Spread(median=5.0, low=2.0, high=8.0, number=9)
    """
    ordered, number = sorted(values), len(values)
    below, left_out = 0.0, 0
    while left_out < (number - 1) // 2:
        below += math.comb(number, left_out) / 2**number
        if 2 * below > 1 - _CONFIDENCE:
            break
        left_out += 1
    first = max(left_out, 1) - 1
    return Spread(median(values), ordered[first], ordered[number - 1 - first], number)


def ratio(times: Sequence[float], others: Sequence[float]) -> Spread:
    """The ratio of two contestants' times, round by round.

    >>> ratio([2.0, 6.0, 3.0], [1.0, 2.0, 1.0]).median
    3.0
    """
    return spread([a / b for a, b in zip(times, others, strict=True)])


@dataclass
class Times:
    """What one contestant's steps have taken, each kind by itself, one in every round.

    Args:
        schedule: how often each kind occurs in a period of the method's intervals.
        kinds: seconds of each kind of step, round by round.
    """

    schedule: Counter[Kind]
    kinds: dict[Kind, list[float]]

    @property
    def steps(self) -> list[float]:
        """Seconds of a step in each round, averaged over a period."""
        rounds = zip(*(self.kinds[kind] for kind in self.schedule), strict=True)
        weights = [count / self.schedule.total() for count in self.schedule.values()]
        return [sum(w * t for w, t in zip(weights, one, strict=True)) for one in rounds]

    def over(self, other: "Times") -> Spread:
        """The ratio of two contestants' steps, round by round."""
        return ratio(self.steps, other.steps)


def race(
    contestants: Mapping[str, Contestant], rounds: int, clock: Callable[[Timing], float]
) -> dict[str, Times]:
    """Have every contestant take a step of each of its kinds, round after round.

    Steps of one kind follow each other, those of a method and of its floor; every other round goes the other
    way round, so that nobody always comes after the same one.

    Args:
        contestants: by name; warmed up.
        rounds: how many.
        clock: which time counts.
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
    gc.freeze()  # no collection is to walk through what the other contestants hold
    try:
        for number in range(rounds):
            for name, kind in turns if number % 2 == 0 else reversed(turns):
                found[name].kinds[kind].append(clock(contestants[name].take(kind)))
    finally:
        gc.unfreeze()
    return found
