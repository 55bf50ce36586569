"""What measuring leaves behind, and what it sees: modes, random numbers, attention, compiled code."""

import random

import numpy as np
import pytest
import torch
from composer.models import ComposerClassifier
from torch import nn

from composer_sassha.sharpness import Measures, measure, objective_of, top_eigenvalues, undisturbed
from composer_sassha.sharpness.objective import Objective
from tests.helpers import Injected, assert_same, copied, images, network, rng_states
from tests.models.networks import pictures, vision_transformer


def batch(count=40):
    return images(count).tensors


def everything(model):
    return copied(
        {
            "model": model.state_dict(),
            "modes": {name: module.training for name, module in model.named_modules()},
            "grads": [p.grad for p in model.parameters()],
            "required": [p.requires_grad for p in model.parameters()],
            "rng": rng_states(),
            "grad_enabled": torch.is_grad_enabled(),
        }
    )


@pytest.mark.parametrize("batch_statistics", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(batch_statistics, fails):
    model = network()
    model.module[3].eval()  # modes that differ
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.module[0].bias.requires_grad_(False)
    before = everything(model)
    with torch.no_grad():
        try:
            with undisturbed(model, batch_statistics):
                measured = measure(objective_of(model, [(batch(), 40)]), Measures(m=(8,), trace_samples=2))
                random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
                model.module[1].running_mean.add_(1)
                if fails:
                    raise Injected
        except Injected:
            pass
    assert measured["lambda_max"] > 0
    assert_same(before, everything(model))


def test_it_is_measured_in_evaluation_mode_or_with_the_statistics_of_the_batch():
    model = network(dropout=0.5)
    x, y = batch()
    found = {}
    for batch_statistics in (False, True):
        with undisturbed(model, batch_statistics):
            found[batch_statistics] = objective_of(model, [((x, y), 40)]).loss()
    exact = nn.functional.cross_entropy(model.eval()((x, y)), y).item()
    assert found[False] == pytest.approx(exact, rel=1e-6)
    model.module[1].train()
    exact = nn.functional.cross_entropy(model((x, y)), y).item()
    assert found[True] == pytest.approx(exact, rel=1e-6) and found[True] != pytest.approx(found[False])


def test_a_model_that_always_draws_is_one_function():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1)) * torch.rand(3)

    model = ComposerClassifier(Noisy(50, 3), num_classes=3)
    with undisturbed(model):
        objective = objective_of(model, [(batch(), 40)])
        assert objective.loss() == objective.loss()
        assert torch.equal(objective.gradient(), objective.gradient())


def explicit_eigenvalue(model, data):
    """Row by row, from the gradient's graph, under the kernels that have one."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        params = list(model.parameters())
        grads = torch.autograd.grad(model.loss(model(data), data), params, create_graph=True)
        flat = torch.cat([g.flatten() for g in grads])
        rows = [torch.autograd.grad(entry, params, retain_graph=True) for entry in flat]
    hessian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    return torch.linalg.eigvalsh(hessian)[-1].item()


def test_attention_is_measured():
    x, y = pictures(4).tensors
    model = vision_transformer().double().eval()
    for name, p in model.named_parameters():  # few enough to write the Hessian out
        p.requires_grad_("in_proj_bias" in name or "heads" in name)
    data = (x.double(), y)
    trained = [p for p in model.parameters() if p.requires_grad]
    model.parameters = lambda recurse=True: iter(trained)
    exact = explicit_eigenvalue(model, data)
    del model.parameters
    with undisturbed(model):
        found = top_eigenvalues(objective_of(model, [(data, 4)]), k=1, tol=1e-9)
    assert found[0] == pytest.approx(exact, rel=1e-6)


def test_a_compiled_model_is_measured_as_it_was_written():
    torch._dynamo.reset()
    plain, runs = network(), []
    compiled = network()
    compiled.load_state_dict(plain.state_dict())

    def backend(graph, inputs):
        def run(*args):
            runs.append(1)
            return graph(*args)

        return run

    compiled.forward = torch.compile(compiled.forward, backend=backend)
    compiled.eval()(batch())
    assert runs
    before = len(runs)
    found = []
    for model in (plain, compiled):
        with undisturbed(model):
            found.append(top_eigenvalues(objective_of(model, [(batch(), 40)]), k=2).tolist())
    assert found[0] == found[1] and len(runs) == before
    torch._dynamo.reset()


def test_groups_are_the_samples_in_their_order():
    x, y = batch(10)
    model = network()
    objective = objective_of(model, [((x[:4], y[:4]), 4), ((x[4:], y[4:]), 6)])
    groups = objective.groups(3)
    seen = [torch.cat([part[1] for part, _ in group.batches]) for group in groups]
    assert_same(seen, [y[:3], y[3:6], y[6:9]])
    assert [group.samples for group in groups] == [3, 3, 3] and not any(
        group.ranks.groups for group in groups
    )


def test_hooks_do_not_hear_of_a_measurement():
    torch.manual_seed(0)
    model, heard = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), []
    model[1].register_full_backward_hook(lambda module, made, given: heard.append(given))
    params = dict(model.named_parameters())
    objective = Objective(params, lambda x: model(x).square().mean(), [(torch.ones(2, 3), 2)])
    with undisturbed(model):
        objective.product(objective.gradient())
    assert not heard
    model(torch.ones(2, 3)).sum().backward()
    assert len(heard) == 1
