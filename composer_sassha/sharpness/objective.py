"""The mean loss over fixed batches as a function of the weights, with its derivatives."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from composer_sassha.common.batches import Samples, copied, must_divide, unwrapped
from composer_sassha.common.losses import total_loss
from composer_sassha.common.ranks import ALONE, Group, Ranks, given_ranks, sharing
from composer_sassha.common.side_effects import SideEffects
from composer_sassha.common.snapshot import Snapshot
from composer_sassha.common.tensors import flatten, unflatten, wide_dtype
from composer_sassha.common.validate import SettingError
from composer_sassha.curvature.by_parts import differentiable_twice
from composer_sassha.curvature.gradients import without_hooks
from composer_sassha.curvature.hooks import silence, silenceable
from composer_sassha.curvature.hutchinson import (
    NoSecondDerivative,
    differentiable_gradients,
    hessian_product,
)

_SEED = 0  # of the random numbers that a model draws while it is measured


class Unfinished(Exception):
    """A measurement without a result: its time was over, or a gradient or product was not finite."""


class Objective:
    """Computes the mean loss over fixed batches and its first two derivatives, at the present weights.

    Every batch is weighted by its number of samples. All vectors are flat, over the parameters that require a
    gradient, in their dtype. The model draws the same random numbers in every evaluation.

    Args:
        params: the parameters by name; those that require no gradient are held fixed.
        loss: returns the loss of one batch, a mean over its samples.
        batches: at least one batch, each with its number of samples.
        process_group: the ranks of which each holds a part of the batches. Sums are then over all of them,
            and all must call the same methods. Default: None, this process's batches alone.
        tick: called before each evaluation. Default: does nothing.
        alone: returns a context that undoes what an evaluation of one batch leaves behind in the model.
            Default: does nothing.
        cut: how to divide a batch. Default: along the first dimension.

    Raises:
        SettingError: no parameter requires a gradient, a parameter is less precise than float32, or there is
            no batch.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> objective = Objective({"w": w}, lambda x: (x * w**2).sum(), [(torch.tensor([1.0, 3.0]), 1)])
        >>> objective.loss(), objective.gradient(), objective.product(torch.tensor([1.0, 1.0]))
        (13.0, tensor([ 2., 12.]), tensor([2., 6.]))
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        loss: Callable[[Any], Tensor],
        batches: Sequence[tuple[Any, int]],
        process_group: Group = None,
        tick: Callable[[], None] = lambda: None,
        alone: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
        cut: Samples = Samples(),  # noqa: B008  # frozen
    ) -> None:
        trained = {name: p for name, p in params.items() if p.requires_grad}
        self.names, self.params = list(trained), list(trained.values())
        self.loss_of, self.batches, self.tick = loss, list(batches), tick
        self.alone, self.cut = alone, cut
        self.ranks: Ranks = given_ranks("sharpness", process_group) or ALONE
        if not self.params:
            raise SettingError("sharpness: no parameter requires a gradient; unfreeze some")
        coarse = {p.dtype for p in self.params} - {torch.float32, torch.float64}
        if coarse:
            raise SettingError(
                f"sharpness: parameters in {min(map(str, coarse))} are too coarse to measure curvature; keep "
                "them in float32 (precision='amp_bf16' does)"
            )
        if not self.batches:
            raise SettingError("sharpness: there is no batch to measure on; use a loader that has some")

    @property
    def size(self) -> int:
        """The number of weights, over all parameters that require a gradient."""
        return sum(p.numel() for p in self.params)

    @property
    def samples(self) -> int:
        """The number of samples in this process."""
        return sum(count for _, count in self.batches)

    def like(self, vector: Tensor) -> list[Tensor]:
        """View a flat vector as the parameters, each in its dtype."""
        return [v.to(p.dtype) for v, p in zip(unflatten(vector, self.params), self.params, strict=True)]

    def loss(self) -> float:
        """Return the loss."""
        with torch.no_grad():
            return self._mean(lambda batch: self._loss(batch).double().reshape(1)).item()

    def gradient(self) -> Tensor:
        """Return the gradient, of shape [size].

        Raises:
            Unfinished: the gradient is not finite.
        """
        return _finite(self._mean(self._gradient))

    def product(self, vector: Tensor) -> Tensor:
        """Return the Hessian times a vector, both of shape [size], by reverse-over-reverse differentiation.

        Raises:
            SettingError: an operation of the model has no second derivative.
            Unfinished: the product is not finite.
        """
        vectors = self.like(vector)
        return _finite(self._mean(lambda batch: self._product(batch, vectors)))

    def groups(self, m: int) -> list["Objective"]:
        """Divide this process's samples, in order, into groups of m; the last, smaller group is dropped.

        Args:
            m: samples in a group, >= 1.
        """
        groups: list[list[tuple[Any, int]]] = [[]]
        missing = m  # samples, in the last group
        for batch, count in self.batches:
            start = 0
            while start < count:
                taken = min(missing, count - start)
                groups[-1] += self._part(batch, start, start + taken, count)
                start, missing = start + taken, missing - taken
                if not missing:
                    groups.append([])
                    missing = m
        params = dict(zip(self.names, self.params, strict=True))
        return [
            Objective(params, self.loss_of, group, alone=self.alone, cut=self.cut) for group in groups[:-1]
        ]

    def _part(self, batch: Any, start: int, stop: int, count: int) -> list[tuple[Any, int]]:
        advice = (
            "leave it out with Measures(m=()), or give the loader a DataSpec whose split_batch makes "
            "microbatches of it"
        )
        with must_divide("sharpness: m-sharpness divides batches", advice):
            return self.cut.parts(batch, start, stop, count)

    def _loss(self, batch: Any) -> Tensor:
        torch.default_generator.manual_seed(_SEED)
        for device in {p.device for p in self.params if p.device.type == "cuda"}:
            torch.cuda.default_generators[device.index].manual_seed(_SEED)
        return self.loss_of(copied(batch))  # the model may edit its batch

    def _gradient(self, batch: Any) -> Tensor:
        with torch.enable_grad(), without_hooks(self.params):
            grads = torch.autograd.grad(self._loss(batch), self.params, allow_unused=True)
        return flatten(grads, like=self.params)

    def _product(self, batch: Any, vectors: Sequence[Tensor]) -> Tensor:
        try:
            with torch.enable_grad(), without_hooks(self.params):
                grads = differentiable_gradients(self._loss(batch), self.params)
                products = hessian_product(grads, self.params, vectors)
        except NoSecondDerivative as error:
            raise SettingError(
                f"sharpness: the Hessian needs a second derivative, and {error.operation} has none; put "
                f"another kernel in place of {error.operation}, or leave the Hessian out: Measures("
                "eigenvalues=0, trace_samples=0) and no spectrum"
            ) from error
        return flatten(products, like=self.params)

    def _mean(self, of: Callable[[Any], Tensor]) -> Tensor:
        """Average over all samples of all ranks, in one collective with the number of samples."""
        self.tick()
        total: Tensor | None = None
        for batch, count in self.batches:
            with self.alone():
                term = of(batch) * count
            total = term if total is None else total.add_(term)
        assert total is not None
        total = torch.cat([total, total.new_tensor([self.samples])])
        self.ranks.reduce_(total)
        return total[:-1] / total[-1]


