"""Kills training runs and starts them again: they must end as if nothing had happened, to the last bit.

    python -m tests.interruptions --runs 200 --seed 0 [--ranks 1,2] [--methods sassha,looksam_sgd]

A run trains a method of `tests.methods` on real digits through the Trainer with autoresume: shuffled data,
dropout, microbatches of unequal size, a checkpoint every five batches, mostly in mid-epoch. Half of the kills
(SIGKILL) come at a random time, the others in a random call of one of `PLACES`, since a random time seldom
falls into a checkpoint's write. On two ranks one of them is killed, and then the other as a launcher does it.
At the end the weights, buffers, optimizer state, counters and RNG states of every rank are compared with
those of an uninterrupted run.

What Composer 0.32 itself does when it is killed around a checkpoint, with plain SGD too:

- It writes the file under its final name, and moves the link that autoresume follows only when the file is
  whole. So the run continues from the checkpoint before, but only with save_overwrite=True: the part is in
  the way otherwise, and every start ends with FileExistsError. With a save_filename that has no {batch} the
  link points to the very file that is being written, and the run is lost.
- It removes the link before it makes the new one. A kill between the two leaves none, and the next start
  trains from the beginning, to the same end, without a word.
- save_num_checkpoints_to_keep does not remove what an earlier process has left.
"""

import argparse
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.core import Engine, Event
from composer.optim import LinearScheduler
from composer.utils import checkpoint, dist
from torch import nn

from tests.distributed.launch import finish, start, wait
from tests.helpers import PASS_EVENTS, assert_same, digits, digits_network, everything, trainer
from tests.methods import NAMED, Method, sgd

BASELINE = Method("sgd", sgd, list, passes=1)  # to tell whose fault it is
METHODS = {**NAMED, "sgd": BASELINE}

# Where a process can be told to die: in the n-th call of one of these.
PLACES: dict[str, tuple[Any, str]] = {
    "event": (Engine, "run_event"),  # any event of any pass, and those around them
    "estimate": (torch.autograd, "grad"),
    "write": (checkpoint, "_write_checkpoint_file"),  # which leaves a part of it
    "link": (os, "symlink"),  # the old one is gone
    "removal": (os, "remove"),  # of the old link, an old checkpoint, a file that the ranks wait for
}


@dataclass(frozen=True)
class Death:
    """When a process dies: so many seconds after its start, or in the n-th call of a place.

    `part` is the share of a checkpoint that gets written before.
    """

    rank: int = 0
    seconds: float | None = None
    place: str = ""
    call: int = 0
    part: float = 0.0


# The processes


def build(method: Method, folder: Path, **kwargs: Any) -> Trainer:
    """The Trainer of every run here: 23 batches, on one process nearly three epochs, on two nearly six."""
    model = digits_network()
    model.module.insert(3, nn.Dropout(0.2))
    settings = {
        "model": model,
        "dataset": digits(80),
        "device_train_microbatch_size": 4,
        "schedulers": LinearScheduler(),
        "max_duration": "23ba",
        "run_name": "interrupted",
        "autoresume": True,
        "save_folder": str(folder / "checkpoints"),
        "save_interval": "5ba",
        "save_overwrite": True,
        "save_num_checkpoints_to_keep": 1,
        "load_progress_bar": False,
    }
    return trainer(method.optimizer, method.algorithms(), **{**settings, **kwargs})


def train(method: str, folder: Path, death: Death | None, settings: dict[str, Any]) -> None:
    """What each process of a run does; leaves what the run has come to."""
    watch = Watch(folder, death if death is not None and death.rank == dist.get_global_rank() else Death())
    run = build(METHODS[method], folder, **settings)
    resumed_at = run.state.timestamp.batch.value
    if run.state.timestamp < run.state.max_duration:
        run.fit()
    for buffer in run.state.model.buffers():  # a checkpoint keeps rank 0's
        dist.broadcast(buffer, src=0)
    end = everything(run)
    if run.state.timestamp.batch == resumed_at:  # the Trainer puts the RNG states back when it trains
        del end["rng"]
    left = {"end": end, "calls": watch.calls, "resumed_at": resumed_at}
    (folder / f"end{dist.get_global_rank()}").write_bytes(pickle.dumps(left))
    run.close()


