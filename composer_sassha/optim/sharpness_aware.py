"""The wrapper that runs the passes of a step around any optimizer."""

import contextlib
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed import ProcessGroup
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from composer_sassha.common import validate
from composer_sassha.common.ranks import rank
from composer_sassha.common.sharding import Shards, forget_copies, local, shards_of
from composer_sassha.common.snapshot import Snapshot
from composer_sassha.common.tensors import copy_into, copy_of, unflatten
from composer_sassha.curvature import LazyCurvature, NormsInFloat32
from composer_sassha.optim.combining import combine, flat_gradient, reuse
from composer_sassha.optim.passes import Closure, PassRunner
from composer_sassha.perturbations import Perturbation, Point

# Kept in every parameter group, so that they are saved and loaded with the optimizer: steps taken, the step
# of the last successful Hessian refresh (-1: none), and the number of refreshes.
# With float16 also the scale of the loss whose Hessian is estimated, and the refreshes since it has changed.
COUNTERS: dict[str, int | float] = {
    "steps_taken": 0,
    "last_refresh": -1,
    "refreshes": 0,
    "hessian_scale": 1024.0,
    "hessian_scale_age": 0,
}

# After so many refreshes without an overflow the Hessian's scale is doubled; each overflow halves it.
HESSIAN_SCALE_GROWTH = 100
HESSIAN_SCALE_MAX = 2.0**15

# So many refreshes in a row may fail before there has been any: each skips its step, so that nothing is
# trained.
FAILURES_ALLOWED = 10


