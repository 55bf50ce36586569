"""The sum over microbatches and ranks that an estimate of the diagonal is."""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from composer_sassha.common.ranks import ALONE, Ranks
from composer_sassha.common.sharding import Shards, local
from composer_sassha.common.tensors import unflatten, wide_dtype
from composer_sassha.curvature.empirical_fisher import empirical_fisher_diagonal


class WeightedSum:
    """Adds up diagonals with weights, and averages them over the ranks.

    Args:
        params: the parameters whose diagonal is wanted, at least one.
        shards: the ranks that hold the other parts of sharded parameters; None: they are whole.
        ranks: those that share the gradient. Default: this process alone.

    Attributes:
        batch_weight: of the whole batch, as the backwards bring it along.
    """

    def __init__(self, params: Sequence[Tensor], shards: Shards | None, ranks: Ranks = ALONE) -> None:
        self._params, self._shards, self._ranks = params, shards, ranks
        self._parts = local(params)  # what this rank holds of each: of a whole parameter, all of it
        # One flat tensor, so that one collective averages it: the diagonal, and each parameter's uses.
        size = sum(p.numel() for p in self._parts) + len(params)
        self._total = torch.zeros(size, dtype=wide_dtype(params), device=params[0].device)
        self.batch_weight: Tensor | float = 0.0
        self._estimated_weight: Tensor | float = 0.0  # of the samples that were estimated on
        self._count: Tensor | int = 0

    def add(
        self, diagonals: Sequence[Tensor], own: Sequence[int], weight: Tensor, count: int | Tensor = 0
    ) -> None:
        """Add an estimate.

        Args:
            diagonals: of the parameters that were used; they are overwritten.
            own: their positions.
            weight: of the samples that were estimated on.
            count: the number of predictions among them, for `square`.
        """
        self._estimated_weight = self._estimated_weight + weight
        self._count = self._count + count * (weight != 0)  # ESAM pads with samples of weight 0
        if own:
            entries, uses = self._split()
            torch._foreach_mul_(list(diagonals), weight)
            torch._foreach_add_([entries[i] for i in own], list(diagonals))
            torch._foreach_add_([uses] if len(own) == len(uses) else [uses[i] for i in own], 1)

    def square(self) -> None:
        """Turn the sum of gradients into that of their mean's `empirical_fisher_diagonal`."""
        entries = self._total[: -len(self._params)].div_(self._estimated_weight)
        (diagonal,) = empirical_fisher_diagonal([entries], self._count)
        torch.mul(diagonal, self._estimated_weight, out=entries)

    def average(
        self, of_a_part: bool, floor: float = 0.0
    ) -> tuple[Mapping[Tensor, Tensor] | None, dict[str, float]]:
        """Average the sum over the ranks; once.

        Args:
            of_a_part: not all samples were estimated on; they count as if they were the whole batch.
            floor: see `LazyCurvature`.

        Returns:
            The diagonal by parameter, without those that the pass did not use, or None if it is not finite;
            and what to log about it.
        """
        total, shards = self._total, self._shards
        diagonal, counts = self._split()
        if shards is not None:
            self._ranks.average_(torch.as_tensor(self.batch_weight))
        if shards is not None or of_a_part:
            total.mul_(self.batch_weight / self._estimated_weight)
        if shards is None:
            self._ranks.average_(total)
        entries = total[: -len(self._params)]
        # One read-back: the sum tells whether all entries are finite.
        sums = torch.stack([entries.abs().sum(), (entries < 0).sum(), total.new_tensor(entries.numel())])
        if shards is not None:
            dist.all_reduce(sums, group=shards.group)
        magnitude, negative, number, *used = torch.cat([sums, counts]).tolist()
        if not math.isfinite(magnitude):
            return None, {}
        if floor:
            self._raise(diagonal, floor)
        measured = {p: h for p, h, count in zip(self._params, diagonal, used, strict=True) if count > 0}
        return measured, {"mean_abs": magnitude / number, "negative_fraction": negative / number}

    def _raise(self, diagonal: Sequence[Tensor], floor: float) -> None:
        """Raise every magnitude to `floor` times the mean magnitude in its tensor, in place."""
        magnitudes = torch.stack(torch._foreach_norm(list(diagonal), 1))
        if self._shards is not None:
            dist.all_reduce(magnitudes, group=self._shards.group)
        sizes = magnitudes.new_tensor([p.numel() for p in self._params])  # of sharded parameters, all parts
        # A tensor of zeros alone says nothing about its scale: an expert that no sample has reached.
        means = torch.where(magnitudes > 0, magnitudes / sizes, magnitudes.sum() / sizes.sum())
        for h, least in zip(diagonal, means * floor, strict=True):
            h.copy_(torch.where(h < 0, h.clamp(max=-least), h.clamp(min=least)))

    def _split(self) -> tuple[list[Tensor], Tensor]:
        entries = self._total.numel() - len(self._parts)
        return unflatten(self._total[:entries], self._parts), self._total[entries:]
