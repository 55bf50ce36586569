"""Transformers through the Trainer: attention is fused, except where a second derivative is due."""

import pytest
import torch
from composer.core import Event
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import TensorDataset

from composer_sassha import SASSHA, LazyHessian, MSassha, Sassha
from composer_sassha.curvature import rademacher
from tests.helpers import Spy, copied, trainer
from tests.methods import adahessian, sassha, sophia
from tests.models.networks import NETWORKS, encoder, pictures, sequences, vision_transformer

METHODS = {
    "sassha": (sassha, lambda: Sassha(rho=0.05, hessian_interval=2)),
    "msassha": (sassha, lambda: MSassha(rho=0.05, hessian_interval=2)),
    "adahessian": (adahessian, lambda: LazyHessian(2)),
    "sophia": (sophia, lambda: LazyHessian(2, "gauss_newton")),
    "difference": (adahessian, lambda: LazyHessian(2, "finite_difference")),
    "fisher": (adahessian, lambda: LazyHessian(2, "empirical_fisher")),
}
FUSED = "ScaledDotProductFlashAttentionForCpuBackward0"


def operations(loss):
    """The names in a loss's autograd graph."""
    if not isinstance(loss, torch.Tensor):
        loss = sum(loss.values()) if isinstance(loss, dict) else sum(loss)
    seen, ahead = set(), [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ahead.extend(following for following, _ in node.next_functions)
    return {node.name() for node in seen}


@pytest.mark.filterwarnings("ignore:LazyHessian. estimator='finite_difference' is for smooth networks")
@pytest.mark.parametrize(
    ("name", "method"),
    [
        # Every network with and without second derivatives, and every method on one network.
        pytest.param(
            name,
            method,
            marks=[] if name == "vit" or method in ("sassha", "sophia") else pytest.mark.slow,
        )
        for method in METHODS
        for name in NETWORKS
    ],
)
def test_attention_is_fused_but_for_second_derivatives(name, method):
    make_model, make_data = NETWORKS[name]
    optimizer, algorithm = METHODS[method]
    model, passes, losses = make_model(), [], []
    before = copied(dict(model.named_parameters()))

    def look(event, state, number):
        if event == Event.AFTER_LOSS:
            passes.append((int(state.timestamp.batch), FUSED in operations(state.loss)))
            losses.append(float(state.loss.detach()))

    run = trainer(
        optimizer,
        [algorithm()],
        model=model,
        dataset=make_data(),
        batch_size=8,
        max_duration="4ba",
        callbacks=[Spy(look)],
    )
    run.fit()
    (inner,) = run.state.optimizers
    twice = 2 if method == "sassha" else 1
    plain = (0, 2) if method in ("sassha", "msassha", "adahessian") else ()
    assert passes == [(batch, batch not in plain) for batch in range(4) for _ in range(twice)]
    assert inner.param_groups[0]["refreshes"] == 2 and inner.steps_taken == 4
    assert all(torch.tensor(losses).isfinite())
    for parameter, p in run.state.model.named_parameters():
        assert p.isfinite().all() and not torch.equal(p, before[parameter]), parameter
        estimate = next(value for key, value in inner.state[p].items() if "hessian" in key and value.ndim)
        assert estimate.isfinite().all(), parameter
    run.close()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in ("vit", "gpt2") else pytest.mark.slow) for name in NETWORKS],
)
def test_the_loss_falls(name):
    make_model, make_data = NETWORKS[name]
    losses = []

    def look(event, state, number):
        if event == Event.AFTER_LOSS and number == 1:
            losses.append(float(state.loss.detach()))

    run = trainer(
        lambda ps: SASSHA(ps, lr=0.1),
        [Sassha(rho=0.05, hessian_interval=4)],
        model=make_model(),
        dataset=torch.utils.data.Subset(make_data(), range(8)),
        batch_size=8,
        max_duration="40ba",
        callbacks=[Spy(look)],
    )
    run.fit()
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3]), losses
    run.close()


RHO, SEED = 0.1, 11


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("microbatch", [8, 5])
@pytest.mark.parametrize(
    ("make_model", "make_data"),
    [
        (vision_transformer, pictures),
        (encoder, sequences),
        (lambda dropout: encoder(dropout, norm_first=True), sequences),
    ],
    ids=["vit", "encoder", "encoder_norm_first"],
)
def test_the_estimate_at_w_plus_e_is_forward_over_reverse(make_model, make_data, microbatch):
    model, batches = make_model(dropout=0.0).double(), []
    w = copied(dict(model.named_parameters()))

    def look(event, state, number):
        if event == Event.BATCH_START:
            batches.append(copied(state.batch))

    x, y = make_data(8).tensors
    run = trainer(
        lambda ps: SASSHA(ps, lr=0.05, betas=(0.9, 0.0)),
        [Sassha(RHO, seed=SEED)],
        model=model,
        dataset=TensorDataset(x.double(), y),
        batch_size=8,
        device_train_microbatch_size=microbatch,
        max_duration="1ba",
        callbacks=[Spy(look)],
    )
    run.fit()
    ((x, y),) = batches
    parts = list(zip(x.split(microbatch), y.split(microbatch), strict=True))

    def loss(p, x, y):
        return F.cross_entropy(torch.func.functional_call(model, p, ((x, y),)), y)

    with sdpa_kernel(SDPBackend.MATH):
        g = torch.func.grad(lambda p: loss(p, x, y))(w)
        norm = sum((part**2).sum() for part in g.values()).sqrt()
        displaced = {name: w[name] + RHO * g[name] / norm for name in w}
        expected = {name: torch.zeros_like(p) for name, p in w.items()}
        for k, (some, labels) in enumerate(parts):
            z = dict(zip(w, rademacher(list(w.values()), (SEED, 0, 0, k, 0)), strict=True))
            gradient = torch.func.grad(lambda p, some=some, labels=labels: loss(p, some, labels))
            _, hz = torch.func.jvp(gradient, (displaced,), (z,))
            expected = {n: expected[n] + len(some) / len(x) * z[n] * hz[n] for n in w}
    state = run.state.optimizers[0].state
    for name, p in model.named_parameters():
        estimate = state[p]["exp_hessian"]
        torch.testing.assert_close(estimate, expected[name].abs(), rtol=1e-8, atol=1e-12, msg=name)
    assert sum(part.abs().sum() for part in expected.values()) > 1
    run.close()


def test_dropout_within_attention_trains():
    # PyTorch's own fast path of the encoder serves evaluation only; with dropout, training has no fused one.
    model = encoder()
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.3
    run = trainer(
        sassha,
        [Sassha(rho=0.05, hessian_interval=2)],
        model=model,
        dataset=sequences(),
        eval_dataloader=torch.utils.data.DataLoader(sequences(8), batch_size=8),
        batch_size=8,
        max_duration="4ba",
    )
    run.fit()
    assert run.state.optimizers[0].param_groups[0]["refreshes"] == 2
    assert 0 <= float(run.state.eval_metrics["eval"]["MulticlassAccuracy"].compute()) <= 1
    run.close()
