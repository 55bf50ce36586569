"""Checks that real processes run: one launch goes through all of them, the tests read what came out."""

import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from composer.utils import dist


def launch(module: str, out: Path, *arguments: str, ranks: int = 2, timeout: float = 540) -> str:
    """Run a module of checks in so many processes, over gloo. Return what they wrote beside the results."""
    root = Path(__file__).parents[2]
    launcher = Path(sys.executable).with_name("composer")
    logs = ["--stdout", out / "stdout{rank}", "--stderr", out / "stderr{rank}"]
    finished = subprocess.run(
        [launcher, "-n", str(ranks), *logs, "-m", module, out, *arguments],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    written = [path.read_text()[-2000:] for path in out.glob("std*")]
    return "".join([finished.stdout[-2000:], finished.stderr[-2000:], *written])


def run_checks(
    checks: Mapping[str, Callable[[], None]], out: Path, double: Callable[[str], bool] = lambda _: False
) -> None:
    """Run the checks in order, and leave a file for each; `double` says which are in float64."""
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
    """Fail if a check has failed on some rank, or has not been reached."""
    for rank in range(ranks):
        file = out / f"{check}.rank{rank}"
        if not file.exists():
            pytest.fail(f"rank {rank} did not get there: {log}")
        assert file.read_text() == "passed"
