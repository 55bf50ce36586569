"""One estimating pass: the diagonal is gathered on the way of an ordinary backward."""

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from composer_sassha.common.ranks import ALONE, Ranks
from composer_sassha.common.sharding import forget_copies, local, shards_of
from composer_sassha.common.validate import SettingError
from composer_sassha.curvature.delivery import stand_in
from composer_sassha.curvature.estimators import Again, Evaluation, Microbatch
from composer_sassha.curvature.finite_difference import refuse_half_precision, warn_of_kinks
from composer_sassha.curvature.gauss_newton import warn_of_divided_loss
from composer_sassha.curvature.gradients import (
    ByBackward,
    reentrant_checkpoints_refused,
    scaled_gradients,
    without_hooks,
)
from composer_sassha.curvature.graph import leaves
from composer_sassha.curvature.hooks import retaining, silence
from composer_sassha.curvature.hutchinson import differentiable_gradients
from composer_sassha.curvature.lazy import LazyCurvature
from composer_sassha.curvature.weighted_sum import WeightedSum


class Estimation:
    """Gathers the estimate of one pass, microbatch by microbatch.

    Each microbatch's gradient is computed before its backward, which then hands that very gradient to all
    leaves of the loss's graph, whether they are the optimizer's or not. In between, the estimator makes of
    it, of its graph or of the loss what it needs. The estimates are added up with the weights that backward
    brings along (a microbatch's part of the batch) and averaged over the ranks in one collective.

    Args:
        settings: how to estimate.
        params: the parameters whose diagonal is wanted.
        step: the number of steps taken; seeds the draws.
        gradient_scale: what a gradient scaler multiplies the loss with, for float16 compute: the gradient is
            taken at this scale, and the estimate is freed of it.
        scale: what the loss is multiplied with while it is differentiated for the estimate alone.
        model: what has sharded parameters, and gathers them.
        look: warn of what the estimator cannot work with, or refuse it.
        ranks: those that share the gradient, and average the estimate. Default: this process alone.

    Raises:
        RuntimeError: `params` is empty.
        SettingError: they are sharded, and the settings are for whole parameters only.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> estimation = Estimation(LazyCurvature(), [w], step=0)
        >>> estimation.attach((w**3).sum()).backward()
        >>> diagonal, metrics = estimation.finish()
        >>> diagonal[w], w.grad
        (tensor([ 6., 12.]), tensor([ 3., 12.]))
    """

    def __init__(
        self,
        settings: LazyCurvature,
        params: Sequence[Tensor],
        step: int,
        *,
        gradient_scale: float = 1.0,
        scale: float = 1.0,
        model: nn.Module | None = None,
        look: bool = True,
        ranks: Ranks = ALONE,
    ) -> None:
        if not params:
            raise RuntimeError(
                "the Hessian refresh finds no parameter that requires a gradient; unfreeze some"
            )
        self.settings, self.needs = settings, settings.needs
        self._shards = shards_of(params)
        if self._shards is not None and (reason := settings.whole_only):
            raise SettingError(reason)
        self._params, self._step = list(params), step
        self._scale, self._gradient_scale, self._model = scale, gradient_scale, model
        self._look, self._ranks = look, ranks
        self._sum = WeightedSum(self._params, self._shards, ranks)
        self._attached = self._delivered = self._samples_seen = 0

    def attach(
        self,
        loss: Tensor,
        *,
        logits: Tensor | None = None,
        labels: Tensor | None = None,
        size: int | None = None,
        batch_size: int | None = None,
        again: Again | None = None,
        weight: float = 1.0,
    ) -> Tensor:
        """Return a loss with the same value and gradient whose backward also gathers the estimate.

        Args:
            loss: one number, of one microbatch.
            logits: [N, classes, ...], of which the loss is the mean cross-entropy; for 'gauss_newton'.
            labels: class numbers [N, ...], outside of [0, classes) where nothing is predicted, or
                probabilities [N, classes, ...]; for 'gauss_newton', and for 'empirical_fisher' where samples
                are not predictions.
            size: samples in this microbatch; for 'empirical_fisher', 'finite_difference' and a
                `batch_fraction`.
            batch_size: samples in all microbatches of this rank's batch; for a `batch_fraction`.
            again: `again(count)` returns a context (`contextlib.contextmanager`) in which the loss of this
                microbatch's first `count` samples has been computed once more, as a Tensor or an
                `Evaluation`, with the same dropout masks; for 'finite_difference' and a `batch_fraction`.
            weight: of the microbatch, which sharded parameters need if `size` is not given; the backward of
                whole ones brings it along. Default: 1.

        Raises:
            ValueError: something is missing or does not fit, or an operation has no second derivative.
        """
        if self._shards is not None:
            return self._attach_sharded(Evaluation(loss, logits, labels), size, again, weight)
        part = self._part(size, batch_size)
        self._attached += 1
        if part == 0:
            loss = loss.clone()  # the caller's own is not to keep this hook
            loss.register_hook(self._skip)
            return loss

        # The last come first in the backward, so that those nearest to the loss are at the end.
        everyone = [*self._params, *reversed(leaves(loss, besides=self._params))]
        activations = retaining()
        with without_hooks(everyone), reentrant_checkpoints_refused():
            scale = self._gradient_scale
            if scale != 1 and size and batch_size:  # the backward of an ordinary step starts from this
                scale *= size / batch_size
            if part is None:
                evaluation = Evaluation(loss, logits, labels)
                all_grads, own, diagonals = self._estimate(evaluation, everyone, size, again, scale)
            else:
                # First of all the gradient, so that the graph is freed before the second one is built.
                all_grads = scaled_gradients(loss, everyone, scale)
                if again is None:
                    raise ValueError(_what_a_fraction_needs(self.settings.batch_fraction))
                with silence(), again(part) as result:
                    evaluation = Evaluation(result) if isinstance(result, Tensor) else result
                    _, own, diagonals = self._estimate(evaluation, self._params, part, again)
        # Parameters that the loss does not use stay unconnected, as DDP's find_unused_parameters expects.
        used = [p for p, grad in zip(everyone, all_grads, strict=True) if grad is not None]
        grads = [grad.detach() for grad in all_grads if grad is not None]
        fraction = 1.0 if part is None or size is None else part / size
        count = self.needs.count(evaluation, size if part is None else part) if self.needs.count else 0

        def weigh(weight: Tensor) -> None:
            self._skip(weight)
            self._sum.add(diagonals, own, weight / self._gradient_scale * fraction, count)

        retained = {h: h.grad.detach() / scale for h in activations if h.grad is not None}
        return stand_in(loss, used, grads, retained, weigh)

    def _attach_sharded(
        self, evaluation: Evaluation, size: int | None, again: Again | None, weight: float
    ) -> Tensor:
        """Estimate on the union of the ranks' microbatches, by backwards of our own, and leave the loss be.

        FSDP2 averages in every backward, and leaves each rank the gradient of its part. So the loss that is
        differentiated is the mean over all ranks, in which every sample counts alike.
        """
        assert self._shards is not None
        self._attached += 1
        self._look_at(evaluation)
        samples = torch.tensor(float(size or weight), device=evaluation.loss.device)
        mean = samples.clone()
        self._ranks.average_(mean)
        in_mean = (samples / mean).item()
        gradients = ByBackward(self._params, in_mean)
        batch = Microbatch(
            evaluation,
            grads=gradients(evaluation.loss, True) if self.needs.evaluates_again else (),
            params=local(self._params),  # now: in its first forward, FSDP2 puts other parts in their place
            # The probe is that of this rank's part of the parameters, the labels those of its samples.
            keys=self._keys(self._shards.part if self.needs.evaluates_again else self._ranks.rank),
            size=size,
            again=again,
            # What is not evaluated again has the graph that the loss still needs.
            gradients=gradients if self.needs.evaluates_again else lambda loss, _: gradients(loss, True),
            spread=self._ranks.size / in_mean,
            on_write=functools.partial(forget_copies, self._model),
        )
        diagonals = self.needs.diagonal(batch)
        used = sorted(gradients.used)
        if not used:
            raise RuntimeError(
                "LazyHessian: FSDP2 has averaged no gradient; on steps that refresh the Hessian it is to do "
                "so in every backward: model.set_requires_gradient_sync(True)"
            )
        self._sum.add([diagonals[i] for i in used], used, mean)
        loss = evaluation.loss.clone()
        loss.register_hook(self._skip)
        return loss

    def _keys(self, own: int) -> list[tuple[int, ...]]:
        """One key per draw for the running microbatch, of this rank alone."""
        return [
            (self.settings.seed, self._step, own, self._attached - 1, sample)
            for sample in range(self.settings.samples)
        ]

    def _part(self, size: int | None, batch_size: int | None) -> int | None:
        """Return how many of the microbatch's samples are to be estimated on; None means all."""
        if self.settings.batch_fraction == 1:
            return None
        if size is None or batch_size is None:
            raise ValueError(_what_a_fraction_needs(self.settings.batch_fraction))
        left = max(1, round(self.settings.batch_fraction * batch_size)) - self._samples_seen
        self._samples_seen += size
        return None if size <= left else max(0, int(left))  # a DataSpec may count in fractions

    def _estimate(
        self,
        evaluation: Evaluation,
        wrt: Sequence[Tensor],
        size: int | None,
        again: Again | None,
        gradient_scale: float | None = None,
    ) -> tuple[tuple[Tensor | None, ...], list[int], list[Tensor]]:
        """Return the gradients, which of our parameters the loss uses, and the estimate for those.

        The gradients are taken at `gradient_scale` and freed of it; None: they are for the estimate alone.
        """
        self._look_at(evaluation)
        keys, loss = self._keys(self._ranks.rank), evaluation.loss
        scaled = loss if self._scale == 1 else loss * self._scale
        if not self.needs.second_order:
            scale = self._scale if gradient_scale is None else gradient_scale
            all_grads = of_loss = scaled_gradients(loss, wrt, scale, self.needs.retains_graph)
        elif gradient_scale is None or gradient_scale == self._gradient_scale == 1:
            all_grads = of_loss = differentiable_gradients(scaled, wrt)
        else:  # at the gradient's scale the second derivative overflows, at its own the gradient underflows
            all_grads = scaled_gradients(loss, wrt, gradient_scale, retain_graph=True)
            with silence():
                of_loss = differentiable_gradients(scaled, wrt)
        found = [(i, grad) for i, grad in enumerate(of_loss[: len(self._params)]) if grad is not None]
        if any(grad.is_sparse for _, grad in found):
            raise SettingError(
                "LazyHessian: sparse gradients give no estimate; build the embedding with sparse=False"
            )
        if not found:
            return all_grads, [], []
        own, grads = [i for i, _ in found], [grad for _, grad in found]
        batch = Microbatch(evaluation, grads, [self._params[i] for i in own], keys, size, again, self._scale)
        with silence():
            return all_grads, own, self.needs.diagonal(batch)

    def _look_at(self, evaluation: Evaluation) -> None:
        """Say once what the estimator cannot work with."""
        if not self._look:
            return
        self._look = False
        if self.needs.smooth:
            refuse_half_precision(evaluation.loss)
            warn_of_kinks(evaluation.loss)
        loss, logits, labels = evaluation
        evaluated = self.needs.predictions or self.needs.evaluates_again
        if evaluated and logits is not None and labels is not None and logits.shape[:1] == labels.shape[:1]:
            warn_of_divided_loss(loss, logits, labels)

    def _skip(self, weight: Tensor) -> None:
        self._delivered += 1
        self._sum.batch_weight += weight.reshape(()) / self._gradient_scale

    def finish(self) -> tuple[Mapping[Tensor, Tensor] | None, dict[str, float]]:
        """Average the estimate over the ranks; see `WeightedSum.average`.

        Raises:
            RuntimeError: a loss of this pass did not come by `attach`, or its backward was not called.
        """
        if not self._attached or self._delivered != self._attached:
            raise RuntimeError(
                f"the Hessian refresh saw {self._attached} losses and {self._delivered} backwards; call "
                "optimizer.backward(loss) instead of loss.backward(), once per loss"
            )
        if self.needs.count is not None:
            self._sum.square()
        return self._sum.average(self.settings.batch_fraction < 1, self.settings.floor)

    def forget(self) -> None:
        """Drop the estimate: the loss may be kept for its value, and with it this object."""
        del self._sum

    @property
    def looked(self) -> bool:
        """Whether a loss was looked at."""
        return not self._look


def _what_a_fraction_needs(batch_fraction: float) -> str:
    return (
        f"LazyHessian: batch_fraction={batch_fraction} may end inside a microbatch; pass size=, batch_size= "
        "and again= to backward, see Estimation.attach"
    )
