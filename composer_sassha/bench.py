"""What a step of each method costs: `python -m composer_sassha.bench --plan [RECIPE] [key=value ...]`.

`--plan` predicts it for machines that are not here yet. Every method of the recipe takes some steps in a
Trainer on this process, on the share of the batch that one of the planned ranks would get, and the
collectives that it would issue there are counted from its parts (`traffic`). With n ranks, of which each
hands in S bytes,

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

Started on several processes, `composer -n 2 -m composer_sassha.bench --plan`, it predicts for those: from
steps that each takes alone at the same time as the others, and from a link that is measured. Then they train
together, and what that takes is printed beside the prediction.
"""

import argparse
import math
import os
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from composer_sassha.recipes.command_line import CommandParser, recipe_and_overrides
from composer_sassha.recipes.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from composer import Callback
    from composer.models import ComposerModel
    from torch.optim import Optimizer

    from composer_sassha.recipes.config import Recipe

_EXAMPLES = """\
examples:
  python -m composer_sassha.bench --plan                   every method of the digits recipe on 8 ranks
  python -m composer_sassha.bench --plan my.yaml --ranks 64 --link 100Gbit/s --latency 5us
  python -m composer_sassha.bench --plan digits data.batch_size=1024 --methods sam,sassha
  composer -n 2 -m composer_sassha.bench --plan digits     on two processes: predicted, and measured
"""

_SPEEDS = {
    f"{prefix}{unit}/s": scale * 1000**power
    for unit, scale in (("bit", 1 / 8), ("B", 1))
    for power, prefix in enumerate(["", "k", "M", "G", "T"])
}
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_ROUND = 6  # timed steps of one method before the next one's turn; see `_Run`
_TIMED = ("epoch_start", "batch_start", "before_backward", "after_backward", "batch_end")  # Composer's events


# What moves between the ranks


class Kind(NamedTuple):
    """What a step does beside an ordinary one: whether it perturbs the weights and refreshes the Hessian."""

    perturbs: bool = False
    refreshes: bool = False


class Collective(NamedTuple):
    """One collective operation: what it is for, and the bytes that each rank hands in."""

    purpose: str
    size: int


# All-reduces that DDP starts as soon as the backward pass has filled a bucket.
_OVERLAPPING = ("ascent gradient", "gradient")


def schedule(optimizer: "Optimizer") -> Counter[Kind]:
    """Count the kinds of steps in one period of a method's intervals.

    Args:
        optimizer: the Trainer's, a `SharpnessAwareOptimizer` or any other.

    >>> import torch
    >>> from composer_sassha import SharpnessAwareOptimizer
    >>> from composer_sassha.perturbations import SAMPerturbation
    >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    >>> schedule(SharpnessAwareOptimizer(sgd, SAMPerturbation(), interval=3))[Kind(perturbs=False)]
    2
    """
    perturbation, curvature = (getattr(optimizer, name, None) for name in ("perturbation", "curvature"))
    perturbs = 0 if perturbation is None else optimizer.interval  # type: ignore[attr-defined]
    refreshes = 0 if curvature is None else curvature.interval
    return Counter(
        Kind(*(bool(interval) and step % interval == 0 for interval in (perturbs, refreshes)))
        for step in range(math.lcm(perturbs or 1, refreshes or 1))
    )


