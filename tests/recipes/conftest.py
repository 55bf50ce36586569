import pytest

from tests.recipes.language import encoder, glue, small, text
from tests.recipes.runs import whole, without_curves

__all__ = ["encoder", "glue", "small", "text", "whole", "without_curves"]


@pytest.fixture(autouse=True)
def _no_curves(without_curves: None) -> None:
    """No run here looks at its curves; the commands' tests draw them."""
