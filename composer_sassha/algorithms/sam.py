"""Sharpness-aware minimization as a Composer algorithm."""

from composer.core import Algorithm, Event, State
from composer.loggers import Logger

from composer_sassha import _validate
from composer_sassha.algorithms import _checks, _trainer
from composer_sassha.perturbations import SAMPerturbation


class SAM(Algorithm):
    """Takes the gradient at `w + rho * g / ||g||` (Foret et al. 2021, arXiv 2010.01412); any optimizer.

    Every `interval` steps, a first pass gives g(w), a second one the gradient at the displaced weights, with
    which the optimizer then updates w. BatchNorm statistics, metrics and the logged loss are those of the
    first pass, and both draw the same random numbers. Each rank perturbs along its own gradient unless
    `sync_ascent` is set. Runs on BEFORE_LOAD, so that the optimizer's state is saved and resumed exactly.

    Logs `sharpness/rho`, `sharpness/grad_norm` (at w) and `sharpness/loss_gap` (the loss at w + e minus that
    at w), as they are on rank 0.

    Args:
        rho: radius of the neighbourhood, >= 0. Default: 0.05.
        interval: steps between perturbed steps, >= 1. Default: 1.
        sync_ascent: average the first gradient over the ranks too, which costs one more communication.
            Default: False.

    Raises:
        TypeError, ValueError: an argument that is not allowed; at the Trainer's start, a combination that is
            not.

    Example:
        >>> SAM(rho=0.1)
        SAM(rho=0.1, interval=1, sync_ascent=False)
    """

    def __init__(self, rho: float = 0.05, interval: int = 1, sync_ascent: bool = False) -> None:
        self.perturbation = SAMPerturbation(rho)
        self.interval = _validate.integer("SAM", "interval", interval, low=1)
        self.sync_ascent = _validate.boolean("SAM", "sync_ascent", sync_ascent)

    def __repr__(self) -> str:
        return f"SAM(rho={self.perturbation.rho}, interval={self.interval}, sync_ascent={self.sync_ascent})"

    def match(self, event: Event, state: State) -> bool:
        """Run at the Trainer's start, and at the end of each batch to log."""
        return event in (*_trainer.START, Event.BATCH_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Wrap the optimizer, or log."""
        if event == Event.INIT:
            _checks.check(state)
        elif event == Event.BEFORE_LOAD:
            _trainer.wrapped_optimizer(state).set_perturbation(
                self.perturbation, self.interval, sync_ascent=self.sync_ascent
            )
        elif event == Event.FIT_START:
            _checks.check_precision(state)  # fit() may have been given another one
        else:
            _trainer.log(state, logger, "sharpness", ("rho", "grad_norm", "loss_gap"))