def traffic(
    optimizer: "Optimizer", model: "ComposerModel", kind: Kind, *, scaled: bool = False
) -> list[Collective]:
    """List the collectives of one step in a Trainer on several ranks, under DDP.

    An ascent is each rank's own unless `sync_ascent`. A perturbation that mixes gradients has the ranks
    average the mixture, and what it remembers, in place of their gradients. A refresh averages the diagonal.

    Args:
        optimizer: the Trainer's.
        model: what it trains, not wrapped for DDP.
        kind: of the step.
        scaled: a gradient scaler looks for overflows, as in amp_fp16.

    >>> from composer.models import ComposerClassifier
    >>> import torch
    >>> model = ComposerClassifier(torch.nn.Linear(3, 2), num_classes=2)
    >>> traffic(torch.optim.SGD(model.parameters(), lr=0.1), model, Kind())[1]
    Collective(purpose='gradient', size=32)
    """
    from composer_sassha._tensors import wide_dtype

    perturbation: Any = getattr(optimizer, "perturbation", None)
    ascends = kind.perturbs and perturbation.ascends
    sync_ascent = ascends and optimizer.sync_ascent  # type: ignore[attr-defined]  # of the wrapper
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    entries, flat = sum(p.numel() for p in params), wide_dtype(params).itemsize
    passes = 2 if ascends else 1

    found = [Collective("batch size", 8)] * passes
    found += [Collective("buffers", size) for size in _buffers(model)] * (2 if sync_ascent else 1)
    if sync_ascent:
        found += [Collective("ascent gradient", size) for size in _buckets(model)]
    if ascends and perturbation.mixes and not sync_ascent:
        vectors = 2 if perturbation.remembers else 1
        found += [Collective("update", flat * (vectors * entries + len(params)))]
    else:
        found += [Collective("gradient", size) for size in _buckets(model)]
    if kind.refreshes:
        found += [Collective("Hessian", flat * (entries + len(params)))]
    if scaled and _is_wrapped(optimizer):
        found += [Collective("overflow", 4)] * passes
    found += [Collective("loss", 4), Collective("samples", 8), Collective("time", 4)]
    return found + _metrics(model)


def _is_wrapped(optimizer: "Optimizer") -> bool:
    """Whether it is a `SharpnessAwareOptimizer`, as in all our methods."""
    return hasattr(optimizer, "base_optimizer")


def _buckets(model: "ComposerModel") -> list[int]:
    """The bytes of DDP's buckets, in the order in which a backward pass fills them."""
    import torch.distributed as dist

    # DDP sorts them by the order of the gradients in its first pass, which is the reverse of the forward's.
    params: list[Any] = [p for p in model.parameters() if p.requires_grad][::-1]
    limits = [dist._DEFAULT_FIRST_BUCKET_BYTES, 25 * 2**20]  # DDP's defaults, which the Trainer takes
    buckets, _ = dist._compute_bucket_assignment_by_size(params, limits, [False] * len(params))
    return [sum(params[i].nbytes for i in bucket) for bucket in buckets]


def _buffers(model: "ComposerModel") -> list[int]:
    """The bytes that DDP broadcasts before a step: BatchNorm's statistics, one collective for each dtype."""
    sizes: Counter[Any] = Counter()
    for buffer in model.buffers():
        sizes[buffer.dtype] += buffer.nbytes
    return [*sizes.values()]


def _metrics(model: "ComposerModel") -> list[Collective]:
    """What torchmetrics gathers after every step, state by state."""
    from torch import Tensor

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


class Timing(NamedTuple):
    """Seconds of a step on one process, and of the last backward pass within it."""

    step: float
    backward: float


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


# Timing


class Stopwatch:
    """Times the steps of a Trainer by its events, each kind of step apart, without the first of an epoch.

    >>> watch = Stopwatch()
    >>> for seconds, event in enumerate(["batch_start", "before_backward", "after_backward", "batch_end"]):
    ...     watch.tick(event, now=seconds, kind=Kind())
    >>> watch.medians()[Kind()]
    Timing(step=3, backward=1)
    """

    def __init__(self) -> None:
        self.steps: dict[Kind, list[Timing]] = defaultdict(list)
        self._start = self._backward = self._took = 0.0
        self._kind = Kind()
        self._warming_up = False

    def tick(self, event: str, now: float, kind: Kind) -> None:
        """Take note of an event.

        Args:
            event: Composer's name of it.
            now: seconds.
            kind: of the coming step; looked at when it starts.
        """
        if event == "epoch_start":
            self._warming_up = True
        elif event == "batch_start":
            self._start, self._kind = now, kind
        elif event == "before_backward":
            self._backward = now
        elif event == "after_backward":
            self._took = now - self._backward
        elif event == "batch_end":
            if not self._warming_up:
                self.steps[self._kind].append(Timing(now - self._start, self._took))
            self._warming_up = False

    def medians(self) -> dict[Kind, Timing]:
        """The median of each kind of step."""
        return {kind: Timing(*map(median, zip(*steps, strict=True))) for kind, steps in self.steps.items()}


