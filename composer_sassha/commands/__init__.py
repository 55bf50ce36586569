"""The commands: `python -m composer_sassha COMMAND ...`, or `composer-sassha COMMAND ...`.

Nothing here imports torch before a command needs it, so that `--help` answers at once.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from composer_sassha import __version__
from composer_sassha.commands.command_line import OPTIONAL, CommandParser
from composer_sassha.recipes.errors import ConfigError, did_you_mean

# The module of each and its purpose. A module has `run(argv)`, which returns the exit status, and
# `INTERRUPTED`, the line that is printed after a signal.
COMMANDS = {
    "train": ("train", "train one method of a recipe"),
    "compare": ("compare", "train the methods of a recipe with several seeds, and report"),
    "inspect": ("inspect_runs", "measure the sharpness of finished runs"),
    "bench": ("bench", "measure what a step of each method costs"),
}
_SIGNALS = {129, 130, 143}  # the exit statuses after SIGHUP, SIGINT and SIGTERM


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the command and its arguments. Default: those of the process.

    Returns:
        The exit status: 0; 1 if runs of `compare` failed; 2 for a mistake, with one line on standard error
        and nothing written; 129, 130 and 143 after SIGHUP, SIGINT (Ctrl-C) and SIGTERM.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    first = int(os.environ.get("RANK", "0")) == 0
    name, interrupted = "composer_sassha", "interrupted"
    try:
        name = _named(argv)
        command = import_module(f"{__name__}.{COMMANDS[name][0]}")
        interrupted = command.INTERRUPTED
        return command.run(argv[1:])
    except ConfigError as error:
        message, status = str(error), 2
    except ModuleNotFoundError as error:
        if (package := (error.name or "").split(".")[0]) not in OPTIONAL:
            raise
        message, status = f"{name}: needs {package}; pip install 'composer_sassha[demo]'", 2
    except (KeyboardInterrupt, SystemExit) as stop:
        # Composer turns SIGINT and SIGTERM into SystemExit with these statuses.
        code = 130 if isinstance(stop, KeyboardInterrupt) else stop.code
        if code not in _SIGNALS:
            raise
        message, status = interrupted, int(code)
    if first:
        print(message, file=sys.stderr)
    return status


def _named(argv: Sequence[str]) -> str:
    """Return the command that the arguments name; `--help` and `--version` end here."""
    width = max(map(len, COMMANDS))
    parser = CommandParser(
        prog="python -m composer_sassha",
        usage="%(prog)s COMMAND [arguments]",
        description="Sharpness-aware and second-order training.",
        epilog="\n".join(
            [
                "commands:",
                *(f"  {name:<{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items()),
                "",
                "COMMAND --help shows a command's arguments.",
            ]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"composer_sassha {__version__}")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="one of the commands below")
    name = parser.parse_args(argv[:1]).command
    if name not in COMMANDS:
        given = "not given" if name is None else f"{name!r} is unknown{did_you_mean(name, COMMANDS)}"
        raise ConfigError(f"COMMAND: {given} (there are: {', '.join(COMMANDS)})")
    return name
