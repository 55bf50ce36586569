"""The checks that each of two ranks runs once, each with its result in a file. See test_two_ranks.py."""

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.models import ComposerClassifier, ComposerModel
from composer.utils import dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from composer_sassha import GSAM, SAM, SASSHA, ClosureGradScaler, Sassha, SharpnessAwareOptimizer
from composer_sassha.algorithms.base import methods_of
from composer_sassha.curvature import rademacher
from composer_sassha.perturbations import GSAMPerturbation
from composer_sassha.recipes.run import RankZeroBuffers
from tests.algorithms.test_sassha import Separable, scalars
from tests.distributed.launch import run_checks, without_metrics
from tests.helpers import (
    Spy,
    assert_same,
    copied,
    everything,
    float16_on_cpu,
    images,
    method_trainer,
    network,
    rng_states,
    trainer,
)
from tests.methods import METHODS, MORE, NAMED, Method, sgd


def trains(method: Method, folder: Path, steps: int = 12) -> None:
    """Train on different data, along different perturbations: the replicas stay equal.

    A run that is resumed in mid-epoch, between two refreshes, ends as the uninterrupted one. The special rows
    are also resumed one batch earlier, as their intervals differ.
    """
    batches = (6, 7) if method in MORE else (7,)  # an epoch has four

    def due(state: State, event: Event) -> bool:
        return event == Event.BATCH_CHECKPOINT and state.timestamp.batch in batches

    def build(**kwargs: Any) -> Trainer:
        return worker_trainer(method, max_duration=f"{steps}ba", device_train_microbatch_size=7, **kwargs)

    run = build(save_folder=str(folder), save_interval=due, save_filename="ba{batch}.pt")
    run.fit()
    assert_replicas(run, steps)
    expected = everything(run)
    run.close()
    for batch in batches:
        resumed = build(load_path=str(folder / f"ba{batch}.pt"))
        assert resumed.state.timestamp.batch == batch
        resumed.fit()
        assert_same(expected, everything(resumed), f"rank {dist.get_global_rank()}, from batch {batch}")
        resumed.close()


def worker_trainer(method: Method, **kwargs: Any) -> Trainer:
    return method_trainer(method, **{"model": without_metrics(network()), "dataset": images(80), **kwargs})


def replicas(method: Method, steps: int) -> None:
    """Train on different data, along different perturbations: both ranks hold the same weights."""
    run = worker_trainer(method, max_duration=f"{steps}ba", device_train_microbatch_size=7)
    run.fit()
    assert_replicas(run, steps)
    run.close()


def assert_replicas(run: Trainer, steps: int) -> None:
    (optimizer,) = run.state.optimizers
    assert optimizer.steps_taken == steps
    norms = dist.all_gather_object(optimizer.metrics.get("grad_norm"))
    assert norms[0] is None or norms[0] != norms[1], "the ranks perturb along their own gradients"
    assert_equal_on_all_ranks([[*run.state.model.parameters()], optimizer.state_dict()])


def replicas_under_overflow(method: Method, steps: int) -> None:
    """In float16, one rank's gradient overflows now and then, in either pass: both skip, and stay equal."""

    def overflow(event: Event, state: State, passes: int) -> None:
        batch = int(state.timestamp.batch)
        due = (passes == 1 and batch % 7 == 3) or (passes == 2 and batch % 5 == 4)
        if event == Event.AFTER_BACKWARD and dist.get_global_rank() == 1 and due:
            next(state.model.parameters()).grad.fill_(torch.inf)

    with float16_on_cpu() as settings:
        run = worker_trainer(method, max_duration=f"{steps}ba", callbacks=[Spy(overflow)], **settings)
        run.fit()
    (optimizer,) = run.state.optimizers
    assert optimizer.skipped_steps > 0 and optimizer.steps_taken + optimizer.skipped_steps == steps
    assert_equal_on_all_ranks(
        [[*run.state.model.parameters()], optimizer.state_dict(), run.state.scaler.state_dict()]
    )
    run.close()


