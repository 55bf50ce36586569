"""Log a run while it trains: metrics.jsonl, a console line per epoch and a progress bar."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from composer import Logger, State
from composer.core import Timestamp, TimeUnit
from composer.loggers import LoggerDestination
from composer.utils import dist
from tqdm import tqdm

from composer_sassha.recipes.errors import ConfigError
from composer_sassha.recipes.files import write_atomically
from composer_sassha.recipes.metrics import Metric, number
from composer_sassha.recipes.rank_zero import on_rank_zero

TRAIN_LOSS = "loss/train/total"
TIMES = ("sharpness/seconds", "sharpness/spectrum_seconds")  # logged by callbacks that measure
Values = dict[str, float | None]  # metrics by name; None stands for one that was not finite
_RESTORE = "restore it, or delete the run folder to start again"


class RunLog(LoggerDestination):
    """Collects the metrics of a run in `records` and appends each record to a JSON-lines file.

    A record holds what was logged in one step, by callbacks at the end of one epoch, or in one evaluation:

    - `batch`, `epoch`: the steps taken and the epochs completed;
    - `seconds`: the wall time of the step from the moment its data is there, without callbacks' measurements;
    - `processor_seconds`: the processor time of this process in the step, if no callback measured in it;
    - the metrics by name. A table is a list of rows.

    A checkpoint stores the number of records, so a resumed run drops later ones and repeats them. Only rank 0
    has records, writes and prints.

    Args:
        path: the JSON-lines file.
        heldout: the label of the evaluator.
        metrics: the metrics of the evaluator, the one that ranks first.
        progress_bar: show a progress bar if standard error is a terminal.
    """

    def __init__(
        self, path: Path, heldout: str, metrics: Sequence[Metric], progress_bar: bool = True
    ) -> None:
        self.records: list[dict[str, Any]] = []
        self._path = path
        self.heldout_label = heldout
        self.metrics = metrics
        self._pending: dict[str, Any] = {}
        self._measuring = 0.0  # seconds in which callbacks measured and Composer's clock was running
        self._just_measured = 0.0  # the same since this step began
        self._resumed_records = 0
        self._step_start = self._processor_start = 0.0
        self._progress_bar = progress_bar
        self._bar = tqdm(disable=True)

    # What Composer calls

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep metrics for the record of this moment."""
        # Composer logs its clock as metrics too; `batch` and `epoch` say the same.
        values = {name: float(value) for name, value in metrics.items() if not name.startswith("time/")}
        # JSON has no NaN and no infinity.
        self._pending |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._just_measured += sum(values.get(name, 0.0) for name in TIMES)

    def log_table(
        self, columns: list[str], rows: list[list[Any]], name: str = "Table", step: int | None = None
    ) -> None:
        """Keep the rows of a table for the record of this moment."""
        self._pending[name] = rows

    def state_dict(self) -> dict[str, Any]:
        """Return the number of records, and what a resumed run must know."""
        size = dist.get_world_size()
        return {"records": len(self.records), "world_size": size, "measuring": self._measuring}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the number of records at the checkpoint."""
        self._resumed_records = state["records"]
        self._measuring = state.get("measuring", 0.0)  # of an earlier version: none
        before, now = state["world_size"], dist.get_world_size()
        if before != now and dist.get_global_rank() == 0:
            print(f"begun on {before} processes, continued on {now}: it ends otherwise than on {before}")

    def after_load(self, state: State, logger: Logger) -> None:
        """Cut the file back to the records that it had at the checkpoint.

        Raises:
            ConfigError: the file is damaged.
        """
        if dist.get_global_rank() == 0:
            lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
            if len(lines) < self._resumed_records:
                raise ConfigError(
                    f"{self._path}: has {len(lines)} lines of the {self._resumed_records} at the checkpoint; "
                    f"{_RESTORE}"
                )
            lines = lines[: self._resumed_records]
            self.records = [self._parsed(position, line) for position, line in enumerate(lines, start=1)]
            write_atomically(self._path, "".join(line + "\n" for line in lines))

    def _parsed(self, position: int, line: str) -> dict[str, Any]:
        try:
            return json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{self._path}: line {position} is damaged; {_RESTORE}") from error

    def fit_start(self, state: State, logger: Logger) -> None:
        """Show the progress bar."""
        end, epoch = state.max_duration, state.dataloader_len
        steps = {TimeUnit.BATCH: 1, TimeUnit.EPOCH: epoch and epoch.value}.get(end.unit) if end else None
        shown = self._progress_bar and dist.get_global_rank() == 0
        self._bar = tqdm(
            desc="training",
            unit=" steps",
            total=end.value * steps if end and steps else None,
            initial=state.timestamp.batch.value,
            leave=False,
            disable=None if shown else True,  # None: shown on a terminal only
        )

    def batch_start(self, state: State, logger: Logger) -> None:
        """Start the clocks of a step."""
        self._measuring += self._just_measured  # Composer's clock counts it into the step that begins
        self._just_measured = 0.0
        self._step_start, self._processor_start = time.perf_counter(), time.process_time()

    def batch_end(self, state: State, logger: Logger) -> None:
        """Write the record of a step."""
        self._pending["seconds"] = time.perf_counter() - self._step_start - self._just_measured
        if not self._just_measured:
            self._pending["processor_seconds"] = time.process_time() - self._processor_start
        self._write(state)
        self._bar.update()

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Write what callbacks logged at the end of an epoch."""
        # Composer repeats the training metrics of the last step. New values are written at once: a checkpoint
        # may come next, or another step.
        steps = (record for record in reversed(self.records) if "seconds" in record)
        last: dict[str, Any] = next(steps, {})
        self._pending = {name: value for name, value in self._pending.items() if name not in last}
        if self._pending:
            self._write(state)

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """Write the record of an evaluation."""
        self._write(state)

    def eval_standalone_end(self, state: State, logger: Logger) -> None:
        """Write the record of an evaluation outside training."""
        self._write(state)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """Print the line of an epoch."""
        if dist.get_global_rank() == 0:
            tqdm.write(self._epoch_line(state))

    def close(self, state: State, logger: Logger) -> None:
        """Remove the progress bar."""
        self._bar.close()

    def _write(self, state: State) -> None:
        if dist.get_global_rank() == 0:
            clock = {"batch": state.timestamp.batch.value, "epoch": state.timestamp.epoch.value}
            self.records.append(clock | self._pending)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.records[-1]) + "\n")
        self._pending = {}

    def _epoch_line(self, state: State) -> str:
        epoch, end = state.timestamp.epoch.value, state.max_duration
        total = f"/{end.value}" if end is not None and end.unit == TimeUnit.EPOCH else ""
        losses = [number(r[TRAIN_LOSS]) for r in self.records if r["epoch"] == epoch - 1 and TRAIN_LOSS in r]
        line = f"epoch {epoch:>3}{total}  train loss {fmean(losses):.4f}"
        if self._is_evaluated(state.timestamp):
            _, values = self.heldout()[-1]
            for metric in reversed(self.metrics):
                line += f"  {self.heldout_label} {metric.text(number(values[metric.name]))}"
        return f"{line}  {self.seconds(state.timestamp):.1f} s"

    # Queries; the records are rank 0's

    def heldout(self) -> list[tuple[int, Values]]:
        """Return the evaluations so far, as (steps taken, metrics by name)."""
        return [(r["batch"], values) for r in self.records if (values := self._values(r)) is not None]

    def _values(self, record: dict[str, Any]) -> Values | None:
        """Return the metrics of an evaluation, or None if the record is not that of one."""
        keys = {metric.name: metric.logged(self.heldout_label) for metric in self.metrics}
        return {n: record[k] for n, k in keys.items()} if record.keys() >= {*keys.values()} else None

    @on_rank_zero
    def is_evaluated(self, now: Timestamp) -> bool:
        """Return on every rank whether the last evaluation saw the weights of this moment."""
        return self._is_evaluated(now)

    def _is_evaluated(self, now: Timestamp) -> bool:
        evaluations = self.heldout()
        return bool(evaluations) and evaluations[-1][0] == now.batch.value

    def seconds(self, now: Timestamp) -> float:
        """Return the time of the training, without evaluations and callbacks' measurements."""
        return now.total_wct.total_seconds() - self._measuring

    def seconds_per_step(self, clock: str = "seconds") -> float | None:
        """Return the time of a step: the median over blocks of 50 steps of the mean within the block.

        The first five steps, which warm up, do not count. A plain median would hide what a method does only
        now and then, such as a refresh of the Hessian; a plain mean would show the hiccups of the machine.

        Args:
            clock: `seconds`, or `processor_seconds`.

        Returns:
            The time, or None if no step has it, as in runs of an older version.
        """
        steps = [r[clock] for r in self.records if clock in r]
        steps = steps[5:] or steps
        if not steps:
            return None
        return median(fmean(steps[i : i + 50]) for i in range(0, max(1, len(steps) - 49), 50))
