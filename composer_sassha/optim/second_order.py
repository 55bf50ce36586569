"""The base class of update rules that divide by a lazily refreshed Hessian diagonal."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from composer_sassha.common import validate
from composer_sassha.common.sharding import local, shards_of
from composer_sassha.common.tensors import as_dtype, euclidean_norms, wide_dtype
from composer_sassha.optim.saved_states import check_state_dict, saved_states


class SecondOrderOptimizer(Optimizer):
    """Keeps the state, checks the arguments and runs a step; a subclass adds the equations of its rule.

    The equations are a few methods, each over lists of tensors of one device and dtype: how an estimate
    enters the average (`_prepare`, `_absorb`), the divisors (`_denominators`), and how the weights move
    (`_update`). A parameter's state:

        step            steps taken
        exp_avg         the average of the gradients
        exp_hessian     the average of the estimates; `_average` is the name of this entry
        hessian_step    the age of that average, 0 before the first estimate; see `_age`
    """

    _average = "exp_hessian"
    _remedy = "composer_sassha.LazyHessian()"  # the algorithm that a message recommends

    def __init__(
        self,
        params: Iterable[Parameter] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        own: dict[str, Any],
        foreach: bool | None,
    ) -> None:
        """Make the groups; `own` are the hyperparameters that only this rule has."""
        common = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**common, **own, "foreach": foreach})

    def _prepare(self, estimates: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Return the tensors to average; must not write to the estimates."""
        return estimates

    def _absorb(self, states: list[dict[str, Any]], estimates: list[Tensor], group: dict[str, Any]) -> None:
        """Average the tensors from `_prepare` into the states, in place; must not allocate."""
        raise NotImplementedError

    def _denominators(self, states: list[dict[str, Any]], group: dict[str, Any]) -> list[Tensor]:
        """Return the divisors of the gradient's average, in new tensors."""
        raise NotImplementedError

    def _update(
        self,
        weights: list[Tensor],
        states: list[dict[str, Any]],
        denominators: list[Tensor],
        group: dict[str, Any],
    ) -> None:
        """Move the weights, which have been decayed; may overwrite the denominators."""
        raise NotImplementedError

    def _age(self, state: dict[str, Any]) -> int:
        """Return the age of the average after one more estimate: the number of estimates."""
        estimates: int = state["hessian_step"]
        return estimates + 1

    def check_group(self, group: dict[str, Any]) -> None:
        """Check a parameter group's hyperparameters; a schedule calls this after changing them.

        Raises:
            TypeError, ValueError: a hyperparameter or a parameter that is not allowed.
        """
        owner, betas, lr = type(self).__name__, group["betas"], group["lr"]
        if group["foreach"] is not None:
            validate.boolean(owner, "foreach", group["foreach"])
        validate.number(owner, "lr", lr.item() if isinstance(lr, Tensor) and lr.numel() == 1 else lr, low=0)
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(
                f"{owner}: betas={betas!r} is not allowed; it must be two numbers, each in [0, 1)"
            )
        for i, beta in enumerate(betas):
            validate.number(owner, f"betas[{i}]", beta, low=0, high=1, below=True)
        validate.number(owner, "eps", group["eps"], low=0)
        validate.number(owner, "weight_decay", group["weight_decay"], low=0)
        if group.get("maximize"):
            raise ValueError(
                f"{owner}: maximize=True is not allowed; minimize the negative of the loss instead"
            )
        for p in group["params"]:
            if p.requires_grad and not p.is_floating_point():
                raise TypeError(
                    f"{owner}: a parameter of dtype {p.dtype} is not allowed; it must be real floating point"
                )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; defaults fill what it does not set.

        Raises:
            TypeError, ValueError: a hyperparameter or a parameter that is not allowed.
        """
        super().add_param_group(param_group)
        try:
            self.check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient.

        Args:
            closure: computes the loss and the gradients again; optional.

        Returns:
            The closure's loss, or None without a closure.

        Raises:
            RuntimeError: no curvature has been estimated although a learning rate is positive, or a gradient
                is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        owner = type(self).__name__
        grads = [p.grad for p in self._params() if p.grad is not None]
        if any(grad.is_sparse for grad in grads):
            raise RuntimeError(
                f"{owner}: sparse gradients are not supported; build the embedding with sparse=False"
            )

        fresh = not self.state
        self._init_state()
        learning = any(group["lr"] > 0 for group in self.param_groups)
        if fresh and not learning and not self._any_gradient(grads):
            # To save and load checkpoints, PyTorch steps a fresh optimizer at lr = 0 with zero gradients,
            # only to create its state.
            return loss
        if grads and learning and not any(state["hessian_step"] for state in self.state.values()):
            raise RuntimeError(
                f"{owner}: no Hessian estimate has arrived before this step; add {self._remedy} to the "
                "Trainer's algorithms, or call update_curvature() before step()"
            )
        for params, group in self._lists(lambda p: p.grad is not None):
            self._step_list(params, [p.grad for p in params], group)  # type: ignore[misc]  # they have one
        return loss

    @torch.no_grad()
    def update_curvature(self, diagonal: Mapping[Tensor, Tensor]) -> None:
        """Average a fresh estimate of the Hessian's diagonal into the state, as of the coming step.

        Args:
            diagonal: a finite estimate for each parameter, with the parameter's shape (if it is sharded, the
                shape of this rank's part). A parameter without an entry keeps its average.

        Raises:
            ValueError: a key is not a parameter that this optimizer trains, or an estimate has another shape.
        """
        owner, trained = type(self).__name__, {p for p in self._params() if _is_trained(p)}
        for p, part, h in zip(diagonal, local(diagonal), diagonal.values(), strict=True):
            if p not in trained:
                raise ValueError(
                    f"{owner}: an estimate for a tensor of shape {tuple(p.shape)} that is not trained here"
                )
            if h.shape != part.shape:
                raise ValueError(
                    f"{owner}: an estimate of shape {tuple(h.shape)} for a parameter of {tuple(part.shape)}"
                )
        self._init_state()
        fresh = []
        for params, group in self._lists(diagonal.__contains__):
            states = [self.state[p] for p in params]
            averages = kept(states, self._average)
            estimates = [diagonal[p].to(average) for p, average in zip(params, averages, strict=True)]
            fresh.append((states, self._prepare(estimates, group), group))
        # Nothing below allocates, so that an out-of-memory error above leaves the state unchanged.
        for states, estimates, group in fresh:
            self._absorb(states, estimates, group)
            for state in states:
                state["hessian_step"] = self._age(state)

    @torch.no_grad()
    def report_per_parameter_metrics(
        self, param: Tensor, name: str, optimizer_metrics: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the metrics with this parameter's norms, for Composer's OptimizerMonitor.

        Their names are `l2_norm/<kind>/<name>`. The kinds are `param` and `grad` and, once there is an
        estimate, `moment` and `curvature`, which are the averages, and `update`, the step that these make
        from the present weight at the present learning rate.
        """
        found, state = {"param": param, "grad": param.grad}, self.state.get(param, {})
        if state.get("hessian_step"):
            _, group = next(self._lists(lambda p: p is param))
            update = [local([param])[0].to(state["exp_avg"].dtype) * (-group["lr"] * group["weight_decay"])]
            self._update(update, [state], self._denominators([state], group), group)
            found |= {"moment": state["exp_avg"], "curvature": state[self._average], "update": update[0]}
        shards = shards_of([param])
        wide = [t.to(wide_dtype([t])) for t in local(found.values())]
        norms = euclidean_norms(wide, None if shards is None else shards.group)
        return optimizer_metrics | {f"l2_norm/{k}/{name}": n for k, n in zip(found, norms, strict=True)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; the float32 state of half-precision parameters keeps its dtype.

        Raises:
            ValueError: the state is another optimizer's. Nothing has been loaded then.
        """
        averages = {"exp_avg", self._average}
        names = {"step", "hessian_step", *averages}
        check_state_dict(type(self).__name__, state_dict, self._params(), names, averages)
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            # A checkpoint of an earlier release lacks hyperparameters that came later. `differentiable` is
            # not ours: torch adds it to the defaults when a state is loaded.
            for name in self.defaults.keys() - {*group, "differentiable"}:
                group[name] = self.defaults[name]
        for _, p, state in saved_states(state_dict, self._params()):
            for name in averages:
                self.state[p][name] = state[name].to(device=p.device, dtype=wide_dtype([p]))

    def _step_list(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        """Step parameters of one device and dtype.

        Allocate before mutating, so that an out-of-memory error leaves the state unchanged.
        """
        lr, decay = group["lr"], group["weight_decay"]
        states = [self.state[p] for p in params]
        averages = kept(states, "exp_avg")
        params, grads = local(params), as_dtype(local(grads), averages[0].dtype)
        ready = [i for i, state in enumerate(states) if state["hessian_step"]]
        if ready:
            params, ready_states = [params[i] for i in ready], [states[i] for i in ready]
            denominators = self._denominators(ready_states, group)
            weights = as_dtype(params, averages[0].dtype)

        torch._foreach_lerp_(averages, grads, 1 - group["betas"][0])
        for state in states:
            state["step"] += 1
        if not ready:
            return
        if decay:
            torch._foreach_mul_(weights, 1 - lr * decay)
        self._update(weights, ready_states, denominators, group)
        if weights is not params:
            torch._foreach_copy_(params, weights)

    def _any_gradient(self, grads: list[Tensor]) -> bool:
        """Whether any gradient has an entry other than zero, on any of the ranks that hold its parts."""
        here = any(grad.any() for grad in local(grads))
        shards = shards_of(grads)
        return here if shards is None else shards.ranks.any(torch.tensor(here, device=grads[0].device))

    def _lists(self, chosen: Callable[[Tensor], bool]) -> Iterator[tuple[list[Tensor], dict[str, Any]]]:
        """Yield lists of chosen parameters for one call of a rule, each with its group and a number as lr."""
        for group in self.param_groups:
            lists: dict[Any, list[Tensor]] = defaultdict(list)
            for i, p in enumerate(group["params"]):
                if chosen(p):
                    # foreach kernels need one device and one dtype
                    lists[i if group["foreach"] is False else (p.device, p.dtype)].append(p)
            for params in lists.values():
                yield params, {**group, "lr": float(group["lr"])}

    def _params(self) -> Iterator[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    def _init_state(self) -> None:
        # At once and for every trainable parameter: PyTorch loads a sharded checkpoint only into state
        # entries that exist already.
        for group in self.param_groups:
            fresh = [p for p in group["params"] if _is_trained(p) and not self.state.get(p)]
            if fresh:
                self.check_group(group)  # they may have been frozen when the group was made
            for p in fresh:
                self.state[p] = {
                    "step": 0,
                    "exp_avg": torch.zeros_like(p, dtype=wide_dtype([p])),
                    self._average: torch.zeros_like(p, dtype=wide_dtype([p])),
                    "hessian_step": 0,
                }


def _is_trained(p: Tensor) -> bool:
    return p.requires_grad or p.grad is not None


def kept(states: Iterable[Mapping[str, Any]], name: str) -> list[Tensor]:
    """Return one state entry of each parameter: of sharded parameters, this rank's part."""
    return local(state[name] for state in states)
