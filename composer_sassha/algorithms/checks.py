"""The checks at the Trainer's start: refuse what cannot train before anything is computed."""

import warnings
from collections.abc import Sequence

import composer.algorithms
from composer.core import Algorithm, Precision, State
from composer.utils import dist
from composer.utils.parallelism import FSDPConfig

from composer_sassha.algorithms import wiring
from composer_sassha.algorithms.base import MethodAlgorithm, methods_of
from composer_sassha.optim import SharpnessAwareOptimizer, takes_curvature
from composer_sassha.perturbations import Perturbation

# They mix samples with each other, or need a minimum number of them.
_NEED_WHOLE_BATCHES = (
    composer.algorithms.MixUp,
    composer.algorithms.CutMix,
    composer.algorithms.GhostBatchNorm,
)


def check(state: State) -> None:
    """Refuse combinations that cannot train, before anything has been computed.

    Args:
        state: the Trainer's.

    Raises:
        ValueError: a combination is not allowed; the message says what to do.
    """
    if len(state.optimizers) != 1:
        raise ValueError(
            f"{len(state.optimizers)} optimizers were given to the Trainer; these methods need exactly one"
        )
    wiring.take_back(state)
    (optimizer,) = state.optimizers
    base = optimizer.base_optimizer if isinstance(optimizer, SharpnessAwareOptimizer) else optimizer
    if any(isinstance(algorithm, composer.algorithms.SAM) for algorithm in state.algorithms):
        raise ValueError(
            "composer.algorithms.SAM cannot run together with composer_sassha's algorithms; remove either"
        )

    # A compound algorithm is shown as the user wrote it, not by its parts.
    shown = [(repr(a), part) for a in state.algorithms for part in methods_of([a])]
    perturbations = [name for name, part in shown if part.perturbation is not None]
    hessians = [name for name, part in shown if part.curvature is not None]
    if isinstance(optimizer, SharpnessAwareOptimizer):
        perturbations += [] if optimizer.perturbation is None else [repr(optimizer.perturbation)]
        hessians += [] if optimizer.curvature is None else [repr(optimizer.curvature)]
    if len(perturbations) > 1:
        raise ValueError(
            f"the weights would be perturbed twice ({' and '.join(perturbations)}); keep one perturbation"
        )
    if len(hessians) > 1:
        raise ValueError(f"the Hessian would be refreshed twice ({' and '.join(hessians)}); keep one of them")
    if hessians and not takes_curvature(base):
        raise ValueError(
            f"LazyHessian needs an optimizer that takes curvature, such as composer_sassha.SASSHA; "
            f"{type(base).__name__} does not"
        )
    if takes_curvature(base) and not hessians:
        raise ValueError(
            f"{type(base).__name__} lacks a Hessian; add LazyHessian(), or use Sassha() or MSassha(), which "
            "perturb and refresh the Hessian in one"
        )
    if (perturbation := perturbation_of(state)) is not None:
        perturbation.check(base)
    _check_sharding(state)
    _check_companions(state)
    if state.auto_microbatching and dist.get_world_size() > 1:
        warnings.warn(
            "device_train_microbatch_size='auto' on several ranks: when one rank alone runs out of memory, "
            "the Trainer hangs or lets the replicas drift apart, plain SGD too; set a number instead",
            stacklevel=2,
        )


def _check_sharding(state: State) -> None:
    """Refuse what does not work on sharded parameters."""
    if state.tp_config is not None or isinstance(state.fsdp_config, FSDPConfig):
        given = "TP" if state.tp_config is not None else "FSDP1"
        raise ValueError(
            f"composer_sassha does not support {given}; shard with "
            "parallelism_config={'fsdp': composer.utils.parallelism.FSDP2Config()}"
        )
    if state.fsdp_config is None:
        return
    if state.precision == Precision.AMP_FP16:
        raise ValueError("precision='amp_fp16' does not work with FSDP here; use 'amp_bf16'")
    for owner in _sources(state):
        if owner.curvature is not None and owner.curvature.whole_only:
            raise ValueError(owner.curvature.whole_only)
    for group in state.optimizers[0].param_groups:
        size = group.get("block_size", 1)
        if any(p.ndim == 2 and p.shape[1] % size and p.requires_grad for p in group["params"]):
            raise ValueError(
                f"AdaHessian: block_size={size} is not allowed with sharded parameters (FSDP) unless it "
                "divides the length of every matrix's rows; 1: no averaging"
            )


def _check_companions(state: State) -> None:
    """Refuse Composer algorithms with which the two passes of a step would compute different functions."""
    perturbation = perturbation_of(state)
    perturbed_twice = perturbation is not None and perturbation.ascends
    evaluated_twice = any(o.curvature is not None and o.curvature.evaluates_again for o in _sources(state))
    fraction = min((method.ascent_fraction for method in methods_of(state.algorithms)), default=1)
    for algorithm in state.algorithms:
        if fraction < 1 and isinstance(algorithm, _NEED_WHOLE_BATCHES):
            raise ValueError(
                f"{type(algorithm).__name__} works on whole batches, and ascent_fraction={fraction} takes a "
                "part of each; leave it out, or set ascent_fraction=1"
            )
        if isinstance(algorithm, composer.algorithms.GyroDropout) and (perturbed_twice or evaluated_twice):
            raise ValueError(
                "GyroDropout counts forward passes, and may change its masks between the two of one step; "
                "leave it out, or use MSAM and an estimator that evaluates once"
            )


def sort(state: State) -> None:
    """Move the algorithms that run late to the end of the Trainer's list, in the order of `runs_late`."""

    def place(algorithm: Algorithm) -> int:
        return max((method.runs_late for method in methods_of([algorithm])), default=0)

    state.algorithms = sorted(state.algorithms, key=place)


def perturbation_of(state: State) -> Perturbation | None:
    """Return the perturbation that the Trainer's algorithms or its wrapped optimizer bring, or None."""
    brought = (owner.perturbation for owner in _sources(state))
    return next((perturbation for perturbation in brought if perturbation is not None), None)


def _sources(state: State) -> Sequence[MethodAlgorithm | SharpnessAwareOptimizer]:
    """Return what may bring a perturbation or the curvature: our algorithms and the wrapped optimizer."""
    wrapped = [optimizer for optimizer in state.optimizers if isinstance(optimizer, SharpnessAwareOptimizer)]
    return [*methods_of(state.algorithms), *wrapped]
