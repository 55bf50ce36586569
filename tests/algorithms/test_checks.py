"""Wrong combinations fail at construction or at the Trainer's start, in one line that says what to do."""

import composer.algorithms
import pytest
import torch
from composer.algorithms import MixUp
from composer.utils.parallelism import FSDP2Config, FSDPConfig

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
    SharpnessAwareOptimizer,
)
from composer_sassha.curvature import LazyCurvature
from composer_sassha.perturbations import SAMPerturbation
from tests.helpers import trainer
from tests.methods import adahessian, adamw, sassha, sgd


def plain_sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def adagrad(params):
    return torch.optim.Adagrad(params)


def wrapped(params):
    return SharpnessAwareOptimizer(sassha(params), SAMPerturbation(), curvature=LazyCurvature())


@pytest.mark.parametrize(
    ("optimizer", "algorithms", "message"),
    [
        (sgd, lambda: [LazyHessian()], "LazyHessian needs an optimizer that takes curvature.*SGD does not"),
        (adamw, lambda: [Sassha()], "AdamW does not"),
        (sgd, lambda: [SAM(), SAM()], "perturbed twice"),
        (sassha, lambda: [SAM(), Sassha()], "perturbed twice"),
        (sassha, lambda: [Sassha(), LazyHessian()], "refreshed twice"),
        (sassha, lambda: [SAM()], r"SASSHA lacks a Hessian; add LazyHessian\(\), or use Sassha\(\)"),
        (adahessian, lambda: [MSAM()], r"AdaHessian lacks a Hessian; add LazyHessian\(\)"),
        (sgd, lambda: [MSAM(), GSAM()], r"perturbed twice \(MSAM\(rho=3.0, interval=1\) and GSAM\(rho_max"),
        (sassha, lambda: [MSassha(), LookSAM()], "perturbed twice"),
        (plain_sgd, lambda: [MSAM()], "MSAM: SGD keeps no momentum to perturb along; use SGD"),
        (adagrad, lambda: [MSAM()], "MSAM: Adagrad keeps no momentum"),
        (sgd, lambda: [MSassha()], "LazyHessian needs an optimizer that takes curvature.*SGD does not"),
        (sgd, lambda: [ESAM(), MixUp()], "ESAM: MixUp mixes samples, .*leave it out, or set gamma=1"),
        (
            sgd,
            lambda: [SAM(ascent_fraction=0.5), MixUp()],
            "MixUp works on whole batches, .*set ascent_fract",
        ),
        (sgd, lambda: [Schedule("rho", FollowLR())], "name='rho' is not allowed; .*momentum, .*weight_decay"),
        (
            sgd,
            lambda: [GSAM(), Schedule("rho", FollowLR())],
            r"name='rho' is not allowed; .*\(rho_max, rho_min",
        ),
        (sgd, lambda: [SAM(), *[Schedule("rho", FollowLR()) for _ in "ab"]], "rho is scheduled twice"),
        (wrapped, lambda: [SAM()], "perturbed twice"),
        (wrapped, lambda: [LazyHessian()], "refreshed twice"),
    ],
)
def test_combinations_that_cannot_train(optimizer, algorithms, message):
    with pytest.raises(ValueError, match=message) as error:
        trainer(optimizer, algorithms())
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:SAM has known issues")
def test_composers_own_sam_beside_ours():
    with pytest.raises(ValueError, match=r"composer.algorithms.SAM cannot run together with"):
        trainer(sgd, [composer.algorithms.SAM(), SAM()])


def test_sassha_with_no_algorithm_fails_at_its_first_step():
    run = trainer(sassha)
    with pytest.raises(RuntimeError, match=r"add composer_sassha.Sassha\(\)"):
        run.fit()
    run.close()


def test_a_wrapped_optimizer_with_no_algorithm_says_what_to_do():
    run = trainer(lambda params: SharpnessAwareOptimizer(sgd(params), SAMPerturbation()))
    with pytest.raises(RuntimeError, match=r"add composer_sassha.SAM\(\) or Sassha\(\)"):
        run.fit()
    run.close()


