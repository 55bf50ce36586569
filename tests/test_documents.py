"""The documents: their Python runs, their links lead somewhere, their numbers are those of the recipes.

The README's bash blocks are run by .ci/run.
"""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
from composer import Trainer
from composer.core import Event
from composer.loggers import InMemoryLogger
from torch.utils.data import DataLoader, TensorDataset

import composer_sassha
from composer_sassha import SASSHA, Sassha, SharpnessAwareOptimizer
from composer_sassha.perturbations import SAMPerturbation
from composer_sassha.recipes.config import load_recipe
from composer_sassha.recipes.files import bundled_recipes
from tests.commands import compare
from tests.helpers import Spy, assert_same, copied, images, network, trainer

ROOT = Path(__file__).parents[1]
PACKAGED = sorted([*ROOT.glob("composer_sassha/**/*.md"), *ROOT.glob("yamls/*.md")])
TEXTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / ".github/CONTRIBUTING.md", *PACKAGED]
}
README = TEXTS["README.md"]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


SCRIPT, MONITOR = blocks(README, "python")
LOOP, METHOD = blocks(TEXTS["composer_sassha/optim/README.md"], "python")
(LONG_MONITOR,) = blocks(TEXTS["composer_sassha/sharpness/README.md"], "python")


def given(**more):
    """What the snippets take as given."""
    return {
        "Trainer": lambda **settings: Trainer(**settings, **more, device="cpu", progress_bar=False),
        "model": network(),
        "train_dataloader": DataLoader(images(), batch_size=10),
        "eval_dataloader": DataLoader(images(), batch_size=10),
        "Sassha": Sassha,
        "SASSHA": SASSHA,
    }


def test_the_readme_fits_ten_minutes():
    assert len(README.splitlines()) <= 180


def test_the_script_trains():
    names = given()
    exec(SCRIPT, names)
    assert names["trainer"].state.optimizers[0].steps_taken == 8
    names["trainer"].close()


def test_the_plain_loop_takes_the_trainers_steps_bit_for_bit(float64):
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


@pytest.mark.parametrize("snippet", [MONITOR, LONG_MONITOR], ids=["readme", "sharpness"])
def test_the_monitor_measures(snippet):
    log = InMemoryLogger()
    names = given(loggers=log)
    exec(snippet, names)
    assert len(log.data["sharpness/lambda_max"]) == 2
    names["trainer"].close()


def table_under(header):
    """The cells of a table of the README, without its header."""
    lines = README[README.index(header) :].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


@pytest.mark.parametrize(
    "row", table_under("| recipe | SGD: lr"), ids=lambda row: re.sub(r"\W+", " ", row[0])
)
def test_the_settings_to_start_from_are_the_recipes(row):
    name = re.search(r"`(\w+)`", row[0])[1]
    rho, around = re.fullmatch(r"(\S+) \((SGD|AdamW)\)", row[3]).groups()
    rows = {
        "sgd": row[1],
        "adamw": row[2],
        f"sam_{around.lower()}": rho,
        "sassha": row[4],
    }
    for method, cell in rows.items():
        recipe = load_recipe(name, [f"method={method}"])
        published = [recipe.optimizer.lr, recipe.optimizer.weight_decay]
        radius = [algorithm.rho for algorithm in recipe.algorithms.values() if hasattr(algorithm, "rho")]
        if method.startswith("sam"):
            plain = load_recipe(name, [f"method={around.lower()}"]).optimizer
            assert [plain.lr, plain.weight_decay] == published, "SAM keeps the optimizer's settings"
            published = []
        assert [float(number) for number in cell.split(", ")] == [*published, *radius], method


def test_measured_numbers_of_the_readme_are_in_the_results():
    results = TEXTS["yamls/RESULTS.md"]
    measured = README[README.index("## Which method") : README.index("## Recipes")]
    measured += README[README.index("## Results") : README.index("## Limits")]
    numbers = set(re.findall(r"\d+\.\d{2,}", measured))
    assert len(numbers) > 20 and [number for number in numbers if number not in results] == []


def test_the_method_that_is_written_there_is_sam():
    names = {}
    exec(METHOD, names)
    ends = []
    for perturbation in (names["SAM"](), SAMPerturbation(rho=0.05)):
        model = network().module
        optimizer = SharpnessAwareOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), perturbation, model=model
        )

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(torch.ones(4, 2, 5, 5)).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        ends.append(copied(model.state_dict()))
    assert_same(*ends)


def test_every_fault_has_its_test():
    table = TEXTS["composer_sassha/FAULTS.md"]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| ")][1:]
    code = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/*.py"))
    tests = [name for row in rows for name in re.findall(r"`(\w+)`", row[3])]
    assert len(tests) >= len(rows) and [name for name in tests if f"def {name}(" not in code] == []


def test_every_recipe_is_named():
    names = set(re.findall(r"`(\w+)`", TEXTS["yamls/README.md"]))
    assert [name for name in bundled_recipes() if name not in names] == []


COMPARISON = re.compile(r"^(?:python -m composer_sassha|composer-sassha) compare (.+)$", re.MULTILINE)
COMPARISONS = {found for text in TEXTS.values() for found in COMPARISON.findall(text.replace("\\\n", ""))}


@pytest.mark.parametrize("command", sorted(COMPARISONS))
def test_comparisons_can_be_run(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert compare([*shlex.split(command), "--table"]) == 0
    assert "| method" in capsys.readouterr().out


def anchors(text):
    """The anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)]+)\)", TEXTS[name]):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent.joinpath(path) if path else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("name", [str(path.relative_to(ROOT)) for path in PACKAGED])
def test_every_document_is_reached_from_the_readme(name):
    seen, waiting = set(), ["README.md"]
    while waiting:
        document = waiting.pop()
        seen.add(document)
        for link in re.findall(r"\]\(([^)#:]+\.md)", TEXTS[document]):
            target = str((ROOT / document).parent.joinpath(link).resolve().relative_to(ROOT))
            waiting += [target] if target not in seen else []
    assert name in seen


@pytest.fixture
def distribution(monkeypatch):
    """What setup.py gives to setuptools."""
    arguments = {}
    monkeypatch.setattr("setuptools.setup", lambda **settings: arguments.update(settings))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return arguments


def test_setup_and_changes_have_the_version_of_the_package(distribution):
    assert distribution["version"] == composer_sassha.__version__
    first = re.search(r"^## (\S+)", TEXTS["composer_sassha/CHANGELOG.md"], re.MULTILINE)
    assert first[1] == composer_sassha.__version__


def test_the_long_description_has_no_relative_links(distribution):
    text = distribution["long_description"]
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links and all(link.startswith("https://") for link in links)
    assert "[" not in re.sub(r"```.*?```|`[^`]*`|\[[^\]]+\]\(https://[^)]+\)", "", text, flags=re.DOTALL)
    assert len(text.splitlines()) == len(README.splitlines())


def test_a_wheel_carries_documents_recipes_and_templates(distribution):
    patterns = distribution["package_data"]
    assert {"composer_sassha.examples", "composer_sassha.yamls"} <= set(distribution["packages"])
    for package, folder in (("composer_sassha", "composer_sassha"), ("composer_sassha.yamls", "yamls")):
        files = [p.relative_to(ROOT / folder) for p in ROOT.glob(f"{folder}/**/*") if p.is_file()]
        data = [str(p) for p in files if p.suffix in (".md", ".html", ".yaml") or p.name == "py.typed"]
        assert data
        carried = {p for pattern in patterns[package] for p in (ROOT / folder).glob(pattern)}
        assert [file for file in data if ROOT / folder / file not in carried] == []
