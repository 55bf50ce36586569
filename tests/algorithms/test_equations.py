"""Every method through the Trainer against a plain transcription of its paper, step by step, in float64.

A new method is tested by its equations in equations.py and a row of the table below.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from composer.core import Event
from composer.optim import CosineAnnealingScheduler, LinearScheduler
from torch.utils.data import TensorDataset

from composer_sassha import (
    ASAM,
    ESAM,
    GSAM,
    MSAM,
    SAM,
    SASSHA,
    SSAM,
    USAM,
    AdaHessian,
    FollowLR,
    LazyHessian,
    LookSAM,
    MSassha,
    Sassha,
    Schedule,
    Sophia,
)
from tests.algorithms import equations as eq
from tests.helpers import Spy, copied, images, network, trainer

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 50
TOLERANCE = 1e-10

# The bias of a convolution before BatchNorm has no gradient but rounding errors, so eps is far above those.
BETAS, EPS = (0.9, 0.99), 1e-4


@dataclass(frozen=True)
class Rule:
    """An update rule as the Trainer gets it, and as equations."""

    lr: float
    optimizer: Callable[[Any], torch.optim.Optimizer]
    equations: Callable[..., Any]


SGD = Rule(
    0.05,
    lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.8, weight_decay=0.01),
    partial(eq.sgd, momentum=0.8, decay=0.01),
)
ADAMW = Rule(
    0.01,
    lambda ps: torch.optim.AdamW(ps, lr=0.01, betas=BETAS, eps=EPS, weight_decay=0.1),
    partial(eq.adamw, betas=BETAS, eps=EPS, decay=0.1),
)
SASSHA_RULE = Rule(
    0.05,
    lambda ps: SASSHA(ps, lr=0.05, betas=BETAS, eps=EPS, weight_decay=0.02),
    partial(eq.sassha, betas=BETAS, eps=EPS, decay=0.02),
)
ADAHESSIAN = Rule(
    0.03,
    lambda ps: AdaHessian(ps, lr=0.03, betas=BETAS, eps=1e-2, weight_decay=0.02, block_size=6),
    partial(eq.adahessian, betas=BETAS, eps=1e-2, decay=0.02, block=6),
)
SOPHIA = Rule(
    0.02,
    lambda ps: Sophia(ps, lr=0.02, betas=BETAS, eps=EPS, weight_decay=0.05, clip_threshold=0.5),
    partial(eq.sophia, betas=BETAS, eps=EPS, decay=0.05, gamma=0.5),
)


def linear(first: float, last: float) -> Callable[[int], float]:
    return lambda step: first + (last - first) * step / STEPS


def cosine(last: float) -> Callable[[int], float]:
    return lambda step: last + (1 - last) * (1 + math.cos(math.pi * step / STEPS)) / 2


@dataclass(frozen=True)
class Case:
    """A method: its equations, and the Trainer's configuration.

    Args:
        refresh: interval and seed of the Hessian's diagonal.
        multiplier: of the learning rate, as a function of the step.
    """

    name: str
    rule: Rule
    perturbation: Callable[..., Any]
    algorithms: Callable[[], Sequence[Any]]
    refresh: tuple[int, int] | None = None
    multiplier: Callable[[int], float] = lambda step: 1.0
    schedulers: Any = None

    def __str__(self) -> str:
        return self.name

    @property
    def microbatch(self) -> int:
        """The samples of a microbatch, of a batch of 10: one microbatch, or two of unequal size."""
        return 6 if self.name in IN_MICROBATCHES else 10


CASES = [
    # The papers' methods
    Case("sgd", SGD, eq.nothing, list),
    Case("sam", SGD, partial(eq.sam, rho=0.3), lambda: [SAM(0.3)]),
    Case("sam, maximum norm", SGD, partial(eq.sam, rho=0.02, p=math.inf), lambda: [SAM(0.02, p=math.inf)]),
    Case("sam every 3", SGD, eq.every(3, partial(eq.sam, rho=0.3)), lambda: [SAM(0.3, interval=3)]),
    Case("asam", SGD, partial(eq.asam, rho=0.6, eta=0.05), lambda: [ASAM(0.6, eta=0.05)]),
    Case(
        "gsam, linear learning rate",
        SGD,
        partial(eq.gsam, rho_max=0.4, rho_min=0.1, alpha=0.3, lr_max=0.05, lr_min=0.005),
        lambda: [GSAM(rho_max=0.4, rho_min=0.1, alpha=0.3, lr_min=0.005)],
        multiplier=linear(1.0, 0.1),
        schedulers=LinearScheduler(alpha_i=1.0, alpha_f=0.1),
    ),
    Case("ssam", SGD, partial(eq.ssam, rho=0.3), lambda: [SSAM(0.3)]),
    Case("usam", SGD, partial(eq.usam, rho=0.4), lambda: [USAM(0.4)]),
    Case(
        "usam, renormalized",
        SGD,
        partial(eq.usam, rho=0.4, renormalize=True),
        lambda: [USAM(0.4, renormalize=True)],
    ),
    Case(
        "looksam",
        SGD,
        partial(eq.looksam, rho=0.3, alpha=0.4, interval=3),
        lambda: [LookSAM(0.3, alpha=0.4, interval=3)],
    ),
    Case(
        "esam",
        SGD,
        partial(eq.esam, rho=0.3, beta=0.6, gamma=0.55, seed=4),
        lambda: [ESAM(0.3, beta=0.6, gamma=0.55, seed=4)],
    ),
    Case("msam", SGD, partial(eq.msam, rho=0.5), lambda: [MSAM(0.5)]),
    Case("msam every 2", SGD, eq.every(2, partial(eq.msam, rho=0.5)), lambda: [MSAM(0.5, interval=2)]),
    Case("adamw", ADAMW, eq.nothing, list),
    Case("adamw, msam", ADAMW, partial(eq.msam, rho=0.5), lambda: [MSAM(0.5)]),
    Case("adamw, sam", ADAMW, partial(eq.sam, rho=0.2), lambda: [SAM(0.2)]),
    Case(
        "sassha",
        SASSHA_RULE,
        partial(eq.sam, rho=0.15),
        lambda: [Sassha(0.15, hessian_interval=4, seed=11)],
        refresh=(4, 11),
    ),
    Case(
        "m-sassha",
        SASSHA_RULE,
        partial(eq.msam, rho=0.3),
        lambda: [MSassha(0.3, hessian_interval=4, seed=11)],
        refresh=(4, 11),
    ),
    Case("adahessian", ADAHESSIAN, eq.nothing, lambda: [LazyHessian(1, seed=2)], refresh=(1, 2)),
    Case("sophia", SOPHIA, eq.nothing, lambda: [LazyHessian(4, seed=3)], refresh=(4, 3)),
    # Unpublished combinations
    Case(
        "adahessian every 3, sam every 3",
        ADAHESSIAN,
        eq.every(3, partial(eq.sam, rho=0.2)),
        lambda: [SAM(0.2, interval=3), LazyHessian(3, seed=2)],
        refresh=(3, 2),
    ),
    Case(
        "adahessian every 5, msam",
        ADAHESSIAN,
        partial(eq.msam, rho=0.3),
        lambda: [LazyHessian(5, seed=2), MSAM(0.3)],
        refresh=(5, 2),
    ),
    Case(
        "sophia every 2, looksam",
        SOPHIA,
        partial(eq.looksam, rho=0.2, alpha=0.4, interval=3),
        lambda: [LookSAM(0.2, alpha=0.4, interval=3), LazyHessian(2, seed=3)],
        refresh=(2, 3),
    ),
    Case(
        "sophia every 4, gsam, cosine learning rate",
        SOPHIA,
        partial(eq.gsam, rho_max=0.2, rho_min=0.05, alpha=0.3, lr_max=0.02, lr_min=0.0),
        lambda: [GSAM(rho_max=0.2, rho_min=0.05, alpha=0.3), LazyHessian(4, seed=3)],
        refresh=(4, 3),
        multiplier=cosine(0.05),
        schedulers=CosineAnnealingScheduler(alpha_f=0.05),
    ),
    Case(
        "sophia every 3, msam",
        SOPHIA,
        partial(eq.msam, rho=0.2),
        lambda: [MSAM(0.2), LazyHessian(3, seed=3)],
        refresh=(3, 3),
    ),
    Case(
        "sassha every 4, esam",
        SASSHA_RULE,
        partial(eq.esam, rho=0.2, beta=0.7, gamma=0.5, seed=4),
        lambda: [ESAM(0.2, beta=0.7, gamma=0.5, seed=4), LazyHessian(4, seed=11)],
        refresh=(4, 11),
    ),
    Case(
        "sassha every 3, asam",
        SASSHA_RULE,
        partial(eq.asam, rho=0.3, eta=0.05),
        lambda: [ASAM(0.3, eta=0.05), LazyHessian(3, seed=11)],
        refresh=(3, 11),
    ),
    Case(
        "sam, partial",
        SGD,
        partial(eq.partial_sam, rho=0.3, fraction=0.3),
        lambda: [SAM(0.3, ascent_fraction=0.3)],
    ),
    Case(
        "sassha every 4, partial",
        SASSHA_RULE,
        partial(eq.partial_sam, rho=0.15, fraction=0.3),
        lambda: [Sassha(0.15, hessian_interval=4, seed=11, ascent_fraction=0.3)],
        refresh=(4, 11),
    ),
    # Schedules
    Case(
        "sam, rho rises",
        SGD,
        partial(eq.sam, rho=lambda now: 0.3 * linear(0.0, 1.5)(now.step)),
        lambda: [SAM(0.3), Schedule("rho", LinearScheduler(alpha_i=0.0, alpha_f=1.5))],
    ),
    Case(
        "msam, rho follows the learning rate",
        SGD,
        partial(eq.msam, rho=lambda now: 0.5 * (0.2 + 0.8 * now.lr / 0.05)),
        lambda: [Schedule("rho", FollowLR(alpha_f=0.2)), MSAM(0.5)],
        multiplier=cosine(0.0),
        schedulers=CosineAnnealingScheduler(),
    ),
    Case(
        "sassha, its power rises",
        Rule(
            0.05,
            SASSHA_RULE.optimizer,
            partial(
                eq.sassha,
                betas=BETAS,
                eps=EPS,
                decay=0.02,
                power=lambda now: 0.5 * linear(1.0, 2.0)(now.step),
            ),
        ),
        partial(eq.sam, rho=0.15),
        lambda: [
            Sassha(0.15, hessian_interval=4, seed=11),
            Schedule("hessian_power", LinearScheduler(alpha_i=1.0, alpha_f=2.0)),
        ],
        refresh=(4, 11),
    ),
]

# Of every way to get a gradient one case: the equations over one microbatch are those of the whole batch.
IN_MICROBATCHES = (
    "sam",
    "gsam, linear learning rate",
    "looksam",
    "esam",
    "msam",
    "sassha",
    "adahessian",
    "sophia every 2, looksam",
    "sassha every 4, esam",
    "sam, partial",
)


def dataset() -> TensorDataset:
    x, y = images().tensors
    return TensorDataset(x.double(), y)


def model() -> Any:
    return network(dropout=0.0).double()


@functools.cache
def batches() -> list[Any]:
    """What a Trainer sees, recorded where none of our algorithms runs."""
    seen = []

    def look(event, state, passes):
        if event == Event.BATCH_START:
            seen.append(copied(state.batch))

    run = trainer(
        lambda ps: torch.optim.SGD(ps, lr=0.0),
        model=model(),
        dataset=dataset(),
        max_duration=f"{STEPS}ba",
        callbacks=[Spy(look)],
    )
    run.fit()
    run.close()
    return seen


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_step_agrees_with_the_equations(case):
    ours = []

    def look(event, state, passes):
        if event == Event.BATCH_END:
            ours.append(copied({**dict(state.model.named_parameters()), **dict(state.model.named_buffers())}))

    run = trainer(
        case.rule.optimizer,
        case.algorithms(),
        model=model(),
        dataset=dataset(),
        max_duration=f"{STEPS}ba",
        device_train_microbatch_size=case.microbatch,
        schedulers=case.schedulers,
        callbacks=[Spy(look)],
    )
    run.fit()
    run.close()
    assert len(ours) == STEPS
    theirs = eq.trajectory(
        model(),
        batches(),
        case.microbatch,
        case.perturbation,
        case.rule.equations,
        # Composer sets the learning rate at the end of a step, before it counts that step.
        lr=lambda step: case.rule.lr * case.multiplier(max(step - 1, 0)),
        refresh=case.refresh,
    )
    for step, expected in enumerate(theirs):
        assert expected.keys() == ours[step].keys()
        for name, value in expected.items():
            difference = (ours[step][name] - value).abs().max().item()
            assert difference <= TOLERANCE, f"{name} differs by {difference} after {step + 1} steps"
