"""Read a YAML file and `key=value` overrides into a `Recipe`: one run, all settings checked."""

import copy
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from composer_sassha.recipes.components import ALGORITHMS, CALLBACKS, OPTIMIZERS
from composer_sassha.recipes.data import DATASETS
from composer_sassha.recipes.errors import ConfigError, did_you_mean
from composer_sassha.recipes.files import find_recipe
from composer_sassha.recipes.models import MODELS
from composer_sassha.recipes.schedulers import SCHEDULERS, SCHEDULES
from composer_sassha.recipes.schema import checked, lookup, mapping, parse, time_in, within


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", name):
        raise ValueError("names a folder, so it must be made of letters, digits and . _ + -")


def _check_folder(folder: str) -> None:
    if not folder or set("{}") & set(folder):
        raise ValueError("must be a path without braces, which Composer fills in")
    try:
        Path(folder).expanduser()
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def _check_precision(precision: str) -> None:
    allowed = ["fp32", "amp_bf16", "amp_fp16"]
    if precision not in allowed:
        raise ValueError(f"must be fp32, or on a GPU amp_bf16 or amp_fp16{did_you_mean(precision, allowed)}")


def _check_count(count: int | None) -> None:
    if count is not None and count < 1:
        raise ValueError("must be at least 1, or null")


def _check_microbatch(size: int | str | None) -> None:
    if size is not None and size != "auto" and (isinstance(size, str) or size < 1):
        raise ValueError("must be a number of samples from 1, auto, or null")


