"""Measures sharpness while a Trainer trains."""

import contextlib
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from composer.core import Callback, DataSpec, Event, State, Time, ensure_data_spec
from composer.loggers import Logger
from composer.utils import MissingConditionalImportError, create_interval_scheduler

from composer_sassha.algorithms.given import samples_of
from composer_sassha.callbacks.batches import take
from composer_sassha.common import validate
from composer_sassha.common.batches import Samples, unwrapped
from composer_sassha.common.ranks import world
from composer_sassha.common.sharding import is_sharded
from composer_sassha.common.snapshot import Snapshot
from composer_sassha.sharpness.measures import Deadline, Measures, measure
from composer_sassha.sharpness.objective import Objective, Unfinished, objective_of, undisturbed
from composer_sassha.sharpness.spectral_density import Spectrum, spectrum


class SharpnessMonitor(Callback):
    """Measures the sharpness of the loss on fixed batches while any method trains, and leaves no trace.

    A run with the monitor is bit-identical to one without: weights, buffers, modes, gradients and random
    numbers are restored, also after an exception. The loss is the model's own,
    `model.loss(model(batch), batch)`, in the parameters' precision and at the weights w after the optimizer's
    step. The model is in evaluation mode: no dropout, and BatchNorm's running statistics (rank 0's on all
    ranks, as in an evaluation).

    Logs `sharpness/<name>` for every name that `measure` lists, and the time taken as `sharpness/seconds`. A
    name is absent if the time was over or a gradient was not finite. All sums are over all ranks, each of
    which has its own part of the loader. Samples that a `DistributedSampler` repeats, so that all ranks have
    equally many, count once. At the end of the chosen epochs, the table `sharpness/spectrum` has a row for
    each eigenvalue and its weight, and `sharpness/spectrum_seconds` is the time taken. The attribute
    `spectra` has each epoch's `Spectrum`.

    Args:
        interval: time between measurements, such as '1ep' or '500ba', > 0. The end of the training is
            measured too. Default: '1ep'.
        dataloader: a loader or `DataSpec` to measure on, which returns the same batches every time. Default:
            the Trainer's evaluation data.
        batches: the number of its first batches to take on each rank, when the training starts, >= 1.
            Default: 4.
        measures: the selection of measures, with their accuracy and cost. Default: `Measures()`.
        spectrum_epochs: the epochs after which to take the spectrum, each >= 1. Default: none.
        spectrum_steps: Lanczos steps for each probe, >= 1. Default: 80.
        spectrum_probes: random vectors for the spectrum, >= 1. Default: 4.
        batch_statistics: BatchNorm normalizes by each batch's statistics, as in training. Default: False.
        max_seconds: time after which no further gradient or Hessian product is begun, > 0. The spectrum has
            the same time again. Default: 60.

    Raises:
        TypeError, ValueError: an argument that is not allowed; at the training's start, sharded parameters
            (FSDP), parameters below float32, or no data.
        SettingError: an operation of the model has no second derivative.

    Example:
        >>> SharpnessMonitor(interval="100ba", measures=Measures(eigenvalues=1, m=()))
        SharpnessMonitor(interval='100ba', batches=4, max_seconds=60.0)
    """

    def __init__(
        self,
        interval: str = "1ep",
        dataloader: Iterable[Any] | DataSpec | None = None,
        batches: int = 4,
        measures: Measures = Measures(),  # noqa: B008  # frozen
        spectrum_epochs: Sequence[int] = (),
        spectrum_steps: int = 80,
        spectrum_probes: int = 4,
        batch_statistics: bool = False,
        max_seconds: float = 60.0,
    ) -> None:
        owner = "SharpnessMonitor"
        self.interval, self.dataloader = interval, dataloader
        self.batches = validate.integer(owner, "batches", batches, low=1)
        self.measures = measures
        self.spectrum_epochs = [validate.integer(owner, "spectrum_epochs", e, low=1) for e in spectrum_epochs]
        self.spectrum_steps = validate.integer(owner, "spectrum_steps", spectrum_steps, low=1)
        self.spectrum_probes = validate.integer(owner, "spectrum_probes", spectrum_probes, low=1)
        self.batch_statistics = validate.boolean(owner, "batch_statistics", batch_statistics)
        self.max_seconds = validate.number(owner, "max_seconds", max_seconds, low=1e-9)
        if not isinstance(self.measures, Measures):
            raise TypeError(f"{owner}: measures={measures!r} is not allowed; it must be a Measures")
        try:
            # At the ends of batches and epochs, so that the numbers join what is logged there.
            self._due = create_interval_scheduler(
                interval, checkpoint_events=False, final_events={Event.BATCH_END, Event.EPOCH_END}
            )
            if not Time.from_input(interval, "ep").value > 0:
                raise ValueError("never due")
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ValueError(
                f"{owner}: interval={interval!r} is not allowed; it must be a time such as '1ep' or '500ba'"
            ) from error
        self._forget()

    def __repr__(self) -> str:
        return (
            f"SharpnessMonitor(interval={self.interval!r}, batches={self.batches}, "
            f"max_seconds={self.max_seconds})"
        )

    def _forget(self) -> None:
        self.spectra: dict[int, Spectrum] = {}
        self._taken: list[tuple[Any, int]] = []
        self._cut = Samples()
        self._measured_at: int | None = None

    def init(self, state: State, logger: Logger) -> None:
        """Forget what belongs to the Trainer before this one."""
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: the batch of the last measurement."""
        return {"measured_at": self._measured_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the batch of the last measurement, so that none is repeated at the end of an epoch."""
        self._measured_at = state.get("measured_at")

    def fit_start(self, state: State, logger: Logger) -> None:
        """Refuse models that cannot be measured, and take the batches."""
        if state.fsdp_config is not None or state.tp_config is not None or is_sharded(state.model):
            raise ValueError(
                "SharpnessMonitor: sharded parameters (FSDP, TP) are not supported; leave it out, or train "
                "data-parallel"
            )
        if not self._taken:
            device = next(state.model.parameters()).device
            before = Snapshot(None, {device})
            try:
                data = self._data(state)
                self._taken, self._cut = take(data, self.batches, state.device), samples_of(data)
            finally:
                before.restore()  # iterating a loader draws a seed for its workers
        # Raises now, before the training, if it cannot be measured.
        objective = objective_of(state.model, self._taken, cut=self._cut)
        for m in self.measures.m:
            objective.groups(m)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Measure if a measurement is due."""
        self._measure_if_due(Event.BATCH_END, state, logger)

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Measure if a measurement is due, and take the spectrum."""
        self._measure_if_due(Event.EPOCH_END, state, logger)
        if state.timestamp.epoch.value in self.spectrum_epochs:
            start = time.monotonic()
            with self._objective(state) as objective:
                found = None
                with contextlib.suppress(Unfinished):
                    found = spectrum(objective, self.spectrum_steps, self.spectrum_probes, self.measures.seed)
            logger.log_metrics({"sharpness/spectrum_seconds": time.monotonic() - start})
            if found is None:
                return
            self.spectra[state.timestamp.epoch.value] = found
            rows = [list(row) for row in zip(found.eigenvalues.tolist(), found.weights.tolist(), strict=True)]
            for destination in logger.destinations:
                try:
                    destination.log_table(
                        ["eigenvalue", "weight"], rows, "sharpness/spectrum", state.timestamp.batch.value
                    )
                except MissingConditionalImportError:
                    warnings.warn(
                        f"SharpnessMonitor: {type(destination).__name__} needs pandas for tables and has not "
                        "logged the spectrum; it is in the monitor's spectra",
                        stacklevel=2,
                    )

    def _data(self, state: State) -> DataSpec:
        if self.dataloader is not None:
            return ensure_data_spec(self.dataloader)
        if not state.evaluators:
            raise ValueError(
                "SharpnessMonitor: the Trainer has no evaluation data to measure on; pass dataloader=..."
            )
        return state.evaluators[0].dataloader

    def _measure_if_due(self, event: Event, state: State, logger: Logger) -> None:
        batch = state.timestamp.batch.value
        # The last batch ends a batch, an epoch and the training: measure once.
        if not self._due(state, event) or batch == self._measured_at:
            return
        self._measured_at = batch
        start = time.monotonic()
        with self._objective(state) as objective:
            found = measure(objective, self.measures)
        found["seconds"] = time.monotonic() - start
        logger.log_metrics({f"sharpness/{name}": value for name, value in found.items()})

    @contextlib.contextmanager
    def _objective(self, state: State) -> Iterator[Objective]:
        """Yield the objective, with the deadline running from now."""
        model = unwrapped(state.model)
        deadline = Deadline(self.max_seconds, next(model.parameters()).device, world())
        with undisturbed(model, self.batch_statistics):
            # Each rank has BatchNorm statistics of its own; the measures must be of one function.
            for buffer in model.buffers():
                world().broadcast_(buffer)
            yield objective_of(model, self._taken, deadline, world(), self._cut)
