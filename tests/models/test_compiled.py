"""Compiled models through the Trainer: what runs compiled, what eagerly, and what is compiled again."""

import shutil

import pytest
import torch
from composer.core import Event
from composer.models import ComposerClassifier
from torch import nn
from torch._dynamo.backends.debugging import aot_eager, eager

from composer_sassha import ESAM, SAM, SASSHA, LazyHessian, LookSAM, MSassha, Sassha
from tests.helpers import Spy, assert_same, everything, images, network, trainer
from tests.methods import sassha, sgd, sophia
from tests.models.networks import pictures, vision_transformer

INTERVAL, STEPS = 3, 10


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A backend that counts how often it is asked to compile, and how often what it made runs."""

    def __init__(self, backend):
        self.backend, self.compilations, self.runs = backend, 0, 0

    def __call__(self, graph, inputs):
        self.compilations += 1
        made = self.backend(graph, inputs)

        def run(*args):
            self.runs += 1
            return made(*args)

        return run


# Forwards of a step (None: one, and one more where an ascent is due; ESAM looks at its samples in between),
# and whether there are refreshes.
METHODS = {
    "sassha": (sassha, lambda: [Sassha(rho=0.1, hessian_interval=INTERVAL)], 2, True),
    "sam": (sgd, lambda: [SAM(rho=0.1)], 2, False),
    "sam_every_3": (sgd, lambda: [SAM(rho=0.1, interval=INTERVAL)], None, False),
    "looksam": (sgd, lambda: [LookSAM(rho=0.1, interval=INTERVAL)], None, False),
    "msassha": (sassha, lambda: [MSassha(rho=0.1, hessian_interval=INTERVAL)], 1, True),
    "esam": (sgd, lambda: [ESAM(rho=0.1, beta=0.5, gamma=0.6)], 3, False),
    "sophia": (sophia, lambda: [LazyHessian(INTERVAL, "gauss_newton")], 1, True),
    "difference": (sassha, lambda: [SAM(0.1), LazyHessian(INTERVAL, "finite_difference")], 2, True),
    # Free of second derivatives and second looks: its refreshes stay compiled.
    "fisher": (sassha, lambda: [SAM(0.1), LazyHessian(INTERVAL, "empirical_fisher")], 2, False),
    "esam_sophia": (
        sophia,
        lambda: [ESAM(rho=0.1, beta=0.5, gamma=0.6), LazyHessian(INTERVAL, "gauss_newton")],
        3,
        True,
    ),
}


# By default one method of each number of forwards and each estimator; the wrapper leaves to aot_eager no more
# than to eager, so two show it.
BY_DEFAULT = {
    eager: ("sassha", "looksam", "sophia", "difference", "fisher", "esam_sophia"),
    aot_eager: ("sassha", "looksam"),
}


@pytest.mark.parametrize(
    ("method", "backend"),
    [
        pytest.param(
            method,
            backend,
            id=f"{method}-{backend.__name__}",
            marks=[] if method in by_default else pytest.mark.slow,
        )
        for backend, by_default in BY_DEFAULT.items()
        for method in METHODS
    ],
)
def test_only_refresh_steps_run_eagerly_and_compile_once(method, backend):
    optimizer, algorithms, forwards, refreshes = METHODS[method]
    counting, compilations, runs = Counting(backend), [], []

    def look(event, state, number):
        if event == Event.BATCH_END:
            compilations.append(counting.compilations)
            runs.append(counting.runs)

    run = trainer(
        optimizer,
        algorithms(),
        model=network(),
        max_duration=f"{STEPS}ba",
        compile_config={"backend": counting},
        callbacks=[Spy(look)],
    )
    run.fit()
    per_step = [after - before for before, after in zip([0, *runs], runs, strict=False)]
    due = [step % INTERVAL == 0 for step in range(STEPS)]
    expected = [0 if refreshes and d else forwards or 1 + d for d in due]
    assert per_step == expected
    # Everything has been compiled by the end of the first step that does not refresh.
    assert compilations[1:] == [compilations[1]] * (STEPS - 1) and compilations[1] > 0
    assert int(run.state.model.module[1].num_batches_tracked) == STEPS
    compiled = everything(run)
    run.close()
    if backend is eager:  # which computes what the plain model does, dropout included
        plain = trainer(optimizer, algorithms(), model=network(), max_duration=f"{STEPS}ba")
        plain.fit()
        assert_same(compiled, everything(plain))
        plain.close()


def test_microbatches_of_many_sizes_are_not_compiled_one_by_one():
    # ESAM's second pass sees another number of samples of each microbatch.
    counting, compilations, sizes = Counting(eager), [], set()

    def look(event, state, number):
        if event == Event.BATCH_END:
            compilations.append(counting.compilations)
        if event == Event.AFTER_FORWARD and number == 2:
            sizes.add(len(state.outputs))

    run = trainer(
        sgd,
        [ESAM(rho=0.1, beta=0.5, gamma=0.6)],
        model=network(),
        dataset=images(64),
        batch_size=16,
        device_train_microbatch_size=8,
        max_duration="20ba",
        compile_config={"backend": counting},
        callbacks=[Spy(look)],
    )
    run.fit()
    assert len(sizes) >= 4
    assert compilations[-1] == compilations[4]
    run.close()


def passes_of(model, dataset, algorithm, backend, steps=5, **compile_config):
    """Losses of each step's passes on one batch, with weights and perturbation at rest."""
    losses = []

    def look(event, state, number):
        if event == Event.AFTER_LOSS:
            if number == 1:
                losses.append([])
            losses[-1].append(float(state.loss.detach()))

    run = trainer(
        lambda ps: SASSHA(ps, lr=0.0),
        [algorithm],
        model=model,
        dataset=dataset,
        batch_size=len(dataset),
        max_duration=f"{steps}ba",
        compile_config={"backend": backend, **compile_config},
        callbacks=[Spy(look)],
    )
    run.fit()
    run.close()
    return losses


