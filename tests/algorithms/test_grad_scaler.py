"""Gradient scaling in float16: on the CPU by autocast, which the Trainer is made to take for its own."""

import copy
import pickle
import warnings

import pytest
import torch
from composer.algorithms import GradientClipping
from composer.core import Event
from composer.loggers import InMemoryLogger
from torch import nn
from torch.amp import GradScaler

from composer_sassha import (
    ESAM,
    GSAM,
    SAM,
    SASSHA,
    AdaHessian,
    ClosureGradScaler,
    LazyHessian,
    Sassha,
    SharpnessAwareOptimizer,
    Sophia,
)
from composer_sassha.curvature import ESTIMATORS, Estimation, LazyCurvature
from composer_sassha.optim.refresh import HESSIAN_SCALE_GROWTH
from composer_sassha.perturbations import (
    GSAMPerturbation,
    LookSAMPerturbation,
    MSAMPerturbation,
    SAMPerturbation,
)
from tests.helpers import Spy, assert_same, copied, everything, method_trainer, network, rng_states, trainer
from tests.methods import METHODS, NAMED, adahessian, rows, sassha, sgd


def net():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(64, 3)
    )


def data():
    generator = torch.Generator().manual_seed(9)
    return torch.randn(8, 1, 6, 6, generator=generator), torch.randint(3, (8,), generator=generator)


class Run:
    """A plain loop in float16 whose gradient or Hessian can be made infinite."""

    def __init__(self, perturbation=None, curvature=None, rule=None, init_scale=2.0**10):
        self.model = net()
        self.base = (
            rule(self.model.parameters()) if rule else torch.optim.SGD(self.model.parameters(), 0.05, 0.9)
        )
        self.optimizer = SharpnessAwareOptimizer(
            self.base, perturbation, curvature=curvature, model=self.model
        )
        self.scaler = ClosureGradScaler("cpu", init_scale=init_scale, growth_interval=1000)
        self.passes = 0

    def step(self, infinite_in=None, check=True):
        x, y = data()
        self.passes = 0

        def closure():
            self.passes += 1
            self.optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = nn.functional.cross_entropy(self.model(x), y)
            self.optimizer.backward(loss, scaler=self.scaler)
            if self.passes == infinite_in:
                next(self.model.parameters()).grad[0] = torch.inf
            return loss.detach()

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = self.scaler.step(self.optimizer, closure=closure)
        self.scaler.update()
        return loss

    def all(self):
        state = self.optimizer.state_dict()
        for group in state["param_groups"]:
            group.pop("hessian_scale"), group.pop("hessian_scale_age")
        return copied([self.model.state_dict(), state, rng_states()])


@pytest.mark.parametrize(
    ("perturbation", "passes"),
    [
        (SAMPerturbation(0.1), 2),
        (GSAMPerturbation(0.1, alpha=0.3), 2),
        (LookSAMPerturbation(0.1), 2),
        (MSAMPerturbation(0.1), 1),
        (None, 1),
    ],
    ids=repr,
)
def test_an_overflow_in_any_pass_skips_the_step_and_backs_off_once(perturbation, passes):
    run = Run(perturbation)
    for _ in range(2):
        assert run.step() is not None
    assert run.scaler.get_scale() == 2.0**10
    for number in range(1, passes + 1):
        before, scale = run.all(), run.scaler.get_scale()
        assert run.step(infinite_in=number) is None
        assert run.passes == number
        assert_same(before, run.all())
        assert run.scaler.get_scale() == scale / 2
    assert run.optimizer.skipped_steps == passes
    assert run.step() is not None and run.optimizer.steps_taken == 3


def test_from_far_too_large_a_scale_it_recovers_by_itself():
    run = Run(SAMPerturbation(0.1), init_scale=2.0**40)
    before = run.all()
    losses = [run.step() for _ in range(40)]
    first = next(i for i, loss in enumerate(losses) if loss is not None)
    assert first > 5 and all(loss is not None for loss in losses[first + 3 :])
    assert run.optimizer.skipped_steps == sum(loss is None for loss in losses)
    assert not torch.equal(before[0]["0.weight"], run.model[0].weight)