class _Run:
    """One method's Trainer, its steps timed, and what it says about them itself.

    It trains on one batch again and again, so that no data is loaded, with a learning rate of 0, so that no
    method diverges; neither changes how long a step takes. What the method does on some steps only is due on
    every second (a perturbation) or third one (a refresh): so each `_ROUND` has all kinds of steps.
    """

    def __init__(self, recipe: "Recipe") -> None:
        from composer import Trainer

        from composer_sassha.recipes.run import _build

        # Schedules cost nothing, but may refuse so short a training.
        parts = _build(replace(recipe, schedulers=None, schedules={}))
        for group in parts.optimizer.param_groups:
            group["lr"] = 0.0
        stopwatch = self.stopwatch = Stopwatch()
        self.trainer = Trainer(
            model=parts.model,
            train_dataloader=[next(iter(parts.train))] * (1 + _ROUND),
            optimizers=parts.optimizer,
            algorithms=parts.algorithms,
            callbacks=[_ticking(stopwatch)],
            max_duration="1ep",
            precision=recipe.precision,
            device_train_microbatch_size=recipe.device_train_microbatch_size or parts.train.batch_size,
            seed=recipe.seed,
            deterministic_mode=recipe.deterministic,
            progress_bar=False,
        )
        optimizer: Any = self.trainer.state.optimizers[0]
        self.gradient = sum(_buckets(parts.model))  # bytes
        self.schedule = schedule(optimizer)
        scaled = recipe.precision == "amp_fp16"
        self.traffic = {kind: traffic(optimizer, parts.model, kind, scaled=scaled) for kind in self.schedule}
        if _is_wrapped(optimizer):
            optimizer.interval = min(optimizer.interval, 2)
            if optimizer.curvature is not None:
                optimizer.curvature.interval = min(optimizer.curvature.interval, 3)


def _ticking(stopwatch: Stopwatch) -> "Callback":
    """Have a Trainer tick a stopwatch."""
    import torch
    from composer import Callback, State

    class Ticks(Callback):
        def run_event(self, event: Any, state: State, logger: Any) -> None:
            if event.value in _TIMED:
                if state.device.name == "gpu":
                    torch.cuda.synchronize()
                optimizer: Any = state.optimizers[0]
                kind = Kind()
                if _is_wrapped(optimizer):
                    kind = Kind(optimizer.ascent_due(), optimizer.refresh_due())
                stopwatch.tick(event.value, time.perf_counter(), kind)

    return Ticks()


def _timed(recipes: Mapping[str, "Recipe"], rounds: int) -> dict[str, _Run]:
    """Time every method's steps in a Trainer, taking turns."""
    runs: dict[str, _Run] = {}
    try:
        for method, recipe in recipes.items():
            with _naming(method):
                runs[method] = _Run(recipe)
        for number in range(1 + rounds):
            for method, run in runs.items():
                with _naming(method):
                    run.trainer.fit(duration="1ep")
                if number == 0:  # memory is found, kernels are chosen
                    run.stopwatch.steps.clear()
    finally:
        for run in runs.values():
            run.trainer.close()
    return runs


@contextmanager
def _naming(method: str) -> Iterator[None]:
    """What a constructor or the Trainer's start refuses is a mistake in this method of the recipe."""
    try:
        yield
    except ValueError as error:  # a ConfigError too
        raise ConfigError(f"method {method}: {error}") from error


@contextmanager
def _alone() -> Iterator[None]:
    """Have Composer believe that this process is the only one, as long as the ranks have not met."""
    import torch.distributed as dist

    names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "NODE_RANK")  # LOCAL_RANK chooses the GPU
    if dist.is_initialized():  # they have: in one process of a program that has called this one
        names = ()  # type: ignore[assignment]
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def _slowest(runs: Mapping[str, _Run]) -> dict[str, dict[Kind, Timing]]:
    """The medians of every method, on the rank where they are largest: the others wait for it."""
    from composer.utils import dist

    ranks = dist.all_gather_object({method: run.stopwatch.medians() for method, run in runs.items()})
    return {
        method: {kind: max(rank[method][kind] for rank in ranks) for kind in kinds}
        for method, kinds in ranks[0].items()
    }


def measured_link(size: int, repeats: int = 30) -> Link:
    """Measure the link between the ranks, which have met already.

    Args:
        size: bytes of a large all-reduce; those of the gradient, as the speed depends on it.
        repeats: of it, and of a small one; the medians count. Default: 30.
    """
    import torch
    from composer.utils import dist, get_device

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


# The command


