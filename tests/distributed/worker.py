"""The checks that each of two ranks runs once, each with its result in a file. See test_two_ranks.py."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from composer.core import Algorithm, Event, State
from composer.models import ComposerClassifier
from composer.utils import dist
from torch import nn
from torch.utils.data import DataLoader

from composer_sassha import (
    GSAM,
    SAM,
    SASSHA,
    ClosureGradScaler,
    LazyHessian,
    Sassha,
    SharpnessAwareOptimizer,
)
from composer_sassha.algorithms.base import methods_of
from composer_sassha.perturbations import GSAMPerturbation
from composer_sassha.recipes.run import RankZeroBuffers
from tests.distributed import topology
from tests.distributed.arithmetic import clips_what_is_applied, gsam_combines, one_process_agrees, separable
from tests.distributed.launch import run_checks, without_metrics
from tests.distributed.replicas import (
    FAULTS,
    LONGER,
    WHAT_KEEPS,
    Unused,
    assert_equal_on_all_ranks,
    replicas,
    trains,
)
from tests.helpers import Spy, assert_same, copied, images, network, rng_states, trainer
from tests.methods import METHODS, NAMED, Method, sgd


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
    """The rest of the model is trainable but not the optimizer's: its gradients are averaged all the same."""
    for algorithms in ([Sassha(rho=0.1, hessian_interval=2)], [GSAM(0.1, 0.1), LazyHessian(2)]):
        model = network()
        run = trainer(
            lambda _, model=model: SASSHA(model.module[5].parameters(), lr=0.05),
            algorithms,
            model=model,
            dataset=images(80),
            max_duration="4ba",
        )
        run.fit()
        assert_equal_on_all_ranks([[p, p.grad] for p in model.module.parameters()])
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
    alone = (
        a_rank_without_a_gradient,
        optimizer_of_the_head_alone,
        evaluates_with_the_buffers_of_rank_zero,
        clips_what_is_applied,
    )
    return checks | {check.__name__: check for check in alone} | topology.checks_in(out)


def main(out: Path, names: Sequence[str]) -> None:
    """Run the named checks of `checks_in`."""
    warnings.simplefilter("ignore")
    found = checks_in(out)
    run_checks(
        {name: found[name] for name in found if name in names},
        out,
        double=lambda name: name.startswith(("separable", "one_process", "gsam_combines")),
    )