def infinite_hessian(monkeypatch):
    """Have every product with the Hessian overflow."""
    real = torch.autograd.grad

    def grad(outputs, inputs, grad_outputs=None, **kwargs):
        results = real(outputs, inputs, grad_outputs, **kwargs)
        if isinstance(outputs, list):  # gradients, differentiated again
            results = (torch.full_like(results[0], torch.inf), *results[1:])
        return results

    monkeypatch.setattr(torch.autograd, "grad", grad)


def curved(interval=2):
    return Run(SAMPerturbation(0.1), LazyCurvature(interval), lambda params: SASSHA(params, lr=0.05))


def test_an_overflow_in_the_hessian_keeps_the_old_curvature(monkeypatch):
    run = curved()
    for _ in range(2):
        run.step()
    group = run.optimizer.param_groups[0]
    assert (group["refreshes"], group["hessian_scale"], group["hessian_scale_age"]) == (1, 1024.0, 1)
    old = copied({p: run.base.state[p]["exp_hessian"] for p in run.model.parameters()})
    with monkeypatch.context() as patched:
        infinite_hessian(patched)
        assert run.step() is not None
    assert_same(list(old.values()), [run.base.state[p]["exp_hessian"] for p in run.model.parameters()])
    assert run.scaler.get_scale() == 2.0**10, "the gradient's scale has nothing to do with it"
    assert (group["steps_taken"], group["refreshes"], group["hessian_scale"]) == (3, 1, 512.0)
    run.step()  # tried again
    assert (group["refreshes"], group["last_refresh"], group["hessian_scale_age"]) == (2, 3, 1)


def test_an_overflow_in_the_first_hessian_skips_the_step(monkeypatch):
    run = curved()
    before = run.all()
    with monkeypatch.context() as patched:
        infinite_hessian(patched)
        assert run.step() is None
    assert_same(before, run.all())
    assert run.optimizer.param_groups[0]["hessian_scale"] == 512.0
    assert run.step() is not None


def test_a_hessian_that_never_fits_ends_the_training(monkeypatch):
    run = curved()
    infinite_hessian(monkeypatch)
    with pytest.raises(RuntimeError, match="the Hessian estimate was not finite"):
        for _ in range(30):
            run.step()
    assert run.optimizer.param_groups[0]["hessian_scale"] == 1.0


def test_the_hessians_scale_grows_again():
    run = curved(interval=1)
    group = run.optimizer.param_groups[0]
    run.optimizer.counters.update(hessian_scale=4.0, hessian_scale_age=HESSIAN_SCALE_GROWTH - 2)
    run.step()
    assert (group["hessian_scale"], group["hessian_scale_age"]) == (4.0, HESSIAN_SCALE_GROWTH - 1)
    run.step()
    assert (group["hessian_scale"], group["hessian_scale_age"]) == (8.0, 0)


FIRST_AND_SECOND = [name for name in ESTIMATORS if name != "finite_difference"]


@pytest.mark.parametrize("gradient_scale", [2.0**4, 2.0**14])
@pytest.mark.parametrize("name", FIRST_AND_SECOND)
def test_the_float16_estimate_is_float32s_but_for_rounding(name, gradient_scale):
    x, y = data()
    found = []
    for half in (False, True):
        model = net().eval()  # the same function twice: no dropout
        params = list(model.parameters())
        curvature, scaler = LazyCurvature(estimator=name), ClosureGradScaler("cpu", init_scale=gradient_scale)
        scales = {"gradient_scale": gradient_scale, "scale": 1024.0} if half else {}
        estimation = Estimation(curvature, params, step=0, **scales)
        with torch.autocast("cpu", torch.float16, enabled=half):
            logits = model(x)
            loss = nn.functional.cross_entropy(logits, y)
        attached = estimation.attach(loss, logits=logits, labels=y)
        (scaler.scale(attached) if half else attached).backward()
        grads = torch.cat([p.grad.flatten() for p in params]) / (gradient_scale if half else 1)
        diagonal, _ = estimation.finish()
        found.append((grads, torch.cat([h.flatten() for h in diagonal.values()])))
    for exact, half in zip(*found, strict=True):
        assert exact.dtype == half.dtype == torch.float32
        assert (exact - half).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("name", FIRST_AND_SECOND)
