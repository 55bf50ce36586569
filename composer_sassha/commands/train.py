"""Train one method of a recipe: `python -m composer_sassha train [RECIPE] [key=value ...]`."""

import argparse
import os
from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from composer_sassha.commands.command_line import CommandParser, recipe_and_overrides
from composer_sassha.recipes.files import bundled_recipes, find_recipe

_DEFAULT = "digits"
_EXAMPLES = """\
examples:
  python -m composer_sassha train                        the bundled digits recipe, with its own method
  python -m composer_sassha train digits method=sgd seed=1
  python -m composer_sassha train my.yaml optimizer.lr=0.1 algorithms.sassha.rho=0.3
  python -m composer_sassha train digits callbacks.sharpness_monitor.interval=5ep
  python -m composer_sassha train runs/digits/sassha/seed0/config.yaml save_folder=again
  composer -n 2 -m composer_sassha train digits          the same on two processes

The same command again continues a run that was stopped, and leaves a finished one alone.
"""


INTERRUPTED = "interrupted; the same command continues the run from its last checkpoint, if it has one"


def run(argv: Sequence[str]) -> int:
    """Run the command with these arguments and return its exit status."""
    recipe, overrides = recipe_and_overrides(_parser(argv).parse_args(argv).arguments, _DEFAULT)
    # Only now, as they import torch and Composer, which --help need not wait for.
    from composer_sassha.recipes.config import load_recipe
    from composer_sassha.recipes.results import summary
    from composer_sassha.recipes.run import train_recipe

    loaded = load_recipe(recipe, overrides)
    results = train_recipe(loaded)
    if int(os.environ.get("RANK", "0")) == 0:
        print(summary(loaded, results))
    return 0


def _parser(argv: Sequence[str]) -> CommandParser:
    recipes = {name: str(path) for name, path in bundled_recipes().items()}
    asks_help = {"-h", "--help"} & set(argv)
    recipe, _ = recipe_and_overrides([arg for arg in argv if not arg.startswith("-")], _DEFAULT)
    if asks_help and recipe not in recipes:
        recipes = {recipe: str(find_recipe(recipe))}
    lines = [f"  {name:<26} {_methods(path)}" for name, path in recipes.items()] if asks_help else []
    parser = CommandParser(
        prog="python -m composer_sassha train",
        usage="%(prog)s [RECIPE] [key=value ...]",
        description="Train one method of a recipe, and leave its metrics, curves and results in a folder.",
        epilog="\n".join(["recipes and their methods:", *lines, "", _EXAMPLES]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="RECIPE, key=value",
        help="a YAML file or the name of a bundled recipe (default: digits), then settings that win over its "
        "own; method=... selects a method",
    )
    return parser


def _methods(path: str) -> str:
    content = OmegaConf.load(path)
    return ", ".join(content.get("methods", {}) if isinstance(content, DictConfig) else {}) or "a single run"
