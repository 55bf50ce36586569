"""What a step of each method costs on machines that are not here yet.

Every method of the recipe takes some steps in a Trainer on this process, on the share of the batch that one
of the planned ranks would get, and the collectives that it would issue there are counted from its parts
(`traffic`). With n ranks, of which each hands in S bytes,

    T(S)    = min(2 (n - 1) (latency + S / n / bandwidth),       around a ring
                  2 ceil(log2 n) (latency + S / bandwidth))      up a tree and down    (`Link.seconds`)
    end     = max(end, backward * share of the gradient so far) + T(bucket), bucket after bucket
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
others, and from a link that is measured. Then they train together, and what that takes is printed beside the
prediction.
"""

import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as torch_dist
from composer.models import ComposerModel
from composer.utils import dist, get_device
from torch import Tensor
from torch.optim import Optimizer

from composer_sassha.benchmark.report import table
from composer_sassha.benchmark.selection import batch_size, naming, with_batch_size
from composer_sassha.benchmark.steps import Kind, Run, Timing, is_wrapped, median_timing, run_of
from composer_sassha.common.batches import unwrapped
from composer_sassha.common.tensors import wide_dtype
from composer_sassha.recipes.config import Recipe
from composer_sassha.recipes.errors import ConfigError

# What moves between the ranks


class Collective(NamedTuple):
    """One collective operation: what it is for, and the bytes that each rank hands in."""

    purpose: str
    size: int


# All-reduces that DDP starts as soon as the backward pass has filled a bucket.
_OVERLAPPING = ("ascent gradient", "gradient")


def traffic(
    optimizer: Optimizer, model: ComposerModel, kind: Kind, *, scaled: bool = False
) -> list[Collective]:
    """List the collectives of one step in a Trainer on several ranks, under DDP.

    An ascent is each rank's own unless `sync_ascent`; after it, or a partial one, rank 0's buffers are handed
    out once more. A perturbation that mixes gradients has the ranks
    average the mixture, and what it remembers, in place of their gradients. A refresh averages the diagonal.

    Args:
        optimizer: the Trainer's.
        model: what it trains, not wrapped for DDP.
        kind: of the step.
        scaled: a gradient scaler looks for overflows, as in amp_fp16.

    >>> from composer.models import ComposerClassifier
    >>> model = ComposerClassifier(torch.nn.Linear(3, 2), num_classes=2)
    >>> traffic(torch.optim.SGD(model.parameters(), lr=0.1), model, Kind())[1]
    Collective(purpose='gradient', size=32)
    """
    wrapper: Any = optimizer  # ours, wherever a step perturbs
    perturbation: Any = getattr(wrapper, "perturbation", None)
    ascends = kind.perturbs and perturbation.ascends
    sync_ascent = ascends and wrapper.sync_ascent
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    entries, flat = sum(p.numel() for p in params), wide_dtype(params).itemsize
    passes = 2 if ascends else 1

    found = [Collective("batch size", 8)] * passes
    again = ascends and (wrapper.sync_ascent or wrapper.partial_ascent)
    found += [Collective("buffers", size) for size in _buffers(model)] * (2 if again else 1)
    if sync_ascent:
        found += [Collective("ascent gradient", size) for size in _buckets(model)]
    if ascends and perturbation.mixes and not sync_ascent:
        vectors = 2 if perturbation.remembers else 1
        found += [Collective("update", flat * (vectors * entries + len(params)))]
    else:
        found += [Collective("gradient", size) for size in _buckets(model)]
    if kind.refreshes:
        found += [Collective("Hessian", flat * (entries + len(params)))]
    if scaled and is_wrapped(optimizer):
        found += [Collective("overflow", 4)] * passes
    found += [Collective("loss", 4), Collective("samples", 8), Collective("time", 4)]
    return found + _metrics(model)


def _buckets(model: ComposerModel) -> list[int]:
    """The bytes of DDP's buckets, in the order in which a backward pass fills them."""
    # DDP sorts them by the order of the gradients in its first pass, which is the reverse of the forward's.
    params: list[Any] = [p for p in model.parameters() if p.requires_grad][::-1]
    limits = [torch_dist._DEFAULT_FIRST_BUCKET_BYTES, 25 * 2**20]  # DDP's defaults, which the Trainer takes
    buckets, _ = torch_dist._compute_bucket_assignment_by_size(params, limits, [False] * len(params))
    return [sum(params[i].nbytes for i in bucket) for bucket in buckets]


def _buffers(model: ComposerModel) -> list[int]:
    """The bytes that DDP broadcasts before a step: BatchNorm's statistics, one collective for each dtype."""
    sizes: Counter[Any] = Counter()
    for buffer in model.buffers():
        sizes[buffer.dtype] += buffer.nbytes
    return [*sizes.values()]


