"""Fixtures of several commands."""

import pytest

from tests.commands import undraw


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save no figure as drawn, in tests that look at none."""
    undraw(monkeypatch)
