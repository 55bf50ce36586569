"""The checks at the Trainer's start: what cannot train is refused before anything is computed."""

from collections.abc import Iterator
from typing import Any

import composer.algorithms
from composer.core import Algorithm, Precision, State

from composer_sassha.optim import SASSHA, SharpnessAwareOptimizer


def check(state: State) -> None:
    """Refuse combinations that cannot train, before anything has been computed.

    Raises:
        ValueError: says what does not fit, and what to do.
    """

    def that_have(attribute: str) -> list[str]:
        return [repr(a) for a in state.algorithms if any(hasattr(part, attribute) for part in parts([a]))]

    perturbations, hessians = that_have("perturbation"), that_have("curvature")
    if len(state.optimizers) != 1:
        raise ValueError(
            f"{len(state.optimizers)} optimizers were given to the Trainer; these methods need exactly one"
        )
    (optimizer,) = state.optimizers
    base = optimizer.base_optimizer if isinstance(optimizer, SharpnessAwareOptimizer) else optimizer
    if isinstance(optimizer, SharpnessAwareOptimizer):
        if optimizer.perturbation is not None:
            perturbations.append(repr(optimizer.perturbation))
        if optimizer.curvature is not None:
            hessians.append(repr(optimizer.curvature))
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
    if hessians and not hasattr(base, "update_curvature"):
        raise ValueError(
            f"LazyHessian needs an optimizer that takes curvature, such as composer_sassha.SASSHA; "
            f"{type(base).__name__} does not"
        )
    if perturbations and not hessians and isinstance(base, SASSHA):
        raise ValueError(
            f"SASSHA with {perturbations[0]} lacks a Hessian; use the algorithm Sassha(), which does both, "
            "or add LazyHessian()"
        )
    if state.fsdp_config is not None or state.tp_config is not None:
        raise ValueError("composer_sassha does not support sharded training (FSDP, TP) yet; train with DDP")
    check_precision(state)


def check_precision(state: State) -> None:
    """Refuse what needs a gradient scaler for closures.

    Raises:
        ValueError: the precision is amp_fp16.
    """
    if state.precision == Precision.AMP_FP16:
        raise ValueError(
            "precision='amp_fp16' is not supported by composer_sassha yet; use 'amp_bf16' or 'fp32'"
        )


def parts(algorithms: Any) -> Iterator[Algorithm]:
    """Yield algorithms, those that are made of others taken apart."""
    for algorithm in algorithms:
        yield from parts(algorithm.parts) if hasattr(algorithm, "parts") else (algorithm,)
