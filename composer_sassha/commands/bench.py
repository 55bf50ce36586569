"""What a step of each method costs, here or elsewhere: `python -m composer_sassha bench [RECIPE] ...`.

Here: every method of the recipe, its floor (the same passes with nothing around them) and plain SGD and AdamW
take turns in one process, step by step. The table has the time of a step, its ratio to SGD's and to the
floor's, the time of the update alone beside AdamW's, and memory; `bench.json` and `bench.png` have the same.
See `composer_sassha.benchmark`.

With `--plan`: the step time on several ranks, from steps on one process and the collectives between them. See
`composer_sassha.benchmark.plan`.
"""

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from composer_sassha.commands.command_line import CommandParser, recipe_and_overrides
from composer_sassha.recipes.errors import ConfigError

_EXAMPLES = """\
examples:
  python -m composer_sassha bench                          every method of the digits recipe
  python -m composer_sassha bench cifar10_resnet20 --images 3x32x32 data.batch_size=64 cpu_threads=1
  python -m composer_sassha bench digits --methods sgd,sassha sassha:algorithms.sassha.hessian_interval=5
  python -m composer_sassha bench --plan                   every method of the digits recipe on 8 ranks
  python -m composer_sassha bench --plan my.yaml --ranks 64 --link 100Gbit/s --latency 5us
  composer -n 2 -m composer_sassha bench --plan digits     on two processes: predicted, and measured
"""

_SPEEDS = {
    f"{prefix}{unit}/s": scale * 1000**power
    for unit, scale in (("bit", 1 / 8), ("B", 1))
    for power, prefix in enumerate(["", "k", "M", "G", "T"])
}
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


INTERRUPTED = "interrupted; nothing was written"


def run(argv: Sequence[str]) -> int:
    """Run the command with these arguments and return its exit status."""
    given = _parser().parse_intermixed_args(argv)
    lines = _planned(given) if given.plan else _measured(given)
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
        "own, in every method, or in one: METHOD:key=value",
    )
    parser.add_argument("--methods", metavar="A,B", help="the methods to measure (default: all)")
    parser.add_argument(
        "--steps", metavar="N", default="30", help="timed steps of each kind of each method (default: 30)"
    )
    parser.add_argument(
        "--images",
        metavar="CxHxW",
        help="random images of this shape in place of the recipe's data, such as 3x32x32",
    )
    here = parser.add_argument_group("measuring")
    here.add_argument(
        "--device", metavar="D", choices=("cpu", "gpu"), help="cpu or gpu (default: gpu if there is one)"
    )
    here.add_argument("--out", metavar="DIR", help="where bench.json and bench.png go (default: runs/bench)")
    plan = parser.add_argument_group("predicting")
    plan.add_argument("--plan", action="store_true", help="predict the step time on several ranks")
    plan.add_argument(
        "--ranks", metavar="N", help="processes that share a batch (default: 8, or as many as are started)"
    )
    plan.add_argument(
        "--link",
        metavar="SPEED",
        help="of the slowest link between ranks, such as 10Gbit/s, the default; 'measure', the default on "
        "several processes",
    )
    plan.add_argument("--latency", metavar="TIME", help="of a message on that link (default: 20us)")
    return parser


def _measured(given: argparse.Namespace) -> list[str]:
    """Measure, write what is found, and return the lines to print."""
    _refuse(given, ("ranks", "link", "latency"), "is for --plan; add it, or leave this out")
    if (here := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ConfigError(f"{here} processes are started, and one is measured; start one, or add --plan")
    steps, recipes = _count("--steps", given.steps), _recipes(given)
    out = Path(given.out or "runs/bench").expanduser()
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out={out}: is a file; name a folder")
    from composer_sassha.benchmark import measure, report

    results = measure.measure(recipes, steps, given.device)
    report.write(results, out)
    return [*report.lines(results), f"written: {out / 'bench.json'}, {out / 'bench.png'}"]


def _planned(given: argparse.Namespace) -> list[str]:
    """Predict, and return the lines to print."""
    _refuse(given, ("device", "out"), "is not for --plan; leave one of the two out")
    here = int(os.environ.get("WORLD_SIZE", "1"))
    ranks = _count("--ranks", given.ranks or str(here if here > 1 else 8))
    if here not in (1, ranks):
        raise ConfigError(f"--ranks={ranks}: {here} processes are started; leave it out, or start one alone")
    link = _link(given.link, given.latency, several=here > 1)
    steps, recipes = _count("--steps", given.steps), _recipes(given)
    from composer_sassha.benchmark import plan

    return plan.plan(recipes, ranks, link and plan.Link(*link), steps)


def _recipes(given: argparse.Namespace) -> Mapping[str, Any]:
    recipe, overrides = recipe_and_overrides(given.arguments, "digits")
    images = None if given.images is None else _shape(given.images)
    from composer_sassha.benchmark.selection import chosen_recipes

    methods = given.methods.split(",") if given.methods is not None else []
    return chosen_recipes(recipe, overrides, methods, images)


def _refuse(given: argparse.Namespace, options: Sequence[str], why: str) -> None:
    for option in options:
        if getattr(given, option) is not None:
            raise ConfigError(f"--{option}={getattr(given, option)}: {why}")


def _count(option: str, text: str) -> int:
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise ConfigError(f"{option}={text}: must be a whole number, at least 1")
    return int(text)


def _shape(text: str) -> tuple[int, int, int]:
    """The channels, height and width of images.

    >>> _shape("3x32x32")
    (3, 32, 32)
    """
    sizes = [int(size) for size in text.split("x") if re.fullmatch(r"[1-9]\d*", size)]
    if len(sizes) != 3 or text.count("x") != 2:
        raise ConfigError(f"--images={text}: must be channels x height x width, such as 3x32x32")
    return sizes[0], sizes[1], sizes[2]


def _link(speed: str | None, latency: str | None, several: bool) -> tuple[float, float] | None:
    """The bandwidth and the latency of a link; None: it is to be measured."""
    if speed == "measure" and not several:
        raise ConfigError("--link=measure: there is one process; start several with composer -n 2 -m ...")
    if speed == "measure" or (speed is None and several):
        if latency is not None:
            raise ConfigError(
                f"--latency={latency}: it is measured with the link; set --link too, or neither"
            )
        return None
    bandwidth = _quantity("--link", speed or "10Gbit/s", _SPEEDS)
    if bandwidth == 0:
        raise ConfigError(f"--link={speed}: must be above 0")
    return bandwidth, _quantity("--latency", latency or "20us", _TIMES)


def _quantity(option: str, text: str, units: Mapping[str, float]) -> float:
    """An option's number and unit, in the basic unit.

    >>> _quantity("--link", "10Gbit/s", _SPEEDS)
    1250000000.0
    """
    number, unit = re.fullmatch(r"(\d*\.?\d*)\s*(.*)", text).groups()  # type: ignore[union-attr]  # all match
    if not re.search(r"\d", number) or unit not in units:
        raise ConfigError(f"{option}={text}: must be a number and a unit ({', '.join(units)})")
    return float(number) * units[unit]