def test_the_curvature_does_not_depend_on_the_scale(name, fraction, half):
    curvatures = []
    for settings, scale in (({}, 1.0), (half, 2.0**3), (half, 2.0**11)):
        run = trainer(
            sassha,
            [LazyHessian(estimator=name, batch_fraction=fraction)],
            model=network(0.0),
            max_duration="1ba",
            device_train_microbatch_size=5,
            **settings,
        )
        if settings:
            run.state.scaler.load_state_dict({**run.state.scaler.state_dict(), "scale": scale})
        run.fit()
        (optimizer,) = run.state.optimizers
        curvatures.append(
            torch.cat([optimizer.state[p]["exp_hessian"].flatten() for p in run.state.model.parameters()])
        )
        run.close()
    for half_precision in curvatures[1:]:
        assert (curvatures[0] - half_precision).norm() < 0.02 * curvatures[0].norm()


@pytest.mark.parametrize("name", FIRST_AND_SECOND)
def test_the_scale_recovers_from_overflows_on_refresh_steps(name):
    # The gradient fits at a scale of about 32, and the Hessian at less than it starts from.
    model = net()
    curvature = LazyCurvature(1, estimator=name)
    base = SASSHA(model.parameters(), lr=1e-9)  # the loss is to stay as large
    optimizer = SharpnessAwareOptimizer(base, curvature=curvature, model=model)
    scaler = ClosureGradScaler("cpu", init_scale=2.0**12)
    x, y = data()

    def closure():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            logits = model(x) * 200
            loss = 10 * nn.functional.cross_entropy(logits, y)
        optimizer.backward(loss, scaler=scaler, logits=logits, labels=y)
        return loss.detach()

    for _ in range(40):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scaler.step(optimizer, closure=closure)
        scaler.update()
    assert optimizer.steps_taken > 15 and scaler.get_scale() > 2.0**-8


def test_unscaling_by_either_optimizer_is_the_same():
    ends = []
    for which in ("wrapper", "base"):
        model = net().eval()
        base = torch.optim.SGD(model.parameters(), 0.1)
        optimizer = SharpnessAwareOptimizer(base, SAMPerturbation())
        scaler = ClosureGradScaler("cpu", init_scale=4.0)

        def closure(model=model, base=base, optimizer=optimizer, scaler=scaler, which=which):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(data()[0]), data()[1])
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer if which == "wrapper" else base)
            return loss.detach()

        scaler.step(optimizer, closure=closure)
        scaler.update()
        ends.append(copied(model.state_dict()))
    assert_same(*ends)


UPDATES = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": torch.optim.AdamW,
    "sassha": SASSHA,
    "adahessian": AdaHessian,
    "sophia": Sophia,
}


@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)
def test_plain_optimizers_step_as_under_torchs_own_scaler(update):
    ends = []
    for ours in (True, False):
        model = net().eval()
        optimizer = update(model.parameters())
        if hasattr(optimizer, "update_curvature"):
            optimizer.update_curvature({p: torch.ones_like(p) for p in model.parameters()})
        scaler = (ClosureGradScaler if ours else GradScaler)("cpu", init_scale=2.0**10)
        seen = []
        for number in range(4):

            def closure(model=model, optimizer=optimizer, scaler=scaler, number=number):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.float16):
                    loss = nn.functional.cross_entropy(model(data()[0]), data()[1])
                scaler.scale(loss).backward()
                if number in (0, 2):
                    next(model.parameters()).grad[0] = torch.inf
                return loss.detach()

            if ours:
                with torch.no_grad():
                    assert (scaler.step(optimizer, closure=closure) is None) == (number in (0, 2))
            else:
                closure()
                scaler.step(optimizer)
            scaler.update()
            seen.append(copied([model.state_dict(), optimizer.state_dict(), scaler.state_dict()]))
        ends.append(seen)
    assert_same(*ends)