def has_a_compiler():
    return bool(shutil.which("g++") or shutil.which("clang++"))


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(eager, id="eager", marks=pytest.mark.slow),
        pytest.param(aot_eager, id="aot_eager"),
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not has_a_compiler(), reason="inductor needs a C++ compiler"),
            ],
        ),
    ],
)
def test_both_passes_draw_the_same_masks_compiled_or_not(backend):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(50, 16), nn.Dropout(0.5), nn.Linear(16, 3))
    model = ComposerClassifier(net, num_classes=3)
    losses = passes_of(model, images(10), Sassha(rho=0.0, hessian_interval=2), backend)
    for ascent, descent in losses:  # steps 0, 2 and 4 run eagerly, 1 and 3 compiled
        assert ascent == descent
    assert len({ascent for ascent, _ in losses}) == 5  # each step its own


@pytest.mark.parametrize(
    "backend",
    [pytest.param(eager, id="eager", marks=pytest.mark.slow), pytest.param(aot_eager, id="aot_eager")],
)
def test_attention_is_compiled_too(backend):
    counting, compilations, runs = Counting(backend), [], []

    def look(event, state, number):
        if event == Event.BATCH_END:
            compilations.append(counting.compilations)
            runs.append(counting.runs)

    run = trainer(
        sassha,
        [Sassha(rho=0.05, hessian_interval=2)],
        model=vision_transformer(),
        dataset=pictures(),
        batch_size=8,
        max_duration="6ba",
        compile_config={"backend": counting},
        callbacks=[Spy(look)],
    )
    run.fit()
    assert run.state.optimizers[0].param_groups[0]["refreshes"] == 3
    graphs = compilations[1]
    assert compilations == [0] + [graphs] * 5 and graphs > 0
    assert runs == [2 * graphs * number for number in (0, 1, 1, 2, 2, 3)]
    assert all(p.isfinite().all() for p in run.state.model.parameters())
    run.close()
