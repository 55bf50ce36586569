"""Operations that cannot be differentiated twice, and activation checkpoints, under a Hessian refresh."""

import contextlib

import pytest
import torch
from composer.models import ComposerClassifier
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from composer_sassha import SAM, LazyHessian, Sassha
from composer_sassha.common.validate import SettingError
from composer_sassha.curvature import ESTIMATORS, Estimation, Evaluation, LazyCurvature
from tests.helpers import assert_same, copied, trainer
from tests.methods import adahessian, sassha


def cube(backward):
    """A function whose value is x^3, with this backward(x, grad)."""

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

    Cube.backward = staticmethod(lambda ctx, grad: backward(*ctx.saved_tensors, grad))
    return Cube.apply


differentiable = cube(lambda x, grad: 3 * x**2 * grad)
once = cube(once_differentiable(lambda x, grad: 3 * x**2 * grad))
outside = cube(lambda x, grad: torch.from_numpy(3 * x.detach().numpy() ** 2) * grad.detach())


@torch.library.custom_op("composer_sassha_tests::cubed", mutates_args=())
def cubed(x: torch.Tensor) -> torch.Tensor:
    return x**3


@torch.library.custom_op("composer_sassha_tests::cubed_grad", mutates_args=())
def cubed_grad(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return 3 * x**2 * grad


cubed.register_autograd(
    lambda ctx, grad: cubed_grad(*ctx.saved_tensors, grad),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Fused(torch.autograd.Function):
    """A loss that computes its gradient in the forward, as fused cross-entropies do."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(2 * x)
        return (x**2).sum()

    @staticmethod
    def backward(ctx, grad):
        return (ctx.saved_tensors[0] * grad).detach()


class FixedLoss(torch.autograd.Function):
    """Adds a loss, with a gradient that depends on nothing (as balancing the load of experts does).

    A product with the Hessian would add that gradient again.
    """

    @staticmethod
    def forward(ctx, x, loss):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.full_like(grad, 0.5)


def flash(w):
    q = w.view(1, 1, 4, 8)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # closer than the MATH around the step
        return F.scaled_dot_product_attention(q, q, q)


def roi_align(w):
    ops = pytest.importorskip("torchvision").ops
    return ops.roi_align(w.view(1, 2, 4, 4), torch.tensor([[0, 0, 0, 3.0, 3.0]]), 2)


# What autograd notices, in its words, and what it passes over in silence.
SAID = {
    "cdist": lambda w: torch.cdist(w.view(8, 4), torch.ones(5, 4)),
    "embedding_bag": lambda w: F.embedding_bag(torch.tensor([[0, 1], [1, 2]]), w.view(8, 4)),
    "grid_sampler_2d": lambda w: F.grid_sample(
        w.view(1, 2, 4, 4), w.view(1, 4, 4, 2).tanh(), align_corners=False
    ),
    "ctc_loss": lambda w: F.ctc_loss(
        w.view(8, 1, 4).log_softmax(-1), torch.tensor([[1, 2]]), torch.tensor([8]), torch.tensor([2])
    ),
    "hardsigmoid": F.hardsigmoid,
    "scaled_dot_product_flash_attention_for_cpu": flash,
    "roi_align": roi_align,
    "composer_sassha_tests.cubed_grad": lambda w: cubed(w),
    "torch.compile": lambda w: torch.compile(torch.tanh, backend="aot_eager")(w),  # kept from running eagerly
}


def flex(w):
    try:
        return flex_attention(*[w.view(1, 1, 2, 16)] * 3)
    except NotImplementedError as error:  # newer versions have no derivative of it at all on a CPU
        pytest.skip(str(error))


def weight_norm(w):
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))
    return torch.func.functional_call(
        layer, {"parametrizations.weight.original1": w.view(4, 8)}, torch.ones(8)
    )


SILENT = {
    "weight_norm": weight_norm,
    "Cube": once,
    " Cube": outside,
    "FlexAttentionAutogradOp": flex,
    "Fused": Fused.apply,
    "FixedLoss": lambda w: FixedLoss.apply(w, w**3),
}


def refresh(function, estimator="hutchinson", **settings):
    """Attach a loss that has a second derivative beside the function's, and run it backward."""
    torch.manual_seed(4)
    w = nn.Parameter(torch.randn(32))
    curvature = LazyCurvature(estimator=estimator, **settings)
    estimation = Estimation(curvature, [w], step=0)
    loss = (function(w) ** 2).sum() + (w**2).sum()
    estimation.attach(loss).backward()
    return w, estimation.finish()[0]


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("name", [*SAID, *SILENT])
def test_an_operation_without_a_second_derivative_is_named(name, samples):
    with pytest.raises(SettingError) as error:
        refresh({**SAID, **SILENT}[name], samples=samples)
    message, name = str(error.value), name.strip()
    assert message.startswith(f"LazyHessian: estimator='hutchinson' differentiates twice, and {name} has no")
    for other in {*ESTIMATORS} - {"hutchinson"}:
        assert f"'{other}'" in message
    assert "\n" not in message
    if name in SAID:  # and what autograd said is at hand
        assert name.rpartition(".")[2] in str(error.value.__cause__)


@pytest.mark.parametrize(
    ("function", "second_derivative"),
    [
        (differentiable, lambda w: 30 * w**4),
        (cube(lambda x, grad: -grad), lambda w: torch.full_like(w, 2.0)),  # reversed twice
        (cube(lambda x, grad: torch.zeros_like(x)), torch.zeros_like),
    ],
    ids=["cube", "reversal", "zero"],
)
def test_functions_that_are_right_pass(function, second_derivative):
    w, diagonal = refresh(function)
    torch.testing.assert_close(diagonal[w], second_derivative(w.detach()) + 2)


def test_a_linear_loss_has_no_curvature():
    w = nn.Parameter(torch.ones(3))
    curvature = LazyCurvature()
    estimation = Estimation(curvature, [w], step=0)
    estimation.attach((2 * w).sum()).backward()
    assert torch.equal(estimation.finish()[0][w], torch.zeros(3)) and torch.equal(
        w.grad, torch.full((3,), 2.0)
    )


class OfItsOwn(torch.autograd.Function):
    """Fails, in its first or second derivative, for reasons of its own."""

    @staticmethod
    def forward(ctx, x, second):
        ctx.second = second
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if not ctx.second:
            raise RuntimeError("out of luck")
        return OfItsOwn.apply(grad, False), None


@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [
        (lambda w: OfItsOwn.apply(w, False), RuntimeError, "^out of luck$"),
        (lambda w: OfItsOwn.apply(w, True), RuntimeError, "^out of luck$"),
        # Without a first derivative no training is possible, and the estimator is not to blame.
        (
            lambda w: torch.special.gammainc(w.abs(), w.abs()),
            NotImplementedError,
            "^the derivative for 'igam",
        ),
    ],
)
def test_other_failures_pass_through(function, kind, message):
    with pytest.raises(kind, match=message) as error:
        refresh(function)
    assert type(error.value) is kind


@pytest.mark.parametrize("estimator", sorted({*ESTIMATORS} - {"hutchinson"}))
@pytest.mark.parametrize("name", [*SAID, *SILENT])
def test_the_advice_works(name, estimator):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("composer_sassha.curvature.estimation.warn_of_kinks", lambda loss: None)
        function = {**SAID, **SILENT}[name]
        torch.manual_seed(4)
        w = nn.Parameter(torch.randn(32))

        def evaluate():
            logits = torch.cat([function(w).reshape(1, -1), w[None]], dim=1)
            labels = torch.tensor([0])
            return Evaluation(F.cross_entropy(logits, labels), logits, labels)

        @contextlib.contextmanager
        def again(count):
            yield evaluate()

        estimation = Estimation(LazyCurvature(estimator=estimator), [w], step=0)
        loss, logits, labels = evaluate()
        estimation.attach(loss, logits=logits, labels=labels, size=1, again=again).backward()
        assert estimation.finish()[0][w].isfinite().all()


class Block(nn.Module):
    """A layer with dropout, perhaps under an activation checkpoint."""

    def __init__(self, how=None):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(50, 12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, 50))
        self.how = how

    def forward(self, x):
        if self.how is None:
            return self.net(x)
        return checkpoint(self.net, x, use_reentrant=self.how == "reentrant")


