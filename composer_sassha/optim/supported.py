"""What the wrapper refuses, in one line, before a step has changed anything."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from composer_sassha.curvature import LazyCurvature
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
    base: Optimizer, params: Iterable[Tensor], model: nn.Module | None, several_passes: bool
) -> None:
    """Raise ValueError where the ranks would silently take different or wrong steps.

    Args:
        base: what updates the weights.
        params: its parameters.
        model: what the closure runs.
        several_passes: a step has an ascent, or a pass that estimates the Hessian.
    """
    sharding = None
    if any(getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False) for p in params):
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
    if (
        several_passes
        and isinstance(model, DistributedDataParallel)
        and getattr(model, "static_graph", False)
    ):
        raise ValueError(
            f"{OWNER}: DistributedDataParallel(static_graph=True) is not supported with an ascent or a "
            "Hessian refresh, whose graphs are not the plain pass's; set static_graph=False"
        )


def _kinds(*objects: Any) -> list[type]:
    return [kind for each in objects for kind in type(each).__mro__]
