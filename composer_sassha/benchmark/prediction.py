"""Predict what a step of each method costs on several ranks.

Every method of the recipe takes some steps in a Trainer on this process, on the samples that one of the
planned ranks would get. The collectives that it would issue there are counted from its parts (`traffic`).
With n ranks, of which each hands in S bytes,

    T(S)    = min(2 (n - 1) (latency + S / n / bandwidth),       around a ring
                  2 ceil(log2 n) (latency + S / bandwidth))      up a tree and down    (`Link.seconds`)
    end     = max(end, backward * fraction of the gradient so far) + T(bucket), bucket after bucket
    exposed = end - backward                                                           (`exposed`)
    step    = alone + exposed, for every backward pass whose gradient DDP averages
                    + T(S), for every other collective                                 (`predict`)

where `alone` is the median time of a step on one process, from its data being there to its end, and
`backward` that of its last backward pass. Steps that perturb, that refresh the Hessian, both and neither are
timed apart and averaged as often as the method's intervals have them. The methods take turns, so that a
machine that slows down slows all of them down; their models are in memory together.

Modelled: links of one kind; DDP's buckets, which on a GPU travel while the backward pass goes on
(on a CPU the cores that would send them are those that compute); the small collectives of the Trainer, its
metrics and the gradient scaler. Not modelled: loading data; waiting for a rank that is slower than the
others; DDP's own work, which copies gradients into buckets and back; links that are faster within a machine
than between machines; DDP's search for unused parameters.

Started on several processes it predicts for those: from steps that each takes alone at the same time as the
others, and from a link that is measured. Then they train together, and the measured time is printed next to
the prediction.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from composer_sassha.benchmark.collectives import Collective
from composer_sassha.benchmark.link import Link
from composer_sassha.benchmark.steps import Kind, Timing

# All-reduces that DDP starts as soon as the backward pass has filled a bucket.
_OVERLAPPING = ("ascent gradient", "gradient")


def exposed(buckets: Sequence[int], backward: float, link: Link, ranks: int) -> float:
    """Return the time that DDP's all-reduces still take when the backward pass has ended.

    Args:
        buckets: bytes of each, in the order in which they fill up at an even pace.
        backward: seconds of the backward pass; 0 if nothing travels while it goes on.
        link: between the ranks.
        ranks: number of ranks.

    >>> exposed([1000, 1000], backward=2.0, link=Link(bandwidth=1000.0, latency=0.0), ranks=2)
    1.0
    """
    end, filled = 0.0, 0
    for size in buckets:
        filled += size
        end = max(end, backward * filled / sum(buckets)) + link.seconds(size, ranks)
    return end - backward


@dataclass(frozen=True)
class Prediction:
    """The time of a step on several ranks, on average over a method's intervals.

    Args:
        alone: seconds of its work on one process.
        size: bytes that each rank hands to collectives.
        collectives: number of collectives.
        communication: seconds that they take.
        waiting: seconds of that in which nothing is computed.
    """

    alone: float
    size: float
    collectives: float
    communication: float
    waiting: float

    @property
    def step(self) -> float:
        """Return the seconds of a step."""
        return self.alone + self.waiting


def predict(
    timings: Mapping[Kind, Timing],
    collectives: Mapping[Kind, Sequence[Collective]],
    kinds: Counter[Kind],
    link: Link,
    ranks: int,
    *,
    overlap: bool = True,
) -> Prediction:
    """Predict a method's step; see the module for the equations.

    Args:
        timings: of each kind of step on one process.
        collectives: of each kind of step, from `traffic`.
        kinds: how often each occurs, from `schedule`.
        link: between the ranks.
        ranks: number of ranks; nothing moves if there is one.
        overlap: whether gradients travel while the backward pass goes on.

    >>> predict(
    ...     {Kind(): Timing(0.3, 0.2)},
    ...     {Kind(): [Collective("gradient", 10**8)]},
    ...     Counter([Kind()]),
    ...     Link(1e9, 0.0),
    ...     ranks=2,
    ...     overlap=False,
    ... ).step
    0.4
    """
    if ranks == 1:
        collectives = {kind: [] for kind in kinds}

    def waiting(kind: Kind) -> float:
        by_purpose: dict[str, list[int]] = defaultdict(list)
        for collective in collectives[kind]:
            by_purpose[collective.purpose].append(collective.size)
        backward = timings[kind].backward if overlap else 0.0
        return sum(
            exposed(sizes, backward if purpose in _OVERLAPPING else 0.0, link, ranks)
            for purpose, sizes in by_purpose.items()
        )

    return Prediction(
        alone=average(kinds, lambda kind: timings[kind].step),
        size=average(kinds, lambda kind: sum(c.size for c in collectives[kind])),
        collectives=average(kinds, lambda kind: len(collectives[kind])),
        communication=average(
            kinds, lambda kind: sum(link.seconds(c.size, ranks) for c in collectives[kind])
        ),
        waiting=average(kinds, waiting),
    )


def average(kinds: Counter[Kind], value: Callable[[Kind], float]) -> float:
    """Return the mean of a value over the steps of a period.

    Args:
        kinds: how often each kind occurs.
        value: of a step of a kind.
    """
    return sum(count * value(kind) for kind, count in kinds.items()) / kinds.total()
