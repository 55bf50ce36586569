"""The floor of a method: its passes, with nothing around them that a pass does not need.

In a Trainer, a bare optimizer calls the closure once per pass, and updates nothing; on a refresh step an
algorithm takes the place of the last backward pass by a gradient that can be differentiated and one product
of the Hessian with a vector. Without a Trainer, the same passes are those few lines of PyTorch.
"""

import contextlib
import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from composer import Algorithm, Event, Logger, State
from composer.core import get_precision_context
from composer.core.data_spec import default_split_batch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from composer_sassha.algorithms import ESAM, wiring
from composer_sassha.algorithms.base import methods_of
from composer_sassha.benchmark.steps import Kind, Stepper, Timing
from composer_sassha.curvature import LazyCurvature
from composer_sassha.recipes.config import Recipe


def passes(optimizer: Any, kind: Kind) -> int:
    """Return the number of forward and backward passes of a step.

    Args:
        optimizer: the Trainer's, wrapped by our algorithms or not.
        kind: of the step.
    """
    return 2 if kind.perturbs and optimizer.perturbation.ascends else 1


def has_floor(stepper: Stepper) -> bool:
    """Return whether a method's steps consist of whole passes and products with the Hessian.

    ESAM's second pass and a partial ascent take a part of the batch. Only Hutchinson's estimate on the whole
    batch takes one product per sample.
    """
    methods = methods_of(stepper.trainer.state.algorithms)
    return not any(
        isinstance(method, ESAM) or method.ascent_fraction < 1 or _takes_something_else(method.curvature)
        for method in methods
    )


def _takes_something_else(curvature: LazyCurvature | None) -> bool:
    return curvature is not None and (curvature.estimator != "hutchinson" or curvature.batch_fraction < 1)


class BareOptimizer(Optimizer):
    """An optimizer that calls the closure once per pass and updates nothing.

    >>> w = torch.nn.Parameter(torch.zeros(1))
    >>> bare = BareOptimizer([w])
    >>> bare.passes = 2
    >>> bare.step(lambda: print("pass"))
    pass
    pass
    """

    _step_supports_amp_closure = True  # the Trainer's closure may be called more than once

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.0})
        self.passes = 1
        self.products = 0  # of the Hessian with a vector, in the last pass
        self.last = False  # whether that pass is running

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Call the closure once per pass; without one, as when a Trainer saves its state, do nothing."""
        if closure is None:
            return None
        with differentiable() if self.products else contextlib.nullcontext():
            for number in range(1, 1 + self.passes):
                self.last = number == self.passes
                loss = closure()
        return loss


class BareHessian(Algorithm):
    """Take products of the Hessian with a vector in the last pass of a refresh step."""

    def match(self, event: Event, state: State) -> bool:
        """Run at the start, and in the last pass if the `BareOptimizer` asks for products."""
        bare: Any = state.optimizers[0]
        return event == Event.BEFORE_LOAD or (
            event == Event.BEFORE_BACKWARD and bare.last and bare.products > 0
        )

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Differentiate twice, and detach the loss so that the Trainer's backward pass does nothing."""
        if event == Event.BEFORE_LOAD:
            wiring.scale_gradients(state)
            return
        loss: Any = state.loss
        params = [p for p in state.model.parameters() if p.requires_grad]
        add_gradients(params, gradient_and_product(loss, params, state.optimizers[0].products))
        state.loss = loss.detach().requires_grad_()


def gradient_and_product(loss: Tensor, params: Sequence[Tensor], products: int) -> list[Tensor]:
    """Return the gradient, after products of the Hessian with a vector of ones.

    Args:
        loss: a scalar that uses every parameter.
        params: with respect to which it is differentiated.
        products: number of products, at least 1.
    """
    grads = torch.autograd.grad(loss, params, create_graph=True)
    ones = [torch.ones_like(p) for p in params]
    for left in reversed(range(products)):
        torch.autograd.grad(grads, params, ones, retain_graph=left > 0, materialize_grads=True)
    return [grad.detach() for grad in grads]


def add_gradients(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Add gradients to `p.grad`, as a backward pass does."""
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad if p.grad is None else p.grad + grad


def differentiable() -> contextlib.AbstractContextManager[Any]:
    """Return a context without fused attention, which has no second derivative."""
    return sdpa_kernel(SDPBackend.MATH)


class Floor:
    """The floor of a method in a Trainer.

    Args:
        recipe: for the Trainer's settings.
        stepper: the method, on whose batch and on a copy of whose model the passes run.
        device: the Trainer's; None takes a GPU if there is one.
    """

    def __init__(self, recipe: Recipe, stepper: Stepper, device: str | None = None) -> None:
        state = stepper.trainer.state
        model: Any = copy.deepcopy(state.model)
        self._method = stepper.optimizer
        self._bare = BareOptimizer([p for p in model.parameters() if p.requires_grad])
        self._stepper = Stepper(recipe, model, stepper.batch, self._bare, [BareHessian()], device=device)
        self.schedule = stepper.schedule

    def take(self, kind: Kind) -> Timing:
        """Take the passes of one step of the method and return their time."""
        self._bare.passes = passes(self._method, kind)
        self._bare.products = self._method.curvature.samples if kind.refreshes else 0
        return self._stepper.take(Kind())

    def close(self) -> None:
        """Close the Trainer."""
        self._stepper.close()


class Raw:
    """The same passes in PyTorch alone: forward, loss and backward, and on a refresh the product.

    Args:
        stepper: the method, on whose batch and on a copy of whose model the passes run.
    """

    def __init__(self, stepper: Stepper) -> None:
        state = stepper.trainer.state
        self._model: Any = copy.deepcopy(state.model).train()
        self._params = [p for p in self._model.parameters() if p.requires_grad]
        parts = default_split_batch(stepper.batch, state.device_train_microbatch_size or 1)
        self._microbatches = [state.device.batch_to_device(part) for part in parts]
        self._state, self._method = state, stepper.optimizer
        self.schedule = stepper.schedule

    def take(self, kind: Kind) -> Timing:
        """Take the passes of one step of the method and return their time."""
        on_gpu, count = self._state.device.name == "gpu", passes(self._method, kind)
        _wait(on_gpu)
        now, cpu = time.perf_counter(), time.process_time()
        with differentiable() if kind.refreshes else contextlib.nullcontext():
            for number in range(1, 1 + count):
                self._pass(self._method.curvature.samples if kind.refreshes and number == count else 0)
        _wait(on_gpu)
        return Timing(time.perf_counter() - now, time.process_time() - cpu)

    def _pass(self, products: int) -> None:
        for p in self._params:
            p.grad = None
        for batch in self._microbatches:
            with get_precision_context(self._state.precision):
                loss = self._model.loss(self._model(batch), batch)
            if products:
                add_gradients(self._params, gradient_and_product(loss, self._params, products))
            else:
                loss.backward()

    def close(self) -> None:
        """Do nothing, as there is no Trainer to close."""


def _wait(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()
