"""The wrapper that runs the passes of a step around any optimizer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from composer_sassha.common import validate
from composer_sassha.common.ranks import Group, given_ranks
from composer_sassha.curvature import LazyCurvature
from composer_sassha.optim import supported
from composer_sassha.optim.counters import Counters
from composer_sassha.optim.driver import Driver, Phase, Watch
from composer_sassha.optim.parameters import Memory, ParameterView
from composer_sassha.optim.passes import Closure, PassRunner
from composer_sassha.optim.proxy import OptimizerProxy
from composer_sassha.optim.refresh import Outcome, RefreshPolicy
from composer_sassha.optim.transaction import Protection, Transaction
from composer_sassha.perturbations import Perturbation, unperturbed


class SharpnessAwareOptimizer(OptimizerProxy):
    """Wraps an optimizer: its gradient is taken at displaced weights, its Hessian diagonal kept fresh.

    A step is a program of passes (`composer_sassha.perturbations`), each one call of the closure:

        ASCENT    at w      gives g(w), hence the displacement e    (only when an ascent is due)
        DESCENT   at w + e  gives g(w + e), and when a refresh is due the Hessian diagonal there
        then      w is restored bit for bit, and the base optimizer steps with the program's update

    An ascent is due when `steps_taken % interval == 0`. A closure that returns None (its gradient overflowed)
    skips the step, which then changes nothing and does not count. So does a Hessian that is not finite before
    there is any estimate; later, the step goes on with the old one and the refresh is tried again. After an
    exception in a pass, weights, model and RNG states are those from before the step. The descent draws the
    same random numbers as the ascent, and leaves no trace in the model (its statistics). With a partial
    ascent it is the ascent that leaves none.

    Parameter groups, state and hooks are the base optimizer's own; see `OptimizerProxy`.

    Args:
        base_optimizer: what updates the weights.
        perturbation: one of `composer_sassha.perturbations`; None: the weights are not displaced.
        interval: steps between perturbed steps, >= 1. Default: 1.
        curvature: when and how the Hessian diagonal is estimated; needs a base optimizer with
            `update_curvature`. None: never.
        model: what the closure runs; what a forward changes in it (buffers, untrained parameters, attributes)
            is protected as said above. Without it only the RNG states are.
        process_group: the ranks that share the gradient; False: none, every rank has a model of its own.
            Default: the process group of `model` (DistributedDataParallel, FSDP2), else False.
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

    def __init__(
        self,
        base_optimizer: Optimizer,
        perturbation: Perturbation | None = None,
        interval: int = 1,
        *,
        curvature: LazyCurvature | None = None,
        model: nn.Module | None = None,
        process_group: Group = None,
        sync_ascent: bool = False,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
        partial_ascent: bool = False,
    ) -> None:
        super().__init__(base_optimizer)
        self.counters = Counters(self)
        self.refresh = RefreshPolicy(self.counters)
        self.set_perturbation(perturbation, interval, sync_ascent=sync_ascent, partial_ascent=partial_ascent)
        self.set_curvature(curvature)
        self.model = model
        self.process_group = given_ranks(supported.OWNER, process_group)
        self.runner = PassRunner(model)
        self.protection = Protection(self)
        self._names = {p: name for name, p in named_parameters or ()}
        self.phase: Phase = None  # of the running step; None between steps and where there is only one pass
        self.metrics: dict[str, Any] = {}  # of the latest step
        self.skipped_steps = 0  # since this process began
        self.watch = Watch()

    def set_perturbation(
        self,
        perturbation: Perturbation | None,
        interval: int = 1,
        *,
        sync_ascent: bool = False,
        partial_ascent: bool = False,
    ) -> None:
        """Choose the perturbation; see the class for the arguments."""
        supported.check_perturbation(perturbation, self.base_optimizer)
        self._checked = False
        self.perturbation = perturbation
        self.interval = validate.integer("SharpnessAwareOptimizer", "interval", interval, low=1)
        self.sync_ascent = validate.boolean("SharpnessAwareOptimizer", "sync_ascent", sync_ascent)
        self.partial_ascent = validate.boolean("SharpnessAwareOptimizer", "partial_ascent", partial_ascent)

    def set_curvature(self, curvature: LazyCurvature | None) -> None:
        """Choose when and how the Hessian diagonal is estimated; see the class."""
        supported.check_curvature(curvature, self.base_optimizer)
        self._checked = False
        self.refresh.set_curvature(curvature)

    @property
    def curvature(self) -> LazyCurvature | None:
        """When and how the Hessian diagonal is estimated; None: never."""
        return self.refresh.curvature

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        names = ("perturbation", "interval", "curvature", "model", "process_group", "sync_ascent")
        settings = {name: getattr(self, name) for name in (*names, "partial_ascent")}
        settings["named_parameters"] = [(name, p) for p, name in self._names.items()]
        return _rebuild, (self.base_optimizer, settings, self.skipped_steps)

    def __repr__(self) -> str:
        how = f"{self.perturbation!r}, interval={self.interval}"
        return f"SharpnessAwareOptimizer({self.base_optimizer!r}, {how})"

    @property
    def steps_taken(self) -> int:
        """Steps taken so far, skipped ones not counted; saved with the optimizer's state."""
        return int(self.counters["steps_taken"])

    def ascent_due(self) -> bool:
        """Whether the coming (or running) step is a perturbed one."""
        return self.perturbation is not None and self.steps_taken % self.interval == 0

    def refresh_due(self) -> bool:
        """Whether the coming (or running) step refreshes the Hessian."""
        return self.refresh.due

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
            RuntimeError: there is no closure, and a learning rate is not 0. Loading a checkpoint steps with
                all of them at 0 and without a closure, to create the optimizer's state.
        """
        if closure is None:
            if any(group.get("lr") != 0 for group in self.param_groups):
                raise RuntimeError(
                    "SharpnessAwareOptimizer.step() needs a closure that computes the loss and its gradient: "
                    "it may be called several times a step"
                )
            self._update(Memory(self._view(), self.perturbation))
            return None

        self.counters.fill()  # the groups may have been replaced
        self.metrics = {}
        with Transaction(self.protection, self.model, self.runner) as transaction:
            try:
                loss = self._take_step(torch.enable_grad()(closure), scaler, transaction)
            finally:
                self.phase = None
                self.refresh.end()
        if loss is not None:
            self.counters.update(steps_taken=self.steps_taken + 1)
        return loss

    def _take_step(self, closure: Closure, scaler: GradScaler | None, transaction: Transaction) -> Any:
        view, perturbation = self._view(), self.perturbation
        if not self._checked:
            supported.check_training(view, self.runner.model, perturbation, self.curvature, scaler)
            self._checked = True
        memory = Memory(view, perturbation)
        point = view.point(name_of=self._name_of, step=self.steps_taken, memory=memory, metrics=self.metrics)
        if perturbation is None:
            program = unperturbed()
        else:
            program = perturbation.step(point) if self.ascent_due() else perturbation.between(point)

        def begin_pass(phase: Phase) -> None:
            if phase != "ascent":
                self.refresh.begin(view, scaler)
            self.phase = phase

        driver = Driver(self, view, transaction, closure, begin_pass, getattr(perturbation, "mixes", False))
        with self.refresh.differentiable(scaler):
            seen, last, update = driver.run(program)
        if seen is not None:
            if driver.ascended and not self.partial_ascent and perturbation is not None:
                self.metrics.update(perturbation.metrics(last - seen))
            if update is not None:
                view.set_gradient(update, memory, average=driver.own_gradients)
            del update  # the base optimizer may need its memory
            if driver.mixes:
                view.mirror()
                self.runner.edit_update()
        if seen is None or self.refresh.finish(self.base_optimizer, scaler, self.metrics) is Outcome.SKIPPED:
            transaction.start_again()
            self._skipped(overflowed=seen is None and scaler is None)
            return None
        self._update(memory)
        return seen

    def _update(self, memory: Memory) -> None:
        """Step the base optimizer, and keep what the perturbation remembers."""
        memory.allocate(p for p in memory.view.trainable if p.grad is not None)
        self.base_optimizer.step()
        memory.keep()

    def _skipped(self, overflowed: bool) -> None:
        self.skipped_steps += 1
        self.metrics["skipped_steps"] = self.skipped_steps
        if overflowed and self.skipped_steps == 1:  # with a scaler it is no news
            supported.warn_of_none()

    def attach(self, loss: Tensor, **estimation: Any) -> Tensor:
        """Return the loss to differentiate; only on a pass that estimates is it `Estimation.attach`'s."""
        running = self.refresh.estimation
        return loss if running is None else running.attach(loss, **estimation)

    def backward(
        self, loss: Tensor, weight: float = 1.0, *, scaler: GradScaler | None = None, **estimation: Any
    ) -> None:
        """Call `loss.backward()`, and estimate the Hessian diagonal on the way if this pass has to.

        Args:
            loss: a scalar; call this once per microbatch, with its mean loss.
            weight: of the microbatch in the batch, such as 1 / n for n equal ones. Dividing the loss instead
                would make 'gauss_newton', 'empirical_fisher' and 'finite_difference' estimate another loss
                than they evaluate. Default: 1.
            scaler: scales the loss, not yet scaled, for float16.
            estimation: what the estimator needs beside the loss; see `Estimation.attach`.
        """
        attached = self.attach(loss, weight=weight, **estimation)
        weighted = attached if weight == 1 else attached * weight
        (weighted if scaler is None else scaler.scale(weighted)).backward()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the base optimizer."""
        super().add_param_group(param_group)
        self.counters.fill()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this or of the base optimizer; the counters are in its parameter groups."""
        super().load_state_dict(state_dict)
        self.counters.fill()
        view = self._view()
        memory = Memory(view, self.perturbation)
        memory.allocate(p for p in view.trainable if self.state.get(p))
        memory.keep()

    def _view(self) -> ParameterView:
        return ParameterView(self, self.model, self.process_group)

    def _name_of(self, p: Tensor) -> str | None:
        if p not in self._names and self.model is not None:
            self._names.update({p: name for name, p in self.model.named_parameters()})
        return self._names.get(p)


# Hooks are the base's (see __getattr__), and torch runs them around the base's step: once per update, not for
# a skipped step. This step must not run them again.
SharpnessAwareOptimizer.step.hooked = True  # type: ignore[attr-defined]


def _rebuild(base: Optimizer, settings: dict[str, Any], skipped_steps: int) -> SharpnessAwareOptimizer:
    optimizer = SharpnessAwareOptimizer(base, **settings)
    optimizer.skipped_steps = skipped_steps
    return optimizer
