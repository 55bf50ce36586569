"""The driver of a perturbation's program: displace, run the pass, put w back, hand the gradient over."""

import contextlib
import math
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from composer_sassha.common.sharding import forget_copies, local
from composer_sassha.common.tensors import copy_into, copy_of, read
from composer_sassha.optim.bystanders import bystanders_spared
from composer_sassha.optim.parameters import ParameterView
from composer_sassha.optim.passes import Closure, PassRunner
from composer_sassha.optim.transaction import Transaction
from composer_sassha.perturbations import Ascent, Descent, Displacement, Gradient, Pass, Program

Phase = Literal["ascent", "descent"] | None


# Reading a norm makes a device wait, so that there the norms of this many displacements are read together.
LOOK_EVERY = 100


class Watch:
    """Warns once if the perturbation is skipped (non-finite norm) or lost in rounding.

    A norm in the host's memory is looked at at once; one on a device on the first step, and then with the
    norms of the `LOOK_EVERY` steps before it.
    """

    def __init__(self) -> None:
        self._warned_of_norm = self._looked_at_rounding = False
        self._looks, self._norms = 0, list[Tensor]()  # those not read yet

    def look(self, e: Displacement, w: list[Tensor], norm: float | Tensor) -> None:
        """Look at a displacement that was applied.

        Args:
            e: the displacement.
            w: the parameters before it.
            norm: what it was divided by.
        """
        norm = torch.as_tensor(norm)
        if not self._warned_of_norm:
            self._norms.append(norm)
            if norm.is_cpu or self._looks % LOOK_EVERY == 0:
                self._look_at_norms()
            self._looks += 1
        coarse = [i for i, weight in enumerate(w) if torch.finfo(weight.dtype).bits < 32]
        if self._looked_at_rounding or not coarse or not 0 < norm.item() < math.inf:
            return
        self._looked_at_rounding = True
        params = local(e.params)
        # Where there is no gradient, or ESAM has masked it, no displacement is meant.
        meant = sum(e.direction[i].count_nonzero().item() for i in coarse)
        moved = sum((params[i] != w[i]).sum().item() for i in coarse)
        fraction = moved / meant if meant else 1.0
        if fraction < 0.5:
            warnings.warn(
                f"the perturbation moves {fraction:.0%} of the entries of {w[coarse[0]].dtype} parameters "
                "that it is to move, the others are lost in rounding; take a larger rho, or float32 "
                "parameters and precision='amp_bf16'",
                stacklevel=10,
            )

    def _look_at_norms(self) -> None:
        values = read(self._norms)
        self._norms.clear()
        if bad := [value for value in values if not math.isfinite(value)]:
            self._warned_of_norm = True
            warnings.warn(
                f"the norm that the perturbation divides by is {bad[0]}: the weights are not displaced on "
                "this step; look for a gradient that is not finite",
                stacklevel=11,
            )


class Settings(Protocol):
    """What the driver has to know of the optimizer that takes the step."""

    runner: PassRunner  # calls the closure
    metrics: dict[str, Any]  # of the step
    watch: Watch
    sync_ascent: bool  # average the gradients of ascents over the ranks
    partial_ascent: bool  # ascents see a part of the batch, so that the descent is the pass that is seen

    def zero_grad(self) -> None:
        """Free the gradients between two passes."""


