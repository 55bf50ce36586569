"""The README's Python runs and does what it says; its commands are run by .ci/run."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from composer import Trainer
from composer.core import Event
from composer.loggers import InMemoryLogger
from torch.utils.data import DataLoader, TensorDataset

from composer_sassha import SASSHA, Sassha
from composer_sassha.recipes.files import bundled_recipes
from tests.commands import compare
from tests.helpers import Spy, assert_same, copied, images, network, trainer

ROOT = Path(__file__).parents[1]
README = ROOT.joinpath("README.md").read_text(encoding="utf-8")
SCRIPT, LOOP, MONITOR = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_the_script_trains():
    names = {
        "Trainer": lambda **settings: Trainer(**settings, device="cpu", progress_bar=False),
        "model": network(),
        "train_dataloader": DataLoader(images(), batch_size=10),
    }
    exec(SCRIPT, names)
    assert names["trainer"].state.optimizers[0].steps_taken == 8
    names["trainer"].close()


def test_the_plain_loop_is_short_and_takes_the_trainers_steps_to_the_last_bit(float64):
    assert len([line for line in LOOP.splitlines() if line and "import" not in line]) <= 15
    batches, rng = [], []

    def look(event, state, passes):
        if event == Event.BATCH_START:
            batches.append(copied(state.batch))
            rng.append(torch.get_rng_state())

    x, y = images(120).tensors
    run = trainer(
        lambda params: SASSHA(params, lr=0.15, weight_decay=3e-3),
        [Sassha(rho=0.2)],
        model=network().double(),
        dataset=TensorDataset(x.double(), y),
        max_duration="1ep",  # a new epoch draws from the RNG
        callbacks=[Spy(look)],
    )
    run.fit()
    assert len(batches) == 12
    model = network().double().module
    torch.set_rng_state(rng[0])
    exec(LOOP, {"model": model, "batches": batches})
    assert_same(copied(model.state_dict()), copied(run.state.model.module.state_dict()))
    run.close()


def test_the_monitor_measures():
    log = InMemoryLogger()
    names = {
        "Trainer": lambda **settings: Trainer(**settings, device="cpu", progress_bar=False, loggers=log),
        "model": network(),
        "train_dataloader": DataLoader(images(), batch_size=10),
        "eval_dataloader": DataLoader(images(), batch_size=10),
        "Sassha": Sassha,
        "SASSHA": SASSHA,
    }
    exec(MONITOR, names)
    assert len(log.data["sharpness/lambda_max"]) == 2
    names["trainer"].close()


def test_every_fault_has_its_test():
    table = ROOT.joinpath("composer_sassha/FAULTS.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| ")][1:]
    code = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/*.py"))
    tests = [name for row in rows for name in re.findall(r"`(\w+)`", row[3])]
    assert len(tests) >= len(rows) and [name for name in tests if f"def {name}(" not in code] == []


def test_every_recipe_is_named():
    names = set(re.findall(r"`(\w+)`", README[README.index("## Recipes") :]))
    recipes = {re.sub(r"noise\d\d$", "noise20", name) for name in bundled_recipes()}  # the first of a series
    assert recipes <= names


@pytest.mark.parametrize(
    "command",
    re.findall(r"^python -m composer_sassha compare (.+)$", README.replace("\\\n", ""), re.MULTILINE),
)
def test_comparisons_can_be_run(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert compare([*shlex.split(command), "--table"]) == 0
    assert "| method" in capsys.readouterr().out


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", README))
def test_links_lead_somewhere(link):
    assert ROOT.joinpath(link).exists()
