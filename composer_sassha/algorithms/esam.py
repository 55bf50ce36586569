"""Efficient SAM as a Composer algorithm."""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from composer.algorithms import CutMix, GhostBatchNorm, MixUp
from composer.core import Event, State
from composer.core.precision import get_precision_context
from composer.loggers import Logger
from composer.utils import batch_get
from torch import Tensor

from composer_sassha.algorithms import checks, wiring
from composer_sassha.algorithms.base import taken_apart
from composer_sassha.algorithms.given import Given
from composer_sassha.algorithms.lazy_hessian import LazyHessian
from composer_sassha.algorithms.perturbing import PerturbingAlgorithm
from composer_sassha.common import validate
from composer_sassha.common.batches import copied, must_divide, select, shared, unwrapped
from composer_sassha.common.validate import SettingError
from composer_sassha.perturbations import ESAMPerturbation
from composer_sassha.perturbations.esam import most_sensitive

_SELECTING = frozenset(
    (
        Event.BEFORE_TRAIN_BATCH,
        Event.BEFORE_FORWARD,
        Event.AFTER_FORWARD,
        Event.BEFORE_LOSS,
        Event.AFTER_LOSS,
        Event.BEFORE_BACKWARD,
    )
)


class ESAM(PerturbingAlgorithm):
    """Perturbs a fraction of the weights, on a fraction of the samples (Du et al. 2022, arXiv 2110.03141).

    Stochastic weight perturbation displaces a random fraction beta of the weights, rescaled by 1 / beta.
    Sharpness-sensitive data selection then takes the gradient at w + e on the fraction gamma of the samples
    whose loss has risen most. One forward over the batch at w + e, without a gradient, finds these samples.
    Each rank selects from its own part of the batch, over all microbatches together.

    Per-sample losses come from the model's own `loss(outputs, batch, reduction="none")`, as for Composer's
    SelectiveBackprop; Composer's classifiers have it. Every tensor of the batch is reduced to the selected
    samples. The metrics are those of `SAM`; `sharpness/loss_gap` is over the whole batch.

    Args:
        rho: radius of the neighbourhood, >= 0. Default: 0.05.
        beta: fraction of the weights to displace, in (0, 1]. Default: 0.6.
        gamma: fraction of the samples in the second pass, in (0, 1], rounded up; 1 takes all samples and
            needs no per-sample losses. Default: 0.5.
        interval: steps between perturbed steps, >= 1. Default: 1.
        seed: determines the draws of weights, >= 0. Default: 0.
        sync_ascent: average the gradient at w over the ranks. Default: False.
        input_key: key of the inputs in a batch; their first dimension is the number of samples. Default: 0.
        target_key: key of the targets in a batch. Default: 1.

    Raises:
        TypeError, ValueError: an argument that is not allowed; at the Trainer's start, a combination that is
            not; on the first step, a model without per-sample losses.

    Example:
        >>> ESAM(gamma=0.8)
        ESAM(rho=0.05, beta=0.6, gamma=0.8, interval=1, seed=0, sync_ascent=False, input_key=0, target_key=1)
    """

    # After LazyHessian: ESAM's factor is a weight of the microbatch, so it must multiply the Hessian's
    # stand-in for the loss, which weighs gradient and estimate alike.
    runs_late = 2

    def __init__(
        self,
        rho: float = 0.05,
        beta: float = 0.6,
        gamma: float = 0.5,
        interval: int = 1,
        seed: int = 0,
        sync_ascent: bool = False,
        input_key: Any = 0,
        target_key: Any = 1,
    ) -> None:
        super().__init__(ESAMPerturbation(rho, beta, seed), interval, sync_ascent)
        self.gamma = validate.fraction("ESAM", "gamma", gamma)
        self.input_key, self.target_key = input_key, target_key
        self._forget()

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the constructor, for `repr`."""
        own = {"gamma": self.gamma, "input_key": self.input_key, "target_key": self.target_key}
        return {**super().settings(), **own}

    def _forget(self) -> None:
        self._selection = _Selection()

    def match(self, event: Event, state: State) -> bool:
        """Whether to run: at the Trainer's start, around and within the two passes, and to log."""
        if event in _SELECTING:
            return self.gamma < 1 and wiring.phase(state) is not None
        return super().match(event, state)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Wrap the optimizer, record losses, select samples, or log."""
        selection = self._selection
        match event, wiring.phase(state):
            case Event.BEFORE_TRAIN_BATCH, "ascent":
                self._forget()
            case Event.BEFORE_FORWARD, "ascent":
                selection.given.append(Given(state.batch))
                selection.weights.append(wiring.samples(state).count(state.batch))
            case Event.AFTER_FORWARD, "ascent":
                selection.given[-1].after_forward(state.batch)
            case Event.BEFORE_LOSS, "ascent":
                selection.given[-1].before_loss(state.batch)
                selection.for_loss = copied(state.batch, shared)  # the loss may edit it
            case Event.AFTER_LOSS, "ascent":
                given, batch = selection.given[-1], selection.for_loss
                selection.before.append(self._losses(state, state.outputs, batch, given))
                selection.for_loss = None
            case Event.BEFORE_TRAIN_BATCH, "descent":
                selection.choose(self._losses_again(state), self.gamma)
            case Event.BEFORE_FORWARD, "descent":
                index, _ = selection.parts[0]
                state.batch = self._selected(state.batch, index)
            case Event.BEFORE_BACKWARD, "descent":
                _, factor = selection.parts.pop(0)
                state.loss = _scaled(state.loss, factor)
            case ((Event.INIT | Event.FIT_START), _):
                self._refuse(state)
                super().apply(event, state, logger)
                checks.sort(state)
            case Event.BEFORE_LOAD, _:
                super().apply(event, state, logger)
                wiring.wrapped_optimizer(state, on_rollback=self._forget)
            case Event.BATCH_END, _:
                if selection.loss_gap is not None:
                    state.optimizers[0].metrics["loss_gap"] = selection.loss_gap
                self._forget()
                super().apply(event, state, logger)

    def _refuse(self, state: State) -> None:
        """Refuse what cannot be combined with a selection of samples."""
        if self.gamma == 1:
            return
        for part in taken_apart(state.algorithms):
            if isinstance(part, MixUp | CutMix):
                raise ValueError(
                    f"ESAM: {type(part).__name__} mixes samples, which then have no loss of their own; "
                    "leave it out, or set gamma=1"
                )
            if isinstance(part, GhostBatchNorm):
                raise ValueError(
                    f"ESAM: GhostBatchNorm needs {part.ghost_batch_size} samples in every pass, and fewer "
                    "may be selected; leave it out, or set gamma=1"
                )
            if isinstance(part, LazyHessian) and part.curvature.batch_fraction < 1:
                raise ValueError(
                    f"ESAM: batch_fraction={part.curvature.batch_fraction} of LazyHessian drops samples that "
                    "ESAM selects; set batch_fraction=1, or gamma=1"
                )

    def _losses_again(self, state: State) -> list[Tensor]:
        """Return every sample's loss at w + e, in the ascent's microbatches.

        Buffers and RNG states are restored: the extra forward must change neither BatchNorm's statistics nor
        the random numbers of the descent.
        """
        unseen = wiring.snapshot(state)
        try:
            try:
                return self._losses_of_microbatches(state, graph=False)
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
            # The model itself differentiates in its forward or its loss, for a penalty or an equation.
            unseen.restore()
            return self._losses_of_microbatches(state, graph=True)
        finally:
            unseen.restore()

    def _losses_of_microbatches(self, state: State, graph: bool) -> list[Tensor]:
        model, after = unwrapped(state.model), []
        for given in self._selection.given:
            with torch.set_grad_enabled(graph):
                batch = given.for_forward()
                with get_precision_context(state.precision, state.precision_config):
                    outputs = model(batch)
                after.append(self._losses(state, outputs, given.for_loss(batch), given))
        return after

    def _losses(self, state: State, outputs: Any, batch: Any, given: Given) -> Tensor:
        """Return the loss of every sample of a microbatch."""
        model, losses = unwrapped(state.model), None
        try:
            with get_precision_context(state.precision, state.precision_config):
                losses = model.loss(outputs, batch, reduction="none")
        except TypeError as error:
            if "reduction" not in str(error) and "keyword" not in str(error):
                raise  # the loss takes it, and has another problem
        # The keys are checked last: other keys would not help a model without per-sample losses.
        if not isinstance(losses, Tensor) or losses.ndim == 0 or len(losses) != self._samples(given.batch):
            raise SettingError(
                f"ESAM: {type(model).__name__}.loss(outputs, batch, reduction='none') returns no loss "
                "per sample; set gamma=1, or give the model such a loss"
            )
        return losses.detach().reshape(len(losses), -1).mean(dim=1)

    def _selected(self, batch: Any, index: Tensor) -> Any:
        advice = "give every part of the batch one entry for each sample, or set gamma=1"
        with must_divide(f"ESAM: gamma={self.gamma} selects samples", advice):
            return select(batch, index, self._samples(batch))

    def _samples(self, batch: Any) -> int:
        """Return the number of samples of a batch, which its inputs and targets must agree on."""
        counts = {}
        for name, key in (("input_key", self.input_key), ("target_key", self.target_key)):
            entry = None
            with contextlib.suppress(Exception):  # a batch may be of any type, and raise anything
                entry = batch_get(batch, key)
            if not isinstance(entry, Tensor) or entry.ndim == 0:
                raise SettingError(
                    f"ESAM: {name}={key!r} is not allowed; it must lead to a tensor in the batch, a "
                    f"{type(batch).__name__}; give the key of its {name[:-4]}s, or set gamma=1"
                )
            counts[name] = len(entry)
        if counts["input_key"] != counts["target_key"]:
            raise SettingError(
                f"ESAM: input_key={self.input_key!r} leads to {counts['input_key']} samples and "
                f"target_key={self.target_key!r} to {counts['target_key']}; give keys of equally many samples"
            )
        return counts["input_key"]


class _Selection:
    """The samples of one step's second pass, and the losses they are selected by."""

    def __init__(self) -> None:
        self.given: list[Given] = []  # the microbatches of the ascent
        self.weights: list[float] = []  # of these in the batch, up to a factor, as the Trainer weighs them
        self.for_loss: Any = None  # what the loss of the running one is given
        self.before: list[Tensor] = []  # their samples' losses at w
        self.parts: list[tuple[Tensor, float]] = []  # of each: which samples, and the factor of its loss
        self.loss_gap: float | None = None  # None if the ascent has overflowed

    def choose(self, after: list[Tensor], gamma: float) -> None:
        """Find the samples whose loss has risen most."""
        rise = torch.cat(after) - torch.cat(self.before)
        chosen = most_sensitive(rise, gamma)
        *indices, self.loss_gap = torch.cat([chosen.float(), rise.mean()[None].float()]).tolist()
        start, total = 0, sum(self.weights)
        for losses, weight in zip(self.before, self.weights, strict=True):
            here = [int(i) - start for i in indices if start <= i < start + len(losses)]
            # The Trainer weighs this microbatch by its fraction of the samples that the DataSpec counts; the
            # factor makes that its fraction of the selected ones. A microbatch without selected samples must
            # still run, at weight zero, or the other ranks would wait in DDP's collectives. It runs with two
            # samples, because BatchNorm cannot train on one.
            factor = (len(here) / len(indices)) / (weight / total)
            some = here or list(range(min(2, len(losses))))
            self.parts.append((torch.tensor(some, device=losses.device), factor))
            start += len(losses)


def _scaled(loss: Any, factor: float) -> Any:
    if isinstance(loss, Mapping):
        return {name: part * factor for name, part in loss.items()}
    if isinstance(loss, tuple | list):
        return tuple(part * factor for part in loss)
    return loss * factor