def checkpointed(how):
    torch.manual_seed(6)
    net = nn.Sequential(nn.Flatten(), nn.Linear(50, 50), Block(how), Block(how), nn.Linear(50, 3))
    return ComposerClassifier(net, num_classes=3)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_activation_checkpoints_change_nothing(estimator):
    results = []
    for how in (None, "not reentrant"):
        run = trainer(
            sassha,
            [SAM(rho=0.1), LazyHessian(2, estimator)],
            model=checkpointed(how),
            max_duration="3ba",
            device_train_microbatch_size=5,
        )
        run.fit()
        (optimizer,) = run.state.optimizers
        assert optimizer.param_groups[0]["refreshes"] == 2
        results.append([optimizer.state[p]["exp_hessian"].clone() for p in run.state.model.parameters()])
        run.close()
    for plain, with_checkpoints in zip(*results, strict=True):
        torch.testing.assert_close(with_checkpoints, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"estimator": "gauss_newton"}, {"batch_fraction": 0.2}])
def test_reentrant_checkpoints_are_refused(settings):
    run = trainer(adahessian, [LazyHessian(**settings)], model=checkpointed("reentrant"), max_duration="1ba")
    with pytest.raises(SettingError, match="pass use_reentrant=False") as error:
        run.fit()
    assert "\n" not in str(error.value)
    run.close()


class Once(nn.Module):
    def forward(self, x):
        return once(x)


def test_the_trainer_says_so_too_and_leaves_the_weights_alone():
    torch.manual_seed(6)
    net = nn.Sequential(nn.Flatten(), nn.Linear(50, 8), Once(), nn.Linear(8, 3))
    model = ComposerClassifier(net, num_classes=3)
    before = copied(model.state_dict())
    run = trainer(sassha, [Sassha()], model=model, max_duration="2ba")
    with pytest.raises(SettingError, match="Cube has no second derivative"):
        run.fit()
    assert_same(before, copied(run.state.model.state_dict()))
    run.close()
    other = trainer(
        sassha, [SAM(rho=0.1), LazyHessian(estimator="gauss_newton")], model=model, max_duration="2ba"
    )
    other.fit()
    assert other.state.optimizers[0].param_groups[0]["refreshes"] == 1
    other.close()
