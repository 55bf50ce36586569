"""Compare the methods of a recipe: `python -m composer_sassha compare RECIPE [options] [key=value ...]`."""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from composer_sassha.commands.command_line import (
    CommandParser,
    at_least_one,
    names,
    recipe_and_overrides,
    seeds,
)
from composer_sassha.recipes.errors import ConfigError

if TYPE_CHECKING:
    from composer_sassha.comparison.grid import GridRun

_EXAMPLES = """\
examples:
  python -m composer_sassha compare digits                         every method with seeds 0, 1 and 2
  python -m composer_sassha compare digits --methods sgd,sam --seeds 0,1,2,3,4 --jobs 2
  python -m composer_sassha compare digits --table                 the table of the runs so far
  python -m composer_sassha compare my.yaml max_duration=5ep save_folder=short

Each run is a call of train. Finished runs are left alone, and stopped ones are continued.
<save_folder>/<recipe name> gets report.html, table.md, table.csv, curves.png and frontier.png.
"""


INTERRUPTED = "interrupted; the same command goes on, and --table shows what is finished"


def run(argv: Sequence[str]) -> int:
    """Run the command with these arguments and return its exit status."""
    arguments, command = _parser().parse_intermixed_args(argv), _command(argv)
    recipe, overrides = recipe_and_overrides(arguments.arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("compare: starts processes of its own; run it with python -m, without a launcher")
    # Imported here because torch and Composer would delay --help.
    from composer_sassha.comparison.grid import load_grid, look, report_folder
    from composer_sassha.comparison.report import Report
    from composer_sassha.inspection.section import sharpness_section
    from composer_sassha.recipes.results import read_results

    grid = load_grid(recipe, arguments.methods, arguments.seeds, overrides)
    runs = look(grid)
    report = Report(runs, command)
    if arguments.table:
        print(f"{report.results_text()}\n{report.settings_text()}", end="")
        return 0
    print(report.settings_text(), flush=True)
    left = [run for run in runs if run.results is None]
    failures = _train(left, recipe, overrides, arguments.jobs) if left else {}
    for run in left:
        run.results = read_results(run.recipe.folder / "results.json")
    report = Report(runs, command)
    if report.finished:
        folder = report_folder(grid)
        report.write(folder, [sharpness_section(folder)])  # of runs that were inspected
        print(f"\n{report.results_text()}\nreport: {folder / 'report.html'}")
    for name, reason in failures.items():
        print(f"{name} failed: {reason}", file=sys.stderr)
    return 1 if failures else 0


def _train(runs: Sequence["GridRun"], recipe: str, overrides: Sequence[str], at_once: int) -> dict[str, str]:
    import torch

    from composer_sassha.comparison.jobs import Job, run_jobs, visible_devices

    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # nohup ignores it
        signal.signal(signal.SIGHUP, lambda number, frame: sys.exit(128 + number))
    tethered = [sys.executable, "-m", "composer_sassha.comparison.tethered"]  # ends with this process
    train = [*tethered, "composer_sassha", "train", recipe, *overrides]
    jobs = [
        Job(
            str(run),
            [*train, f"method={run.recipe.method}", f"seed={run.recipe.seed}"],
            run.recipe.folder.with_suffix(".log"),
        )
        for run in runs
    ]
    return run_jobs(jobs, at_once, visible_devices(os.environ, torch.cuda.device_count()))


def _command(argv: Sequence[str]) -> str:
    return shlex.join(["python", "-m", "composer_sassha", "compare", *argv])


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m composer_sassha compare",
        usage="%(prog)s RECIPE [--methods A,B] [--seeds 0,1] [--jobs N] [--table] [key=value ...]",
        description="Train the methods of a recipe with several seeds, and report means, tests and costs.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="RECIPE, key=value",
        help="a YAML file or the name of a bundled recipe, then settings that win over its own",
    )
    parser.add_argument("--methods", type=names, default=[], metavar="A,B", help="all by default")
    parser.add_argument("--seeds", type=seeds, default=[0, 1, 2], metavar="0,1", help="0,1,2 by default")
    parser.add_argument("--jobs", type=at_least_one, default=1, metavar="N", help="runs at the same time (1)")
    parser.add_argument(
        "--table", action="store_true", help="print the table of the runs so far; run and write nothing"
    )
    return parser