def test_an_optimizer_of_one_gradient_skips_what_the_closure_says():
    w = nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([w], lr=0.1), ClosureGradScaler("cpu", init_scale=4.0)

    def closure():
        scaler.scale((w**2).sum()).backward()

    assert scaler.step(optimizer, closure=closure) is None
    scaler.update()
    assert w.tolist() == [1, 1] and scaler.get_scale() == 2.0


class Closures(torch.optim.SGD):
    """Says that its closure may return None, as Composer's own SAM does."""

    _step_supports_amp_closure = True

    def step(self, closure):
        if closure() is not None and closure() is not None:
            super().step()


def test_an_optimizer_that_takes_none_from_its_closure_is_given_it():
    w = nn.Parameter(torch.ones(2))
    optimizer, scaler = Closures([w], lr=0.1), ClosureGradScaler("cpu", init_scale=4.0)
    passes = []

    def closure():
        optimizer.zero_grad()
        loss = (w**2).sum()
        scaler.scale(loss).backward()
        passes.append(loss)
        if len(passes) == 2:
            w.grad[0] = torch.nan
        return loss

    for _ in range(2):
        scaler.step(optimizer, closure=closure)
        scaler.update()
    assert len(passes) == 4 and scaler.get_scale() == 2.0
    assert w.tolist() == pytest.approx([0.8, 0.8])


def test_an_optimizer_that_needs_closures_is_refused():
    w = nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.LBFGS([w]), ClosureGradScaler("cpu")
    torch.optim.lr_scheduler.ConstantLR(optimizer)  # wraps `step`
    with pytest.raises(TypeError, match="ClosureGradScaler: LBFGS runs closures of its own") as error:
        scaler.step(optimizer, closure=lambda: (w**2).sum())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda scaler: pickle.loads(pickle.dumps(scaler))], ids=["copied", "pickled"]
)
def test_a_copy_has_its_scale(copy_of):
    class Own(ClosureGradScaler):
        pass

    globals()["Own"], Own.__qualname__ = Own, "Own"
    for kind in (ClosureGradScaler, Own):
        scaler = kind("cpu", init_scale=8.0, growth_interval=5)
        scaler.scale(torch.ones(()))
        scaler.update(2.0)
        again = copy_of(scaler)
        assert type(again) is kind and again.state_dict() == scaler.state_dict()
        assert again.scale(torch.ones(())).item() == 2.0


def test_it_is_saved_as_torchs_own():
    assert ClosureGradScaler.__qualname__ == GradScaler.__qualname__
    ours, plain = ClosureGradScaler("cpu", init_scale=8.0), GradScaler("cpu", init_scale=2.0)
    plain.load_state_dict(ours.state_dict())
    assert plain.get_scale() == 8.0


def test_switched_off_it_only_steps():
    model = net()
    optimizer = SharpnessAwareOptimizer(torch.optim.SGD(model.parameters(), 0.1), SAMPerturbation())
    scaler = ClosureGradScaler("cpu", enabled=False)

    def closure():
        optimizer.zero_grad()
        loss = model(data()[0]).square().mean()
        scaler.scale(loss).backward()
        return loss

    assert scaler.step(optimizer, closure=closure) > 0
    scaler.update()


IN_HALF = [m for m in METHODS if m.name != "sassha_difference"]  # that one is refused in float16


@pytest.mark.parametrize("method", rows(IN_HALF))
def test_every_method_trains_in_float16(method, half):
    run = method_trainer(method, max_duration="7ba", device_train_microbatch_size=5, **half)
    run.fit()
    (optimizer,) = run.state.optimizers
    assert isinstance(run.state.scaler, ClosureGradScaler)
    assert optimizer.steps_taken + optimizer.skipped_steps == 7 and optimizer.steps_taken >= 5
    assert all(p.isfinite().all() for p in run.state.model.parameters())
    run.close()


