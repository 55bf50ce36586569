"""What a step leaves in leaves that are not the optimizer's, and which hooks it runs."""

import contextlib
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from composer.models import ComposerClassifier
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from composer_sassha import MSAM, SAM, SASSHA, LazyHessian, SharpnessAwareOptimizer
from composer_sassha.curvature import ESTIMATORS, Evaluation, LazyCurvature
from composer_sassha.optim.parameters import Memory, ParameterView
from composer_sassha.perturbations import (
    GSAMPerturbation,
    LookSAMPerturbation,
    MSAMPerturbation,
    SAMPerturbation,
)
from tests.helpers import CLASSES, trainer

PERTURBATIONS = {
    "none": lambda: None,
    "SAM": lambda: SAMPerturbation(0.0),
    "GSAM": lambda: GSAMPerturbation(0.0, 0.0),
    "LookSAM": lambda: LookSAMPerturbation(0.0),
    "MSAM": lambda: MSAMPerturbation(0.0),
}
X = torch.randint(7, (12,), generator=torch.Generator().manual_seed(1))
Y = torch.randint(CLASSES, (12,), generator=torch.Generator().manual_seed(2))


class Problem:
    """A body between leaves of all kinds, with a hook on everything that can have one."""

    def __init__(self):
        torch.manual_seed(3)
        self.body, self.head = nn.Linear(5, 4), nn.Linear(4, CLASSES)
        self.embedding = nn.Embedding(7, 5, sparse=True)
        self.prompt = torch.randn(5, requires_grad=True)
        self.phase = torch.randn(4, dtype=torch.complex64, requires_grad=True)
        self.to(torch.float64)
        self.heard = defaultdict(list)
        self.body.register_full_backward_pre_hook(lambda module, given: self.hear("before body", given[0]))
        self.body.register_full_backward_hook(lambda module, made, given: self.hear("body", given[0]))
        self.prompt.register_hook(lambda grad: self.hear("prompt", grad))
        self.prompt.register_post_accumulate_grad_hook(lambda leaf: self.hear("accumulated", leaf.grad))

    def to(self, dtype):
        for module in (self.body, self.head, self.embedding):
            module.to(dtype)
        self.prompt.data, self.phase.data = self.prompt.data.to(dtype), self.phase.data.to(torch.complex128)

    def hear(self, name, grad):
        self.heard[name].append(grad.detach().clone())

    def leaves(self):
        return [*self.head.parameters(), self.embedding.weight, self.prompt, self.phase]

    def evaluate(self, part=slice(0, 12)):
        hidden = self.body(self.embedding(X[part]) + self.prompt).tanh()
        self.hidden = hidden
        hidden.retain_grad()
        hidden.register_hook(lambda grad: self.hear("hidden", grad))
        logits = self.head(hidden * (1 + (self.phase * self.phase.conj()).real))
        return Evaluation(F.cross_entropy(logits, Y[part]), logits, Y[part])

    def found(self):
        """The gradients, and those that the hooks have heard."""
        grads = [leaf.grad.to_dense() for leaf in [*self.body.parameters(), *self.leaves(), self.hidden]]
        return {"grads": grads, **self.heard}


def step(problem, optimizer, parts=(slice(0, 12),)):
    def closure():
        problem.heard.clear()
        optimizer.zero_grad()
        for part in parts:
            evaluation = problem.evaluate(part)

            @contextlib.contextmanager
            def again(count, part=part):
                hidden = problem.hidden
                yield problem.evaluate(slice(part.start, part.start + count))
                problem.hidden = hidden

            size = len(evaluation.labels)
            optimizer.backward(
                evaluation.loss,
                1 / len(parts),
                logits=evaluation.logits,
                labels=evaluation.labels,
                size=size,
                batch_size=len(X),
                again=again,
            )
        return evaluation.loss

    optimizer.step(closure)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_every_leaf_and_hook_gets_the_gradient_of_one_pass(perturbation, estimator, fraction):
    plain, problem = Problem(), Problem()
    optimizer = SharpnessAwareOptimizer(
        SASSHA(problem.body.parameters(), lr=0.0),
        PERTURBATIONS[perturbation](),
        curvature=LazyCurvature(2, estimator, batch_fraction=fraction),
    )
    for _ in range(3):  # with a refresh, without, and with
        for each in (plain, problem):
            for leaf in each.leaves():
                leaf.grad = None
            each.prompt.grad = torch.ones_like(each.prompt)  # gathered before
            each.body.zero_grad()
        plain.heard.clear()
        plain.evaluate().loss.backward()
        step(problem, optimizer)
        torch.testing.assert_close(problem.found(), plain.found(), rtol=1e-12, atol=1e-15)
        assert not problem.hidden.grad.requires_grad


