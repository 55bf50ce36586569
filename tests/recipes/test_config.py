"""How a recipe, its methods and the overrides become settings."""

import dataclasses
import inspect
from pathlib import Path

import pytest
import yaml

import composer_sassha
from composer_sassha.recipes.algorithms import ALGORITHMS
from composer_sassha.recipes.config import load_recipe
from composer_sassha.recipes.errors import ConfigError
from composer_sassha.recipes.files import bundled_recipes

RECIPE = """
name: small
method: a
seed: 1
max_duration: 5ep
model: {name: resnet_cifar, depth: 8}
data: {name: digits, batch_size: 32}
optimizer: {name: sgd, lr: 0.3, momentum: 0.5}
methods:
  a: {}
  b:
    seed: 2
    model: {depth: 14}
    optimizer: {lr: 0.2}
    reported: 92.5
  c: {optimizer: {name: adamw}, algorithms: {sam: {rho: 0.1}}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


def test_shared_then_method_then_overrides(recipe: Path) -> None:
    a = load_recipe(recipe)
    assert (a.method, a.seed, a.model.depth, a.optimizer.lr, a.optimizer.momentum) == ("a", 1, 8, 0.3, 0.5)
    b = load_recipe(recipe, ["method=b"])
    assert (b.method, b.seed, b.model.depth, b.optimizer.lr, b.optimizer.momentum) == ("b", 2, 14, 0.2, 0.5)
    over = load_recipe(recipe, ["seed=3", "method=b", "model.depth=20", "optimizer.lr=0.1"])
    assert (over.seed, over.model.depth, over.optimizer.lr, over.reported) == (3, 20, 0.1, 92.5)
    assert over.folder == Path("runs/small/b/seed3")


def test_naming_another_component_replaces_the_section(recipe: Path) -> None:
    c = load_recipe(recipe, ["method=c", "algorithms.sam.interval=2"])
    assert c.optimizer.lr == 1e-3  # AdamW's default, not the shared rate of SGD
    assert (c.algorithms["sam"].rho, c.algorithms["sam"].interval) == (0.1, 2)
    assert load_recipe(recipe, ["optimizer.name=adamw"]).optimizer == c.optimizer


def test_resolved_settings_make_the_same_recipe(recipe: Path, tmp_path: Path) -> None:
    overrides = ["schedulers={name: multi_step, milestones: [1ep, 2ep]}", "device_train_microbatch_size=8"]
    for method in "abc":
        first = load_recipe(recipe, [f"method={method}", *overrides])
        resolved = tmp_path / "config.yaml"
        resolved.write_text(yaml.safe_dump(first.settings()))
        assert "methods" not in first.settings()
        assert load_recipe(resolved) == first


def test_null_takes_an_algorithm_away(recipe: Path) -> None:
    assert load_recipe(recipe, ["method=c", "algorithms.sam=null"]).algorithms == {}
    both = load_recipe(recipe, ["method=c", "algorithms.sam=null", "algorithms.msam={}"])
    assert list(both.algorithms) == ["msam"]
    assert load_recipe(recipe, ["method=c", "algorithms=null"]).algorithms == {}


def test_schedules_are_settings_too(recipe: Path, tmp_path: Path) -> None:
    first = load_recipe(recipe, ["method=c", "schedules.rho={name: follow_lr, alpha_f: 0.5}"])
    assert first.settings()["schedules"] == {"rho": {"name": "follow_lr", "alpha_f": 0.5}}
    assert load_recipe(recipe, ["method=c"]).schedules == {}
    resolved = tmp_path / "config.yaml"
    resolved.write_text(yaml.safe_dump(first.settings()))
    assert load_recipe(resolved) == first


def test_a_resolved_recipe_has_one_method(recipe: Path, tmp_path: Path) -> None:
    resolved = tmp_path / "config.yaml"
    resolved.write_text(yaml.safe_dump(load_recipe(recipe).settings()))
    with pytest.raises(ConfigError, match="method: 'b' is unknown"):
        load_recipe(resolved, ["method=b"])


@pytest.mark.parametrize("name", ["digits", "digits.yaml", "yamls/digits.yaml"])
def test_bundled_recipes_go_by_several_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe(name).name == "digits"


@pytest.mark.parametrize("path", bundled_recipes().values(), ids=str)
def test_every_method_of_a_bundled_recipe_is_valid(path: Path) -> None:
    for method in yaml.safe_load(path.read_text())["methods"]:
        assert load_recipe(path, [f"method={method}"]).method == method


@pytest.mark.parametrize(
    "name", [name for name in ALGORITHMS if hasattr(composer_sassha, ALGORITHMS[name].__name__)]
)
def test_a_recipe_can_set_every_argument_with_the_same_defaults(name: str) -> None:
    schema = ALGORITHMS[name]
    built = getattr(composer_sassha, schema.__name__)
    arguments = {name: p.default for name, p in inspect.signature(built).parameters.items()}
    assert {f.name: f.default for f in dataclasses.fields(schema)} == arguments
    assert repr(schema().build()) == repr(built())