def _metrics(model: ComposerModel) -> list[Collective]:
    """What torchmetrics gathers after every step, state by state."""
    metrics = model.get_metrics(is_train=True).values()
    sizes: list[int] = []
    for state in (state for metric in metrics for state in metric.metric_state.values()):
        if isinstance(state, Tensor):
            # A barrier, the shapes unless they are known, and the values.
            sizes += [0, 8 * state.ndim, state.nbytes] if state.ndim else [0, state.nbytes]
    return [Collective("metrics", size) for size in sizes]


# How long it takes


@dataclass(frozen=True)
class Link:
    """The slowest link between the ranks.

    Args:
        bandwidth: bytes per second, in each direction, above 0.
        latency: seconds that a message takes beside its bytes, at least 0.

    >>> Link(bandwidth=1e9, latency=1e-5).seconds(4_000_000, ranks=4)
    0.00606
    """

    bandwidth: float
    latency: float

    def seconds(self, size: float, ranks: int) -> float:
        """The time of an all-reduce of `size` bytes, which a broadcast or a gather does not exceed."""
        around_a_ring = 2 * (ranks - 1) * (self.latency + size / ranks / self.bandwidth)
        through_a_tree = 2 * math.ceil(math.log2(ranks)) * (self.latency + size / self.bandwidth)
        return min(around_a_ring, through_a_tree)

    def __str__(self) -> str:
        return f"link {8e-9 * self.bandwidth:.3g} Gbit/s, latency {1e6 * self.latency:.3g} us"


def exposed(buckets: Sequence[int], backward: float, link: Link, ranks: int) -> float:
    """The time that DDP's all-reduces still take when the backward pass has ended.

    Args:
        buckets: their bytes, in the order in which they fill up; bytes of the gradient come at an even pace.
        backward: seconds of the backward pass; 0 if nothing travels while it goes on.
        link: between the ranks.
        ranks: their number.

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
    """What a step takes on several ranks, on average over a method's intervals.

    Args:
        alone: seconds of its work on one process.
        size: bytes that each rank hands to collectives.
        collectives: their number.
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
        """Seconds of a step."""
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
        ranks: their number; nothing moves if there is one.
        overlap: gradients travel while the backward pass goes on.

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
        alone=_average(kinds, lambda kind: timings[kind].step),
        size=_average(kinds, lambda kind: sum(c.size for c in collectives[kind])),
        collectives=_average(kinds, lambda kind: len(collectives[kind])),
        communication=_average(
            kinds, lambda kind: sum(link.seconds(c.size, ranks) for c in collectives[kind])
        ),
        waiting=_average(kinds, waiting),
    )


def _average(kinds: Counter[Kind], value: Callable[[Kind], float]) -> float:
    return sum(count * value(kind) for kind, count in kinds.items()) / kinds.total()


# The measurement


class _Measured(NamedTuple):
    """What a method's run has told: the median of each kind of step, and what follows from its parts."""

    timings: dict[Kind, Timing]
    schedule: Counter[Kind]
    traffic: dict[Kind, list[Collective]]
    gradient: int  # bytes

    @property
    def step(self) -> float:
        """Seconds of a step, on average."""
        return _average(self.schedule, lambda kind: self.timings[kind].step)


def _timed(recipes: Mapping[str, Recipe], steps: int) -> dict[str, _Measured]:
    """Time every method's steps in a Trainer, taking turns."""
    with ExitStack() as open_runs:
        runs: dict[str, Run] = {}
        for method, recipe in recipes.items():
            with naming(method):
                runs[method] = run_of(recipe, backward=True)
                open_runs.callback(runs[method].close)
                runs[method].warm_up()
        found: dict[str, dict[Kind, list[Timing]]] = {method: defaultdict(list) for method in runs}
        for _ in range(steps):
            for method, run in runs.items():
                for kind in run.schedule:
                    found[method][kind].append(run.take(kind))
        return {
            method: _measured(run, found[method], scaled=recipes[method].precision == "amp_fp16")
            for method, run in runs.items()
        }


def _measured(run: Run, steps: Mapping[Kind, Sequence[Timing]], scaled: bool) -> _Measured:
    model = unwrapped(run.trainer.state.model)
    return _Measured(
        {kind: median_timing(timings) for kind, timings in steps.items()},
        run.schedule,
        {kind: traffic(run.optimizer, model, kind, scaled=scaled) for kind in run.schedule},
        sum(_buckets(model)),
    )


def _slowest(runs: Mapping[str, _Measured]) -> dict[str, _Measured]:
    """Take the medians of the rank where they are largest: the others wait for it."""
    ranks = dist.all_gather_object({method: run.timings for method, run in runs.items()})
    return {
        method: run._replace(
            timings={kind: max(rank[method][kind] for rank in ranks) for kind in run.timings}
        )
        for method, run in runs.items()
    }