def test_parts_of_a_batch_add_up_in_every_leaf():
    plain, problem = Problem(), Problem()
    optimizer = SharpnessAwareOptimizer(
        SASSHA(problem.body.parameters(), lr=0.0), SAMPerturbation(0.0), curvature=LazyCurvature(1)
    )
    parts = [slice(0, 6), slice(6, 12)]
    for part in parts:
        (plain.evaluate(part).loss / 2).backward()
    step(problem, optimizer, parts)
    torch.testing.assert_close(problem.found()["grads"], plain.found()["grads"], rtol=1e-12, atol=1e-15)


def test_the_gradient_of_a_bystander_is_that_at_the_displaced_weights():
    w, other = nn.Parameter(torch.tensor([3.0])), torch.tensor([1.0], requires_grad=True)
    optimizer = SharpnessAwareOptimizer(torch.optim.SGD([w], lr=0.0), SAMPerturbation(0.5))

    def closure():
        optimizer.zero_grad()
        loss = (w**2 * other).sum()
        loss.backward()  # of a loop that has no backward of ours
        return loss

    optimizer.step(closure)
    assert other.grad.tolist() == [3.5**2]


def test_an_exception_in_an_ascent_leaves_a_bystanders_gradient():
    w, other = nn.Parameter(torch.tensor([3.0])), torch.tensor([1.0], requires_grad=True)
    optimizer = SharpnessAwareOptimizer(torch.optim.SGD([w], lr=0.0), SAMPerturbation(0.5))
    other.grad = torch.tensor([7.0])
    backward = torch.autograd.backward

    def closure():
        (w * other).sum().backward()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    assert other.grad.tolist() == [7.0] and torch.autograd.backward is backward


@pytest.mark.parametrize(
    "backward",
    [
        lambda loss: torch.autograd.backward(loss for loss in [loss]),
        lambda loss: torch.autograd.backward(get_gradient_edge(loss), torch.ones(1)),
    ],
    ids=["iterator", "edge"],
)
def test_a_loss_is_found_however_it_is_handed_over(backward):
    w, other = nn.Parameter(torch.tensor([3.0])), torch.tensor([1.0], requires_grad=True)
    optimizer = SharpnessAwareOptimizer(torch.optim.SGD([w], lr=0.0), SAMPerturbation(0.5))

    def closure():
        backward(loss := w**2 * other)
        return loss

    optimizer.step(closure)
    assert other.grad.tolist() == [3.5**2]


def test_a_reentrant_checkpoint_within_an_ascent_keeps_its_gradient():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, ends = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), []
    for how in (True, False):
        optimizer = SharpnessAwareOptimizer(torch.optim.SGD(net.parameters(), lr=0.0), SAMPerturbation(0.1))
        x.grad = None

        def closure(how=how, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (checkpoint(net, x, use_reentrant=how) ** 2).mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        ends.append([x.grad, *(p.grad.clone() for p in net.parameters())])
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-15)


class Prompted(nn.Module):
    """Has a leaf that is no parameter, and layers that the optimizer is not given."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body, self.head = nn.Linear(50, 4), nn.Linear(4, CLASSES)
        self.prompt = torch.randn(4, requires_grad=True)

    def forward(self, x):
        return self.head(self.body(x.flatten(1)).tanh() + self.prompt)


@pytest.mark.parametrize(
    "algorithms",
    [
        lambda: [SAM(0.0)],
        lambda: [SAM(0.0), LazyHessian(2)],
        lambda: [SAM(0.0), LazyHessian(2, "gauss_newton")],
        lambda: [MSAM(0.0), LazyHessian(2)],
    ],
)
def test_the_trainer_leaves_bystanders_what_plain_training_does(algorithms):
    ends = []
    for chosen in ([], algorithms()):
        net, rule = Prompted(), torch.optim.SGD if len(algorithms()) == 1 else SASSHA
        run = trainer(
            lambda _, net=net, rule=rule: rule(net.body.parameters(), lr=0.0),
            chosen,
            model=ComposerClassifier(net, num_classes=CLASSES),
            max_duration="3ba",
            device_train_microbatch_size=5,
        )
        run.fit()
        run.close()
        ends.append([net.prompt.grad, net.head.weight.grad, net.head.bias.grad])
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def test_sparse_gradients_that_ranks_would_average_are_refused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(4, 2, sparse=True), nn.Linear(2, 2))
    view = ParameterView(torch.optim.SGD(model[1].parameters(), lr=0.1), model)
    view.ranks = SimpleNamespace(several=True)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients cannot be averaged with the update; build"):
        view.set_gradient(torch.zeros(6), Memory(view, None), average=True)
