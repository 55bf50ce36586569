"""The method cards: every algorithm and rule has one, its snippet trains, its table names the arguments."""

import ast
import inspect
import re
from pathlib import Path

import composer.optim
import pytest
import torch

import composer_sassha
from composer_sassha.algorithms import FollowLR, Schedule
from tests.helpers import images, network, trainer

CARDS = {
    path.stem: path.read_text(encoding="utf-8")
    for path in Path(composer_sassha.__file__).with_name("algorithms").glob("*.md")
    if path.stem.islower()  # README and its like are about all of them
}
NO_CARD = (
    "SharpnessAwareOptimizer",
    "ClosureGradScaler",
    "FollowLR",
    "SASSHA",
    "LazyHessian",
    "ignore_own_entries",
    "SharpnessMonitor",  # a callback
)
DESCRIBED = {
    name.lower(): getattr(composer_sassha, name) for name in composer_sassha.__all__ if name not in NO_CARD
} | {"lazy_hessian": composer_sassha.LazyHessian}


def test_everything_has_a_card():
    assert set(CARDS) == set(DESCRIBED)


@pytest.mark.parametrize("name", CARDS)
def test_a_card_has_the_sections_of_all_cards(name):
    headings = re.findall(r"^## (.+)$", CARDS[name], re.MULTILINE)
    assert {"With other parts", "Use" if name == "schedule" else "Cost"} <= {*headings}
    assert "**" not in re.sub(r"```.*?```", "", CARDS[name], flags=re.DOTALL)


def snippets():
    for name, text in CARDS.items():
        for block in re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
            if "Trainer(" in block:
                yield pytest.param(block, id=name)


@pytest.mark.parametrize("block", [*snippets()])
def test_the_snippet_trains(block):
    model = network()

    def short_trainer(model, optimizers, algorithms, **settings):
        run = trainer(
            lambda _: optimizers, algorithms, model=model, dataset=images(), max_duration="2ba", **settings
        )
        run.fit()
        assert run.state.optimizers[0].steps_taken == 2
        run.close()

    names = {
        **{name: getattr(composer_sassha, name) for name in composer_sassha.__all__},
        **{name: getattr(composer.optim, name) for name in ("CosineAnnealingScheduler", "LinearScheduler")},
        "SGD": torch.optim.SGD,
        "Trainer": short_trainer,
        "model": model,
    }
    exec(re.sub(r",\s*\.\.\.\s*\)", ")", block), names)


@pytest.mark.parametrize("name", DESCRIBED)
def test_the_table_has_every_argument_with_its_default(name):
    table = CARDS[name].split("\n| argument |", 1)[1].split("\n\n", 1)[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    rows = {cells[0].strip("`"): cells for cells in rows}
    if name == "schedule":
        assert set(rows) <= {*inspect.signature(Schedule).parameters, *inspect.signature(FollowLR).parameters}
        return
    for argument, parameter in inspect.signature(DESCRIBED[name]).parameters.items():
        if argument != "params":
            default = rows[argument][3].strip("`")
            assert ast.literal_eval(default) == parameter.default, argument
