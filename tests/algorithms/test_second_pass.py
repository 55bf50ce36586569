"""The second pass of a perturbed step: a user sees the update, and nothing else."""

from functools import cache

import pytest
import torch
from composer.core import Event
from composer.loggers import InMemoryLogger

from composer_sassha import ASAM, ESAM, GSAM, MSAM, SAM, SSAM, USAM, LookSAM
from tests.helpers import Spy, assert_same, copied, rng_states, trainer


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


@pytest.mark.parametrize("algorithm", AT_W, ids=repr)
def test_the_second_pass_leaves_no_trace(algorithm, plain):
    # A perturbation of radius 0 takes two passes and must come out as none at all: weights, momentum,
    # BatchNorm, RNG states, metrics, logged losses, and the loss and outputs that a callback finds in the
    # state.
    ours = observed([algorithm], max_duration="6ba")
    (_, optimizer_state, _), _, _ = ours
    for state in optimizer_state.values():
        state.pop("looksam_g_v", None)
    assert_same(plain("6ba"), ours)


FAR = [SAM(5.0), ASAM(5.0), GSAM(5.0, 5.0, 0.5), SSAM(5.0), USAM(5.0), LookSAM(5.0), ESAM(5.0, 0.5, 0.5)]


@pytest.mark.parametrize("algorithm", FAR, ids=repr)
def test_a_perturbed_step_shows_in_weights_and_momentum_only(algorithm, plain):
    (model, _, rng), *visible = plain("1ba")
    (sam, _, sam_rng), *sam_visible = observed([algorithm], max_duration="1ba")
    assert not torch.equal(model["module.0.weight"], sam["module.0.weight"])
    for buffer in ("running_mean", "running_var", "num_batches_tracked"):
        assert_same(model[f"module.1.{buffer}"], sam[f"module.1.{buffer}"])
    assert_same([rng, visible], [sam_rng, sam_visible])
