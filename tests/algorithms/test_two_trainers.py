"""Algorithms, callbacks and wrapped optimizers that two Trainers share, one after the other or in turns."""

import pytest
from composer.core import Precision
from composer.loggers import InMemoryLogger
from composer.optim import LinearScheduler
from torch.utils.data import DataLoader, Subset

from composer_sassha import (
    ESAM,
    SAM,
    LazyHessian,
    LookSAM,
    Sassha,
    Schedule,
    SharpnessAwareOptimizer,
    SharpnessMonitor,
)
from composer_sassha.perturbations import SAMPerturbation
from composer_sassha.sharpness import Measures
from tests.helpers import assert_same, copied, images, network, trainer
from tests.methods import sassha, sgd

SHARED = {
    "sassha": (
        sassha,
        lambda: [Sassha(0.1, hessian_interval=3), Schedule("hessian_power", LinearScheduler())],
    ),
    "on_part": (sassha, lambda: [SAM(0.1, ascent_fraction=0.5), LazyHessian(2, batch_fraction=0.4)]),
    "esam": (sgd, lambda: [ESAM(0.1, 0.5, 0.6), Schedule("weight_decay", LinearScheduler(alpha_f=0.5))]),
    "looksam": (sgd, lambda: [LookSAM(0.1, interval=2), Schedule("alpha", LinearScheduler(alpha_f=0.5))]),
}


@pytest.mark.parametrize("in_turns", [False, True])
@pytest.mark.parametrize(("optimizer", "algorithms"), SHARED.values(), ids=SHARED)
def test_two_trainers_share_nothing_but_the_algorithms(optimizer, algorithms, in_turns):
    def build(algorithms, count):
        loader = DataLoader(images(count), 10)
        return trainer(optimizer, algorithms, model=network(dropout=0), train_dataloader=loader)

    def fit(runs):
        for run in 4 * runs:
            run.fit(duration="1ba")
        return [copied(run.state.model.state_dict()) for run in runs]

    alone = [fit([build(algorithms(), count)]) for count in (40, 60)]
    shared = algorithms()
    if in_turns:
        together = [[end] for end in fit([build(shared, count) for count in (40, 60)])]
    else:
        together = [fit([build(shared, count)]) for count in (40, 60)]
    assert_same(alone, together)


def test_every_trainer_checks_what_it_is_given():
    shared = [LazyHessian(estimator="finite_difference")]
    trainer(sassha, shared).close()
    with pytest.raises(ValueError, match="SGD does not"):
        trainer(sgd, shared)
    run = trainer(sassha, shared)
    run.state.precision = Precision.AMP_BF16
    with pytest.raises(ValueError, match="needs precision='fp32'"):
        run.fit()
    run.close()


WRAPPED = {
    "the user's perturbation": (SAMPerturbation(0.1), lambda: [LazyHessian(3)]),
    "the algorithm's": (None, lambda: [Sassha(rho=0.1, hessian_interval=3)]),
}


@pytest.mark.parametrize(("perturbation", "algorithms"), WRAPPED.values(), ids=WRAPPED)
def test_a_wrapped_optimizer_goes_on_in_another_trainer(perturbation, algorithms):
    """With this one's algorithms, not with those of the Trainer before."""
    ends = []
    for durations in (["4ba"], ["2ba", "2ba"]):
        model = network(dropout=0)
        optimizer = SharpnessAwareOptimizer(sassha(model.parameters()), perturbation)
        start = 0
        for duration in durations:
            loader = DataLoader(Subset(images(), range(start, 40)), 10)
            run = trainer(
                lambda _, o=optimizer: o,
                algorithms(),
                model=model,
                train_dataloader=loader,
                max_duration=duration,
            )
            run.fit()
            start += 20
        assert optimizer.steps_taken == 4
        ends.append(copied(model.state_dict()))
    assert_same(*ends)
    other = trainer(lambda _: optimizer, [LazyHessian(5)], model=model)
    assert optimizer.perturbation is perturbation and optimizer.curvature.interval == 5
    with pytest.raises(ValueError, match="has been given to another Trainer since") as error:
        run.fit(duration="1ba")
    assert "\n" not in str(error.value)
    other.close()


def test_a_monitor_begins_anew_in_another_trainer():
    """With that one's data, and at the batch at which the first one ended."""
    little = Measures(eigenvalues=0, trace_samples=0, directions=0, m=())
    shared, own = (SharpnessMonitor("1ep", batches=1, measures=little) for _ in range(2))
    found = []
    for monitor, count in ((shared, 10), (shared, 5), (own, 5)):
        log, evaluation = InMemoryLogger(), DataLoader(images(count), 10)
        run = trainer(
            sgd,
            model=network(dropout=0),
            eval_dataloader=evaluation,
            max_duration="1ep",
            callbacks=[monitor],
            loggers=[log],
        )
        run.fit()
        run.close()
        found.append([value for _, value in log.data["sharpness/loss"]])
    assert len(found[0]) == 1 and found[0] != found[1] and found[1] == found[2]