class Sometimes(nn.Module):
    """A layer that every rank leaves out at random."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layer = nn.Linear(features, features)

    def forward(self, x):
        return x + self.layer(x) if torch.rand(()) < 0.6 else x


def replicas_without_gradients(method: Method, steps: int) -> None:
    """Leave a layer out at random: one rank, or both, has no gradient for it, other ones in each pass."""
    model = without_metrics(network())
    *layers, head = model.module
    model.module = nn.Sequential(*layers, Sometimes(head.in_features), head)
    run = trainer(
        method.optimizer,
        [*method.algorithms(), Unused()],
        model=model,
        dataset=images(80),
        max_duration=f"{steps}ba",
    )
    run.fit()
    (optimizer,) = run.state.optimizers
    assert optimizer.steps_taken == steps
    assert_equal_on_all_ranks([[*run.state.model.parameters()], optimizer.state_dict()])
    run.close()


def assert_equal_on_all_ranks(tree: Any) -> None:
    mine = copied(tree)
    for other in dist.all_gather_object(mine):
        assert_same(mine, other)


def recording(model: ComposerModel) -> list:
    """Have a model remember the microbatches that its loss sees."""
    seen, loss = [], model.loss

    def recorded(outputs, batch):
        seen.append(copied(batch))
        return loss(outputs, batch)

    model.loss = recorded
    return seen


def separable(microbatch: int) -> None:
    """The diagonal is the mean of the analytic ones at the points that the two ranks have perturbed to."""
    model = Separable("scalar")
    seen = recording(model)
    p, a = model.p.detach().clone(), model.a
    x = torch.linspace(0.5, 2.0, 20, dtype=torch.float64)
    run = trainer(
        lambda params: SASSHA(params, lr=0.1, betas=(0.9, 0.0)),
        [Sassha(rho=0.3)],
        model=model,
        dataset=scalars(20),
        max_duration="1ba",
        device_train_microbatch_size=microbatch,
    )
    run.fit()
    (state,) = run.state.optimizers[0].state.values()
    expected = torch.zeros_like(p)
    shards = dist.all_gather_object(torch.cat([x for x, _ in seen[: len(seen) // 2]]))  # of the first pass
    assert torch.equal(torch.cat(shards).sort().values, x)
    for shard in shards:
        g = -shard.mean() * a * p.sin()
        expected += -shard.mean() * a * (p + 0.3 * g / g.norm()).cos() / 2
    assert (state["exp_hessian"] - expected.abs()).abs().max() <= 1e-12
    run.close()


def one_process_agrees(microbatch: int, uneven: bool = False) -> None:
    """With a synchronized ascent, two ranks take the step of one process on the whole batch."""
    x, y = images(20).tensors
    kwargs = {}
    if uneven:  # one rank has 6 samples, the other 14
        mine = slice(0, 6) if dist.get_global_rank() == 0 else slice(6, 20)
        own = TensorDataset(x[mine].double(), y[mine])
        sampler = DistributedSampler(own, num_replicas=1, rank=0)
        kwargs["train_dataloader"] = DataLoader(own, batch_size=len(own), sampler=sampler)
    torch.manual_seed(17)
    model = ComposerClassifier(
        nn.Sequential(nn.Flatten(), nn.Linear(50, 6), nn.Tanh(), nn.Linear(6, 3)).double(), num_classes=3
    )
    seen = recording(model)
    reference = copy.deepcopy(model.module)
    w = {name: p.detach() for name, p in reference.named_parameters()}
    run = trainer(
        lambda params: SASSHA(params, lr=0.1),
        [Sassha(rho=0.3, sync_ascent=True)],
        model=model,
        dataset=TensorDataset(x.double(), y),
        max_duration="1ba",
        device_train_microbatch_size=microbatch,
        **kwargs,
    )
    run.fit()

    # The same by hand, with the probes that each rank and microbatch has drawn.
    shards = dist.all_gather_object(seen[: len(seen) // 2])
    pieces = [(rank, k, x, y) for rank, shard in enumerate(shards) for k, (x, y) in enumerate(shard)]
    total = sum(len(x) for _, _, x, _ in pieces)
    assert total == 20

    def loss(params, x, y):
        return nn.functional.cross_entropy(torch.func.functional_call(reference, params, (x,)), y)

    def gradient(params):
        grads = [torch.func.grad(loss)(params, x, y) for _, _, x, y in pieces]
        shares = [len(x) / total for _, _, x, _ in pieces]
        return {n: sum(s * g[n] for s, g in zip(shares, grads, strict=True)) for n in params}

    g = gradient(w)
    norm = sum((v**2).sum() for v in g.values()).sqrt()
    displaced = {n: w[n] + 0.3 * g[n] / norm for n in w}
    g_hat = gradient(displaced)
    h = {n: torch.zeros_like(v) for n, v in w.items()}
    for rank, k, x, y in pieces:
        z = dict(zip(w, rademacher([*w.values()], (0, 0, rank, k, 0)), strict=True))
        hz = torch.func.jvp(lambda p, x=x, y=y: torch.func.grad(loss)(p, x, y), (displaced,), (z,))[1]
        h = {n: h[n] + len(x) / total * z[n] * hz[n] for n in h}
    for name, p in model.module.named_parameters():
        expected = w[name] - 0.1 * g_hat[name] / (h[name].abs().sqrt() + 1e-4)
        assert (p - expected).abs().max() <= 1e-9, name
    run.close()


def sync_strategies(method: Method) -> None:
    """When to average is the Trainer's choice; averaging every pass is what sync_ascent does, and said."""

    def train(strategy: str, sync_ascent: bool) -> tuple[list[torch.Tensor], bool]:
        algorithms = method.algorithms()
        for algorithm in algorithms:
            for part in methods_of([algorithm]):
                if hasattr(part, "sync_ascent"):
                    part.sync_ascent = sync_ascent
        run = trainer(
            method.optimizer,
            algorithms,
            model=without_metrics(network()),
            device_train_microbatch_size=7,
            ddp_sync_strategy=strategy,
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.fit()
        weights = copied([*run.state.model.parameters()])
        for other in dist.all_gather_object(weights):
            assert_same(weights, other)
        run.close()
        return weights, any("all ranks perturb along the same gradient" in str(w.message) for w in caught)

    def assert_close(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
        for a, b in zip(first, second, strict=True):
            assert (a - b).abs().max() <= 1e-5

    rank = dist.get_global_rank()
    single, said = train("single_auto_sync", False)
    assert not said
    multi, said = train("multi_auto_sync", False)
    assert not said
    assert_close(single, multi)
    averaged, said = train("single_auto_sync", True)
    assert not said
    forced, said = train("forced_sync", False)
    assert said == (rank == 0)
    assert_close(averaged, forced)
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(single, forced, strict=True))


def a_rank_without_a_gradient() -> None:
    """Nobody waits for a rank whose first batches have no gradient at all."""

    def mask(event: Event, state: State, passes: int) -> None:
        if event == Event.AFTER_LOSS and dist.get_global_rank() == 1 and state.timestamp.batch < 2:
            state.loss = state.loss * 0

    run = trainer(
        NAMED["sam_sgd"].optimizer, NAMED["sam_sgd"].algorithms(), max_duration="4ba", callbacks=[Spy(mask)]
    )
    run.fit()
    assert_equal_on_all_ranks([*run.state.model.parameters()])
    run.close()


def gsam_combines(sync_ascent: bool) -> None:
    """Each rank combines its own gradients and the results are averaged; or averaged ones are combined."""
    x, y = images(20).tensors
    torch.manual_seed(17)
    net = nn.Sequential(nn.Flatten(), nn.Linear(50, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    model = ComposerClassifier(net, num_classes=3)
    seen = recording(model)
    reference = copy.deepcopy(net)
    w = {name: p.detach() for name, p in reference.named_parameters()}
    run = trainer(
        lambda params: torch.optim.SGD(params, lr=0.1),
        [GSAM(rho_max=0.3, alpha=0.5, sync_ascent=sync_ascent)],
        model=model,
        dataset=TensorDataset(x.double(), y),
        max_duration="1ba",
        device_train_microbatch_size=7,
    )
    run.fit()

    shards = dist.all_gather_object([torch.cat(part) for part in zip(*seen[: len(seen) // 2], strict=True)])
    if sync_ascent:  # the gradients are those of the whole batch
        shards = [[torch.cat(part) for part in zip(*shards, strict=True)]]

    def gradient(params, shard):
        def loss(params):
            return nn.functional.cross_entropy(
                torch.func.functional_call(reference, params, (shard[0],)), shard[1]
            )

        return torch.func.grad(loss)(params)

    def inner(a, b):
        return sum((a[n] * b[n]).sum() for n in a)

    update = {n: torch.zeros_like(v) for n, v in w.items()}
    for shard in shards:
        g = gradient(w, shard)
        g_p = gradient({n: w[n] + 0.3 * g[n] / inner(g, g).sqrt() for n in w}, shard)
        along = inner(g, g_p) / inner(g_p, g_p)
        update = {n: update[n] + (g_p[n] - 0.5 * (g[n] - along * g_p[n])) / len(shards) for n in w}
    for name, p in net.named_parameters():
        assert (p - (w[name] - 0.1 * update[name])).abs().max() <= 1e-12, name
    run.close()


class Unused(Algorithm):
    """Has DDP look for parameters that are not used."""

    find_unused_parameters = True

    def match(self, event: Event, state: State) -> bool:
        return False

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        raise NotImplementedError


def a_parameter_that_one_rank_uses(method: Method) -> None:
    """It is updated by its average; one that no rank uses is left without a gradient."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.stem, self.mine, self.idle = (nn.Linear(50, 3), nn.Linear(50, 3), nn.Linear(50, 3))

        def forward(self, x):
            x = x.flatten(1)
            return self.stem(x) + (self.mine(x) if dist.get_global_rank() == 0 else 0)

    model = ComposerClassifier(Branches(), num_classes=3)
    before = copied(dict(model.module.named_parameters()))
    run = trainer(
        method.optimizer,
        [*method.algorithms(), Unused()],
        model=model,
        dataset=images(40),
        max_duration="2ba",
    )
    run.fit()
    after = copied(dict(model.module.named_parameters()))
    for other in dist.all_gather_object(after):
        assert_same(after, other)
    assert not torch.equal(before["mine.weight"], after["mine.weight"])
    assert_same(before["idle.weight"], after["idle.weight"])
    run.close()


def an_overflow_on_one_rank(in_pass: int) -> None:
    """Both ranks skip the step, and both back the scale off, once."""
    torch.manual_seed(3)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(50, 6), nn.Tanh(), nn.Linear(6, 3)))
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = SharpnessAwareOptimizer(base, GSAMPerturbation(0.1, alpha=0.3), model=model)
    scaler = ClosureGradScaler("cpu", init_scale=2.0**8)
    x, y = images(20).tensors
    rank, passes = dist.get_global_rank(), 0

    def closure():
        nonlocal passes
        passes += 1
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[rank::2].flatten(1)), y[rank::2])
        optimizer.backward(loss, scaler=scaler)
        if rank == 1 and passes == in_pass:
            next(model.parameters()).grad[0] = torch.inf
        return loss.detach()

    before = copied([*model.parameters()])
    assert scaler.step(optimizer, closure=closure) is None
    scaler.update()
    assert passes == in_pass and scaler.get_scale() == 2.0**7
    assert_same(before, [p.detach() for p in model.parameters()])
    assert optimizer.skipped_steps == 1 and optimizer.steps_taken == 0
    assert scaler.step(optimizer, closure=closure) is not None
    scaler.update()
    for other in dist.all_gather_object(copied([*model.parameters()])):
        assert_same([p.detach() for p in model.parameters()], other)


def optimizer_of_the_head_alone() -> None:
    """The rest of the model is trainable but not the optimizer's: DDP waits for its gradients too."""
    model = network()
    run = trainer(
        lambda _: SASSHA(model.module[5].parameters(), lr=0.05),
        [Sassha(rho=0.1, hessian_interval=2)],
        model=model,
        dataset=images(80),
        max_duration="4ba",
    )
    run.fit()
    assert_equal_on_all_ranks([*model.module.parameters()])
    assert run.state.optimizers[0].param_groups[0]["refreshes"] == 2
    run.close()


def evaluates_with_the_buffers_of_rank_zero() -> None:
    seen = {}

    def look(event, state, passes):
        if event in (Event.EVAL_BEFORE_ALL, Event.EVAL_START):
            seen[event] = dist.all_gather_object(copied(dict(state.model.named_buffers())))

    run = trainer(
        NAMED["sam_sgd"].optimizer,
        NAMED["sam_sgd"].algorithms(),
        dataset=images(80),
        max_duration="1ep",
        eval_dataloader=DataLoader(images(20), batch_size=10, sampler=dist.get_sampler(images(20))),
        callbacks=[Spy(look), RankZeroBuffers()],
    )
    run.fit()
    before, during = seen[Event.EVAL_BEFORE_ALL], seen[Event.EVAL_START]
    name = "module.module.1.running_mean"
    assert not torch.equal(before[0][name], before[1][name]), "each rank has statistics of its own"
    assert_same(before[0], during[0])
    assert_same(before[0], during[1])
    run.close()


def leaves_no_trace(ascent_fraction: float) -> None:
    """A second pass at radius 0 changes nothing, nor BatchNorm's statistics, which differ between ranks."""

    def train(algorithms: list[Algorithm]) -> Any:
        run = trainer(
            sgd,
            algorithms,
            model=without_metrics(network()),
            dataset=images(80),
            max_duration="7ba",
            device_train_microbatch_size=7,
        )
        run.fit()
        found = copied([run.state.model.state_dict(), rng_states()])
        run.close()
        return found

    assert_same(train([]), train([SAM(rho=0.0, ascent_fraction=ascent_fraction)]))


STRATEGIC = ("sam_sgd", "gsam_sgd", "looksam_sgd", "sassha")
# What may tear replicas apart, and the methods that it is tried on. Differences are refused in float16.
WHAT_KEEPS = {
    "replicas": replicas,
    "replicas_under_overflow": replicas_under_overflow,
    "replicas_without_gradients": replicas_without_gradients,
}
REPLICAS = [
    (check, method)
    for method in METHODS
    for check in WHAT_KEEPS
    if (check, method.name) != ("replicas_under_overflow", "sassha_difference")
]
FAULTS = [
    (check, name)
    for check in ("replicas_under_overflow", "replicas_without_gradients")
    for name in ("sam_sgd_every_2", "gsam_adamw", "looksam_sgd", "esam_sgd", "sassha", "msassha")
]
LONGER = ("looksam_adamw", "sassha_scheduled")


def checks_in(out: Path) -> dict[str, Callable[[], None]]:
    """Return every check by its name, in the order in which they run; `out` is for their files."""
    folder = out / "checkpoints"
    checks = {f"trains[{m}]": partial(trains, m, folder / m.name) for m in METHODS}
    for microbatch in (10, 3):
        checks[f"separable[{microbatch}]"] = partial(separable, microbatch)
        checks[f"one_process_agrees[{microbatch}]"] = partial(one_process_agrees, microbatch)
    checks["one_process_agrees[uneven]"] = partial(one_process_agrees, 4, uneven=True)
    checks |= {f"sync_strategies[{name}]": partial(sync_strategies, NAMED[name]) for name in STRATEGIC}
    checks |= {f"an_overflow_on_one_rank[{n}]": partial(an_overflow_on_one_rank, n) for n in (1, 2)}
    checks |= {f"{check}[{name}]": partial(WHAT_KEEPS[check], NAMED[name], 15) for check, name in FAULTS}
    checks |= {f"replicas[{name}]": partial(replicas, NAMED[name], 30) for name in LONGER}
    checks |= {f"gsam_combines[{sync}]": partial(gsam_combines, sync) for sync in (False, True)}
    for name in ("sam_sgd", "gsam_sgd", "looksam_sgd"):
        checks[f"a_parameter_that_one_rank_uses[{name}]"] = partial(
            a_parameter_that_one_rank_uses, NAMED[name]
        )
    checks |= {f"leaves_no_trace[{fraction}]": partial(leaves_no_trace, fraction) for fraction in (1.0, 0.4)}
    alone = (a_rank_without_a_gradient, optimizer_of_the_head_alone, evaluates_with_the_buffers_of_rank_zero)
    return checks | {check.__name__: check for check in alone}


def main(out: Path, names: Sequence[str]) -> None:
    """Run the named checks of `checks_in`."""
    warnings.simplefilter("ignore")
    found = checks_in(out)
    run_checks(
        {name: found[name] for name in found if name in names},
        out,
        double=lambda name: name.startswith(("separable", "one_process", "gsam_combines")),
    )


def long(out: Path, steps: int) -> None:
    """Run the checks of equal replicas, for every method and fault."""
    warnings.simplefilter("ignore")
    run_checks({f"{check}[{m}]": partial(WHAT_KEEPS[check], m, steps) for check, m in REPLICAS}, out)
