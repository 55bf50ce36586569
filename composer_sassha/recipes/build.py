"""Build the parts of a run: everything that can be built before anything is written."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from composer import Algorithm, Callback, Evaluator
from composer.core.data_spec import default_split_batch
from composer.devices import DeviceCPU
from composer.models import ComposerModel
from composer.optim import ComposerScheduler
from composer.utils import get_device, reproducibility
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from composer_sassha.algorithms import Schedule
from composer_sassha.algorithms.base import methods_of
from composer_sassha.optim import takes_curvature
from composer_sassha.recipes.config import Recipe
from composer_sassha.recipes.errors import ConfigError, config_errors

_SAMPLES = 16  # of the first batch; the model must accept them before anything is written


@dataclass
class Parts:
    """The arguments of a Trainer that a recipe describes."""

    model: ComposerModel
    optimizer: Optimizer
    algorithms: list[Algorithm]
    callbacks: list[Callback]
    scheduler: ComposerScheduler | None
    train: DataLoader
    heldout: Evaluator


def build_parts(recipe: Recipe) -> Parts:
    """Build the parts of a run without writing, so that mistakes show before anything is written.

    Args:
        recipe: from `load_recipe`.

    Raises:
        ConfigError: the recipe cannot be run.
    """
    if recipe.precision != "fp32" and isinstance(get_device(None), DeviceCPU):
        raise ConfigError(f"precision={recipe.precision}: needs a GPU; this machine trains in fp32")
    with config_errors("curves.png"):
        import matplotlib.figure  # noqa: F401  # only needed at the end, which is too late to ask for it
    reproducibility.seed_all(recipe.seed)  # the Trainer seeds too, but the model is built before it
    with config_errors("data"):
        train, heldout = recipe.data.build(recipe.seed)
        _check_model(recipe)
    with config_errors("model"):
        model = recipe.model.build()
    with config_errors("optimizer"):
        optimizer = recipe.optimizer.build(model.parameters())
    algorithms = []
    for name, algorithm in recipe.algorithms.items():
        with config_errors(f"algorithms.{name}"):
            algorithms.append(algorithm.build())
    for name, schedule in recipe.schedules.items():
        with config_errors(f"schedules.{name}"):
            algorithms.append(Schedule(name, schedule.build()))
    callbacks = []
    for name, callback in recipe.callbacks.items():
        with config_errors(f"callbacks.{name}"):
            callbacks.append(callback.build())
    if takes_curvature(optimizer) and all(method.curvature is None for method in methods_of(algorithms)):
        raise ConfigError(
            f"algorithms: {type(optimizer).__name__} needs a Hessian; add algorithms.lazy_hessian={{}}, "
            "or algorithms.sassha={} or algorithms.msassha={}, which perturb as well"
        )
    with config_errors("schedulers"):
        scheduler = recipe.schedulers.build() if recipe.schedulers is not None else None
    _check_fit(recipe, model, train)
    return Parts(model.train(), optimizer, algorithms, callbacks, scheduler, train, heldout)


def _check_model(recipe: Recipe) -> None:
    """Refuse a model that lacks what follows from the data, such as an output for every class."""
    follows = recipe.data.model_settings() if hasattr(recipe.data, "model_settings") else {}
    for key, value in follows.items():
        if not hasattr(recipe.model, key):
            names = {key: recipe.settings()[key]["name"] for key in ("data", "model")}
            raise ConfigError(f"model.name={names['model']}: is not for data.name={names['data']}")
        if (found := getattr(recipe.model, key)) != value:
            raise ConfigError(f"model.{key}={found}: does not fit the data; set model.{key}={value}")


def _check_fit(recipe: Recipe, model: ComposerModel, train: DataLoader) -> None:
    """Refuse a model that cannot compute the loss of the first samples."""
    try:
        with torch.no_grad():
            # On the CPU, where large models take seconds for a few samples.
            batch = default_split_batch(DeviceCPU().batch_to_device(next(iter(train))), _SAMPLES)[0]
            model.eval().loss(model(batch), batch)
    except (RuntimeError, IndexError, ValueError) as error:
        raise ConfigError(f"model: it does not fit the data: {error}") from error
    if isinstance(batch, Mapping) and "label_smoothing" in recipe.algorithms:  # which reads batch[1]
        raise ConfigError("algorithms.label_smoothing: is not for texts; set algorithms.label_smoothing=null")
