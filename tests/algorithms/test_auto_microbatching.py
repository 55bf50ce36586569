"""Out of memory in any pass, under `device_train_microbatch_size='auto'`: the batch is tried again from w."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from composer.core import Event
from composer.trainer import trainer as trainer_module

from composer_sassha import SAM
from composer_sassha.algorithms import checks, perturbing
from tests.helpers import PASS_EVENTS, Spy, assert_same, copied, everything, method_trainer, network, trainer
from tests.methods import NAMED, sgd

pytestmark = pytest.mark.filterwarnings("ignore:CUDA out of memory or excessive memory:RuntimeWarning")

# The Trainer takes these words for a lack of memory, on any device.
MESSAGE = "CUDA out of memory (injected)"


class Memory:
    """Counts the places of one batch that need memory, and raises at some of them.

    Args:
        batch: which batch.
        fail_at: the place to raise at in each of the first tries of the batch.
        halve_at: the batch from which on the microbatches are half as large, with nothing raised.
    """

    def __init__(self, batch=3, fail_at=(), halve_at=None):
        self.batch, self.fail_at, self.halve_at = batch, [*fail_at], halve_at
        self.places = []
        self.spy = Spy(self.on_event)
        self.here = False

    def need(self, place):
        if self.here:
            self.places.append(place)
            if self.fail_at and len(self.places) - 1 == self.fail_at[0]:
                self.fail_at.pop(0)
                self.places.clear()
                raise RuntimeError(MESSAGE)

    def on_event(self, event, state, passes):
        if event == Event.BATCH_START:
            self.here = state.timestamp.batch == self.batch
            if state.timestamp.batch == self.halve_at:
                state.device_train_microbatch_size //= 2
        elif event == Event.BATCH_END:
            self.here = False
        elif event in PASS_EVENTS:
            self.need(f"{event.value} of pass {passes}")

    def around(self, name, function):
        def watched(*args, **kwargs):
            self.need(f"before {name}")
            result = function(*args, **kwargs)
            if name != "base step":  # after it there is nothing to go back to
                self.need(f"after {name}")
            return result

        return watched

    def watch(self, run, monkeypatch):
        net = run.state.model.module
        net[4].register_forward_hook(lambda *_: self.need("forward"))
        net[0].weight.register_hook(lambda _: self.need("backward"))
        monkeypatch.setattr(torch.autograd, "grad", self.around("autograd.grad", torch.autograd.grad))
        (optimizer,) = run.state.optimizers
        base, perturbation = optimizer.base_optimizer, optimizer.perturbation
        base.step = self.around("base step", base.step)
        if perturbation is not None:
            for name in ("displace", "combine"):
                if hasattr(perturbation, name):
                    object.__setattr__(perturbation, name, self.around(name, getattr(perturbation, name)))


def run_with(method, memory, **kwargs):
    settings = {"max_duration": "5ba", "device_train_microbatch_size": 10, "callbacks": [memory.spy]}
    with pytest.MonkeyPatch.context() as monkeypatch:
        run = method_trainer(method, model=network(), **{**settings, **kwargs})
        run.state.auto_microbatching = True
        memory.watch(run, monkeypatch)
        losses = []
        memory.spy.on_event = _also(memory.on_event, losses)
        run.fit()
        result = everything(run), copied(run.state.train_metric_values), losses
        size = run.state.device_train_microbatch_size
        run.close()
    return result, size


def _also(on_event, losses):
    def both(event, state, passes):
        on_event(event, state, passes)
        if event == Event.BATCH_END:
            losses.append(dict(state.total_loss_dict))

    return both


EVERYWHERE = [
    "sam_sgd",
    "gsam_sgd",
    "looksam_sgd",
    "esam_sgd",
    "msam_sgd",
    "sassha",
    "msassha",
    "none_adahessian",
    "sophia_gauss_newton",
    "sassha_difference",
    "sassha_on_part",
]


@pytest.mark.parametrize("name", EVERYWHERE)
def test_out_of_memory_anywhere_is_retried_from_w(name, monkeypatch):
    method = NAMED[name]
    batch = 4 if name == "looksam_sgd" else 3  # perturbed, and one that refreshes
    probe = Memory(batch)
    run_with(method, probe)
    expected, size = run_with(method, Memory(batch, halve_at=batch))
    assert size == 5 and len(probe.places) > 8 * method.passes
    # A failure before the rule's step has a test of its own, below.
    skipped = () if method.optimizer is sgd else ("before base step",)
    failing = Memory(batch, [i for i, place in enumerate(probe.places) if place not in skipped])
    halve = trainer_module._adjust_device_train_microbatch_size

    def halve_after_the_last(state):
        if not failing.fail_at:
            halve(state)

    # One try after the other fails, each at the next place. The Trainer would halve at each.
    monkeypatch.setattr(trainer_module, "_adjust_device_train_microbatch_size", halve_after_the_last)
    result, size = run_with(method, failing)
    assert size == 5 and not failing.fail_at
    assert_same(expected, result)


@pytest.mark.parametrize("name", ["sam_sgd", "esam_sgd", "sassha", "msassha", "sassha_partial_ascent"])
def test_out_of_memory_again_and_on_the_first_batch(name):
    method = NAMED[name]
    probe = Memory(0)
    run_with(method, probe)
    count = len(probe.places)
    # The second try has about twice as many places.
    result, size = run_with(method, Memory(0, fail_at=(count // 2, count)))
    assert size == 2
    expected, size = run_with(method, Memory(0), device_train_microbatch_size=2)
    assert size == 2
    assert_same(expected, result)


SECOND_ORDER = [name for name in EVERYWHERE if NAMED[name].optimizer is not sgd]


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_a_failure_in_the_rules_own_step_keeps_the_estimate(name):
    """It has been taken at the same point: the retry steps with it, and absorbs none twice."""
    method, ends = NAMED[name], []
    probe = Memory()
    run_with(method, probe)
    for fail_at in ((), (probe.places.index("before base step"),)):
        memory = Memory(fail_at=fail_at)
        with pytest.MonkeyPatch.context() as monkeypatch:
            run = method_trainer(
                method,
                model=network(),
                max_duration="5ba",
                device_train_microbatch_size=5,
                callbacks=[memory.spy],
            )
            memory.watch(run, monkeypatch)
            train_batch, retries = run._train_batch, []

            def retried(scaling, run=run, train_batch=train_batch, retries=retries):
                before = copied([run.state.model.state_dict(), everything(run)["rng"]])
                try:
                    return train_batch(scaling)
                except RuntimeError as error:
                    assert str(error) == MESSAGE
                    assert_same(before, [run.state.model.state_dict(), everything(run)["rng"]])
                    retries.append(True)
                    return train_batch(scaling)

            run._train_batch = retried
            run.fit()
            ends.append(everything(run))
            assert len(retries) == len(fail_at)
            run.close()
    assert_same(*ends)


def test_the_averaged_first_batch_brings_no_warning(monkeypatch):
    # The other rank is a mock with the same gradient.
    mock = SimpleNamespace(
        get_world_size=lambda: 2, get_global_rank=lambda: 0, all_gather_object=lambda norm: [norm, norm]
    )
    monkeypatch.setattr(perturbing, "dist", mock)
    run = trainer(sgd, [SAM()], max_duration="1ba")
    (sam,) = run.state.algorithms
    run.state.optimizers[0].metrics["grad_norm"] = 1.0
    run.state.auto_microbatching = True
    sam._warn_if_synchronized(run.state)
    with pytest.warns(UserWarning, match="all ranks perturb along the same gradient"):
        sam._warn_if_synchronized(run.state)
    run.close()


def test_several_ranks_are_warned(monkeypatch):
    run = trainer(sgd, [SAM()])
    run.state.optimizers = run.state.optimizers[0].base_optimizer
    run.state.auto_microbatching = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checks.check(run.state)
    monkeypatch.setattr(checks.dist, "get_world_size", lambda: 2)
    with pytest.warns(UserWarning, match=r"'auto' on several ranks: .* set a number instead$"):
        checks.check(run.state)
    monkeypatch.undo()
    run.close()
