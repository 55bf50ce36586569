"""Time an optimizer's step alone, on gradients that are there already."""

import time
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from composer_sassha.benchmark.steps import Kind, Timing

_REPEATS = 5  # steps between two readings of the clock


class Update:
    """An optimizer that takes steps on random gradients; a contestant of `race`.

    Args:
        optimizer: with trainable parameters; one that divides by a Hessian gets an estimate first.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer, self.schedule = optimizer, Counter([Kind()])
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self._on_gpu = params[0].is_cuda
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        for p in params:
            p.grad = torch.randn_like(p)
        if hasattr(optimizer, "update_curvature"):
            optimizer.update_curvature({p: torch.ones_like(p) for p in params})
        self.take(Kind())

    def take(self, kind: Kind) -> Timing:
        """Take some steps and return the mean time of one."""
        self._wait()
        now, cpu = time.perf_counter(), time.process_time()
        for _ in range(_REPEATS):
            self._optimizer.step()
        self._wait()
        return Timing((time.perf_counter() - now) / _REPEATS, (time.process_time() - cpu) / _REPEATS)

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()


def copies(params: Sequence[Tensor], device: str) -> list[nn.Parameter]:
    """Copy the trainable parameters among these, for an optimizer of their own.

    Args:
        params: of a model.
        device: of the copies, as PyTorch names it.
    """
    return [nn.Parameter(p.detach().clone().to(device)) for p in params if p.requires_grad]
