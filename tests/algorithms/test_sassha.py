"""SASSHA through the Trainer: the diagonal of a loss that has an analytic one, and what it logs."""

import pytest
import torch
from composer.algorithms import MixUp
from composer.core import Event
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier, ComposerModel
from torch import nn
from torch.utils.data import TensorDataset

from composer_sassha import SASSHA, LazyHessian, MSassha, Sassha
from tests.helpers import Spy, digits, images, network, trainer

pytestmark = pytest.mark.usefixtures("float64")


def dataset():
    x, y = images().tensors
    return TensorDataset(x.double(), y)


class Separable(ComposerModel):
    """A loss whose Hessian is diagonal: the mean over samples x of x * sum_i a_i cos(p_i)."""

    def __init__(self, form):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.a = torch.randn(6, generator=generator, dtype=torch.float64)
        self.p = nn.Parameter(torch.randn(6, generator=generator, dtype=torch.float64))
        self.form = form

    def forward(self, batch):
        return batch[0] * (self.a * self.p.cos()).sum()

    def loss(self, outputs, batch, *args, **kwargs):
        if self.form == "scalar":
            return outputs.mean()
        if self.form == "per sample":
            return outputs
        if self.form == "tuple":
            return 0.25 * outputs.mean(), 0.75 * outputs
        if self.form == "dict":
            return {"first": 0.25 * outputs.mean(), "second": 0.75 * outputs.mean()}
        total = outputs.mean()
        return {"total": total, "half": total / 2}


def scalars(count=10):
    x = torch.linspace(0.5, 2.0, count, dtype=torch.float64)
    return TensorDataset(x, torch.zeros(count))


@pytest.mark.parametrize("microbatch", [10, 3])  # one, or four of unequal size
@pytest.mark.parametrize("form", ["scalar", "per sample", "tuple", "dict", "dict with total"])
def test_the_diagonal_is_the_analytic_one_at_the_perturbed_point(microbatch, form):
    model = Separable(form)
    p, a = model.p.detach().clone(), model.a
    mean_x = torch.linspace(0.5, 2.0, 10, dtype=torch.float64).mean()
    g = -mean_x * a * p.sin()
    displaced = p + 0.3 * g / g.norm()
    expected = -mean_x * a * displaced.cos()

    log = InMemoryLogger()
    run = trainer(
        lambda params: SASSHA(params, lr=0.1, betas=(0.9, 0.0)),
        [Sassha(rho=0.3)],
        model=model,
        dataset=scalars(),
        max_duration="1ba",
        device_train_microbatch_size=microbatch,
        loggers=[log],
    )
    run.fit()
    (state,) = run.state.optimizers[0].state.values()
    assert (state["exp_hessian"] - expected.abs()).abs().max() <= 1e-12
    assert (state["exp_avg"] - 0.1 * -mean_x * a * displaced.sin()).abs().max() <= 1e-12
    logged = {name: values[-1][1] for name, values in log.data.items()}
    loss, perturbed = ((mean_x * a * q.cos()).sum().item() for q in (p, displaced))
    assert logged["loss/train/total"] == pytest.approx(loss, rel=1e-12)
    assert logged["sharpness/rho"] == 0.3
    assert logged["sharpness/grad_norm"] == pytest.approx(g.norm().item(), rel=1e-12)
    assert logged["sharpness/loss_gap"] == pytest.approx(perturbed - loss, rel=1e-9)
    assert logged["hessian/mean_abs"] == pytest.approx(expected.abs().mean().item(), rel=1e-12)
    assert logged["hessian/negative_fraction"] == pytest.approx((expected < 0).double().mean().item())
    assert logged["hessian/refreshes"] == 1
    if form == "tuple":
        assert logged["loss/train/loss0"] == pytest.approx(loss / 4)
    if form == "dict":
        assert logged["loss/train/second"] == pytest.approx(0.75 * loss)
    if form == "dict with total":
        assert logged["loss/train/half"] == pytest.approx(loss / 2)
    run.close()


def test_lazy_hessian_alone_estimates_at_w():
    model = Separable("scalar")
    p = model.p.detach().clone()
    run = trainer(
        lambda params: SASSHA(params, lr=0.1, betas=(0.9, 0.0)),
        [LazyHessian()],
        model=model,
        dataset=scalars(),
        max_duration="1ba",
    )
    run.fit()
    (state,) = run.state.optimizers[0].state.values()
    expected = (1.25 * model.a * p.cos()).abs()
    assert (state["exp_hessian"] - expected).abs().max() <= 1e-12
    run.close()