@dataclass
class Recipe:
    """One run, with every section an instance of the dataclass that is registered under its name.

    Args:
        model: the model (`models.MODELS`).
        data: the data set (`data.DATASETS`).
        optimizer: the update rule (`components.OPTIMIZERS`).
        name: names the folder of the runs.
        method: the row of the recipe that runs.
        algorithms: Composer algorithms by name (`components.ALGORITHMS`).
        schedulers: the learning rate schedule (`schedulers.SCHEDULERS`), or None for a constant one.
        schedules: other hyperparameters by name, each with a schedule (`schedulers.SCHEDULES`) whose
            multiplier drives it: `schedules: {rho: {name: cosine, alpha_f: 0.1}}`.
        callbacks: Composer callbacks by name; they must not change the training (`components.CALLBACKS`).
        baseline: the method that step times are compared with.
        reported: the paper's number for this method, of the metric that ranks; a fraction is in percent.
        tuning_runs: trainings that its hyperparameters were chosen from, >= 1; None: not known. `compare`
            warns if methods had different numbers.
        seed: of the initial weights, the order of the data and all other randomness.
        max_duration: length of the training, such as 30ep or 1000ba.
        precision: fp32, or on a GPU amp_bf16 or amp_fp16.
        device_train_microbatch_size: samples in one forward pass on one device; None: the whole batch.
        cpu_threads: threads of each process on a CPU; None leaves them to PyTorch, which takes every core.
        deterministic: refuse operations that are not deterministic on a GPU.
        save_folder: where the folders of runs are made.
        save_interval: time between checkpoints.
        eval_interval: time between evaluations on the held-out data.
        progress_bar: show a progress bar where standard error is a terminal.
    """

    model: Any
    data: Any
    optimizer: Any
    name: str = checked(MISSING, _check_name)  # MISSING: without a default, like the three above
    method: str = checked(MISSING, _check_name)
    algorithms: dict[str, Any] = field(default_factory=dict)
    schedulers: Any = None
    schedules: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    baseline: str | None = None
    reported: float | None = None
    tuning_runs: int | None = checked(None, _check_count)
    seed: int = checked(0, within(0, 2**32))
    max_duration: str = checked("30ep", time_in("ep", "ba", "sp"))
    precision: str = checked("fp32", _check_precision)
    device_train_microbatch_size: int | str | None = checked(None, _check_microbatch)
    cpu_threads: int | None = checked(None, _check_count)
    deterministic: bool = False
    save_folder: str = checked("runs", _check_folder)
    save_interval: str = checked("1ep", time_in("ep", "ba", "sp", "dur"))
    eval_interval: str = checked("1ep", time_in("ep", "ba"))
    progress_bar: bool = True

    @property
    def folder(self) -> Path:
        """Return the folder of this run: `<save_folder>/<name>/<method>/seed<k>`."""
        return Path(self.save_folder).expanduser() / Path(self.name, self.method, f"seed{self.seed}")

    def settings(self) -> dict[str, Any]:
        """Return plain settings, of which `load_recipe` makes the same recipe."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        for key, registry in _SECTIONS.items():
            if plain[key] is not None:
                plain[key] = _section_of(registry, plain[key])
        plain["schedules"] = {
            name: _section_of(SCHEDULES, schedule) for name, schedule in self.schedules.items()
        }
        for key in _BY_NAME:
            plain[key] = {name: asdict(part) for name, part in getattr(self, key).items()}
        return OmegaConf.to_container(OmegaConf.create(plain))  # type: ignore[return-value]  # tuples to lists

    def flat_settings(self) -> dict[str, Any]:
        """Return the settings by their dotted names, as an override writes them; an empty section is a value.

        >>> load_recipe("digits").flat_settings()["optimizer.name"]
        'sassha'
        """
        return _flatten(self.settings())


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _section_of(registry: Mapping[str, type], component: Any) -> dict[str, Any]:
    name = next(name for name, schema in registry.items() if type(component) is schema)
    return {"name": name, **asdict(component)}


_SECTIONS: dict[str, Mapping[str, type]] = {
    "model": MODELS,
    "data": DATASETS,
    "optimizer": OPTIMIZERS,
    "schedulers": SCHEDULERS,
}
_BY_NAME: dict[str, Mapping[str, type]] = {"algorithms": ALGORITHMS, "callbacks": CALLBACKS}


def read_recipe(recipe: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a recipe's file: the settings common to its methods, and by name those that each adds.

    The config.yaml of a run has one method, which is merged already and adds nothing.

    Args:
        recipe: a path, or the name of a bundled recipe.

    Raises:
        ConfigError: there is no such file, or it is no recipe.

    >>> shared, methods = read_recipe("digits")
    >>> shared["baseline"], "sassha" in methods
    ('sgd', True)
    """
    shared = _read(find_recipe(str(recipe)))
    if "methods" not in shared and shared.get("method") is None:
        raise ConfigError(f"{recipe}: has neither methods nor a method, so it is no recipe")
    return shared, mapping(shared.pop("methods", {shared.get("method"): {}}), "methods")


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe: the shared settings, then those of the method, then the overrides; the later win.

    Sections are merged key by key. If the later names another component, only those settings stay that both
    inherit from a common base, such as the batch size of one data set for another; the rest begins anew.

    Args:
        recipe: a path, or the name of a bundled recipe.
        overrides: `key=value`, with dots into sections; `method=...` selects the method.

    Raises:
        ConfigError: anything that cannot be run, in one line.

    >>> recipe = load_recipe("digits", ["method=sgd", "optimizer.lr=0.2"])
    >>> recipe.optimizer.lr, recipe.folder.as_posix()
    (0.2, 'runs/digits/sgd/seed0')
    """
    shared, methods = read_recipe(recipe)
    given = _parse_overrides(overrides)
    method: Any = given.get("method", shared.get("method"))
    if method is None:
        raise ConfigError(f"method: not given; choose one with method=... (there are: {', '.join(methods)})")
    method = str(method)
    lookup(methods, method, "method")
    settings = shared
    for layer in (mapping(methods[method] or {}, f"methods.{method}"), given, {"method": method}):
        settings = _merge(settings, layer)
    try:
        settings = mapping(OmegaConf.to_container(OmegaConf.create(settings), resolve=True), "the recipe")
    except OmegaConfBaseException as error:
        raise ConfigError(f"{recipe}: {error}") from error
    found = _resolve(settings)
    if found.baseline is not None and len(methods) > 1:
        lookup(methods, found.baseline, "baseline")
    return found


def _merge(settings: dict[str, Any], layer: dict[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for key, value in layer.items():
        before = merged.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            merged[key] = _merge(_inherited(before, value, _SECTIONS.get(key, {})), value)
        else:
            merged[key] = value
    return merged


def _inherited(
    before: dict[str, Any], section: dict[str, Any], registry: Mapping[str, type]
) -> dict[str, Any]:
    """Return the part of a section to keep under a later one: all of it, unless the component is another."""
    old, new = before.get("name"), section.get("name")
    if old is None or new is None or old == new:
        return before
    was, becomes = _owners(registry.get(str(old))), _owners(registry.get(str(new)))
    return {key: value for key, value in before.items() if key in was and was[key] is becomes.get(key)}


def _owners(schema: type | None) -> dict[str, type]:
    """Return the class that declares each setting of a component: heirs of one class mean the same by it."""
    classes = schema.__mro__[::-1] if schema is not None else ()
    return {key: owner for owner in classes for key in inspect.get_annotations(owner)}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = _parsed(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of settings")
    return mapping(copy.deepcopy(content), str(path))


@cache  # a comparison reads its recipe anew for every method, and parsing takes half of that time
def _parsed(text: str) -> Any:
    return OmegaConf.to_container(OmegaConf.load(StringIO(text)))


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        if not re.match(r"[^=\s]+=", override):
            raise ConfigError(f"{override}: an override is written key=value, such as optimizer.lr=0.1")
        try:
            OmegaConf.from_dotlist([override])
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(f"{override}: the value is not valid YAML: {error}") from error
    return mapping(OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides))), "the overrides")


def _resolve(settings: dict[str, Any]) -> Recipe:
    """Check everything and turn each section into an instance of the dataclass that it names."""
    for key in (*_BY_NAME, "schedules"):
        if settings.get(key, {}) is None:
            settings[key] = {}
        if isinstance(settings.get(key), Mapping):  # null takes one away
            settings[key] = {name: part for name, part in settings[key].items() if part is not None}
    recipe = parse(Recipe, settings)
    for key, registry in _SECTIONS.items():
        section = getattr(recipe, key)
        if section is not None or key != "schedulers":
            setattr(recipe, key, _component(registry, section, key))
    for key, registry in _BY_NAME.items():
        parts = getattr(recipe, key)
        for name, section in parts.items():
            where = f"{key}.{name}"
            parts[name] = parse(lookup(registry, name, where), section, where, owner=name)
    for name, section in recipe.schedules.items():
        recipe.schedules[name] = _component(SCHEDULES, section, f"schedules.{name}")
    return recipe


def _component(registry: Mapping[str, type], section: Any, where: str) -> Any:
    if isinstance(section, str):
        raise ConfigError(f"{where}={section}: not a mapping; did you mean {where}.name={section}?")
    settings = mapping(section, where)
    name = settings.pop("name", None)
    return parse(lookup(registry, name, f"{where}.name"), settings, where, owner=name)
