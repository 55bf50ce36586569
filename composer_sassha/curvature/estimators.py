"""The estimators by name, and their input. To add one, write a function and add a line to ESTIMATORS."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from composer_sassha.common.tensors import wide_dtype
from composer_sassha.common.validate import SettingError
from composer_sassha.curvature.finite_difference import finite_difference_diagonal
from composer_sassha.curvature.gauss_newton import gauss_newton_diagonal, predictions
from composer_sassha.curvature.gradients import Gradients
from composer_sassha.curvature.hutchinson import hutchinson_diagonal


class Evaluation(NamedTuple):
    """The loss of one forward, with the logits and labels behind it if the model has them.

    Logits are [N, classes, ...] and labels [N, ...], as `torch.nn.functional.cross_entropy` takes them.
    """

    loss: Tensor
    logits: Tensor | None = None
    labels: Tensor | None = None


# Takes a number n, and returns a context in which the loss of the microbatch's first n samples has been
# computed again, with the same random numbers and buffers. On exit no trace of that is left.
Again = Callable[[int], AbstractContextManager[Evaluation | Tensor]]


@dataclass(frozen=True)
class Microbatch:
    """The input of an estimator: one microbatch.

    Args:
        evaluation: its loss, logits and labels.
        grads: the loss's gradients; with their graph if the estimator differentiates twice.
        params: the parameters, one for each gradient.
        keys: one key per draw, see `rademacher`.
        size: the number of samples, if known.
        again: see `Again`; None: the loss cannot be computed again.
        scale: the factor of the loss behind `grads` that float16 compute needs, if they are to be
            differentiated.
        gradients: how to differentiate sharded parameters. Default: by autograd.
        spread: of sharded parameters, the predictions on all ranks for each one here.
        on_write: see `finite_difference_diagonal`.
    """

    evaluation: Evaluation
    grads: Sequence[Tensor]
    params: Sequence[Tensor]
    keys: Sequence[Sequence[int]]
    size: int | None
    again: Again | None
    scale: float = 1.0
    gradients: Gradients | None = None
    spread: float = 1.0
    on_write: Callable[[], None] = torch.clear_autocast_cache


def _hutchinson(batch: Microbatch) -> list[Tensor]:
    diagonal = hutchinson_diagonal(batch.grads, batch.params, batch.keys)
    if batch.scale != 1:
        torch._foreach_div_(diagonal, batch.scale)
    return diagonal


def _gauss_newton(batch: Microbatch) -> list[Tensor]:
    _, logits, labels = batch.evaluation
    if logits is None or labels is None or logits.shape[1] < 2:
        raise SettingError(
            "LazyHessian: estimator='gauss_newton' finds no class logits: it looked for outputs [N, classes, "
            "...], two classes at least, with class labels in batch[1], and for outputs['logits'] with "
            "batch['labels']; use estimator='hutchinson', or in a loop of your own pass logits= and labels="
        )
    return gauss_newton_diagonal(
        logits, labels, batch.params, batch.keys, batch.scale, batch.spread, batch.gradients
    )


def _gradients(batch: Microbatch) -> list[Tensor]:
    return [grad.to(wide_dtype([grad]), copy=True) for grad in batch.grads]


def _count(evaluation: Evaluation, size: int | None) -> int | Tensor:
    _, logits, labels = evaluation
    if labels is not None:
        return predictions(labels, None if logits is None else logits.shape[1]).sum()
    if size is None:
        raise ValueError(
            "LazyHessian: estimator='empirical_fisher' needs the number of predictions behind the loss; pass "
            "size= (the number of samples) or labels= to backward"
        )
    return size


def _finite_difference(batch: Microbatch) -> list[Tensor]:
    again, size = batch.again, batch.size
    if again is None or size is None:
        raise ValueError(
            "LazyHessian: estimator='finite_difference' computes every loss a second time; pass size= (the "
            "number of samples) and again= to backward; see Estimation.attach"
        )

    @contextlib.contextmanager
    def loss_again() -> Iterator[Tensor]:
        with again(size) as evaluation:
            yield evaluation if isinstance(evaluation, Tensor) else evaluation.loss

    return finite_difference_diagonal(
        batch.grads, batch.params, batch.keys, loss_again, batch.gradients, batch.on_write
    )


@dataclass(frozen=True)
class Estimator:
    """An estimator and what it needs.

    Args:
        diagonal: estimates the diagonal on a microbatch.
        second_order: differentiates the gradient, for which fused attention and compiled code have no kernel.
        retains_graph: differentiates the loss's graph once more after its gradient.
        evaluates_again: evaluates every microbatch a second time.
        eager: a pass that estimates must run without compiled code, which has no second derivative, frees its
            graph, draws other dropout masks than the model evaluated again, and hides kinks.
        predictions: looks for logits and labels.
        draws: takes probes or labels at random, so that more than one sample makes sense.
        sharded: works with sharded parameters, whose gradients come out of an ordinary backward alone.
        smooth: is for networks without kinks, in full precision.
        count: the number of predictions B in a microbatch. With it, `diagonal` returns the gradient, and the
            estimate is `B * g * g` for the whole pass, which squares of microbatches do not add up to.
    """

    diagonal: Callable[[Microbatch], list[Tensor]]
    second_order: bool = False
    retains_graph: bool = False
    evaluates_again: bool = False
    eager: bool = True
    predictions: bool = False
    draws: bool = True
    sharded: bool = False
    smooth: bool = False
    count: Callable[[Evaluation, int | None], int | Tensor] | None = None


ESTIMATORS: dict[str, Estimator] = {
    "hutchinson": Estimator(_hutchinson, second_order=True),
    "gauss_newton": Estimator(_gauss_newton, retains_graph=True, predictions=True, sharded=True),
    "empirical_fisher": Estimator(_gradients, eager=False, predictions=True, draws=False, count=_count),
    "finite_difference": Estimator(_finite_difference, evaluates_again=True, sharded=True, smooth=True),
}
