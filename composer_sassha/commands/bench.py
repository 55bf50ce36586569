"""Measure or predict the cost of a step of each method: `python -m composer_sassha bench [RECIPE] ...`.

Without `--plan`, every method of the recipe, its floor (the same passes with nothing around them) and plain
SGD and AdamW take turns in one process, step by step. The table, `bench.json` and `bench.png` have the time
of a step, its ratios to SGD's and to the floor's, the ratio of the update alone to AdamW's, and memory.

With `--plan`, the step time on several ranks is predicted from steps on one process and the collectives
between ranks. See `composer_sassha.benchmark.prediction`.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from composer_sassha.commands.command_line import (
    CommandParser,
    at_least_one,
    bandwidth,
    duration,
    image_shape,
    names,
    recipe_and_overrides,
)
from composer_sassha.recipes.errors import ConfigError

_EXAMPLES = """\
examples:
  python -m composer_sassha bench                          every method of the digits recipe
  python -m composer_sassha bench cifar10_resnet20 --images 3x32x32 data.batch_size=64 cpu_threads=1
  python -m composer_sassha bench digits --methods sgd,sassha sassha:algorithms.sassha.hessian_interval=5
  python -m composer_sassha bench --plan                   every method of the digits recipe on 8 ranks
  python -m composer_sassha bench --plan my.yaml --ranks 64 --link 100Gbit/s --latency 5us
  composer -n 2 -m composer_sassha bench --plan digits     on two processes, predicted and measured
"""
INTERRUPTED = "interrupted; nothing was written"
MEASURE = "measure"  # the --link that is measured


def run(argv: Sequence[str]) -> int:
    """Run the command with these arguments and return its exit status."""
    given = _parser().parse_intermixed_args(argv)
    lines = _predict(given) if given.plan else _measure(given)
    if int(os.environ.get("RANK", "0")) == 0:
        print("\n".join(lines))
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m composer_sassha bench",
        usage="%(prog)s [RECIPE] [key=value ...] [options]",
        description="Measure what a step of every method of a recipe costs, or predict it for several ranks.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="RECIPE, key=value",
        help="a YAML file or the name of a bundled recipe (default: digits), then settings that win over its "
        "own, in every method, or in one as METHOD:key=value",
    )
    parser.add_argument(
        "--methods", type=names, default=[], metavar="A,B", help="the methods to measure (default: all)"
    )
    parser.add_argument(
        "--steps",
        type=at_least_one,
        metavar="N",
        default=30,
        help="timed steps of each kind of each method (default: 30)",
    )
    parser.add_argument(
        "--images",
        type=image_shape,
        metavar="CxHxW",
        help="random images of this shape in place of the recipe's data, such as 3x32x32",
    )
    here = parser.add_argument_group("measuring")
    here.add_argument(
        "--device", metavar="D", choices=("cpu", "gpu"), help="cpu or gpu (default: gpu if there is one)"
    )
    here.add_argument("--out", metavar="DIR", help="folder of bench.json and bench.png (default: runs/bench)")
    plan = parser.add_argument_group("predicting")
    plan.add_argument("--plan", action="store_true", help="predict the step time on several ranks")
    plan.add_argument(
        "--ranks",
        type=at_least_one,
        metavar="N",
        help="processes that share a batch (default: 8, or as many as are started)",
    )
    plan.add_argument(
        "--link",
        type=_link,
        metavar="SPEED",
        help="speed of the slowest link between ranks (default: 10Gbit/s); 'measure' is the default on "
        "several processes",
    )
    plan.add_argument(
        "--latency", type=duration, metavar="TIME", help="latency of a message on that link (default: 20us)"
    )
    return parser


def _measure(given: argparse.Namespace) -> list[str]:
    """Measure, write the results and return the lines to print."""
    _refuse(given, ("ranks", "link", "latency"), "is for --plan; add it, or leave this out")
    if (here := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ConfigError(f"{here} processes are started, and one is measured; start one, or add --plan")
    recipes, out = _recipes(given), Path(given.out or "runs/bench").expanduser()
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out={out}: is a file; name a folder")
    from composer_sassha.benchmark.measurement import measure_methods
    from composer_sassha.benchmark.report import report_lines, write_report

    results = measure_methods(recipes, given.steps, given.device)
    write_report(results, out)
    return [*report_lines(results), f"written: {out / 'bench.json'}, {out / 'bench.png'}"]


def _predict(given: argparse.Namespace) -> list[str]:
    """Predict, and return the lines to print."""
    _refuse(given, ("device", "out"), "is not for --plan; leave one of the two out")
    here = int(os.environ.get("WORLD_SIZE", "1"))
    ranks = given.ranks or (here if here > 1 else 8)
    if here not in (1, ranks):
        raise ConfigError(f"--ranks={ranks}: {here} processes are started; leave it out, or start one alone")
    measured = given.link == MEASURE or (given.link is None and here > 1)
    if measured and here == 1:
        raise ConfigError("--link=measure: there is one process; start several with composer -n 2 -m ...")
    if measured and given.latency is not None:
        raise ConfigError("--latency: is measured with the link; set --link too, or neither")
    recipes = _recipes(given)
    from composer_sassha.benchmark.link import Link
    from composer_sassha.benchmark.plan import plan_lines

    link = None
    if not measured:
        link = Link(
            bandwidth("10Gbit/s") if given.link is None else given.link,
            duration("20us") if given.latency is None else given.latency,
        )
    return plan_lines(recipes, ranks, link, given.steps)


def _recipes(given: argparse.Namespace) -> Mapping[str, Any]:
    recipe, overrides = recipe_and_overrides(given.arguments, "digits")
    from composer_sassha.benchmark.selection import chosen_recipes

    return chosen_recipes(recipe, overrides, given.methods, given.images)


def _refuse(given: argparse.Namespace, options: Sequence[str], why: str) -> None:
    for option in options:
        if getattr(given, option) is not None:
            raise ConfigError(f"--{option}: {why}")


def _link(text: str) -> float | str:
    return MEASURE if text == MEASURE else bandwidth(text)