class SharpnessAwareOptimizer(Optimizer):
    """Wraps an optimizer: its gradient is taken at displaced weights, its Hessian diagonal kept fresh.

    A step is made of passes, each one call of the closure (a forward and backward over the same batch):

        ASCENT    at w      gives g(w), hence the displacement e    (only when an ascent is due)
        DESCENT   at w + e  gives g(w + e), and when a refresh is due the Hessian diagonal there
        then      the weights are back at exactly w, the perturbation makes its update of the two gradients,
                  and the base optimizer steps

    An ascent is due when `steps_taken % interval == 0`. A perturbation along the momentum needs no ascent and
    displaces before the only pass. A closure that returns None (its gradient overflowed)
    skips the step, which then changes nothing and does not count. So does a Hessian that is not finite before
    there is any estimate; later, the step goes on with the old one and the refresh is tried again. After an
    exception in a pass, weights, buffers and RNG states are those from before the step. The descent draws the
    same random numbers as the ascent, and leaves no trace in BatchNorm's statistics. With a partial ascent it
    is the ascent that leaves none.

    Parameter groups and state are the base optimizer's own, and the instance's class carries the base's name:
    a checkpoint of the one continues under the other. Hooks are shared too and run once per update.

    Args:
        base_optimizer: what updates the weights.
        perturbation: how the weights are displaced (see `composer_sassha.perturbations`); None: not at all.
        interval: steps between perturbed steps, >= 1. Default: 1.
        curvature: when and how the Hessian diagonal is estimated; needs a base optimizer with
            `update_curvature`.
            None: never.
        model: what the closure runs; its buffers are protected as said above. Without it only the RNG states
            are.
        sync_ascent: average the ascent gradient over the ranks; by default each rank perturbs along its own,
            and those that mix it into the update average the result.
        named_parameters: the parameters' names, for a perturbation that asks for them (ASAM); by default the
            model's.
        partial_ascent: the closure takes a part of the batch while `phase` is "ascent". Then the loss and all
            that a pass leaves behind are the descent's, which has the whole batch. Default: False.

    Raises:
        TypeError, ValueError: an argument that is not allowed, `curvature` for an optimizer that takes none,
            or a perturbation along the momentum of an optimizer that keeps none.

    Example:
        >>> from composer_sassha.perturbations import SAMPerturbation
        >>> w = nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = SharpnessAwareOptimizer(torch.optim.SGD([w], lr=0.1), SAMPerturbation(rho=0.5))
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = (w**2).sum()
        ...     optimizer.backward(loss)
        ...     return loss
        >>> loss = optimizer.step(closure)
        >>> w.data  # 1 - 0.1 * (2 * 1.5)
        tensor([0.7000])
    """

    # Asked for by Composer's Trainer before every batch in amp_fp16.
    _step_supports_amp_closure = True

    def __new__(cls, base_optimizer: Optimizer, *args: Any, **kwargs: Any) -> "SharpnessAwareOptimizer":
        """Return an instance of a subclass that has the base optimizer's name, as checkpoints need."""
        return object.__new__(_class_named_after(type(base_optimizer)))  # type: ignore[arg-type]

    def __init__(
        self,
        base_optimizer: Optimizer,
        perturbation: Perturbation | None = None,
        interval: int = 1,
        *,
        curvature: LazyCurvature | None = None,
        model: nn.Module | None = None,
        sync_ascent: bool = False,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
        partial_ascent: bool = False,
    ) -> None:
        _check_base(base_optimizer)
        self.base_optimizer = base_optimizer
        self.set_perturbation(perturbation, interval, sync_ascent=sync_ascent, partial_ascent=partial_ascent)
        self.set_curvature(curvature)
        self.model = model
        self.runner = PassRunner(model)
        self._names = {p: name for name, p in named_parameters or ()}
        # Which of a step's two passes is running; None between steps and in a step that has only one.
        self.phase: Literal["ascent", "descent"] | None = None
        # What the perturbation and the refresh have to say about the latest step.
        self.metrics: dict[str, Any] = {}
        self.skipped_steps = self.failed_refreshes = 0  # since this process began
        self._failures = 0  # refreshes in a row that were not finite
        self._scaler: GradScaler | None = None  # of the running step
        self._rounding_checked = False  # whether a displacement of coarse parameters has been looked at
        self._warned_of_norm = False
        self._fill_counters()

    def set_perturbation(
        self,
        perturbation: Perturbation | None,
        interval: int = 1,
        *,
        sync_ascent: bool = False,
        partial_ascent: bool = False,
    ) -> None:
        """Choose the perturbation; see the class for the arguments."""
        if perturbation is not None and not isinstance(perturbation, Perturbation):
            raise TypeError(
                f"SharpnessAwareOptimizer: perturbation={perturbation!r} is not allowed; take one of "
                "composer_sassha.perturbations"
            )
        if perturbation is not None:
            perturbation.check(self.base_optimizer)
            if found := [p.dtype for p in self._params() if p.is_complex()]:
                raise TypeError(
                    f"SharpnessAwareOptimizer: a parameter of dtype {found[0]} cannot be perturbed; keep it "
                    "as real numbers, and use torch.view_as_complex in the model"
                )
        self.perturbation = perturbation
        self.interval = validate.integer("SharpnessAwareOptimizer", "interval", interval, low=1)
        self.sync_ascent = validate.boolean("SharpnessAwareOptimizer", "sync_ascent", sync_ascent)
        self.partial_ascent = validate.boolean("SharpnessAwareOptimizer", "partial_ascent", partial_ascent)

    def set_curvature(self, curvature: LazyCurvature | None) -> None:
        """Choose when and how the Hessian diagonal is estimated; see the class."""
        if curvature is not None and not isinstance(curvature, LazyCurvature):
            raise TypeError(
                f"SharpnessAwareOptimizer: curvature={curvature!r} is not allowed; take a "
                "composer_sassha.curvature.LazyCurvature"
            )
        if curvature is not None and not hasattr(self.base_optimizer, "update_curvature"):
            raise ValueError(
                f"{type(self.base_optimizer).__name__} takes no curvature; a lazy Hessian refresh needs an "
                "optimizer with update_curvature, such as composer_sassha.SASSHA"
            )
        self.curvature = curvature

    # The base optimizer's own, always: nothing can come apart, not after load_state_dict either.
    state = property(lambda self: self.base_optimizer.state)
    param_groups = property(lambda self: self.base_optimizer.param_groups)
    defaults = property(lambda self: self.base_optimizer.defaults)

    def __getattr__(self, name: str) -> Any:
        if name == "base_optimizer":  # not set yet
            raise AttributeError(name)
        return getattr(self.base_optimizer, name)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        names = [(name, p) for p, name in self._names.items()]
        how = (self.perturbation, self.interval, self.curvature, self.model, self.sync_ascent, names)
        return _rebuild, (self.base_optimizer, *how, self.partial_ascent, self.skipped_steps)

    def __repr__(self) -> str:
        how = f"{self.perturbation!r}, interval={self.interval}"
        return f"SharpnessAwareOptimizer({self.base_optimizer!r}, {how})"

    @property
    def steps_taken(self) -> int:
        """Steps taken so far, skipped ones not counted; saved with the optimizer's state."""
        return self.param_groups[0]["steps_taken"]

    def ascent_due(self) -> bool:
        """Whether the coming (or running) step is a perturbed one."""
        return self.perturbation is not None and self.steps_taken % self.interval == 0

    def refresh_due(self) -> bool:
        """Whether the coming (or running) step refreshes the Hessian."""
        return self.curvature is not None and self.curvature.due(
            self.steps_taken, self.param_groups[0]["last_refresh"]
        )

    @torch.no_grad()
    def step(self, closure: Closure | None = None, *, scaler: GradScaler | None = None) -> Any:
        """Run the passes of one step and update the weights.

        Args:
            closure: zeroes the gradients, computes the loss, calls `backward(loss)` of this optimizer, and
                returns the loss, or None if the gradient overflowed. It is called once per pass.
            scaler: scales the closure's loss for float16 (`ClosureGradScaler` passes itself). The Hessian
                then has a scale of its own: at the gradient's, the second derivative overflows.

        Returns:
            The loss at w, or None if the step was skipped. Where no pass over the whole batch is at w (after
            a partial ascent, and with MSAM), the loss at w + e.

        Raises:
            RuntimeError: there is no closure. Only with all learning rates at 0 may it be left out: a
                checkpoint is loaded so, to have the optimizer's state made.
        """
        if closure is None:
            if any(group["lr"] != 0 for group in self.param_groups):
                raise RuntimeError(
                    "SharpnessAwareOptimizer.step() needs a closure that computes the loss and its gradient: "
                    "it may be called several times a step"
                )
            room = self._room(p for p in self._trainable() if p.grad is not None)
            self.base_optimizer.step()
            self._remember(room)
            return None

        closure = torch.enable_grad()(closure)
        self._scaler = scaler
        self.metrics = {}
        self.runner.begin()
        before = self._snapshot()
        try:
            with self._differentiable():
                loss, remembered = self._run_passes(closure, before)
            curved = loss is not None and self._update_curvature()
            if curved:
                room = self._room(p for p in self._trainable() if p.grad is not None)
                self.base_optimizer.step()
                self._remember(room, remembered)
        except BaseException:
            before.restore()
            self.runner.rollback()
            raise
        finally:
            self.phase = None
            if self.curvature is not None:
                self.curvature.reset()
        if not curved:
            before.restore()
            self.skipped_steps += 1
            self.metrics["skipped_steps"] = self.skipped_steps
            if loss is None and self.skipped_steps == 1 and scaler is None:  # with a scaler it is no news
                warnings.warn(
                    "the closure returned None, which means that the gradient overflowed: the step is "
                    "skipped (a closure has to return its loss)",
                    stacklevel=2,
                )
            return None
        self._count(steps_taken=self.steps_taken + 1)
        return loss

    def backward(self, loss: Tensor, *, scaler: GradScaler | None = None, **estimation: Any) -> None:
        """Call `loss.backward()`, and estimate the Hessian diagonal on the way if this pass has to.

        Args:
            loss: a scalar; call this once per microbatch.
            scaler: scales the loss, not yet scaled, for float16.
            estimation: what the estimator needs beside the loss; see `LazyCurvature.attach`.
        """
        if self.curvature is not None:
            loss = self.curvature.attach(loss, **estimation)
        (loss if scaler is None else scaler.scale(loss)).backward()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the base optimizer does."""
        self.base_optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the base optimizer."""
        self.base_optimizer.add_param_group(param_group)
        self._fill_counters()

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state dict; the counters are in its parameter groups.

        Raises:
            RuntimeError: parameters with a state have been taken out of the groups.
        """
        if removed := len({*self.state} - {*self._params()}):
            raise RuntimeError(
                f"{removed} parameters have been taken out of the optimizer (LayerFreezing does), and "
                "Composer can neither save nor resume such a run; freeze them from the start with "
                "requires_grad_(False), or save no checkpoint"
            )
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this or of the base optimizer."""
        self.base_optimizer.load_state_dict(state_dict)
        self._fill_counters()
        self._remember(self._room(p for p in self._trainable() if self.state.get(p)))

    def _run_passes(self, closure: Closure, before: Snapshot) -> tuple[Any, Tensor | None]:
        """Leave the gradient to update with in place, and the weights at w.

        Returns:
            The loss at w (at w + e if no pass over the whole batch is at w), and what the perturbation wants
            remembered.
        """
        perturbation = self.perturbation
        if perturbation is None or not self.ascent_due():
            self._prepare_refresh()
            loss = _checked(self.runner.run(closure))
            if loss is not None and perturbation is not None and perturbation.remembers:
                params = self._trainable()
                remembered = [self.state.get(p, {}).get(perturbation.remembers) for p in params]
                reuse(perturbation, params, remembered, shards=self._shard_group())
            return loss, None
        if not perturbation.ascends:
            with self._displaced(self._trainable(), perturbation):
                self._prepare_refresh()
                return _checked(self.runner.run(closure)), None

        self.phase = "ascent"
        # FSDP2 averages in every backward.
        sync = self.sync_ascent or self._shards() is not None or self.runner.must_synchronize
        loss = _checked(self.runner.run(closure, sync=sync, hidden=self.partial_ascent))
        if loss is None:
            return None, None
        if isinstance(loss, Tensor):
            loss = loss.detach().clone()  # the closure may return the same tensor again
        after = None if self.partial_ascent else self._snapshot()
        before.restore()  # the descent is to see the same function: dropout masks, augmentations, buffers
        params = [p for p in self._params() if p.grad is not None]
        if any(p.grad is not None and p.grad.is_sparse for p in params):
            raise RuntimeError("sparse gradients cannot perturb; build the embedding with sparse=False")
        ascent = flat_gradient(self._trainable()) if perturbation.mixes else None
        alone = perturbation.mixes and not sync  # the ranks' gradients meet in the combination
        with self._displaced(params, perturbation):
            self.zero_grad()  # the closure does too, or should; and the descent wants their memory
            if self.partial_ascent:
                self.runner.share_buffers()  # what the ascent has received is gone with its traces
            self._prepare_refresh()
            self.phase = "descent"
            perturbed_loss = _checked(
                self.runner.run(closure, sync=not alone, hidden=not self.partial_ascent)
            )
        if perturbed_loss is None:
            return None, None
        if after is None:
            loss = perturbed_loss  # the two are of different samples, so that there is no gap to tell of
        else:
            after.restore()
            self.metrics.update(perturbation.metrics(perturbed_loss - loss))
        if ascent is None:
            return loss, None
        return loss, combine(
            perturbation, self._trainable(), ascent, average=alone, shards=self._shard_group()
        )

    @contextlib.contextmanager
    def _displaced(self, params: list[Tensor], perturbation: Perturbation) -> Iterator[None]:
        """Have the parameters at w + e, and then back at exactly w."""
        shards = self._shards()
        sharded = None if shards is None else self.model
        weights = copy_of(local(params))
        try:
            self._displace(params, perturbation, shards, weights)
            forget_copies(sharded)  # FSDP2 may have gathered w before, for an evaluation
            yield
        finally:
            # By copy: (w + e) - e is not w in floating point. And into the parts of now: in its first
            # forward, FSDP2 puts others in their place.
            copy_into(local(params), weights)
            forget_copies(sharded)  # and now w + e, for a pass that did not come to its end

    def _displace(
        self, params: list[Tensor], perturbation: Perturbation, shards: Shards | None, weights: list[Tensor]
    ) -> None:
        # The point, which has the gradients at w, ends here: the next pass wants their memory.
        point = self._point(params, perturbation, shards)
        found = perturbation.displace(point)
        self.metrics.update(found)
        self._check_displacement(point, weights, found.get("grad_norm", found.get("momentum_norm", 0)))

    def _check_displacement(self, point: Point, weights: list[Tensor], norm: float) -> None:
        """Warn, once, of a displacement that there is none of, or that is lost in rounding."""
        if not math.isfinite(norm) and not self._warned_of_norm:
            self._warned_of_norm = True
            warnings.warn(
                f"the norm that the perturbation divides by is {norm}: the weights are not displaced on this "
                "step; look for a gradient that is not finite",
                stacklevel=8,
            )
        coarse = [i for i, w in enumerate(weights) if torch.finfo(w.dtype).bits < 32]
        if self._rounding_checked or not coarse or not 0 < norm < math.inf:
            return
        self._rounding_checked = True
        # Where there is no gradient, or ESAM has masked it, no displacement is meant to be.
        momenta = [state.get("exp_avg", state.get("momentum_buffer")) for state in point.states]
        directions = [(point.grads or momenta)[i] for i in coarse]
        meant = sum(d.count_nonzero().item() for d in directions if d is not None)
        moved = sum((point.params[i] != weights[i]).sum().item() for i in coarse)
        share = moved / meant if meant else 1.0
        if share < 0.5:
            warnings.warn(
                f"the perturbation moves {share:.0%} of the entries of {weights[coarse[0]].dtype} parameters "
                "that it is to move, the others are lost in rounding; take a larger rho, or float32 "
                "parameters and precision='amp_bf16'",
                stacklevel=8,
            )

    def _point(self, params: list[Tensor], perturbation: Perturbation, shards: Shards | None) -> Point:
        states = [self.state.get(p, {}) for p in params]
        if shards is not None:
            states = [dict(zip(state, local(state.values()), strict=True)) for state in states]
        return Point(
            params=local(params),
            grads=local(p.grad for p in params if p.grad is not None),
            names=self._names_of(params) if perturbation.names else [],
            states=states,
            group=self.param_groups[0],
            step=self.steps_taken,
            rank=rank() if shards is None else shards.part,
            shards=None if shards is None else shards.group,
        )

    def _shards(self) -> Shards | None:
        shards = shards_of(self._trainable())
        if shards is not None and self.model is None:
            raise ValueError(
                "SharpnessAwareOptimizer: sharded parameters need model=, the module given to fully_shard: "
                "it has to gather them anew when they are displaced"
            )
        return shards

    def _shard_group(self) -> ProcessGroup | None:
        shards = self._shards()
        return None if shards is None else shards.group

    def _names_of(self, params: list[Tensor]) -> list[str]:
        if self.model is not None and any(p not in self._names for p in params):
            self._names.update({p: name for name, p in self.model.named_parameters()})
        return [self._names[p] for p in params] if all(p in self._names for p in params) else []

    def _trainable(self) -> list[Tensor]:
        return [p for p in self._params() if p.requires_grad]

    def _room(self, made: Iterable[Tensor]) -> dict[Tensor, Tensor]:
        """Make tensors, all zero, for what the perturbation remembers of those parameters that lack one."""
        key = self.perturbation.remembers if self.perturbation is not None else ""
        return {p: torch.zeros_like(p) for p in made if key and key not in self.state.get(p, {})}

    def _remember(self, room: dict[Tensor, Tensor], vector: Tensor | None = None) -> None:
        """Keep a vector in the optimizer's state; None only puts the room for it there.

        After the base optimizer's step, which must not find an entry that it did not make; so nothing here
        may need memory.
        """
        key = self.perturbation.remembers if self.perturbation is not None else ""
        for p, zeros in room.items():
            self.state[p][key] = zeros
        if vector is not None:
            params = self._trainable()
            pieces = dict(zip(params, unflatten(vector, local(params)), strict=True))
            kept = [p for p in params if key in self.state.get(p, {})]
            copy_into(local(self.state[p][key] for p in kept), [pieces[p] for p in kept])

    def _prepare_refresh(self) -> None:
        if self.curvature is not None and self.refresh_due():
            params = self._trainable()
            mine, every = set(params), self.model.parameters() if self.model is not None else ()
            others = [p for p in every if p.requires_grad and p not in mine]
            gradient_scale = 1.0 if self._scaler is None else self._scaler.get_scale()
            self.curvature.begin(
                params,
                self.steps_taken,
                others,
                gradient_scale=gradient_scale,
                scale=self._hessian_scale(),
                model=self.model,
            )

    def _update_curvature(self) -> bool:
        """Hand a refreshed diagonal to the base optimizer. Return False if it has none to step with."""
        if self.curvature is None or not self.curvature.active:
            return True
        refreshes = self.param_groups[0]["refreshes"]
        diagonal, metrics = self.curvature.finish()
        scale, age = self._hessian_scale(), self.param_groups[0]["hessian_scale_age"]
        if diagonal is None:
            self.failed_refreshes += 1
            self.metrics["failed_refreshes"] = self.failed_refreshes
        if diagonal is None and scale > 1:
            self._count(hessian_scale=scale / 2, hessian_scale_age=0)
            return refreshes > 0
        if diagonal is None:
            self._failures += 1
            if not refreshes and self._failures >= FAILURES_ALLOWED:
                half = (
                    ""
                    if self._scaler is None
                    else (
                        "; or the second derivative of some operation does not fit float16: use "
                        "estimator='gauss_newton' or precision='amp_bf16'"
                    )
                )
                raise RuntimeError(
                    f"the Hessian estimate was not finite on the first {self._failures} steps: nothing can "
                    "be trained; look for a loss that is not finite, or for an infinite second derivative "
                    f"(the root or the norm of 0){half}"
                )
            warnings.warn(
                "the Hessian estimate is not finite; the refresh is tried again on the next step",
                stacklevel=3,
            )
            return refreshes > 0
        self._failures = 0
        if self._scaler is not None:
            grown = age + 1 == HESSIAN_SCALE_GROWTH
            larger = min(2 * scale, HESSIAN_SCALE_MAX)
            self._count(hessian_scale=larger if grown else scale, hessian_scale_age=0 if grown else age + 1)
        self.base_optimizer.update_curvature(diagonal)  # type: ignore[attr-defined]
        self._count(last_refresh=self.steps_taken, refreshes=refreshes + 1)
        self.metrics.update(metrics, refreshes=refreshes + 1)
        return True

    def _differentiable(self) -> contextlib.ExitStack:
        """Run a refresh step as the estimator needs it, both passes: else dropout would draw other masks."""
        stack = contextlib.ExitStack()
        if self.curvature is not None and self.refresh_due():
            if self.curvature.second_order:  # fused attention has no second derivative
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
                if self._scaler is not None:
                    stack.enter_context(NormsInFloat32())
            if self.curvature.eager:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
        return stack

    def _params(self) -> Iterable[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def _snapshot(self) -> Snapshot:
        return Snapshot(self.model, {p.device for p in self._params()})

    def _fill_counters(self) -> None:
        for group in self.param_groups:
            for name, start in COUNTERS.items():
                group.setdefault(name, self.param_groups[0].get(name, start))

    def _hessian_scale(self) -> float:
        return self.param_groups[0]["hessian_scale"] if self._scaler is not None else 1.0

    def _count(self, **values: int | float) -> None:
        for group in self.param_groups:
            group.update(values)


# Hooks are the base's (see __getattr__), and torch runs them around the base's step: once per update, not for
# a skipped step. This step must not run them again.
SharpnessAwareOptimizer.step.hooked = True  # type: ignore[attr-defined]


@functools.cache
def _class_named_after(base: type[Optimizer]) -> type[SharpnessAwareOptimizer]:
    # Composer keys an optimizer's state by its class's __qualname__.
    return type(
        base.__name__,
        (SharpnessAwareOptimizer,),
        {"__qualname__": base.__qualname__, "__doc__": base.__doc__},
    )


def _rebuild(
    base_optimizer: Optimizer,
    perturbation: Perturbation | None,
    interval: int,
    curvature: LazyCurvature | None,
    model: nn.Module | None,
    sync_ascent: bool,
    named_parameters: list[tuple[str, Tensor]],
    partial_ascent: bool,
    skipped_steps: int,
) -> SharpnessAwareOptimizer:
    optimizer = SharpnessAwareOptimizer(
        base_optimizer,
        perturbation,
        interval,
        curvature=curvature,
        model=model,
        sync_ascent=sync_ascent,
        named_parameters=named_parameters,
        partial_ascent=partial_ascent,
    )
    optimizer.skipped_steps = skipped_steps
    return optimizer


def _checked(loss: Any) -> Any:
    if loss is None or isinstance(loss, (int, float)) or (isinstance(loss, Tensor) and loss.numel() == 1):
        return loss
    raise TypeError(
        f"the closure returned a {type(loss).__name__}; it must return its loss: one number, or None"
    )


def _check_base(base: Any) -> None:
    if isinstance(base, SharpnessAwareOptimizer):
        raise TypeError("SharpnessAwareOptimizer: the base optimizer is wrapped already; wrap it once")
    if not isinstance(base, Optimizer):
        raise TypeError(f"SharpnessAwareOptimizer: base_optimizer={base!r} is not a torch.optim.Optimizer")
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"SharpnessAwareOptimizer: {type(base).__name__} runs closures of its own and cannot be wrapped"
        )
