"""The optimizer's parameters as one step sees them, and the vectors over them."""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from composer_sassha.common.ranks import Ranks, sharing
from composer_sassha.common.sharding import Shards, local, shards_of
from composer_sassha.common.tensors import copy_into, flatten, unflatten
from composer_sassha.perturbations import Gradient, Perturbation, Point


class ParameterView:
    """The parameters of one step: every list of them is taken from here.

    Args:
        optimizer: whose parameters they are.
        model: what gathers sharded parameters; None: it is not known.
        given: the ranks that share its gradient, as far as the caller says.

    Raises:
        ValueError: parameters are sharded and there is no model.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module | None, given: Ranks | None = None) -> None:
        self.optimizer, groups = optimizer, optimizer.param_groups
        # Once each: torch only warns of a parameter that is twice in a group.
        self.all: list[Tensor] = [*dict.fromkeys(p for group in groups for p in group["params"])]
        self._maximized = [p for group in groups if group.get("maximize") for p in group["params"]]
        self.trainable = [p for p in self.all if p.requires_grad]
        self.model, self._given = model, given

    @cached_property
    def shards(self) -> Shards | None:
        """The ranks that hold the other parts of sharded parameters; None: they are whole."""
        shards = shards_of(self.trainable)
        if shards is not None and self.model is None:
            raise ValueError(
                "SharpnessAwareOptimizer: sharded parameters need model=, the module given to fully_shard: "
                "it has to gather them anew when they are displaced"
            )
        return shards

    @cached_property
    def ranks(self) -> Ranks:
        """The ranks that share the gradient."""
        return sharing(self._given, self.model, None if self.shards is None else self.shards.ranks)

    @property
    def shard_group(self) -> ProcessGroup | None:
        """The group of those ranks."""
        return None if self.shards is None else self.shards.group

    @property
    def sharded_model(self) -> nn.Module | None:
        """The model that gathers sharded parameters; None: they are whole."""
        return None if self.shards is None else self.model

    def gradient(self) -> Gradient:
        """Return the gradient that the latest pass left."""
        params = [p for p in self.all if p.grad is not None]
        return Gradient(params, everyone=self.trainable, shards=self.shard_group)

    def _others(self) -> list[Tensor]:
        """Return the model's parameters that get a gradient but are not the optimizer's."""
        mine = set(self.all)
        every = () if self.model is None else self.model.parameters()
        return [p for p in every if p.requires_grad and p not in mine]

    def check_size(self, vector: Tensor, what: str) -> None:
        """Raise ValueError if a flat vector is not one over the trainable parameters."""
        size = sum(p.numel() for p in local(self.trainable))
        if vector.shape != (size,):
            raise ValueError(f"{what} has shape {tuple(vector.shape)}; it must be ({size},)")

    def mirror(self) -> None:
        """Change the sign of the gradients of groups with `maximize=True`, for which uphill is downhill."""
        grads = local(p.grad for p in self._maximized if p.grad is not None)
        if grads:
            torch._foreach_neg_(grads)

    def refuse_sparse(self) -> None:
        """Raise RuntimeError if a gradient is sparse."""
        _refuse_sparse([p.grad for p in self.all], "perturb")

    def point(self, **known: Any) -> Point:
        """Return what a perturbation's program can know; `known` is the rest of it."""
        return Point(
            self.trainable,
            states=_States(self.trainable, self.optimizer.state),
            group=self.optimizer.param_groups[0],
            rank=self.ranks.rank if self.shards is None else self.shards.part,
            shards=self.shard_group,
            **known,
        )

    def set_gradient(self, update: Tensor, memory: "Memory", average: bool) -> None:
        """Put a flat update in the place of the gradients.

        Args:
            update: over the trainable parameters.
            memory: what the step wants remembered, averaged likewise.
            average: the update was made of this rank's own gradients: average it over the ranks, and with it
                the gradients of the model's parameters that are not the optimizer's.
        """
        if not self.trainable:
            return
        self.check_size(update, "the update that a perturbation's program returned")
        params = self.trainable
        if average and self.ranks.several and (others := self._others()):
            # No pass was synchronized, so that theirs are not averaged either.
            params, grads = [*params, *others], [p.grad for p in others]
            _refuse_sparse(grads, "be averaged with the update")
            update = torch.cat([update, flatten(grads, like=others)])
        used = [p.grad is not None for p in params]
        if average and self.ranks.several:
            # One collective for all of it. A parameter that no rank has used stays without a gradient.
            parts = [update, update.new_tensor(used), *memory.stored.values()]
            everything = torch.cat(parts)
            self.ranks.average_(everything)
            update, counts, *stored = everything.split([part.numel() for part in parts])
            if not all(used):  # else there is nothing to read back
                used = [count > 0 for count in counts.tolist()]
            memory.stored = dict(zip(memory.stored, stored, strict=True))
        pieces = unflatten(update, local(params))
        chosen = [(p, piece) for p, piece, use in zip(params, pieces, used, strict=True) if use]
        for p, _ in chosen:
            if p.grad is None:  # another rank has used it
                p.grad = torch.empty_like(p)
        copy_into(local(p.grad for p, _ in chosen), [piece for _, piece in chosen])