def test_the_first_fsdp_is_refused():
    with pytest.raises(ValueError, match=r"does not support FSDP1; shard with .*FSDP2Config"):
        trainer(sgd, [SAM()], parallelism_config={"fsdp": FSDPConfig()})


def test_blocks_that_straddle_rows_are_refused_for_sharded_parameters():
    hessian = LazyHessian(estimator="gauss_newton")
    with pytest.raises(ValueError, match="block_size=27 is not allowed with sharded parameters"):
        trainer(
            lambda params: AdaHessian(params, block_size=27),  # the matrix is 3 x 36
            [hessian],
            parallelism_config={"fsdp": FSDP2Config()},
        )


@pytest.mark.parametrize(
    ("hessian", "reason"),
    [
        (
            LazyHessian(),
            "'hutchinson' is not allowed with sharded parameters .* use estimator='gauss_newton'",
        ),
        (LazyHessian(estimator="empirical_fisher"), "'empirical_fisher' is not allowed with sharded"),
        (LazyHessian(estimator="gauss_newton", batch_fraction=0.5), "batch_fraction=0.5 is not allowed"),
    ],
)
def test_a_hessian_of_whole_parameters_is_refused_for_sharded_ones(hessian, reason):
    with pytest.raises(ValueError, match=reason):
        trainer(sassha, [hessian], parallelism_config={"fsdp": FSDP2Config()})


@pytest.mark.parametrize(
    "build",
    [
        lambda: SAM(p=3),
        lambda: SAM(p=True),
        lambda: SAM(ascent_fraction=0),
        lambda: Sassha(ascent_fraction=1.5),
        lambda: ASAM(rho=-1),
        lambda: ASAM(eta=-1),
        lambda: GSAM(rho_min=0.5),
        lambda: GSAM(alpha=-0.1),
        lambda: GSAM(lr_min=-1),
        lambda: SSAM(rho=float("inf")),
        lambda: USAM(renormalize=1),
        lambda: LookSAM(alpha="a"),
        lambda: LookSAM(interval=0),
        lambda: ESAM(beta=0),
        lambda: ESAM(gamma=1.1),
        lambda: ESAM(seed=-1),
        lambda: MSAM(rho=-1),
        lambda: MSAM(interval=1.5),
        lambda: MSassha(hessian_interval=0),
        lambda: Schedule("lr", FollowLR()),
        lambda: Schedule("rho", 0.5),
        lambda: FollowLR(alpha_f=-1),
        lambda: SAM(rho=-1),
        lambda: SAM(rho="big"),
        lambda: SAM(interval=0),
        lambda: Sassha(rho=float("nan")),
        lambda: Sassha(hessian_interval=0),
        lambda: LazyHessian(samples=0),
        lambda: LazyHessian(estimator="exact"),
        lambda: LazyHessian(seed=-3),
    ],
)
def test_bad_hyperparameters_fail_at_construction(build):
    with pytest.raises((ValueError, TypeError), match="is not allowed") as error:
        build()
    assert "\n" not in str(error.value)


def test_an_optimizer_that_the_user_wrapped_is_not_wrapped_again():
    run = trainer(
        lambda params: SharpnessAwareOptimizer(SASSHA(params)), [Sassha(rho=0.1)], max_duration="2ba"
    )
    run.fit()
    (optimizer,) = run.state.optimizers
    assert isinstance(optimizer.base_optimizer, SASSHA) and optimizer.steps_taken == 2
    run.close()


def test_fit_twice_continues():
    once = trainer(sassha, [Sassha(rho=0.1)], max_duration="1ep")
    once.fit()
    once.fit(duration="1ep")
    (optimizer,) = once.state.optimizers
    assert optimizer.steps_taken == 8
    once.close()
