"""What the wrapper refuses, in one line, before a step has changed anything."""

import warnings
from typing import Any

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

from composer_sassha.common.ranks import data_parallel
from composer_sassha.curvature import LazyCurvature
from composer_sassha.optim.parameters import ParameterView
from composer_sassha.optim.protocols import takes_curvature
from composer_sassha.perturbations import Perturbation

OWNER = "SharpnessAwareOptimizer"


def check_perturbation(perturbation: Any, base: Optimizer) -> None:
    """Raise TypeError or ValueError for what is no perturbation, or cannot work with the base optimizer."""
    if perturbation is None:
        return
    if not isinstance(perturbation, Perturbation):
        raise TypeError(
            f"{OWNER}: perturbation={perturbation!r} is not allowed; take one of "
            "composer_sassha.perturbations"
        )
    perturbation.check(base)
    params: list[Tensor] = [p for group in base.param_groups for p in group["params"]]
    if found := [p.dtype for p in params if p.is_complex() and p.requires_grad]:
        raise TypeError(
            f"{OWNER}: a parameter of dtype {found[0]} cannot be perturbed; keep it as real numbers, and use "
            "torch.view_as_complex in the model"
        )


def check_curvature(curvature: Any, base: Optimizer) -> None:
    """Raise TypeError or ValueError for what is no curvature, or if the base optimizer takes none."""
    if curvature is None:
        return
    if not isinstance(curvature, LazyCurvature):
        raise TypeError(
            f"{OWNER}: curvature={curvature!r} is not allowed; take a composer_sassha.curvature.LazyCurvature"
        )
    if not takes_curvature(base):
        raise ValueError(
            f"{type(base).__name__} takes no curvature; a lazy Hessian refresh needs an optimizer with "
            "update_curvature, such as composer_sassha.SASSHA"
        )


def check_training(
    view: ParameterView,
    model: nn.Module | None,
    perturbation: Perturbation | None,
    curvature: LazyCurvature | None,
    scaler: GradScaler | None,
) -> None:
    """Raise ValueError or warn where the ranks would silently take different or wrong steps.

    Args:
        view: the parameters.
        model: what the closure runs.
        perturbation: how the weights are displaced; None: they are not.
        curvature: how the Hessian is estimated; None: it is not.
        scaler: looks for overflows; None: there is none.
    """
    base: Any = getattr(view.optimizer, "base_optimizer", view.optimizer)
    sharding = None
    if any(getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False) for p in view.all):
        sharding = "FullyShardedDataParallel (FSDP1)"
    elif isinstance(base, ZeroRedundancyOptimizer):
        sharding = "ZeroRedundancyOptimizer"
    elif any(kind.__module__.partition(".")[0] == "deepspeed" for kind in _kinds(base, model)):
        sharding = "DeepSpeed"
    if sharding is not None:
        raise ValueError(
            f"{OWNER}: {sharding} is not supported: each rank would see the gradient of its part alone; "
            "shard with torch.distributed.fsdp.fully_shard (FSDP2) instead"
        )
    several_passes = curvature is not None or getattr(perturbation, "ascends", False)
    if several_passes and any(getattr(ddp, "static_graph", False) for ddp in data_parallel(model)):
        raise ValueError(
            f"{OWNER}: DistributedDataParallel(static_graph=True) is not supported with an ascent or a "
            "Hessian refresh, whose graphs are not the plain pass's; set static_graph=False"
        )
    agree = curvature is not None or scaler is not None or getattr(perturbation, "mixes", False)
    if not view.ranks.known and agree:
        warnings.warn(
            f"{OWNER}: several ranks run, and nothing says that they train one model, so that each takes its "
            "own curvature and update; pass model= (DistributedDataParallel), or process_group=: "
            "torch.distributed.group.WORLD if your loop averages gradients, False for independent models",
            stacklevel=5,
        )


def warn_of_none() -> None:
    """Warn of a closure that returned None without a scaler."""
    warnings.warn(
        "the closure returned None, which means that the gradient overflowed: the step is "
        "skipped (a closure has to return its loss)",
        stacklevel=6,
    )


def _kinds(*objects: Any) -> list[type]:
    return [kind for each in objects for kind in type(each).__mro__]
