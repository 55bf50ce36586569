"""Check that the methods of a comparison differ in what is compared, and in nothing else."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from typing import Any

from composer_sassha import algorithms
from composer_sassha.comparison.grid import GridRun
from composer_sassha.recipes.config import Recipe

_COMPARED = ("optimizer", "algorithms", "schedules")
_OF_NO_EFFECT = (
    "method",
    "seed",
    "reported",
    "baseline",
    "name",
    "save_folder",
    "save_interval",
    "progress_bar",
    "callbacks",
)


def compared_settings(runs: Sequence[GridRun]) -> dict[str, dict[str, str]]:
    """Return the optimizer, algorithms and schedules of every method, with the settings that matter.

    These are the first of each, such as lr or rho, and those that some method changes from the default. The
    number of tuning runs is shown too if some method has one.

    Args:
        runs: of all methods.

    >>> from composer_sassha.comparison.grid import load_grid
    >>> runs = [GridRun(recipe, None) for recipe in load_grid("digits", ["sgd", "sam"], seeds=[0])]
    >>> compared_settings(runs)["sgd"]
    {'optimizer': 'sgd(lr=0.3, weight_decay=0.002)', 'algorithms': '', 'tuning runs': '36'}
    """
    rows = {run.recipe.method: _components(run.recipe) for run in runs}
    used = [key for key in _COMPARED if any(row[key] for row in rows.values())]
    shown: dict[type, set[str]] = defaultdict(set)
    for row in rows.values():
        for component in (component for key in used for component in row[key].values()):
            shown[type(component)] |= _first_and_changed(component)
    texts = {
        method: {key: ", ".join(_text(name, part, shown) for name, part in row[key].items()) for key in used}
        for method, row in rows.items()
    }
    if any(run.recipe.tuning_runs for run in runs):
        for run in runs:
            texts[run.recipe.method]["tuning runs"] = str(run.recipe.tuning_runs or "")
    return texts


def _components(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Return the components of each section by name."""
    names = {key: part["name"] for key, part in recipe.settings()["schedules"].items()}
    return {
        "optimizer": {recipe.settings()["optimizer"]["name"]: recipe.optimizer},
        "algorithms": recipe.algorithms,
        "schedules": {f"{key}: {names[key]}": part for key, part in recipe.schedules.items()},
    }


def _first_and_changed(component: Any) -> set[str]:
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(component)
    }
    changed = {
        name
        for name in defaults
        if _list_if_tuple(getattr(component, name)) != _list_if_tuple(defaults[name])
    }
    return changed | set(list(defaults)[:1])


def _list_if_tuple(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _text(name: str, component: Any, shown: dict[type, set[str]]) -> str:
    names = [field.name for field in fields(component) if field.name in shown[type(component)]]
    return f"{name}({', '.join(f'{name}={getattr(component, name)}' for name in names)})"


def unfair_differences(runs: Sequence[GridRun]) -> list[str]:
    """Return the differences between the methods that a comparison should not have, one line each.

    All settings count except the optimizer, the methods' algorithms and their schedules. Any other algorithm,
    such as gradient clipping, should belong to every method or to none. Finished runs should have the same
    kind of device, number of processes and seeds.

    Args:
        runs: of all methods.

    >>> from composer_sassha.comparison.grid import load_grid
    >>> first, second = load_grid("digits", ["sgd", "sam"], seeds=[0])
    >>> second.max_duration = "60ep"
    >>> unfair_differences([GridRun(first, None), GridRun(second, None)])
    ['max_duration differs: 30ep (sgd), 60ep (sam)']
    """
    found = {run.recipe.method: _shared_settings(run.recipe) for run in runs}
    methods: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for key in dict.fromkeys(key for settings in found.values() for key in settings):
        for method, settings in found.items():
            methods[key][settings.get(key, "not there")].append(method)
    seeds: dict[str, list[int]] = defaultdict(list)
    for run in runs:
        if run.results is not None:
            for key in ("device", "world_size"):
                methods[key][str(run.results[key])].append(run.recipe.method)
            seeds[run.recipe.method].append(run.recipe.seed)
    for method, finished in seeds.items():
        methods["the set of finished seeds"][", ".join(map(str, sorted(finished)))].append(method)
    return [
        f"{key} differs: "
        + ", ".join(f"{value} ({', '.join(dict.fromkeys(names))})" for value, names in by_value.items())
        for key, by_value in methods.items()
        if len(by_value) > 1
    ]


def _shared_settings(recipe: Recipe) -> dict[str, str]:
    """Return the settings that all methods should share, among them algorithms that are not methods."""
    settings = {
        key: str(value)
        for key, value in recipe.flat_settings().items()
        if key.split(".")[0] not in _COMPARED + _OF_NO_EFFECT
    }
    for name, algorithm in recipe.algorithms.items():
        if type(algorithm).__name__ not in algorithms.__all__:
            arguments = ", ".join(f"{key}={value}" for key, value in asdict(algorithm).items())
            settings[f"algorithms.{name}"] = f"{name}({arguments})"
    return settings