@dataclass
class Driver:
    """Runs the passes of one step.

    Args:
        settings: the optimizer that takes the step.
        view: its parameters.
        transaction: of the step.
        closure: computes the loss and its gradients.
        begin_pass: called before each pass with "ascent" or "descent", or None for the only pass of a step.
        mixes: the update mixes the gradients of several passes.
    """

    settings: Settings
    view: ParameterView
    transaction: Transaction
    closure: Closure
    begin_pass: Callable[[Phase], None]
    mixes: bool
    ascended: bool = field(default=False, init=False)
    zeroes_in_place: bool = field(default=False, init=False)  # the closure does, by set_to_none=False

    @property
    def own_gradients(self) -> bool:
        """Whether the update is made of this rank's own gradients, so that the ranks have to average it."""
        return self.mixes and self.ascended and not self._averages_ascents

    @property
    def _averages_ascents(self) -> bool:
        # FSDP2 averages in every backward.
        return (
            self.settings.sync_ascent or self.view.shards is not None or self.settings.runner.must_synchronize
        )

    def run(self, program: Program) -> tuple[Any, Any, Tensor | None]:
        """Run a program to its end, and leave the weights at w.

        Returns:
            The loss of the seen pass, that of the last pass, and the update (None: the gradients in place).
            Both losses are None if a pass overflowed.
        """
        if not isinstance(program, Generator):
            raise TypeError(
                f"a perturbation's program must be a generator that yields passes, not {program!r}"
            )
        with contextlib.closing(program):
            return self._run(program)

    def _run(self, program: Program) -> tuple[Any, Any, Tensor | None]:
        seen = loss = wanted = None
        gradient = Gradient([])
        # Weak, because most closures free the gradients of the last step before their forward.
        with_grad = (p for p in self.view.all if p.grad is not None)
        left = [(p, weakref.ref(p.grad)) for p in islice(with_grad, 1)]
        while True:
            try:
                wanted = _following(wanted, next(program) if wanted is None else program.send(gradient))
            except StopIteration as end:
                if not isinstance(wanted, Descent):
                    raise RuntimeError(
                        "a perturbation's program ended without a Descent; its last pass must be one"
                    ) from None
                if end.value is not None and self.ascended and not self.mixes:
                    raise RuntimeError(
                        "a perturbation's program returned an update of several gradients, which the ranks "
                        "have to average; set mixes = True in its class"
                    ) from None
                self.transaction.finish_passes()
                return loss if seen is None else seen, loss, end.value
            loss = self._pass(wanted, gradient)
            if loss is None:
                return None, None, None
            ascends = isinstance(wanted, Ascent)
            if ascends:
                self.view.refuse_sparse()
            if ascends or self.mixes:
                self.view.mirror()
            gradient = self.view.gradient()
            if isinstance(wanted, Ascent):
                if not self.ascended:
                    self.zeroes_in_place = any(p.grad is not None and p.grad is grad() for p, grad in left)
                if not self.ascended and not self.settings.partial_ascent:
                    # A copy: the closure may return the same tensor again.
                    seen = loss.detach().clone() if isinstance(loss, Tensor) else loss
                    self.transaction.keep_seen()
                loss = None  # its graph may hold outputs, which the next pass has no room for
                self.transaction.start_again()
                self.ascended = True
                if wanted.keeps:
                    gradient.keep()

    def _pass(self, wanted: Pass, before: Gradient) -> Any:
        """Run one pass at w + e and return its loss, or None if it overflowed."""
        last = isinstance(wanted, Descent)
        spared = contextlib.nullcontext() if last else bystanders_spared(self.view.all)
        with self._displaced(wanted.e), spared:
            if self.ascended:
                before.release()
                # The closure does too, or should; and this pass needs the memory. But what it leaves at zero
                # has a gradient, which the base optimizer must find where this pass brings no other.
                if self.zeroes_in_place:
                    torch._foreach_zero_(local(p.grad for p in self.view.all if p.grad is not None))
                else:
                    self.settings.zero_grad()
                if self.settings.partial_ascent:
                    self.settings.runner.share_buffers()  # what the ascent received is gone with its traces
            self.begin_pass(None if last and not self.ascended else "descent" if last else "ascent")
            return _checked(
                self.settings.runner.run(
                    self.closure,
                    sync=not self.own_gradients if last else self._averages_ascents,
                    hidden=not last if self.settings.partial_ascent else self.ascended,
                    applied=last and not self.mixes,
                )
            )

    @contextlib.contextmanager
    def _displaced(self, e: Displacement | None) -> Iterator[None]:
        """Move the parameters to w + e; restore w bit for bit on exit."""
        if e is None:
            yield
            return
        w = copy_of(local(e.params))
        try:
            e.apply()
            norm = self.settings.metrics.get("grad_norm", self.settings.metrics.get("momentum_norm", 0))
            self.settings.watch.look(e, w, norm)
            e.direction = ()
            forget_copies(self.view.sharded_model)  # FSDP2 may have gathered w before, for an evaluation
            yield
        finally:
            # By copy: (w + e) - e is not w in floating point. And into the parts of now: in its first
            # forward, FSDP2 puts others in their place.
            copy_into(local(e.params), w)
            forget_copies(self.view.sharded_model)  # and now w + e, for a pass that did not come to its end


def _following(before: Pass | None, wanted: Any) -> Pass:
    """Check what a program yields after a pass."""
    if not isinstance(wanted, (Ascent, Descent)):
        raise TypeError(f"a perturbation's program yielded {wanted!r}; it must yield an Ascent or a Descent")
    if isinstance(before, Descent):
        raise RuntimeError(
            "a perturbation's program yielded a pass after its Descent, which must be the last"
        )
    return wanted


def _checked(loss: Any) -> Any:
    if loss is None or isinstance(loss, (int, float)) or (isinstance(loss, Tensor) and loss.numel() == 1):
        return loss
    raise TypeError(
        f"the closure returned a {type(loss).__name__}; it must return its loss: one number, or None"
    )
