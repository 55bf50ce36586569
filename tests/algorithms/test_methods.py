"""What every method owes its users, through the real Trainer: one table of methods, one set of tests."""

import weakref

import pytest
import torch
from composer.core import Event
from composer.loggers import InMemoryLogger
from composer.optim import CosineAnnealingWithWarmupScheduler
from torch.utils.data import TensorDataset

from composer_sassha import ASAM, ESAM, GSAM, MSAM, SAM, SASSHA, SSAM, USAM, LookSAM, Sassha
from tests.helpers import (
    PASS_EVENTS,
    Injected,
    Spy,
    assert_same,
    copied,
    digits,
    digits_network,
    everything,
    images,
    method_trainer,
    network,
    rng_states,
    trainer,
)
from tests.methods import METHODS, MORE, NAMED, Method

each_method = pytest.mark.parametrize("method", METHODS, ids=str)


@each_method
def test_trains_the_digits(method):
    log = InMemoryLogger()
    run = method_trainer(
        method,
        model=digits_network(),
        dataset=digits(),
        batch_size=40,
        max_duration="6ep",
        loggers=[log],
        device_train_microbatch_size=20,
    )
    run.fit()
    losses = [value for _, value in log.data["loss/train/total"]]
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])
    run.close()


# In bfloat16 a curvature may round to zero, which the rule divides by eps alone: a large one is needed.
BFLOAT16 = [
    NAMED["sam_sgd"],
    Method("sassha", lambda params: SASSHA(params, lr=0.05, eps=0.1), lambda: [Sassha(0.1)]),
]


@pytest.mark.parametrize("method", BFLOAT16, ids=str)
def test_trains_bfloat16_parameters_and_resumes_them(method, tmp_path):
    x, y = images().tensors

    def build(**kwargs):
        dataset = TensorDataset(x.bfloat16(), y)
        return method_trainer(
            method, model=network().bfloat16(), dataset=dataset, max_duration="6ep", **kwargs
        )

    log = InMemoryLogger()
    run = build(save_folder=str(tmp_path), save_interval="1ba", save_filename="ba{batch}.pt", loggers=[log])
    run.fit()
    expected = everything(run)
    run.close()
    resumed = build(load_path=str(tmp_path / "ba5.pt"))
    resumed.fit()
    assert_same(expected, everything(resumed))
    resumed.close()
    losses = [value for _, value in log.data["loss/train/total"]]
    assert sum(losses[-4:]) < sum(losses[:4])


@each_method
def test_resumes_bit_for_bit_from_any_batch(method, tmp_path):
    def build(**kwargs):
        return method_trainer(
            method,
            schedulers=CosineAnnealingWithWarmupScheduler("2ba"),
            device_train_microbatch_size=7,
            **kwargs,
        )

    run = build(save_folder=str(tmp_path), save_interval="1ba", save_filename="ba{batch}.pt")
    run.fit()
    expected = everything(run)
    run.close()
    # The steps after a refresh, before one, on a perturbed and an unperturbed step, in and between epochs.
    for batch in range(1, 8) if method in MORE else (2, 3):
        resumed = build(load_path=str(tmp_path / f"ba{batch}.pt"))
        resumed.fit()
        assert_same(expected, everything(resumed), f"resumed from batch {batch}")
        resumed.close()


class Failure:
    """Raises once: in pass `number` of batch 3, at an event or inside forward or backward."""

    def __init__(self, place, number, batch=3):
        self.place, self.number, self.batch, self.armed, self.fired = place, number, batch, False, False
        self.spy = Spy(self.on_event)

    def on_event(self, event, state, passes):
        self.armed = not self.fired and passes == self.number and state.timestamp.batch == self.batch
        if isinstance(self.place, Event) and event == self.place:
            self()

    def __call__(self, *_):
        if self.armed and not self.fired:
            self.fired = True
            raise Injected

    def install(self, model):
        if isinstance(self.place, Event):
            return
        if self.place == "forward":
            model.module[4].register_forward_hook(self)
        else:
            model.module[0].weight.register_hook(self)


def run_with_failure(method, failure):
    """Train two epochs; a batch that fails is tried again by the Trainer's own step."""
    model = network()
    if failure is not None:
        failure.install(model)
    run = method_trainer(
        method, model=model, device_train_microbatch_size=5, callbacks=[failure.spy] if failure else []
    )
    train_batch = run._train_batch

    def retried(use_grad_scaling):
        metrics = run.state.train_metrics
        batch = run.state.batch
        before = everything(run)
        try:
            return train_batch(use_grad_scaling)
        except Injected:
            assert_same(before, everything(run))
            assert run.state.train_metrics is metrics and run.state.batch is batch
            assert all(metric._update_count == 0 for metric in metrics.values())
            return train_batch(use_grad_scaling)

    run._train_batch = retried
    run.fit()
    result = everything(run), copied(run.state.train_metric_values)
    run.close()
    return result