class Watch:
    """Counts this process's calls of the places, notes its events, and kills it where it has to die."""

    def __init__(self, folder: Path, death: Death) -> None:
        self.calls: Counter[str] = Counter()
        self.death = death
        self.notes = os.open(folder / f"event{dist.get_global_rank()}", os.O_WRONLY)
        for place, (owner, name) in PLACES.items():
            setattr(owner, name, self._watched(place, getattr(owner, name)))

    def _watched(self, place: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls[place] += 1
            if place == "event":
                os.pwrite(self.notes, Event(args[1]).value.ljust(30).encode(), 0)
            if (place, self.calls[place]) == (self.death.place, self.death.call):
                if place == "write":
                    function(*args)
                    os.truncate(args[1], int(self.death.part * os.path.getsize(args[1])))
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call


# Killing and comparing them


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run: its ends and its calls of the places, by rank, and its seconds."""

    ends: list[dict[str, Any]]
    seconds: float
    calls: list[Counter[str]]


def whole(method: str, ranks: int, folder: Path, **settings: Any) -> Whole:
    """Train without a kill."""
    begun = time.monotonic()
    assert finish(_start_run(method, ranks, folder, None, settings)), (folder / "log").read_text()
    seconds = time.monotonic() - begun
    left = [_left(folder, rank) for rank in range(ranks)]
    return Whole([each["end"] for each in left], seconds, [each["calls"] for each in left])


def interrupted(
    method: str, deaths: Sequence[Death], expected: Whole, folder: Path, **settings: Any
) -> tuple[list[str], int]:
    """Train, dying these deaths one after the other, and compare the end with the expected one.

    Returns:
        Where the deaths were died (see `COLUMNS`), and the batch that the last start continued from.

    Raises:
        AssertionError: the end is another one, or the run failed by itself.
    """
    places = []
    for death in [*deaths, None]:
        processes = _start_run(method, len(expected.ends), folder, death, settings)
        if death is not None and death.seconds is not None:
            wait(processes, death.seconds)
            assert not any(p.exitcode for p in processes), (folder / "log").read_text()
            processes[death.rank].kill()
        if finish(processes):
            break
        log = (folder / "log").read_text()
        assert death is not None and processes[death.rank].exitcode == -signal.SIGKILL, log
        places.append(_place(folder, death))
    for rank, end in enumerate(expected.ends):
        left = _left(folder, rank)
        assert_same({key: end[key] for key in left["end"]}, left["end"], f"rank {rank}")
    return places, left["resumed_at"]


def _start_run(
    method: str, ranks: int, folder: Path, death: Death | None, settings: dict[str, Any]
) -> list[BaseProcess]:
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        (folder / f"event{rank}").write_text("")
    return start(ranks, folder / "log", train, method, folder, death, settings)


def _left(folder: Path, rank: int) -> dict[str, Any]:
    return pickle.loads((folder / f"end{rank}").read_bytes())


def _place(folder: Path, death: Death) -> str:
    event = (folder / f"event{death.rank}").read_text().strip() or Event.INIT.value
    if death.place == "link":
        return "link"
    if not list(folder.glob("checkpoints/*.pt")):
        return "before"
    if Event(event) in (Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT):
        return "write"
    if Event(event) in (Event.INIT, Event.BEFORE_LOAD, Event.AFTER_LOAD, Event.FIT_START):
        return "start"
    return "pass" if Event(event) in PASS_EVENTS else "between"


# The script


def draw(rng: random.Random, run: Whole) -> Iterator[Death]:
    """One death or more."""
    while True:
        place = rng.choice(list(PLACES))
        ranks = [rank for rank, calls in enumerate(run.calls) if calls[place]]
        if rng.random() < 0.5 or not ranks:
            yield Death(rng.randrange(len(run.ends)), seconds=rng.uniform(0, run.seconds))
        else:
            rank = rng.choice(ranks)
            yield Death(rank, None, place, rng.randint(1, run.calls[rank][place]), rng.random())
        if rng.random() < 0.5:
            return


COLUMNS = {
    "before": "before the first checkpoint",
    "start": "at a later start",
    "pass": "in a pass",
    "write": "in a checkpoint's write",
    "link": "between two links",
    "between": "between the passes",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.interruptions")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", default="1,2", help="numbers of processes, such as 1,2")
    parser.add_argument("--methods", default=",".join(METHODS), help="names in tests.methods; default: all")
    asked = parser.parse_args()
    cells = [(method, int(ranks)) for method in asked.methods.split(",") for ranks in asked.ranks.split(",")]
    rng = random.Random(asked.seed)
    rng.shuffle(cells)
    table = {method: Counter[str]() for method, _ in cells}
    begun, hit, anew = time.monotonic(), 0, 0
    root = Path(tempfile.mkdtemp(prefix="interruptions-"))
    for number, (method, ranks) in enumerate(cells[: asked.runs]):
        folder = root / f"{method}-{ranks}"
        expected = whole(method, ranks, folder / "whole")
        for run in range(number, asked.runs, len(cells)):
            deaths = list(draw(rng, expected))
            try:
                places, resumed_at = interrupted(method, deaths, expected, folder / str(run))
            except AssertionError as difference:
                print(f"{method} on {ranks}, {deaths}: {difference}\n{folder / str(run)} is kept")
                return 1
            table[method].update(places)
            hit += bool(places)
            anew += bool(places) and resumed_at == 0
        shutil.rmtree(folder)
    for method, kills in sorted(table.items()):
        told = ", ".join(f"{kills[place]} {name}" for place, name in COLUMNS.items() if kills[place])
        print(f"{method:<20} {kills.total():>3} kills: {told}")
    total = sum(table.values(), Counter[str]())
    print("all: " + ", ".join(f"{total[place]} {name}" for place, name in COLUMNS.items()))
    print(f"{anew} of the last starts found no checkpoint, or no link to it, and trained from the beginning")
    print(f"{hit} runs interrupted {total.total()} times: all equal ({time.monotonic() - begun:.0f} s)")
    return 0


if __name__ == "__main__":
    from tests.interruptions import main as importable  # its functions are sent to processes by their names

    sys.exit(importable())
