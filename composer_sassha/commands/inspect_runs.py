"""Measure finished runs: `python -m composer_sassha inspect RUN [RUN ...] [options] [data.key=value ...]`."""

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from composer_sassha.commands.command_line import CommandParser, above_zero, at_least_one, at_least_two
from composer_sassha.inspection.options import Options
from composer_sassha.recipes.errors import ConfigError

_EXAMPLES = """\
examples:
  python -m composer_sassha inspect runs/digits/*/seed*
  python -m composer_sassha inspect runs/digits/sgd/seed0 runs/digits/sam/seed0 --split train
  python -m composer_sassha inspect runs/cifar10-resnet20/*/seed* data.root=/data --samples 2048

Measures the last checkpoint of each run: the largest eigenvalues, the trace and the spectral density of the
Hessian, SAM's, ASAM's, average-case and m-sharpness, and the loss along directions and between runs. The
folder of the comparison gets sharpness.json, spectra.png, lines.png and planes.png, and its report.html a
section with them. Runs that are measured already are left alone.
"""


INTERRUPTED = "interrupted; the same command goes on with the runs that are left"


def run(argv: Sequence[str]) -> int:
    """Run the command with these arguments and return its exit status."""
    arguments = _parser().parse_intermixed_args(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("inspect: works in one process; run it with python -m, without a launcher")
    paths = [Path(a) for a in arguments.arguments if "=" not in a or Path(a).is_dir()]
    overrides = [a for a in arguments.arguments if "=" in a and not Path(a).is_dir()]
    if not paths:
        raise ConfigError("RUN: not given; name the folders of finished runs, such as runs/digits/*/seed*")
    settings = {name: getattr(arguments, name) for name in Options.__dataclass_fields__}
    # Imported here because torch and Composer would delay --help.
    from composer_sassha.comparison.grid import GridRun
    from composer_sassha.comparison.report import Report
    from composer_sassha.inspection.record import read_record
    from composer_sassha.inspection.runner import inspect_runs
    from composer_sassha.inspection.section import put_section, sharpness_section, sharpness_table

    folder, runs = inspect_runs(paths, overrides, Options(**settings))
    page, section = folder / "report.html", sharpness_section(folder)
    if page.exists():
        put_section(page, section)
    else:
        report = Report([GridRun(run.recipe, run.results) for run in runs], _command(argv))
        report.write(folder, [section])
    print(f"{sharpness_table(read_record(folder / 'sharpness.json')).markdown()}\n\nreport: {page}")
    return 0


def _command(argv: Sequence[str]) -> str:
    return shlex.join(["python", "-m", "composer_sassha", "inspect", *argv])


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m composer_sassha inspect",
        usage="%(prog)s RUN [RUN ...] [--split train] [--samples N] [options] [data.key=value ...]",
        description="Measure and draw how sharp the minima of finished runs are.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="RUN, data.key=value",
        help="folders of finished runs of one comparison, then settings of the data that differ here",
    )
    default = Options()
    parser.add_argument(
        "--split",
        choices=["heldout", "train"],
        default=default.split,
        help="the data: heldout (default), or train, augmented as in training",
    )
    for option, kind, metavar, what in (
        ("samples", at_least_one, "N", "number drawn from it, the same for all runs"),
        ("batch-size", at_least_one, "N", "samples in one pass"),
        ("rho", above_zero, "R", "radius of SAM's sharpness, m-sharpness and the average"),
        ("asam-rho", above_zero, "R", "radius of adaptive sharpness"),
        ("trace-samples", at_least_two, "N", "random vectors for the trace"),
        ("steps", at_least_one, "N", "Lanczos steps for each of the spectrum's probes"),
        ("probes", at_least_one, "N", "random vectors for the spectrum"),
        ("points", at_least_two, "N", "points on each line; half of it along a side of the plane"),
    ):
        value = getattr(default, option.replace("-", "_"))
        parser.add_argument(
            f"--{option}", type=kind, default=value, metavar=metavar, help=f"{what} ({value})"
        )
    return parser
