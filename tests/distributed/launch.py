"""Start real processes over gloo; two of them run many checks in one launch, and the tests read the results.

Mark every test that starts several processes with `launches`: with `pytest -n 2 --dist loadgroup`, one worker
runs all of them, before anything else, so that two launches never share the cores.
"""

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.models import ComposerModel
from composer.utils import collect_env, dist, get_free_tcp_port
from torchmetrics import MetricCollection

launches = pytest.mark.xdist_group("launch")
_IMPORTED = frozenset(sys.modules)  # what a process had imported before this module

# The processes


@cache
def server() -> Any:
    """Start the process that ranks are forked from: it has imported everything and has no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.warm"])
    first = context.Process(target=_is_warm)
    with pytest.MonkeyPatch.context() as patch:
        # The server ignores this process's sys.path, and a module that it cannot import (Python 3.11).
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=os.pathsep)
        first.start()
    first.join()
    assert first.exitcode == 0, "every rank would import everything anew"
    return context


def _is_warm() -> None:
    assert "tests.distributed.warm" in _IMPORTED


def start(
    ranks: int, log: Path, work: Callable[..., None], *args: Any, nodes: int = 1, meet: bool = True
) -> list[BaseProcess]:
    """Start a process per rank that calls `work(*args)`.

    Args:
        ranks: their number; a single one gets the environment of a program without a launcher.
        log: where what they say on standard error goes.
        work: a function of a module.
        args: of it.
        nodes: among which the ranks are divided, as far as they can tell. Default: 1.
        meet: whether the ranks have met when the work begins, or are left to do it. Default: True.
    """
    port, local = get_free_tcp_port(), ranks // nodes
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": local, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    own = [{"RANK": rank, "LOCAL_RANK": rank % local, "NODE_RANK": rank // local} for rank in range(ranks)]
    environments = [{key: str(value) for key, value in (shared | each).items()} for each in own]
    processes = [
        server().Process(target=_rank, args=(log, environment, meet, work, args), daemon=True)
        for environment in (environments if ranks > 1 else [{}])
    ]
    for process in processes:
        process.start()
    return processes


def _rank(log: Path, environment: dict[str, str], meet: bool, work: Callable[..., None], args: Any) -> None:
    # Composer asks for them at every start and checkpoint, which takes longer than the training.
    collect_env.get_cpu_model = collect_env.get_composer_commit_hash = str
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), sys.stderr.fileno())
    os.environ.update(environment)
    if environment and meet:
        dist.initialize_dist("cpu")
    work(*args)


def wait(processes: Sequence[BaseProcess], seconds: float) -> None:
    """Wait until all have ended, or one has failed, or the time is over."""
    until = time.monotonic() + seconds
    while (alive := [p for p in processes if p.is_alive()]) and not any(p.exitcode for p in processes):
        if not connection.wait([p.sentinel for p in alive], max(0, until - time.monotonic())):
            return


def finish(processes: Sequence[BaseProcess], seconds: float = 540) -> bool:
    """Wait for the end of all, and end the others if one fails. Return whether all have ended well."""
    wait(processes, seconds)
    alive = [p for p in processes if p.is_alive()]
    for process in alive:
        process.terminate()
    for process in alive:
        process.join(3)
        process.kill()
        process.join()
    return not any(p.exitcode for p in processes)


# The checks


def selected(request: pytest.FixtureRequest) -> list[str]:
    """Return the `check` of every test of this module that `-k` and `-m` have left."""
    here = [item for item in request.session.items if item.path == request.path]
    calls = [item.callspec.params for item in here if hasattr(item, "callspec")]
    return list(dict.fromkeys(call["check"] for call in calls if "check" in call))


def launch(work: Callable[..., None], out: Path, *arguments: Any, seconds: float = 1200) -> str:
    """Run `work(out, *arguments)`, which leaves results in `out`, on two ranks; return their log's end."""
    finish(start(2, out / "log", work, out, *arguments), seconds)
    return (out / "log").read_text()[-4000:]


def run_checks(
    checks: Mapping[str, Callable[[], None]], out: Path, double: Callable[[str], bool] = lambda _: False
) -> None:
    """Run the checks in order and write a file for each; `double` says which are in float64."""
    for name, check in checks.items():
        torch.set_default_dtype(torch.float64 if double(name) else torch.float32)
        try:
            check()
            result = "passed"
        except Exception:
            result = traceback.format_exc()
        (out / f"{name}.rank{dist.get_global_rank()}").write_text(result)
        if result != "passed":
            break  # the other rank may be waiting in a collective that this one has left: end both


def assert_passed(check: str, out: Path, log: str, ranks: int = 2) -> None:
    """Fail if a check has failed on some rank, or was not reached."""
    for rank in range(ranks):
        file = out / f"{check}.rank{rank}"
        if not file.exists():
            pytest.fail(f"rank {rank} did not get there: {log}")
        assert file.read_text() == "passed"


def without_metrics(model: ComposerModel) -> ComposerModel:
    """Let a model train without metrics; gathering those of each batch takes longer than its passes."""
    model.train_metrics = MetricCollection([])
    return model