@dataclass(frozen=True)
class _Plan:
    recipe: str
    overrides: list[str]
    methods: list[str]
    ranks: int
    link: Link | None  # None: measure it
    rounds: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: its arguments; those of the process by default.

    Returns:
        The exit status: 0, or 2 for a mistake, with one line on standard error.
    """
    first = int(os.environ.get("RANK", "0")) == 0
    try:
        lines = _planned(_parse(sys.argv[1:] if argv is None else argv))
    except ConfigError as error:
        if first:
            print(error, file=sys.stderr)
        return 2
    if first:
        print("\n".join(lines))
    return 0


def _parse(argv: Sequence[str]) -> _Plan:
    parser = CommandParser(
        prog="python -m composer_sassha.bench",
        usage="%(prog)s --plan [RECIPE] [key=value ...] [options]",
        description="Predict the step time of every method of a recipe on several ranks.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="RECIPE, key=value",
        help="a YAML file or the name of a bundled recipe (default: digits), then settings that win over its "
        "own, in every method",
    )
    parser.add_argument("--plan", action="store_true", help="predict; so far there is nothing else to do")
    parser.add_argument("--methods", metavar="A,B", help="the methods to predict (default: all)")
    parser.add_argument(
        "--ranks", metavar="N", help="processes that share a batch (default: 8, or as many as are started)"
    )
    parser.add_argument(
        "--link",
        metavar="SPEED",
        help="of the slowest link between ranks, such as 10Gbit/s, the default; 'measure', the default on "
        "several processes",
    )
    parser.add_argument("--latency", metavar="TIME", help="of a message on that link (default: 20us)")
    parser.add_argument("--steps", metavar="N", default="30", help="timed steps of each method (default: 30)")
    given = parser.parse_intermixed_args(argv)
    if not given.plan:
        raise ConfigError("nothing to do; add --plan")
    recipe, overrides = recipe_and_overrides(given.arguments, "digits")
    here = int(os.environ.get("WORLD_SIZE", "1"))
    ranks = _count("--ranks", given.ranks or str(here if here > 1 else 8))
    if here not in (1, ranks):
        raise ConfigError(f"--ranks={ranks}: {here} processes are started; leave it out, or start one alone")
    return _Plan(
        recipe,
        overrides,
        methods=given.methods.split(",") if given.methods is not None else [],
        ranks=ranks,
        link=_link(given.link, given.latency, several=here > 1),
        rounds=math.ceil(_count("--steps", given.steps) / _ROUND),
    )


def _count(option: str, text: str) -> int:
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise ConfigError(f"{option}={text}: must be a whole number, at least 1")
    return int(text)


def _link(speed: str | None, latency: str | None, several: bool) -> Link | None:
    if speed == "measure" and not several:
        raise ConfigError("--link=measure: there is one process; start several with composer -n 2 -m ...")
    if speed == "measure" or (speed is None and several):
        if latency is not None:
            raise ConfigError(
                f"--latency={latency}: it is measured with the link; set --link too, or neither"
            )
        return None
    bandwidth = _quantity("--link", speed or "10Gbit/s", _SPEEDS)
    if bandwidth == 0:
        raise ConfigError(f"--link={speed}: must be above 0")
    return Link(bandwidth, _quantity("--latency", latency or "20us", _TIMES))


def _quantity(option: str, text: str, units: Mapping[str, float]) -> float:
    """An option's number and unit, in the basic unit.

    >>> _quantity("--link", "10Gbit/s", _SPEEDS)
    1250000000.0
    """
    number, unit = re.fullmatch(r"(\d*\.?\d*)\s*(.*)", text).groups()  # type: ignore[union-attr]  # all match
    if not re.search(r"\d", number) or unit not in units:
        raise ConfigError(f"{option}={text}: must be a number and a unit ({', '.join(units)})")
    return float(number) * units[unit]


def _planned(plan: _Plan) -> list[str]:
    """Predict, measure if there are ranks to measure on, and return the lines to print."""
    import torch
    from composer.utils import dist, get_device

    recipes = _recipes(plan)
    first = next(iter(recipes.values()))
    if first.cpu_threads is not None:
        torch.set_num_threads(first.cpu_threads)
    samples = _share(first, plan.ranks)
    with _alone():
        alone = _timed({m: _with_batch(recipe, samples) for m, recipe in recipes.items()}, plan.rounds)
    several, on_gpu = dist.get_world_size() > 1, get_device(None).name == "gpu"
    if several:
        dist.initialize_dist(get_device(None))
    link = plan.link or measured_link(next(iter(alone.values())).gradient)
    timings = _slowest(alone)
    predictions = {
        method: predict(timings[method], run.traffic, run.schedule, link, plan.ranks, overlap=on_gpu)
        for method, run in alone.items()
    }
    measured = {}
    if several:
        together = _slowest(_timed(recipes, plan.rounds))
        for method, run in alone.items():
            steps = {kind: timing.step for kind, timing in together[method].items()}
            measured[method] = _average(run.schedule, steps.__getitem__)
    baseline = first.baseline if first.baseline in recipes else next(iter(recipes))
    device, how = "CPU", "all of it waited for, as CPUs compute or send"
    if on_gpu:
        device, how = "GPU", "that of gradients during the backward pass, as far as it can"
    return [
        f"{first.name} on {plan.ranks} ranks of {samples} samples each, {link}; times in ms",
        *_table(predictions, measured, baseline),
        f"alone: median of {plan.rounds * _ROUND} steps on one process, here, on a {device}.",
        f"communication: around a ring or, if that is faster, through a tree; {how}.",
        "Left out: loading data, ranks slower than others, DDP's own work, faster links within a machine.",
    ]


def _recipes(plan: _Plan) -> dict[str, "Recipe"]:
    """The recipe of every method to predict, and of the baseline."""
    from composer_sassha.recipes.config import load_recipe, read_recipe

    for override in plan.overrides:
        if override.startswith("method="):
            raise ConfigError(f"{override}: leave it out; --methods says which methods to predict")
    shared, known = read_recipe(plan.recipe)
    if not known:
        raise ConfigError(f"{plan.recipe}: its methods are empty, so there is none to predict")
    for method in plan.methods:
        if method not in known:
            near = did_you_mean(method, known)
            raise ConfigError(f"--methods: {method!r} is unknown{near} (there are: {', '.join(known)})")
    chosen = [m for m in known if not plan.methods or m in (*plan.methods, shared.get("baseline"))]
    return {m: load_recipe(plan.recipe, [*plan.overrides, f"method={m}"]) for m in chosen}


def _share(recipe: "Recipe", ranks: int) -> int:
    """The samples that each rank gets of a batch."""
    size = getattr(recipe.data, "batch_size", None)
    if size is None:
        raise ConfigError(f"data: {type(recipe.data).__name__} has no batch_size that the ranks could share")
    if size % ranks:
        raise ConfigError(
            f"data.batch_size={size}: cannot be divided by {ranks} ranks; change one of the two, such as "
            f"data.batch_size={max(1, round(size / ranks)) * ranks}"
        )
    return size // ranks


def _with_batch(recipe: "Recipe", samples: int) -> "Recipe":
    return replace(recipe, data=replace(recipe.data, batch_size=samples))


def _table(
    predictions: Mapping[str, Prediction], measured: Mapping[str, float], baseline: str
) -> Iterator[str]:
    """The lines of the table, whose last columns are there if something is measured."""
    relative = f"/ {baseline}"
    titles = ["alone", "MB/step", "collectives", "communication", "waiting", "step", relative]
    rows = {}
    for method, found in predictions.items():
        ratio = found.step / predictions[baseline].step
        milliseconds = [f"{1e3 * t:.2f}" for t in (found.communication, found.waiting, found.step)]
        rows[method] = [
            f"{1e3 * found.alone:.2f}",
            f"{1e-6 * found.size:.3f}",
            f"{found.collectives:.1f}",
            *milliseconds,
            f"{ratio:.2f}",
        ]
        if measured:
            true = measured[method] / measured[baseline]
            rows[method] += [f"{1e3 * measured[method]:.2f}", f"{true:.2f}", f"{ratio / true - 1:+.0%}"]
    titles += ["measured", relative, "off"] if measured else []
    widths = [max(map(len, column)) for column in zip(titles, *rows.values(), strict=True)]
    first = max(len("method"), *map(len, rows))
    for name, cells in {"method": titles, **rows}.items():
        yield "  ".join([f"{name:<{first}}", *(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))])


if __name__ == "__main__":
    sys.exit(main())