@pytest.mark.parametrize("name", ["sam_sgd", "looksam_sgd", "sassha", "msassha", "none_adahessian"])
def test_resumes_bit_for_bit_with_its_scale(name, half, tmp_path):
    def build(**kwargs):
        return method_trainer(NAMED[name], **half, **kwargs)

    def everything_and_scale(run):
        return [everything(run), run.state.scaler.state_dict()]

    run = build(save_folder=str(tmp_path), save_interval="1ba", save_filename="ba{batch}.pt")
    run.state.scaler.load_state_dict({**run.state.scaler.state_dict(), "scale": 2.0**7, "growth_interval": 2})
    run.fit()
    expected = everything_and_scale(run)
    run.close()
    resumed = build(load_path=str(tmp_path / "ba3.pt"))
    resumed.fit()
    assert_same(expected, everything_and_scale(resumed))
    resumed.close()


@pytest.mark.parametrize("algorithm", [SAM(0.1), GSAM(0.1)], ids=lambda a: type(a).__name__)
def test_clipping_sees_the_unscaled_gradient(algorithm, half):
    norms = []

    def look(event, state, passes):
        if event == Event.BATCH_END:
            grads = [p.grad.flatten() for p in state.model.parameters() if p.grad is not None]
            norms.append(torch.cat(grads).norm().item())

    def optimizer(params):
        first, *rest = params
        return torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": rest}], lr=0.05, momentum=0.9)

    clipping = GradientClipping("norm", clipping_threshold=0.05)
    run = trainer(
        optimizer,
        [algorithm, clipping],
        model=network(0.0),
        max_duration="3ba",
        callbacks=[Spy(look)],
        **half,
    )
    run.fit()
    assert len(norms) == 3 and all(norm == pytest.approx(0.05, rel=1e-3) for norm in norms)
    assert run.state.optimizers[0].steps_taken == 3
    run.close()


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(
    ("rule", "algorithm"), [(sassha, lambda: Sassha(0.1)), (adahessian, lambda: LazyHessian(1))]
)
def test_an_overflow_through_the_trainer_skips_the_step(passes, rule, algorithm, half):
    seen, log = [], InMemoryLogger()

    def look(event, state, number):
        if event == Event.BATCH_START:
            seen.append(copied(dict(state.model.state_dict())))
        if event == Event.AFTER_LOSS and number == passes and state.timestamp.batch == 2:
            state.loss = state.loss * torch.inf

    run = trainer(
        rule,
        [algorithm()],
        model=network(0.0),
        max_duration="5ba",
        callbacks=[Spy(look)],
        loggers=[log],
        **half,
    )
    run.fit()
    (optimizer,) = run.state.optimizers
    two = isinstance(algorithm(), Sassha)
    if two:
        assert log.data["sharpness/skipped_steps"] == [(log.data["sharpness/skipped_steps"][0][0], 1)]
    skipped = passes == 1 or two
    assert optimizer.skipped_steps == skipped and optimizer.steps_taken == 5 - skipped
    if skipped:
        assert_same(seen[2], seen[3])
    run.close()


def test_esam_logs_the_gap_of_those_steps_that_it_was_measured_in(half):
    log = InMemoryLogger()

    def look(event, state, passes):
        # The third batch overflows in the first pass, the fifth in the second.
        if event == Event.AFTER_LOSS and (state.timestamp.batch.value, passes) in ((2, 1), (4, 2)):
            state.loss = state.loss * torch.inf

    run = trainer(
        sgd, [ESAM(0.1)], model=network(0.0), max_duration="6ba", callbacks=[Spy(look)], loggers=[log], **half
    )
    run.state.scaler.load_state_dict({**run.state.scaler.state_dict(), "scale": 2.0**7})
    run.fit()
    assert run.state.optimizers[0].skipped_steps == 2
    gaps = {stamp.batch.value: gap for stamp, gap in log.data["sharpness/loss_gap"]}
    assert gaps.keys() == {1, 2, 4, 5, 6} and 0 not in gaps.values()
    run.close()