def objective_of(
    model: nn.Module,
    batches: Sequence[tuple[Any, int]],
    tick: Callable[[], None] = lambda: None,
    process_group: Group = None,
    cut: Samples = Samples(),  # noqa: B008  # frozen
) -> Objective:
    """Return the objective of a model that computes its own loss, `model.loss(model(batch), batch)`.

    Args:
        model: has a method `loss(outputs, batch)`, as a `ComposerModel` has; wrapped for data-parallel
            training or not.
        batches: at least one batch, each with its number of samples.
        tick: see `Objective`.
        process_group: see `Objective`; False: this process's batches alone. Default: the process group of a
            model wrapped for data-parallel training, else False.
        cut: see `Objective`.
    """
    inner, ranks = unwrapped(model), given_ranks("sharpness", process_group) or sharing(None, model)
    effects = SideEffects(inner)

    @contextlib.contextmanager
    def alone() -> Iterator[None]:
        before = effects.take()
        try:
            yield
        finally:
            effects.restore(before)

    return Objective(
        dict(inner.named_parameters()),
        lambda batch: total_loss(inner.loss(inner(batch), batch)),
        batches,
        ranks,
        tick,
        alone,
        cut,
    )


@contextlib.contextmanager
def undisturbed(model: nn.Module, batch_statistics: bool = False) -> Iterator[None]:
    """Put a model in evaluation mode and in full precision; restore everything when the block ends.

    Restored are the modes of all modules, the buffers, the random number generators (of Python, NumPy,
    PyTorch and the GPUs in use) and the precision of matrix products, also after an exception. Operations
    without a second derivative are computed by parts that have one (`differentiable_twice`), a compiled model
    runs eagerly, and hooks of the backward are not called.

    Args:
        model: wrapped for data-parallel training, compiled, or neither.
        batch_statistics: BatchNorm normalizes by the mean and variance of each batch, as in training, and
            leaves its running statistics alone. Default: False.
    """
    model = unwrapped(model)
    modes = [(module, module.training) for module in model.modules()]
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    tracking = [norm.track_running_stats for norm in norms]
    devices = {p.device for p in model.parameters()}
    before = Snapshot(SideEffects(model), devices)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(differentiable_twice())
        stack.enter_context(silenceable())
        stack.enter_context(silence())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for kind in {device.type for device in devices}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if any(device.type == "cuda" for device in devices):
            stack.enter_context(_without_tf32())
        try:
            model.eval()
            for norm in norms if batch_statistics else ():
                # Without tracking, the running values are neither used nor updated.
                norm.training, norm.track_running_stats = True, False
            yield
        finally:
            for norm, tracks in zip(norms, tracking, strict=True):
                norm.track_running_stats = tracks
            for module, training in modes:
                module.training = training
            before.restore()


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """Disable TF32 on GPUs: its ten bits are less than a Hessian-vector product needs."""
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    allowed = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, value in zip(backends, allowed, strict=True):
            backend.allow_tf32 = value


def _finite(vector: Tensor) -> Tensor:
    if not torch.isfinite(vector).all():
        raise Unfinished("not finite")
    return vector


def wide_like(objective: Objective) -> Tensor:
    """Return an empty vector with the dtype and device of an objective's vectors."""
    return torch.empty(0, dtype=wide_dtype(objective.params), device=objective.params[0].device)
