"""How a recipe, its methods and the overrides become settings."""

import dataclasses
import inspect
from pathlib import Path

import pytest
import yaml

import composer_sassha
from composer_sassha.recipes.components import ALGORITHMS, CALLBACKS
from composer_sassha.recipes.config import load_recipe, read_recipe
from composer_sassha.recipes.data import Digits, ImageFolder, ImageNet
from composer_sassha.recipes.data.images import InMemoryImages
from composer_sassha.recipes.errors import ConfigError
from composer_sassha.recipes.models import WRN
from composer_sassha.recipes.schedulers import Cosine, Linear
from composer_sassha.sharpness import Measures

PARTS = {**ALGORITHMS, **CALLBACKS}
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


IMAGES = """
name: images
method: a
model: {name: resnet_cifar}
data: {name: cifar10, root: /cifar, download: true, batch_size: 32, padding: 2, flip: true, label_noise: 0.4,
  noise_seed: 3, train_size: 7}
optimizer: {name: sgd}
methods:
  a: {}
  b: {data: {name: svhn, cutout: 8}}
"""


@pytest.mark.parametrize(
    ("overrides", "also"),
    [
        (["data.name=cifar100"], {"root": "/cifar", "download": True, "flip": True}),
        (["data.name=image_folder", "data.root=/there"], {"root": "/there", "flip": True}),
        (["data.name=image_folder", "data.root=/there", "data.padding=0"], {"root": "/there", "padding": 0}),
        (["data.name=mnist"], {"root": "/cifar", "flip": False}),  # which mirrors nothing unless told to
        (["method=b"], {"root": "/cifar", "flip": False, "cutout": 8}),
        (["method=b", "data.name=image_folder", "data.flip=true"], {"flip": True, "cutout": 8}),
    ],
    ids=" ".join,
)
def test_another_data_set_keeps_what_both_inherit(
    overrides: list[str], also: dict[str, object], tmp_path: Path
) -> None:
    path = tmp_path / "images.yaml"
    path.write_text(IMAGES)
    data = load_recipe(path, overrides).data
    assert type(data) is not type(load_recipe(path).data)
    expected = {"batch_size": 32, "padding": 2, "label_noise": 0.4, "noise_seed": 3, "train_size": 7} | also
    assert {key: getattr(data, key) for key in expected} == expected


def test_another_kind_of_data_keeps_nothing(tmp_path: Path) -> None:
    path = tmp_path / "images.yaml"
    path.write_text(IMAGES)
    for name, schema in (("imagenet", ImageNet), ("digits", Digits)):
        assert load_recipe(path, [f"data.name={name}"]).data == schema()


def test_a_cifar_recipe_takes_a_folder_of_images() -> None:
    folder = load_recipe("cifar10_resnet32_noise", ["data.name=image_folder", "data.root=/there"])
    own = load_recipe("cifar10_resnet32_noise")
    inherited = {f.name for f in dataclasses.fields(InMemoryImages)}
    assert {name: getattr(folder.data, name) for name in inherited} == {
        name: getattr(own.data, name) for name in inherited
    }
    assert (folder.data, folder.data.label_noise) == (
        ImageFolder(**{**vars(folder.data), "root": "/there"}),
        0.4,
    )
    assert dataclasses.replace(folder, data=own.data) == own


def test_another_schedule_or_model_begins_anew(recipe: Path) -> None:
    of = ["schedulers={name: cosine, t_warmup: 2ep, alpha_f: 0.5}"]
    assert load_recipe(recipe, [*of, "schedulers.t_warmup=1ep"]).schedulers == Cosine("1ep", 0.5)
    recipe.write_text(RECIPE + "  d: {schedulers: {name: cosine, t_warmup: 2ep}}\n")
    assert load_recipe(recipe, ["method=d", "schedulers.name=linear"]).schedulers == Linear()
    assert load_recipe(recipe, ["model.name=wide_resnet", "model.depth=16"]).model == WRN(depth=16)


