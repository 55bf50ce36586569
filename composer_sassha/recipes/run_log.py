"""What a run writes down while it trains: metrics.jsonl, a console line per epoch, and the curves."""

import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from composer import Logger, State
from composer.core import Timestamp, TimeUnit
from composer.loggers import LoggerDestination
from composer.utils import dist
from tqdm import tqdm

from composer_sassha.recipes.errors import ConfigError
from composer_sassha.recipes.metrics import Metric

TRAIN_LOSS = "loss/train/total"
TIMES = ("sharpness/seconds", "sharpness/spectrum_seconds")  # what callbacks say that they took
Values = dict[str, float | None]  # metrics by name; None stands for one that was not finite


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, finds the old content or the new, never a part."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


class RunLog(LoggerDestination):
    """Collects the metrics of a run in `records` and appends each record to a JSON-lines file.

    A record holds what was logged in one step, by callbacks at the end of one epoch, or in one evaluation.
    `batch` steps had been taken then, and `epoch` epochs completed; `seconds` is the time of the step from
    the moment its data is there, without what a callback measured, and `processor_seconds` what this process
    had of a processor in it, where no callback measured. A table is a list of rows. A checkpoint remembers
    how many records there were, so a resumed run drops what came later and repeats it. Only rank 0 has
    records, writes and prints.

    Args:
        path: the JSON-lines file.
        heldout: the label of the evaluator.
        metrics: that it computes, the one that ranks first.
        progress_bar: show one where standard error is a terminal.
    """

    def __init__(
        self, path: Path, heldout: str, metrics: Sequence[Metric], progress_bar: bool = True
    ) -> None:
        self.records: list[dict[str, Any]] = []
        self._path = path
        self.heldout_label = heldout
        self.metrics = metrics
        self._pending: dict[str, Any] = {}
        self._measuring = 0.0  # seconds in which callbacks measured, and which Composer's clock has counted
        self._just_measured = 0.0  # since this step began
        self._resumed_records = 0
        self._step_start = self._processor_start = 0.0
        self._progress_bar = progress_bar
        self._bar = tqdm(disable=True)

    # What Composer calls

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        # Composer logs its clock as metrics too; `batch` and `epoch` say the same.
        values = {name: float(value) for name, value in metrics.items() if not name.startswith("time/")}
        # JSON has no NaN and no infinity.
        self._pending |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._just_measured += sum(values.get(name, 0.0) for name in TIMES)

    def log_table(
        self, columns: list[str], rows: list[list[Any]], name: str = "Table", step: int | None = None
    ) -> None:
        self._pending[name] = rows

    def state_dict(self) -> dict[str, Any]:
        size = dist.get_world_size()
        return {"records": len(self.records), "world_size": size, "measuring": self._measuring}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._resumed_records = state["records"]
        self._measuring = state.get("measuring", 0.0)  # of an earlier version: none
        before, now = state["world_size"], dist.get_world_size()
        if before != now and dist.get_global_rank() == 0:
            print(f"begun on {before} processes, continued on {now}: it ends otherwise than on {before}")

    def after_load(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
            if len(lines) < self._resumed_records:
                raise ConfigError(
                    f"{self._path}: has {len(lines)} lines of the {self._resumed_records} at the checkpoint; "
                    "restore it, or delete the run folder to start again"
                )
            lines = lines[: self._resumed_records]
            self.records = [self._parsed(number, line) for number, line in enumerate(lines, start=1)]
            write_atomically(self._path, "".join(line + "\n" for line in lines))

    def _parsed(self, number: int, line: str) -> dict[str, Any]:
        try:
            return json.loads(line)
        except ValueError as error:
            raise ConfigError(
                f"{self._path}: line {number} is damaged; restore it, or delete the run folder to start again"
            ) from error

    def fit_start(self, state: State, logger: Logger) -> None:
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
        self._measuring += self._just_measured  # Composer's clock counts it into the step that begins
        self._just_measured = 0.0
        self._step_start, self._processor_start = time.perf_counter(), time.process_time()

    def batch_end(self, state: State, logger: Logger) -> None:
        self._pending["seconds"] = time.perf_counter() - self._step_start - self._just_measured
        if not self._just_measured:
            self._pending["processor_seconds"] = time.process_time() - self._processor_start
        self._write(state)
        self._bar.update()

    def epoch_end(self, state: State, logger: Logger) -> None:
        # Composer repeats the training metrics of the last step. What is new is written at once: the next
        # thing may be a checkpoint, or another step.
        steps = (record for record in reversed(self.records) if "seconds" in record)
        last: dict[str, Any] = next(steps, {})
        self._pending = {name: value for name, value in self._pending.items() if name not in last}
        if self._pending:
            self._write(state)

    def eval_after_all(self, state: State, logger: Logger) -> None:
        self._write(state)

    def eval_standalone_end(self, state: State, logger: Logger) -> None:
        self._write(state)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            tqdm.write(self._epoch_line(state))

    def close(self, state: State, logger: Logger) -> None:
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
        if self.evaluated_at(state.timestamp):
            _, values = self.heldout()[-1]
            for metric in reversed(self.metrics):
                line += f"  {self.heldout_label} {metric.text(number(values[metric.name]))}"
        return f"{line}  {self.seconds(state.timestamp):.1f} s"

    # What the records say

    def heldout(self) -> list[tuple[int, Values]]:
        """The evaluations so far, as (steps taken, metrics by name)."""
        return [(r["batch"], values) for r in self.records if (values := self._values(r)) is not None]

    def _values(self, record: dict[str, Any]) -> Values | None:
        """What an evaluation measured, or None where the record is not that of one."""
        keys = {metric.name: metric.logged(self.heldout_label) for metric in self.metrics}
        return {n: record[k] for n, k in keys.items()} if record.keys() >= {*keys.values()} else None

    def evaluated_at(self, now: Timestamp) -> bool:
        """Whether the last evaluation saw the weights of this moment."""
        evaluations = self.heldout()
        return bool(evaluations) and evaluations[-1][0] == now.batch.value

    def seconds(self, now: Timestamp) -> float:
        """The time of the training, without evaluations and what callbacks measured."""
        return now.total_wct.total_seconds() - self._measuring

    def seconds_per_step(self, clock: str = "seconds") -> float | None:
        """The time of a step: the median over blocks of 50 steps of the mean within the block.

        The first five steps, which warm up, do not count. A plain median would hide what a method does only
        now and then, such as a refresh of the Hessian; a plain mean would show the hiccups of the machine.

        Args:
            clock: `seconds`, or `processor_seconds`.

        Returns:
            It, or None where no step has it: an older version has trained them.
        """
        steps = [r[clock] for r in self.records if clock in r]
        steps = steps[5:] or steps
        if not steps:
            return None
        return median(fmean(steps[i : i + 50]) for i in range(0, max(1, len(steps) - 49), 50))

    def plot(self, path: Path, steps_per_epoch: int) -> None:
        """Draw the losses and the first of the held-out metrics over the epochs."""
        from matplotlib.figure import Figure  # optional: not everyone needs the curves

        train = [(r["batch"], number(r[TRAIN_LOSS])) for r in self.records if TRAIN_LOSS in r]
        first, loss = self.metrics[0], self.metrics[-1]
        epochs = [batch / steps_per_epoch for batch, _ in self.heldout()]
        measured = {
            m: [m.scale * number(values[m.name]) for _, values in self.heldout()] for m in (first, loss)
        }
        figure = Figure(figsize=(9, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        # Blue and orange of Okabe and Ito's palette, and different line styles, for every kind of eyes.
        blue, orange = {"color": "#0072B2", "linewidth": 0.8}, {"color": "#D55E00", "markersize": 3}
        left.plot(
            [batch / steps_per_epoch for batch, _ in train], [y for _, y in train], label="training", **blue
        )
        left.plot(epochs, measured[loss], "o--", label=self.heldout_label, **orange)
        left.set(xlabel="epoch", ylabel="loss", yscale="log", title="Loss")
        left.legend()
        right.plot(epochs, measured[first], "o--", **orange)
        title = f"{first.name.capitalize()} on the {self.heldout_label} data"
        right.set(xlabel="epoch", ylabel=first.label, title=title)
        for axes in (left, right):
            axes.grid(alpha=0.3)
        figure.savefig(path, dpi=150)


def step_clock(results: Iterable[Mapping[str, Any]]) -> str:
    """By which key of results.json the time of a step compares between these runs.

    That is the processor's time where all are single processes on a CPU, as other programs do not lengthen
    it, and the time on the clock otherwise.

    >>> run = {"device": "cpu", "world_size": 1, "seconds_per_step": 0.2, "processor_seconds_per_step": 0.1}
    >>> step_clock([run]), step_clock([run, run | {"world_size": 2}])
    ('processor_seconds_per_step', 'seconds_per_step')
    """
    alone = all(
        (run["device"], run["world_size"]) == ("cpu", 1) and run.get("processor_seconds_per_step") is not None
        for run in results
    )
    return "processor_seconds_per_step" if alone else "seconds_per_step"


def number(value: float | None) -> float:
    """A recorded value; None stands for one that was not finite."""
    return math.nan if value is None else value
