"""The second pass of a perturbed step: a user sees the update, and nothing else."""

import weakref
from functools import cache

import pytest
import torch
from composer.core import Event
from composer.loggers import InMemoryLogger

from composer_sassha import ASAM, ESAM, GSAM, MSAM, SAM, SSAM, USAM, LookSAM
from composer_sassha.algorithms import wiring
from composer_sassha.algorithms.perturbing import LOGGED
from tests.helpers import Spy, assert_same, copied, rng_states, trainer
from tests.methods import sgd
from tests.optim.test_counts import Calls


def observed(algorithms, **kwargs):
    """Train two epochs and return everything that a user can see."""
    log = InMemoryLogger()
    last = {}

    def look(event, state, passes):
        if event == Event.BATCH_END:
            last.update(copied({"loss": state.loss, "outputs": state.outputs, "batch": state.batch}))

    run = trainer(
        lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
        algorithms,
        loggers=[log],
        callbacks=[Spy(look)],
        device_train_microbatch_size=4,
        **kwargs,
    )
    run.fit()
    state = copied(
        [run.state.model.state_dict(), run.state.optimizers[0].state_dict()["state"], rng_states()]
    )
    logged = {
        name: [value for _, value in values]
        for name, values in log.data.items()
        if name.startswith(("loss/", "metrics/"))
    }
    run.close()
    return state, last, logged


@pytest.fixture(scope="module")
def plain():
    """What a user of SGD sees after some batches."""
    return cache(lambda duration: observed([], max_duration=duration))


AT_W = [
    SAM(rho=0.0),
    SAM(rho=0.0, p=float("inf")),
    SAM(rho=0.0, ascent_fraction=0.4),
    ASAM(rho=0.0),
    GSAM(rho_max=0.0, rho_min=0.0, alpha=0.0),
    SSAM(rho=0.0),
    USAM(rho=0.0, renormalize=True),
    LookSAM(rho=0.0, alpha=0.0, interval=2),
    ESAM(rho=0.0, gamma=1.0),
    MSAM(rho=0.0),
]


HIDES_ITS_LAST_PASS = (SAM, ASAM, GSAM, SSAM, USAM, ESAM)


def without_outputs(last, expected):
    """The outputs of the seen pass would be in the hidden one's way, and those of that one are not shown."""
    assert last.pop("outputs").numel() == 0
    del expected[1]["outputs"]


@pytest.mark.parametrize("algorithm", AT_W, ids=repr)
def test_the_second_pass_leaves_no_trace(algorithm, plain):
    # A perturbation of radius 0 takes two passes and must come out as none at all: weights, momentum,
    # BatchNorm, RNG states, metrics, logged losses, and the loss, the batch and, after one pass, the outputs
    # that a callback finds in the state. The last of LookSAM's steps takes one pass.
    ours = observed([algorithm], max_duration="6ba")
    (_, optimizer_state, _), last, _ = ours
    for state in optimizer_state.values():
        state.pop("looksam_g_v", None)
    expected = copied(plain("6ba"))
    if isinstance(algorithm, HIDES_ITS_LAST_PASS) and algorithm.ascent_fraction == 1:
        without_outputs(last, expected)
    assert_same(expected, ours)


FAR = [SAM(5.0), ASAM(5.0), GSAM(5.0, 5.0, 0.5), SSAM(5.0), USAM(5.0), LookSAM(5.0), ESAM(5.0, 0.5, 0.5)]


@pytest.mark.parametrize("algorithm", FAR, ids=repr)
def test_a_perturbed_step_shows_in_weights_and_momentum_only(algorithm, plain):
    (model, _, rng), *visible = plain("1ba")
    (sam, _, sam_rng), *sam_visible = observed([algorithm], max_duration="1ba")
    assert not torch.equal(model["module.0.weight"], sam["module.0.weight"])
    for buffer in ("running_mean", "running_var", "num_batches_tracked"):
        assert_same(model[f"module.1.{buffer}"], sam[f"module.1.{buffer}"])
    expected = copied(visible)
    without_outputs(sam_visible[0], [None, expected[0]])
    assert_same([rng, expected], [sam_rng, sam_visible])


def test_the_first_outputs_are_gone_before_the_second_forward():
    alive, outputs = [], []

    def look(event, state, passes):
        if event == Event.BEFORE_FORWARD:
            alive.append([output() is not None for output in outputs])
        elif event == Event.AFTER_FORWARD:
            outputs.append(weakref.ref(state.outputs))

    run = trainer(sgd, [SAM(rho=0.1)], callbacks=[Spy(look)], max_duration="1ba")
    run.fit()
    run.close()
    assert alive == [[], [False]]


@pytest.mark.parametrize("loggers", [[], [InMemoryLogger()]], ids=["unlogged", "logged"])
def test_metrics_are_read_at_once_where_they_are_logged(loggers):
    run = trainer(sgd, [GSAM()], loggers=loggers, max_duration="1ba")
    run.fit()
    assert torch.is_tensor(run.state.optimizers[0].metrics["grad_norm"])
    with Calls() as calls:
        wiring.log(run.state, run.logger, "sharpness", LOGGED)
    assert calls.reads == len(loggers)
    for log in loggers:
        assert all(isinstance(value, float) for _, value in log.data["sharpness/grad_norm"])
    run.close()