def test_a_recipe_is_read_as_shared_settings_and_methods(recipe: Path, tmp_path: Path) -> None:
    shared, methods = read_recipe(recipe)
    assert list(methods) == ["a", "b", "c"] and methods["b"]["seed"] == 2
    assert shared["seed"] == 1 and "methods" not in shared
    resolved = tmp_path / "config.yaml"
    resolved.write_text(yaml.safe_dump(load_recipe(recipe, ["method=b"]).settings()))
    shared, methods = read_recipe(resolved)
    assert shared["seed"] == 2 and methods == {"b": {}}
    resolved.write_text("name: x")
    for overrides in ([], ["method=a"]):
        with pytest.raises(ConfigError, match="neither methods nor a method"):
            load_recipe(resolved, overrides)


def test_settings_can_be_read_by_their_dotted_names(recipe: Path) -> None:
    found = load_recipe(recipe, ["method=c"])
    flat = found.flat_settings()
    assert (flat["optimizer.name"], flat["algorithms.sam.rho"], flat["schedules"]) == ("adamw", 0.1, {})
    overrides = [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in flat.items()]
    assert load_recipe(recipe, overrides) == found


def test_the_number_of_tuning_runs_is_a_count_or_not_known(recipe: Path) -> None:
    assert load_recipe(recipe).tuning_runs is None
    assert load_recipe(recipe, ["tuning_runs=36"]).tuning_runs == 36
    with pytest.raises(ConfigError, match="tuning_runs=0: must be at least 1, or null"):
        load_recipe(recipe, ["tuning_runs=0"])


def test_a_home_that_nobody_has_is_one_line(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"save_folder=~nobody-here/runs: .*home"):
        load_recipe(recipe, ["save_folder=~nobody-here/runs"])


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


WATCHED = """
callbacks: {sharpness_monitor: {interval: 2ep, measures: {m: [4], rho: 0.1}, spectrum_epochs: [3]}}
"""


def test_callbacks_are_settings_too(recipe: Path, tmp_path: Path) -> None:
    assert load_recipe(recipe).callbacks == {} and load_recipe(recipe).settings()["callbacks"] == {}
    recipe.write_text(RECIPE + "  d: {callbacks: {sharpness_monitor: {batches: 2}}}\n" + WATCHED)
    overrides = ["method=d", "callbacks.sharpness_monitor.measures.directions=0"]
    found = load_recipe(recipe, overrides)
    monitor = found.callbacks["sharpness_monitor"].build()
    assert (monitor.interval, monitor.batches, monitor.spectrum_epochs) == ("2ep", 2, [3])
    assert monitor.measures == Measures(m=(4,), rho=0.1, directions=0)
    resolved = tmp_path / "config.yaml"
    resolved.write_text(yaml.safe_dump(found.settings()))
    assert load_recipe(resolved) == found
    settings = yaml.safe_load(resolved.read_text())["callbacks"]["sharpness_monitor"]
    assert settings["measures"]["tol"] == 1e-3 and settings["max_seconds"] == 60.0  # every setting
    for null in ("callbacks=null", "callbacks.sharpness_monitor=null"):
        assert load_recipe(recipe, [*overrides, null]).callbacks == {}


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


@pytest.mark.parametrize(
    "name", [name for name, part in PARTS.items() if hasattr(composer_sassha, part.__name__)]
)
def test_a_recipe_can_set_every_argument_with_the_same_defaults(name: str) -> None:
    schema = PARTS[name]
    built = getattr(composer_sassha, schema.__name__)
    arguments = {name: p.default for name, p in inspect.signature(built).parameters.items()}
    arguments.pop("dataloader", None)  # of a recipe it is the held-out data
    assert {f.name: f.default for f in dataclasses.fields(schema)} == arguments
    assert repr(schema().build()) == repr(built())
