"""The Trainer's batches: how they are counted and cut, and what a second evaluation is given."""

from collections.abc import Callable
from typing import Any

from composer.core import DataSpec
from composer.core.data_spec import default_split_batch

from composer_sassha.common.batches import (
    Samples,
    Version,
    changed,
    changes,
    copied,
    size_of,
)

# What to do with a batch that cannot be cut; a part of messages.
CUTTABLE = "give the loader a DataSpec whose split_batch makes microbatches of it"


def samples_of(data: DataSpec) -> Samples:
    """Return how the batches of a loader are counted and cut: as its DataSpec says."""

    def count(batch: Any) -> float:
        try:
            number = float(data.get_num_samples_in_batch(batch))
            return int(number) if number.is_integer() else number
        except (ValueError, NotImplementedError):  # Composer's own knows fewer types
            return size_of(batch)

    # Composer's own cuts each tensor along its first dimension, whether that counts samples or not.
    return Samples(count, None if data.split_batch is default_split_batch else data.split_batch)


class Given:
    """The batch of one microbatch, as its forward and its loss were given it.

    A forward may edit its batch, and edits it again when it is evaluated again. So the forward is given a
    copy of what it was given, and the loss what this forward has left, with the changes that algorithms had
    made in between (MixUp and LabelSmoothing change the labels there).

    Args:
        batch: the batch before the forward.
    """

    def __init__(self, batch: Any) -> None:
        self.batch = copied(batch)
        self._left = self._changes = None

    def after_forward(self, batch: Any) -> None:
        """Note what the forward has left of its batch, before other algorithms change it."""
        self._left = copied(batch, Version.of)

    def before_loss(self, batch: Any) -> None:
        """Note what other algorithms have changed since the forward."""
        self._changes, self._left = changes(self._left, batch), None

    def for_forward(self) -> Any:
        """Return a copy of what the forward was given."""
        return copied(self.batch)

    def for_loss(self, batch: Any, of: Callable[[Any], Any] = lambda part: part) -> Any:
        """Return what the loss is given after another forward.

        Args:
            batch: what that forward has left of its batch.
            of: takes the forward's samples of a part that an algorithm has changed.
        """
        return changed(batch, self._changes, of)
