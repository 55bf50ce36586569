"""Tests of the benchmark, and what those of its command share."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def quick_collections() -> Iterator[None]:
    """Hide all objects that exist already from `gc.collect()`, which the benchmark calls often.

    They are those of every imported module, and take a third of a second each time.
    """
    with pytest.MonkeyPatch.context() as patch:
        gc.collect()
        gc.freeze()
        unfreeze = gc.unfreeze
        patch.setattr(gc, "unfreeze", lambda: None)  # a race would show them again
        try:
            yield
        finally:
            unfreeze()
