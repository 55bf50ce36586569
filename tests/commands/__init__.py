"""The commands as functions: each takes its arguments and returns the exit status."""

from collections.abc import Sequence

from composer_sassha.commands import main


def train(arguments: Sequence[str]) -> int:
    return main(["train", *arguments])


def compare(arguments: Sequence[str]) -> int:
    return main(["compare", *arguments])


def inspect(arguments: Sequence[str]) -> int:
    return main(["inspect", *arguments])


def bench(arguments: Sequence[str]) -> int:
    return main(["bench", *arguments])