def _refuse_sparse(grads: Sequence[Tensor | None], what: str) -> None:
    if any(grad is not None and grad.is_sparse for grad in grads):
        raise RuntimeError(f"sparse gradients cannot {what}; build the embedding with sparse=False")


class _States(Sequence[Mapping[str, Any]]):
    """The optimizer's state of each parameter, looked up only where a program reads it, as MSAM does."""

    def __init__(self, params: Sequence[Tensor], state: Mapping[Tensor, Mapping[str, Any]]) -> None:
        self._params, self._state = params, state

    def __len__(self) -> int:
        return len(self._params)

    def __getitem__(self, i: Any) -> Any:
        state = self._state.get(self._params[i], {})
        return dict(zip(state, local(state.values()), strict=True))


class Memory(MutableMapping[str, Tensor]):
    """The vectors that the optimizer's state keeps for a perturbation: read flat, written after the step.

    Args:
        view: the parameters.
        perturbation: says under which name a vector is kept, if any.
    """

    def __init__(self, view: ParameterView, perturbation: Perturbation | None) -> None:
        self.view, self.state = view, view.optimizer.state
        self.names = [perturbation.remembers] if perturbation is not None and perturbation.remembers else []
        self.stored: dict[str, Tensor] = {}
        self._room: list[tuple[Tensor, str, Tensor]] = []

    def __getitem__(self, name: str) -> Tensor:
        params = self.view.trainable
        return flatten(local(self.state.get(p, {}).get(name) for p in params), like=local(params))

    def __setitem__(self, name: str, vector: Tensor) -> None:
        if name not in self.names:
            raise KeyError(f"{name} is not among what this perturbation remembers: {', '.join(self.names)}")
        self.view.check_size(vector, f"the vector {name} that a perturbation remembers")
        self.stored[name] = vector

    def __delitem__(self, name: str) -> None:
        del self.stored[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def allocate(self, params: Iterable[Tensor]) -> None:
        """Make zeros for those of `params` that lack an entry; `keep` puts them into the state.

        The base optimizer must not find an entry that it did not make, and nothing may need memory after its
        step.
        """
        lacking = [(p, name) for p in params for name in self.names if name not in self.state.get(p, {})]
        self._room = [(p, name, torch.zeros_like(p)) for p, name in lacking]

    def keep(self) -> None:
        """Write what was stored into the optimizer's state."""
        for p, name, zeros in self._room:
            self.state[p][name] = zeros
        params = self.view.trainable
        for name, vector in self.stored.items():
            pieces = dict(zip(params, unflatten(vector, local(params)), strict=True))
            kept = [p for p in params if name in self.state.get(p, {})]
            copy_into(local(self.state[p][name] for p in kept), [pieces[p] for p in kept])
