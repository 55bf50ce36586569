"""Composer's OptimizerMonitor around every rule, and around a base that reports metrics of its own."""

import math

import pytest
from composer.callbacks import OptimizerMonitor
from composer.core import Event
from composer.loggers import InMemoryLogger
from composer.optim import DecoupledAdamW

from composer_sassha import MSAM, SAM, LazyHessian, Sassha
from tests.helpers import Spy, trainer
from tests.methods import adahessian, sassha, sgd, sophia


def decoupled(params):
    return DecoupledAdamW(params, lr=0.01)


def logged(optimizer, algorithms):
    log, norms = InMemoryLogger(), []

    def look(event, state, passes):
        if event == Event.BATCH_END and state.timestamp.batch.value % 2 == 0:
            squares = sum(p.grad.double().square().sum().item() for p in state.model.parameters())
            norms.append(math.sqrt(squares))

    callbacks = [OptimizerMonitor(batch_log_interval=2), Spy(look)]
    run = trainer(optimizer, algorithms, callbacks=callbacks, loggers=[log], max_duration="4ba")
    run.fit()
    names = [name for name, _ in run.state.model.named_parameters()]
    run.close()
    found = {key: [value for _, value in values] for key, values in log.data.items() if "l2_norm" in key}
    assert found["l2_norm/grad/global"] == pytest.approx(norms, rel=1e-5)
    return found, names


@pytest.mark.parametrize(
    ("optimizer", "algorithms", "kinds"),
    [
        (sgd, [SAM()], {"grad"}),
        (decoupled, [SAM()], {"grad", "moment", "param", "update"}),
        (sassha, [Sassha()], {"grad", "moment", "param", "update", "curvature"}),
        (adahessian, [LazyHessian()], {"grad", "moment", "param", "update", "curvature"}),
        (sophia, [MSAM(), LazyHessian()], {"grad", "moment", "param", "update", "curvature"}),
    ],
)
def test_it_logs_the_norms_of_every_parameter(optimizer, algorithms, kinds):
    found, names = logged(optimizer, algorithms)
    assert found.keys() - {"l2_norm/grad/global"} == {f"l2_norm/{k}/{name}" for k in kinds for name in names}
    assert all(len(values) == 2 and all(map(math.isfinite, values)) for values in found.values())


def test_at_radius_0_it_logs_what_it_logs_of_the_base():
    assert logged(decoupled, []) == logged(decoupled, [SAM(rho=0.0)])