@pytest.fixture(scope="module")
def undisturbed():
    results = {}

    def of(method):
        if method.name not in results:
            results[method.name] = run_with_failure(method, None)
        return results[method.name]

    return of


# Everywhere for some methods, where it hurts for all: in the second pass of a step that refreshes.
EVERYWHERE = [*PASS_EVENTS, "forward", "backward"]
FAILURES = [
    *[
        (m, n, p)
        for m in map(NAMED.get, ("sam_sgd", "gsam_sgd", "sassha"))
        for n in (1, 2)
        for p in EVERYWHERE
    ],
    *[(m, m.passes, p) for m in METHODS for p in (Event.BEFORE_FORWARD, Event.BEFORE_BACKWARD, "backward")],
]


@pytest.mark.parametrize(("method", "number", "place"), FAILURES, ids=str)
def test_survives_an_exception_anywhere_in_a_step(method, number, place, undisturbed):
    batch = 4 if "every_2" in method.name or "looksam" in method.name else 3  # one with as many passes
    failure = Failure(place, number, batch)
    result = run_with_failure(method, failure)
    assert failure.fired
    assert_same(undisturbed(method), result)


@each_method
def test_builds_a_second_order_graph_on_refresh_steps_only(method, monkeypatch):
    calls = []
    grad = torch.autograd.grad

    def counted(*args, create_graph=False, **kwargs):
        calls.append(create_graph)
        return grad(*args, create_graph=create_graph, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    backward = torch.Tensor.backward

    def plain_backward(self, *args, create_graph=False, **kwargs):
        assert not create_graph
        return backward(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", plain_backward)
    run = method_trainer(method, max_duration="4ba")
    run.fit()
    assert calls.count(True) == method.second_order
    run.close()


@each_method
def test_evaluates_and_saves_at_w(method):
    # Whoever looks between steps sees the weights that the step left.
    seen = []

    def look(event, state, passes):
        if event in (Event.BATCH_START, Event.BATCH_END, Event.EVAL_START, Event.BATCH_CHECKPOINT):
            seen.append((event, copied(state.model.state_dict())))

    run = method_trainer(method, max_duration="4ba", callbacks=[Spy(look)])
    run.fit()
    ends = [weights for event, weights in seen if event == Event.BATCH_END]
    starts = [weights for event, weights in seen if event == Event.BATCH_START]
    for end, start in zip(ends, starts[1:], strict=False):
        assert_same(end, start)
    run.close()


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
def test_the_second_pass_leaves_no_trace(algorithm):
    # A perturbation of radius 0 takes two passes and must come out as none at all: weights, momentum,
    # BatchNorm, RNG states, metrics, logged losses, and the loss and outputs that a callback finds in the
    # state.
    plain = observed([], device_train_microbatch_size=4)
    ours = observed([algorithm], device_train_microbatch_size=4)
    (_, optimizer_state, _), _, _ = ours
    for state in optimizer_state.values():
        state.pop("looksam_g_v", None)
    assert_same(plain, ours)


FAR = [SAM(5.0), ASAM(5.0), GSAM(5.0, 5.0, 0.5), SSAM(5.0), USAM(5.0), LookSAM(5.0), ESAM(5.0, 0.5, 0.5)]


@pytest.mark.parametrize("algorithm", FAR, ids=repr)
def test_after_a_perturbed_step_only_weights_and_momentum_tell(algorithm):
    (plain, _, rng), *visible = observed([], max_duration="1ba", device_train_microbatch_size=4)
    (sam, _, sam_rng), *sam_visible = observed(
        [algorithm], max_duration="1ba", device_train_microbatch_size=4
    )
    assert not torch.equal(plain["module.0.weight"], sam["module.0.weight"])
    for buffer in ("running_mean", "running_var", "num_batches_tracked"):
        assert_same(plain[f"module.1.{buffer}"], sam[f"module.1.{buffer}"])
    assert_same([rng, visible], [sam_rng, sam_visible])


# Not ESAM, whose second pass may select many samples of one microbatch and few of another, nor the estimate
# on part of the batch, which is a larger part of the larger batch.
GATHERING = [m for m in METHODS if m.second_order and "esam" not in m.name and m.name != "sassha_on_part"]


@pytest.mark.parametrize("method", GATHERING, ids=str)
def test_the_memory_of_a_refresh_does_not_grow_with_the_number_of_microbatches(method):
    def peak(batch_size, microbatch_size):
        """The largest number of elements saved for backward at one time."""
        live, most = 0, 0

        def release(count):
            nonlocal live
            live -= count

        def pack(tensor):
            nonlocal live, most
            saved = tensor.detach()
            live += saved.numel()
            most = max(most, live)
            weakref.finalize(saved, release, saved.numel())
            return saved

        run = method_trainer(
            method, max_duration="1ba", batch_size=batch_size, device_train_microbatch_size=microbatch_size
        )
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            run.fit()
        run.close()
        return most

    assert peak(40, 10) <= 1.1 * peak(10, 10)
