"""The lazy refresh: a Hessian diagonal every few steps, gathered on the way of an ordinary backward pass."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from composer_sassha import _validate
from composer_sassha._tensors import unflatten, wide_dtype
from composer_sassha.curvature.hutchinson import hutchinson_diagonal

# (gradients with a graph, parameters, probe keys) -> the diagonal's estimate on one microbatch
Estimator = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Sequence[int]]], list[Tensor]]
ESTIMATORS: dict[str, Estimator] = {"hutchinson": hutchinson_diagonal}


class LazyCurvature:
    """Estimates the Hessian's diagonal on the passes that `SharpnessAwareOptimizer` chooses.

    On such a pass each microbatch's loss is differentiated twice before its backward, which then hands the
    very gradient that was differentiated to the parameters. The estimates are added up with the weights that
    backward brings along (a microbatch's share, an accumulation factor) and averaged over the ranks in one
    collective.

    Args:
        interval: steps between refreshes, >= 1. Default: 10.
        estimator: its name; allowed: 'hutchinson'.
        samples: probes per microbatch, >= 1; the cost grows with them, the variance falls. Default: 1.
        seed: of the probes; with the step, the rank and the microbatch it determines them. Default: 0.

    Raises:
        TypeError, ValueError: an argument that is not allowed.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> curvature = LazyCurvature()
        >>> curvature.begin([w], step=0)
        >>> curvature.attach((w**3).sum()).backward()
        >>> diagonal, metrics = curvature.finish()
        >>> diagonal[w], w.grad
        (tensor([ 6., 12.]), tensor([ 3., 12.]))
    """

    def __init__(
        self, interval: int = 10, estimator: str = "hutchinson", samples: int = 1, seed: int = 0
    ) -> None:
        self.interval = _validate.integer("LazyHessian", "interval", interval, low=1)
        self.samples = _validate.integer("LazyHessian", "samples", samples, low=1)
        self.seed = _validate.integer("LazyHessian", "seed", seed, low=0)
        if estimator not in list(ESTIMATORS):
            raise ValueError(
                f"LazyHessian: estimator={estimator!r} is not allowed; allowed: {', '.join(ESTIMATORS)}"
            )
        self.estimator = estimator
        self.reset()

    def __repr__(self) -> str:
        return (
            f"LazyCurvature(interval={self.interval}, estimator={self.estimator!r}, "
            f"samples={self.samples}, seed={self.seed})"
        )

    def due(self, step: int, last_refresh: int) -> bool:
        """Whether a refresh is due: at multiples of the interval, until one has succeeded."""
        return last_refresh < step - step % self.interval

    @property
    def active(self) -> bool:
        """Whether the running pass is one that estimates."""
        return self._total is not None

    def reset(self) -> None:
        """Forget the running estimate."""
        self._params: list[Tensor] = []
        self._others: list[Tensor] = []
        self._total: Tensor | None = None
        self._uses: list[int] = []
        self._step = self._attached = self._delivered = 0

    def begin(self, params: Sequence[Tensor], step: int, others: Sequence[Tensor] = ()) -> None:
        """Estimate in the coming pass.

        Args:
            params: the parameters whose diagonal is wanted.
            step: the number of steps taken; seeds the probes.
            others: parameters that get a gradient too, but are not the optimizer's.

        Raises:
            RuntimeError: `params` is empty.
        """
        self.reset()
        if not params:
            raise RuntimeError(
                "the Hessian refresh finds no parameter that requires a gradient; unfreeze some"
            )
        self._params, self._others, self._step = list(params), list(others), step
        self._uses = [0] * len(params)
        # One flat tensor, so that one collective averages it: the diagonal, and how often each parameter was
        # used.
        size = sum(p.numel() for p in params) + len(params)
        self._total = torch.zeros(size, dtype=wide_dtype(params), device=params[0].device)

    def attach(self, loss: Tensor) -> Tensor:
        """Return a loss with the same value and gradient whose backward also gathers the estimate.

        Outside of a pass that estimates, this is `loss` itself, and no second-order graph is built.

        Args:
            loss: one number, of one microbatch.
        """
        if self._total is None:
            return loss
        rank = dist.get_rank() if _distributed() else 0
        keys = [(self.seed, self._step, rank, self._attached, sample) for sample in range(self.samples)]
        everyone = [*self._params, *self._others]
        with _without_hooks(everyone):
            all_grads = torch.autograd.grad(loss, everyone, create_graph=True, allow_unused=True)
            # Parameters that the loss does not use stay unconnected, as DDP's find_unused_parameters expects.
            used = [i for i, grad in enumerate(all_grads) if grad is not None]
            grads = [grad for grad in all_grads if grad is not None]
            own = [i for i in used if i < len(self._params)]
            diagonals = (
                ESTIMATORS[self.estimator](grads[: len(own)], [everyone[i] for i in own], keys) if own else []
            )
        self._attached += 1
        grads = [grad.detach() for grad in grads]

        def deliver(weight: Tensor) -> list[Tensor]:
            self._add(diagonals, own, weight)  # only now is the microbatch's weight known
            return list(torch._foreach_mul(grads, weight.reshape(())))

        return _Delivery.apply(loss.detach(), deliver, *[everyone[i] for i in used])

    def _add(self, diagonals: list[Tensor], used: list[int], weight: Tensor) -> None:
        assert self._total is not None
        self._delivered += 1
        if used:
            diagonal, _ = self._split(self._total)
            scaled = torch._foreach_mul(diagonals, weight.reshape(()))
            torch._foreach_add_([diagonal[i] for i in used], list(scaled))
        for i in used:
            self._uses[i] += 1

    def _split(self, total: Tensor) -> tuple[list[Tensor], Tensor]:
        entries = total.numel() - len(self._params)
        return unflatten(total[:entries], self._params), total[entries:]

    def finish(self) -> tuple[Mapping[Tensor, Tensor] | None, dict[str, float]]:
        """Average the estimate over the ranks, and end the pass.

        Returns:
            The diagonal by parameter, without those that the pass did not use, or None if it is not finite;
            and what to log about it.

        Raises:
            RuntimeError: a loss of this pass did not come by `attach`, or its backward was not called.
        """
        total, params = self._total, self._params
        if total is None or not self._attached or self._delivered != self._attached:
            raise RuntimeError(
                f"the Hessian refresh saw {self._attached} losses and {self._delivered} backwards; call "
                "optimizer.backward(loss) instead of loss.backward(), once per loss"
            )
        diagonal, counts = self._split(total)
        counts.copy_(torch.tensor(self._uses))
        if _distributed():
            dist.all_reduce(total)
            total.div_(dist.get_world_size())
        self.reset()
        entries = total[: -len(params)]
        # One read-out: the mean tells whether all entries are finite.
        summary = torch.stack([entries.abs().mean(), (entries < 0).to(entries.dtype).mean()])
        mean_abs, negative, *used = torch.cat([summary, counts]).tolist()
        if not math.isfinite(mean_abs):
            return None, {}
        measured = {p: h for p, h, count in zip(params, diagonal, used, strict=True) if count > 0}
        return measured, {"mean_abs": mean_abs, "negative_fraction": negative}


class _Delivery(torch.autograd.Function):
    """Stands in for a loss: the same value, and a backward that hands out gradients computed before.

    They reach the parameters through the ordinary hooks, those of DistributedDataParallel among them, which a
    backward with create_graph=True does not.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, deliver: Callable[[Tensor], list[Tensor]], *params: Tensor) -> Tensor:
        ctx.deliver = deliver
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        deliver, ctx.deliver = ctx.deliver, None  # the loss may be kept for its value; the gradients may not
        if deliver is None:
            raise RuntimeError("the loss of a refresh pass can be differentiated once")
        return None, None, *deliver(weight)


@contextlib.contextmanager
def _without_hooks(params: Sequence[Tensor]) -> Iterator[None]:
    """Keep the tensors' own hooks from running: they will, once, when the gradient is delivered."""
    hooks = [(p, p._backward_hooks) for p in params if p._backward_hooks]
    try:
        for p, _ in hooks:
            p._backward_hooks = None
        yield
    finally:
        for p, hook in hooks:
            p._backward_hooks = hook


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
