"""The checks at the Trainer's start: what cannot train is refused before anything is computed."""

import warnings
from collections.abc import Iterator
from typing import Any

import composer.algorithms
from composer.core import Algorithm, Precision, State
from composer.utils import dist
from composer.utils.parallelism import FSDPConfig

from composer_sassha.optim import SharpnessAwareOptimizer

# They mix samples with each other, or need a number of them.
_OF_WHOLE_BATCHES = (
    composer.algorithms.MixUp,
    composer.algorithms.CutMix,
    composer.algorithms.GhostBatchNorm,
)


def check(state: State) -> None:
    """Refuse combinations that cannot train, before anything has been computed.

    Raises:
        ValueError: says what does not fit, and what to do.
    """
    if len(state.optimizers) != 1:
        raise ValueError(
            f"{len(state.optimizers)} optimizers were given to the Trainer; these methods need exactly one"
        )
    (optimizer,) = state.optimizers
    wrapped = isinstance(optimizer, SharpnessAwareOptimizer)
    base = optimizer.base_optimizer if wrapped else optimizer

    def that_have(attribute: str) -> list[str]:
        brought = [repr(a) for a in state.algorithms if any(hasattr(part, attribute) for part in parts([a]))]
        given = getattr(optimizer, attribute, None) if wrapped else None
        return [*brought, repr(given)] if given is not None else brought

    perturbations, hessians = that_have("perturbation"), that_have("curvature")
    if any(isinstance(algorithm, composer.algorithms.SAM) for algorithm in state.algorithms):
        raise ValueError(
            "composer.algorithms.SAM cannot run beside composer_sassha's algorithms; remove one of the two"
        )
    if len(perturbations) > 1:
        raise ValueError(
            f"the weights would be perturbed twice ({' and '.join(perturbations)}); keep one perturbation"
        )
    if len(hessians) > 1:
        raise ValueError(f"the Hessian would be refreshed twice ({' and '.join(hessians)}); keep one of them")
    takes_curvature = hasattr(base, "update_curvature")
    if hessians and not takes_curvature:
        raise ValueError(
            f"LazyHessian needs an optimizer that takes curvature, such as composer_sassha.SASSHA; "
            f"{type(base).__name__} does not"
        )
    if takes_curvature and not hessians:
        raise ValueError(
            f"{type(base).__name__} lacks a Hessian; add LazyHessian(), or use Sassha() or MSassha(), which "
            "perturb and refresh the Hessian in one"
        )
    if perturbations:
        perturbation_of(state).check(base)
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
    for owner in [*parts(state.algorithms), *state.optimizers]:
        curvature = getattr(owner, "curvature", None)
        if curvature is not None and curvature.whole_only:
            raise ValueError(curvature.whole_only)
    for group in state.optimizers[0].param_groups:
        size = group.get("block_size", 1)
        if any(p.ndim == 2 and p.shape[1] % size for p in group["params"]):
            raise ValueError(
                f"AdaHessian: block_size={size} is not allowed with sharded parameters (FSDP) unless it "
                "divides the length of every matrix's rows; 1: no averaging"
            )


def _check_companions(state: State) -> None:
    """Refuse those of Composer's algorithms that a second pass would make another function of the model."""
    owners = [*parts(state.algorithms), *state.optimizers]
    perturbed_twice = getattr(perturbation_of(state), "ascends", False)
    curvatures = [getattr(owner, "curvature", None) for owner in owners]
    evaluated_twice = any(curvature.evaluates_again for curvature in curvatures if curvature is not None)
    fraction = min((getattr(part, "ascent_fraction", 1) for part in parts(state.algorithms)), default=1)
    for algorithm in state.algorithms:
        if fraction < 1 and isinstance(algorithm, _OF_WHOLE_BATCHES):
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
    """Have the Trainer run those algorithms last, at every event, that say so, in the order they name."""
    state.algorithms = sorted(
        state.algorithms, key=lambda a: max(getattr(part, "runs_late", 0) for part in parts([a]))
    )


def perturbation_of(state: State) -> Any:
    """The perturbation that the Trainer's algorithms or its wrapped optimizer bring, or None."""
    owners = [*parts(state.algorithms), *state.optimizers]
    return next((found for owner in owners if (found := getattr(owner, "perturbation", None))), None)


def parts(algorithms: Any) -> Iterator[Algorithm]:
    """Yield algorithms, those that are made of others taken apart."""
    for algorithm in algorithms:
        yield from parts(algorithm.parts) if hasattr(algorithm, "parts") else (algorithm,)
