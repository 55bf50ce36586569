"""Run commands, several at once, with one line of progress; a failing one does not stop the others."""

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

_STOPPED = (2, 130, 143)  # statuses of the train command whose last line is the reason


@dataclass
class Job:
    """A command to run.

    Args:
        name: for messages.
        command: with its arguments. Its standard input ends when this process does; see `tethered`.
        log: file for its output if it crashes. Its folder is created if it is missing.
    """

    name: str
    command: Sequence[str]
    log: Path


def run_jobs(jobs: Sequence[Job], at_once: int, devices: Sequence[str] = ()) -> dict[str, str]:
    """Run all jobs and return the reasons of those that failed, by name.

    If an exception interrupts this, the commands that run get SIGTERM and are waited for.

    Args:
        jobs: commands, started in this order.
        at_once: number of jobs that may run at the same time.
        devices: values for CUDA_VISIBLE_DEVICES, assigned in turn; without any, it stays as it is.
    """
    waiting, failures = list(jobs), {}
    running: dict[int, _Running] = {}
    with tempfile.TemporaryDirectory() as folder, tqdm(total=len(jobs), unit="run", disable=None) as bar:
        try:
            while waiting or running:
                for place in sorted(set(range(at_once)) - running.keys())[: len(waiting)]:
                    device = devices[place % len(devices)] if devices else None
                    running[place] = _Running(waiting.pop(0), Path(folder, f"{place}.log"), device)
                for place, child in list(running.items()):
                    if child.process.poll() is None:
                        continue
                    del running[place]
                    name, failure = child.job.name, child.finish()
                    if failure is not None:
                        failures[name] = failure
                    bar.update()
                    done = len(jobs) - len(waiting) - len(running)
                    tqdm.write(
                        f"{done}/{len(jobs)} {name}: {child.headline if failure is None else 'failed'}"
                    )
                bar.set_postfix_str(", ".join(child.progress() for child in running.values()))
                time.sleep(0.2)
        finally:
            _stop([child.process for child in running.values()])
    return failures


class _Running:
    """A job whose process runs or has just ended."""

    def __init__(self, job: Job, output: Path, device: str | None) -> None:
        self.job, self.output = job, output
        with output.open("w") as file:
            # A session of its own, so that Ctrl-C reaches this process alone, which then stops its children.
            self.process = subprocess.Popen(
                job.command,
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device}),
            )

    def lines(self) -> list[str]:
        text = self.output.read_text(encoding="utf-8", errors="replace")
        return [line for line in text.splitlines() if line.strip()]

    def progress(self) -> str:
        """Return the progress, such as `sam seed 0 (epoch 3/30)`."""
        epochs = re.findall(r"^epoch +(\S+)", "\n".join(self.lines()), flags=re.MULTILINE)
        return f"{self.job.name} (epoch {epochs[-1]})" if epochs else self.job.name

    @property
    def headline(self) -> str:
        """Return the start of the train command's summary."""
        found = [line for line in self.lines() if re.search(r" seed \d+: ", line)]
        return found[-1].split(": ", 1)[1] if found else "finished"

    def finish(self) -> str | None:
        """Return why it failed, or None; keep the output of a crash."""
        self.process.stdin.close()  # type: ignore[union-attr]  # it is a pipe
        status = self.process.returncode
        if status == 0:
            self.job.log.unlink(missing_ok=True)  # of an earlier crash
            return None
        last = self.lines()[-1] if self.lines() else "no output"
        if status in _STOPPED:
            return last
        with suppress(OSError):  # such as a full disk, which may be the reason of the crash
            self.job.log.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.output, self.job.log)
            last += f" (all of its output: {self.job.log})"
        return last if status > 0 else f"killed by {signal.Signals(-status).name}; its last line: {last}"


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
    finally:  # a second Ctrl-C ends the waiting
        for process in processes:
            process.kill()  # no effect on processes that have ended
            if process.stdin is not None:
                process.stdin.close()


def visible_devices(environment: Mapping[str, str], count: int) -> list[str]:
    """Return the GPUs that jobs can use: the visible ones, or all `count`.

    Args:
        environment: environment variables.
        count: number of GPUs that PyTorch finds.

    >>> visible_devices({"CUDA_VISIBLE_DEVICES": "2,5"}, count=2), visible_devices({}, count=2)
    (['2', '5'], ['0', '1'])
    >>> visible_devices({}, count=0)
    []
    """
    named = environment.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(device) for device in range(count)]
