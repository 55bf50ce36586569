"""The CIFAR ResNet."""

import pytest
import torch

from composer_sassha.recipes.models import CIFARResNet


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (56, 853_018)])
def test_as_large_as_in_the_paper(depth: int, parameters: int) -> None:
    """Table 6 of He et al. says 0.27, 0.46 and 0.85 million; shortcuts have no parameters (option A)."""
    model = CIFARResNet(depth, num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == parameters
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) == depth


@pytest.mark.parametrize("size", [8, 9, 32])
def test_any_image_size(size: int) -> None:
    model = CIFARResNet(depth=14, num_classes=7, width=4, in_channels=2)
    assert model(torch.randn(3, 2, size, size)).shape == (3, 7)


@pytest.mark.parametrize(("depth", "near"), [(9, 8), (18, 20), (2, 8)])
def test_other_depths_are_refused(depth: int, near: int) -> None:
    with pytest.raises(ValueError, match=rf"depth={depth} is not 6n \+ 2; the nearest that is: {near}"):
        CIFARResNet(depth, num_classes=10)
