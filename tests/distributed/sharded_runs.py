"""The methods, the model and the Trainer that the checks of sharded training share."""

from collections.abc import Callable
from typing import Any

import torch
from composer.core import Algorithm
from composer.models import ComposerClassifier
from composer.utils.parallelism import FSDP2Config
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import TensorDataset

from composer_sassha import ASAM, ESAM, GSAM, MSAM, SAM, SSAM, USAM, LazyHessian, LookSAM, Sassha
from tests.distributed.launch import without_metrics
from tests.helpers import copied, images, trainer
from tests.methods import adahessian, adamw, sassha, sgd, sophia

# With the gradient at w averaged, where the perturbation has one, as FSDP2 averages in every backward.
PERTURBED: dict[str, tuple[Callable, Callable[[], list[Algorithm]]]] = {
    "sam": (sgd, lambda: [SAM(0.1, sync_ascent=True)]),
    "sam_inf": (sgd, lambda: [SAM(0.01, p=float("inf"), sync_ascent=True)]),
    "sam_every_2": (adamw, lambda: [SAM(0.1, interval=2, sync_ascent=True)]),
    "sam_partial": (sgd, lambda: [SAM(0.1, ascent_fraction=0.5, sync_ascent=True)]),
    "asam": (adamw, lambda: [ASAM(0.3, sync_ascent=True)]),
    "gsam": (sgd, lambda: [GSAM(0.1, 0.05, alpha=0.2, sync_ascent=True)]),
    "ssam": (sgd, lambda: [SSAM(0.1, sync_ascent=True)]),
    "usam": (adamw, lambda: [USAM(0.1, renormalize=True, sync_ascent=True)]),
    "looksam": (sgd, lambda: [LookSAM(0.1, alpha=0.5, interval=2, sync_ascent=True)]),
    "esam": (sgd, lambda: [ESAM(0.1, beta=1.0, gamma=0.6, sync_ascent=True)]),
    "msam": (sgd, lambda: [MSAM(0.1)]),
    "adamw_msam": (adamw, lambda: [MSAM(0.1)]),
}

CURVED: dict[str, tuple[Callable, Callable[[], list[Algorithm]]]] = {
    "sassha": (sassha, lambda: [Sassha(0.1, hessian_interval=2, estimator="gauss_newton", sync_ascent=True)]),
    "adahessian": (
        adahessian,
        lambda: [GSAM(0.1, sync_ascent=True), LazyHessian(2, estimator="finite_difference")],
    ),
    "sophia": (sophia, lambda: [MSAM(0.1), LazyHessian(2, estimator="gauss_newton", samples=2)]),
}


def network() -> ComposerClassifier:
    torch.manual_seed(17)
    dtype = torch.get_default_dtype()
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(36, 3)
    )
    return without_metrics(ComposerClassifier(net.to(dtype), num_classes=3))


def dataset(count: int = 40) -> TensorDataset:
    x, y = images(count).tensors
    return TensorDataset(x.to(torch.get_default_dtype()), y)


def build(
    optimizer: Callable, algorithms: list[Algorithm], *, shard: str | None = "sharded", **kwargs: Any
) -> Any:
    """A Trainer that shards, with checkpoints of one kind or the other, or does not."""
    sharding = FSDP2Config(state_dict_type=shard, mixed_precision="FULL") if shard else None
    return trainer(
        optimizer,
        algorithms,
        **{
            "model": network(),
            "dataset": dataset(),
            "device_train_microbatch_size": 3,
            "parallelism_config": {"fsdp": sharding} if sharding else None,
            **kwargs,
        },
    )


def whole(tree: Any) -> Any:
    """Copy, with sharded tensors put together."""
    if isinstance(tree, DTensor):
        return tree.full_tensor().detach().clone()
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [whole(value) for value in tree]
    return copied(tree)


def everything(run: Any) -> Any:
    """Weights, optimizer state and counters by name."""
    (optimizer,) = run.state.optimizers
    names = {p: name.removeprefix("module.module.") for name, p in run.state.model.named_parameters()}
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return whole(
        {
            "weights": {name.removeprefix("module."): p for p, name in names.items()},
            "state": {name.removeprefix("module."): optimizer.state[p] for p, name in names.items()},
            "groups": groups,
        }
    )
