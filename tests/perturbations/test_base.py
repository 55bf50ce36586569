"""What all perturbations owe their users."""

import math

import pytest
import torch

from composer_sassha.perturbations import (
    ASAMPerturbation,
    Ascent,
    Descent,
    ESAMPerturbation,
    Gradient,
    GSAMPerturbation,
    LookSAMPerturbation,
    MSAMPerturbation,
    Perturbation,
    Point,
    SAMPerturbation,
    SSAMPerturbation,
    USAMPerturbation,
)
from tests.helpers import assert_same
from tests.perturbations.points import NAMES, displace, tensors

BIG = [
    SAMPerturbation(1e3),
    SAMPerturbation(1e3, p=math.inf),
    ASAMPerturbation(1e3),
    ESAMPerturbation(1e3),
    GSAMPerturbation(1e3),
    LookSAMPerturbation(1e3),
    MSAMPerturbation(1e3),
    SSAMPerturbation(1e3),
    USAMPerturbation(1e3),
    USAMPerturbation(1e3, renormalize=True),
]


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("perturbation", BIG, ids=repr)
def test_a_norm_of_zero_or_not_finite_displaces_by_nothing(perturbation, value):
    params, vectors = tensors(1), tensors(2)
    before = [p.clone() for p in params]
    if value == 0:
        vectors = [torch.zeros_like(v) for v in vectors]
    else:
        vectors[1][2] = value  # one entry is enough
    states = [{"exp_avg": v} for v in vectors]
    metrics = displace(perturbation, params, vectors, NAMES, states, group={"lr": 0.1})
    assert_same(params, before)
    assert metrics["rho"] == 1e3


@pytest.mark.parametrize("perturbation", BIG, ids=repr)
def test_displaces_in_place_and_by_much_if_rho_is_large(perturbation):
    params, vectors = tensors(1), tensors(2)
    before = [p.clone() for p in params]
    states = [{"exp_avg": v} for v in vectors]
    displace(perturbation, params, vectors, NAMES, states, group={"lr": 0.1})
    assert max((p - w).abs().max() for p, w in zip(params, before, strict=True)) > 100


SUBNORMAL = 1e-40  # its square is zero in float32


@pytest.mark.parametrize("perturbation", BIG, ids=repr)
def test_tiny_gradients_displace_by_something_finite(perturbation):
    params = [torch.zeros(3)]
    vectors = [torch.full((3,), SUBNORMAL)]
    displace(perturbation, params, vectors, ["weight"], [{"exp_avg": vectors[0]}], group={"lr": 0.1})
    assert params[0].isfinite().all()


@pytest.mark.parametrize("perturbation", BIG, ids=repr)
def test_no_parameters_at_all(perturbation):
    assert displace(perturbation, [], [], ["none"])["rho"] == 1e3


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        *[
            (method, {name: value})
            for method, name in [
                (SAMPerturbation, "rho"),
                (ASAMPerturbation, "rho"),
                (ASAMPerturbation, "eta"),
                (ESAMPerturbation, "rho"),
                (GSAMPerturbation, "rho_max"),
                (GSAMPerturbation, "rho_min"),
                (GSAMPerturbation, "alpha"),
                (GSAMPerturbation, "lr_min"),
                (LookSAMPerturbation, "rho"),
                (LookSAMPerturbation, "alpha"),
                (MSAMPerturbation, "rho"),
                (SSAMPerturbation, "rho"),
                (USAMPerturbation, "rho"),
            ]
            for value in (-0.1, math.nan, math.inf, "0.1", True, None)
        ],
        *[(SAMPerturbation, {"p": value}) for value in (1, 3, -math.inf, math.nan, True, "2", None)],
        *[(ESAMPerturbation, {"beta": value}) for value in (0, 0.0, -0.5, 1.5, math.nan, "x", True)],
        *[(ESAMPerturbation, {"seed": value}) for value in (-1, 0.5, "x", True)],
        *[(USAMPerturbation, {"renormalize": value}) for value in (1, "yes", None)],
        (GSAMPerturbation, {"rho_max": 0.1, "rho_min": 0.2}),
    ],
)
def test_a_bad_value_is_refused_in_one_line_that_names_it(method, arguments):
    with pytest.raises((ValueError, TypeError)) as error:
        method(**arguments)
    name, value = list(arguments.items())[-1]
    owner = method.__name__.removesuffix("Perturbation")
    message = str(error.value)
    assert message.startswith(f"{owner}: {name}={value!r} is not allowed") and "\n" not in message


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        (SAMPerturbation, {"rho": 0}),
        (ASAMPerturbation, {"rho": 0, "eta": 0}),
        (ESAMPerturbation, {"rho": 0, "beta": 1, "seed": 0}),
        (GSAMPerturbation, {"rho_max": 0.1, "rho_min": 0.1, "alpha": 0, "lr_min": 0}),
        (LookSAMPerturbation, {"rho": 0, "alpha": 0}),
        (MSAMPerturbation, {"rho": 0}),
    ],
)
def test_the_ends_of_the_ranges_are_allowed(method, arguments):
    method(**arguments)


def test_what_the_wrapper_has_to_know():
    assert [type(p).__name__ for p in BIG if not p.ascends] == ["MSAMPerturbation"]
    assert [p for p in BIG if p.mixes] == [
        GSAMPerturbation(1e3),
        LookSAMPerturbation(1e3),
        SSAMPerturbation(1e3),
        USAMPerturbation(1e3, renormalize=True),
    ]
    assert [p.remembers for p in BIG if p.remembers] == ["looksam_g_v"]


@pytest.mark.parametrize(
    ("perturbation", "state"),
    [
        (SAMPerturbation(0.5), {}),
        (ASAMPerturbation(0.5, eta=1.0), {}),
        (ESAMPerturbation(0.5), {}),
        (MSAMPerturbation(0.5), {"momentum_buffer": torch.tensor([1e-42])}),
    ],
    ids=repr,
)
def test_a_norm_too_small_to_divide_by_displaces_by_nothing(perturbation, state):
    w = torch.zeros(1)
    displace(perturbation, [w], [torch.tensor([1e-42])], names=["w"], states=[state])
    assert not w.any()


class Plain(Perturbation):
    """SAM at no distance, by the defaults of the base class."""

    def step(self, at):
        yield Ascent()
        yield Descent()


def test_by_default_the_loss_gap_is_what_there_is_to_log():
    assert Plain().metrics(0.5) == {"loss_gap": 0.5}


def test_by_default_a_step_between_is_one_pass_at_w():
    program = Plain().between(Point())
    assert next(program) == Descent()
    with pytest.raises(StopIteration) as end:
        program.send(Gradient([]))
    assert end.value.value is None


def test_a_gradient_that_is_not_kept_is_gone_with_the_next_pass():
    w = torch.zeros(2)
    kept, gone = (Gradient([w], [torch.tensor([1.0, 2.0])]) for _ in range(2))
    assert kept.flat.tolist() == [1.0, 2.0]
    for g in (kept, gone):
        g.release()
    assert kept.flat.tolist() == [1.0, 2.0]
    with pytest.raises(RuntimeError, match=r"yield Ascent\(keeps=True\) to keep it"):
        gone.flat  # noqa: B018