@pytest.mark.parametrize("interpolate_loss", [True, False])
def test_runs_after_algorithms_that_change_the_loss(interpolate_loss):
    order = [Sassha(rho=0.1), MixUp(alpha=0.5, interpolate_loss=interpolate_loss)]
    run = trainer(
        lambda params: SASSHA(params, lr=0.05),
        order,
        model=network().double(),
        dataset=dataset(),
        max_duration="4ba",
    )
    run.fit()
    assert isinstance(run.state.algorithms[-1], Sassha)
    assert run.state.optimizers[0].param_groups[0]["refreshes"] == 1
    run.close()


@pytest.mark.parametrize(
    "make",
    [lambda: Sassha(interval=3), lambda: MSassha(interval=3)],
    ids=["sassha", "msassha"],
)
def test_refreshes_between_perturbed_steps_are_told_of(make):
    with pytest.warns(UserWarning, match="hessian_interval=10 is no multiple of interval=3"):
        make()


def test_the_lean_preset_ascends_and_estimates_on_less():
    """In 40 steps 2 refreshes, and in each of them an ascent with a fifth of the batch of 10."""
    sizes, refreshes = [], []
    lean = Sassha.lean(0.1, seed=3)
    preset = {"batch_fraction": 0.25, "ascent_fraction": 0.2, "floor": 0.01}
    assert lean.settings() == Sassha(0.1, 1, 20, seed=3, **preset).settings()
    assert Sassha.lean(interval=2, batch_fraction=1.0, floor=0.0).settings() == (
        Sassha(0.2, 2, 20, ascent_fraction=0.2).settings()
    )

    def look(event, state, passes):
        if event == Event.AFTER_FORWARD:
            sizes.append(len(state.outputs))
        if event == Event.BATCH_END:
            refreshes.append(state.optimizers[0].param_groups[0]["refreshes"])

    run = trainer(
        lambda ps: SASSHA(ps, lr=0.05),
        [lean],
        model=network().double(),
        dataset=dataset(),
        max_duration="40ba",
        callbacks=[Spy(look)],
    )
    run.fit()
    run.close()
    assert sizes == [2, 10] * 40
    assert refreshes == [1] * 20 + [2] * 20


def with_zero_curvature(algorithm, duration, **settings):
    """Digits, ReLU and Dropout: the curvature of many weights is exactly zero, their gradient is not."""
    torch.manual_seed(0)
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 128), nn.ReLU(), nn.Dropout(0.5)]
    x, y = digits(1797).tensors
    x = x.double().flatten(1)
    run = trainer(
        lambda params: SASSHA(params, lr=0.01),
        [algorithm],
        model=ComposerClassifier(nn.Sequential(*layers, nn.Linear(128, 10)), num_classes=10),
        dataset=TensorDataset(x[:1437], y[:1437]),
        batch_size=64,
        max_duration=duration,
        **settings,
    )
    return run, x[1437:], y[1437:]


def test_the_lean_preset_trains_where_much_curvature_is_zero():
    run, x, y = with_zero_curvature(Sassha.lean(), "6ep")
    run.fit()
    run.close()
    assert (run.state.model.module.eval()(x).argmax(1) == y).double().mean() > 0.85


def test_zero_curvature_is_logged_and_warned_of_once():
    log = InMemoryLogger()
    run, *_ = with_zero_curvature(Sassha.lean(hessian_interval=1, floor=0.0), "1ba", loggers=[log])
    with pytest.warns(UserWarning, match=r"^SASSHA: \d+% of the entries .* pass floor=0.01 to") as caught:
        run.fit()
    states = run.state.optimizers[0].state.values()
    moved, zero = (
        sum(mask(state).sum().item() for state in states)
        for mask in (
            lambda state: state["exp_avg"] != 0,
            lambda state: (state["exp_avg"] != 0) & (state["exp_hessian"] == 0),
        )
    )
    ((_, logged),) = log.data["hessian/zero_fraction"]
    assert logged == zero / moved > 0.1
    run.fit(duration="1ba")
    run.close()
    assert len(log.data["hessian/zero_fraction"]) == 2 and len(caught) == 1