@contextmanager
def _alone() -> Iterator[None]:
    """Have Composer believe that this process is the only one, as long as the ranks have not met."""
    names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "NODE_RANK")  # LOCAL_RANK chooses the GPU
    if torch_dist.is_initialized():  # they have: in one process of a program that has called this one
        names = ()  # type: ignore[assignment]
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def measured_link(size: int, repeats: int = 30) -> Link:
    """Measure the link between the ranks, which have met already.

    Args:
        size: bytes of a large all-reduce; those of the gradient, as the speed depends on it.
        repeats: of it, and of a small one; the medians count. Default: 30.
    """
    device, ranks = get_device(None), dist.get_world_size()

    def seconds(entries: int) -> float:
        tensor, found = device.tensor_to_device(torch.zeros(entries)), []
        for _ in range(repeats):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(tensor)
            tensor[0].item()
            found.append(time.perf_counter() - start)
        return max(dist.all_gather_object(median(found)))

    seconds(1)  # connects
    small, large = seconds(1), seconds(size // 4)
    bandwidth = 2 * (ranks - 1) / ranks * size / max(large - small, 1e-9)
    return Link(bandwidth, latency=small / (2 * math.ceil(math.log2(ranks))))


def plan(recipes: Mapping[str, Recipe], ranks: int, link: Link | None, steps: int) -> list[str]:
    """Predict, measure if there are ranks to measure on, and return the lines to print.

    Args:
        recipes: by method; all with the same data.
        ranks: how many share a batch.
        link: between them; None: the one between the processes that have been started, measured.
        steps: of each kind that each method takes.

    Raises:
        ConfigError: something cannot be built, or the batch not be divided.
    """
    first = next(iter(recipes.values()))
    if first.cpu_threads is not None:
        torch.set_num_threads(first.cpu_threads)
    samples = _share(first, ranks)
    with _alone():
        alone = _timed({m: with_batch_size(recipe, samples) for m, recipe in recipes.items()}, steps)
    several, on_gpu = dist.get_world_size() > 1, get_device(None).name == "gpu"
    if several:
        dist.initialize_dist(get_device(None))
        alone = _slowest(alone)
    link = link or measured_link(next(iter(alone.values())).gradient)
    predictions = {
        method: predict(run.timings, run.traffic, run.schedule, link, ranks, overlap=on_gpu)
        for method, run in alone.items()
    }
    together = _slowest(_timed(recipes, steps)) if several else {}
    measured = {method: run.step for method, run in together.items()}
    baseline = next((m for m in recipes if m == first.baseline), next(iter(recipes)))
    device, how = "CPU", "all of it waited for, as CPUs compute or send"
    if on_gpu:
        device, how = "GPU", "that of gradients during the backward pass, as far as it can"
    return [
        f"{first.name} on {ranks} ranks of {samples} samples each, {link}; times in ms",
        *_rows(predictions, measured, baseline),
        f"alone: median of {steps} steps of each kind on one process, here, on a {device}.",
        f"communication: around a ring or, if that is faster, through a tree; {how}.",
        "Left out: loading data, ranks slower than others, DDP's own work, faster links within a machine.",
    ]


def _share(recipe: Recipe, ranks: int) -> int:
    """The samples that each rank gets of a batch."""
    size = batch_size(recipe)
    if size % ranks:
        raise ConfigError(
            f"data.batch_size={size}: cannot be divided by {ranks} ranks; change one of the two, such as "
            f"data.batch_size={max(1, round(size / ranks)) * ranks}"
        )
    return size // ranks


def _rows(
    predictions: Mapping[str, Prediction], measured: Mapping[str, float], baseline: str
) -> Iterator[str]:
    """The lines of the table, whose last columns are there if something is measured."""
    relative = f"/ {baseline}"
    titles = ["method", "alone", "MB/step", "collectives", "communication", "waiting", "step", relative]
    rows: list[list[str]] = []
    for method, found in predictions.items():
        ratio = found.step / predictions[baseline].step
        milliseconds = [f"{1e3 * t:.2f}" for t in (found.communication, found.waiting, found.step)]
        row = [
            method,
            f"{1e3 * found.alone:.2f}",
            f"{1e-6 * found.size:.3f}",
            f"{found.collectives:.1f}",
            *milliseconds,
            f"{ratio:.2f}",
        ]
        if measured:
            true = measured[method] / measured[baseline]
            row += [f"{1e3 * measured[method]:.2f}", f"{true:.2f}", f"{ratio / true - 1:+.0%}"]
        rows.append(row)
    titles += ["measured", relative, "off"] if measured else []
    yield from table(titles, rows)
