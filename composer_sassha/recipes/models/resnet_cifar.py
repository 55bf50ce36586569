"""The ResNet for small images (He et al. 2016)."""

from dataclasses import dataclass

import torch.nn.functional as F
from composer.models import ComposerClassifier, ComposerModel
from torch import Tensor, nn

from composer_sassha.recipes.schema import at_least, checked


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A of He et al.)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.stride = stride
        self.new_channels = channels_out - channels_in

    def forward(self, x: Tensor) -> Tensor:
        """Return the features after this block."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        # Every other pixel, and zeros for the channels that are new.
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(y + shortcut)


class CIFARResNet(nn.Module):
    """The ResNet of He et al. (2016, section 4.2) for small images: 6n + 2 layers in three stages.

    Args:
        depth: number of layers, 6n + 2 with n >= 1.
        num_classes: number of outputs.
        width: channels of the first stage; the others have twice and four times that number.
        in_channels: channels of the images.

    Raises:
        ValueError: `depth` is not 6n + 2.

    >>> sum(p.numel() for p in CIFARResNet(depth=20, num_classes=10).parameters())  # 0.27 M in the paper
    269722
    """

    def __init__(self, depth: int, num_classes: int, width: int = 16, in_channels: int = 3) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            near = max(8, 6 * round((depth - 2) / 6) + 2)
            raise ValueError(f"depth={depth} is not 6n + 2; the nearest that is: {near}")
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        stages: list[nn.Module] = []
        channels = width
        for stage in range(3):
            for block in range(blocks):
                stages.append(_Block(channels, width * 2**stage, stride=2 if stage and not block else 1))
                channels = width * 2**stage
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images."""
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(x.mean(dim=(2, 3)))


@dataclass
class ResNetCIFAR:
    """`CIFARResNet` as a Composer classifier."""

    depth: int = checked(20, at_least(8))
    num_classes: int = checked(10, at_least(2))
    width: int = checked(16, at_least(1))
    in_channels: int = checked(3, at_least(1))

    def build(self) -> ComposerModel:
        """Return the model."""
        module = CIFARResNet(self.depth, self.num_classes, self.width, self.in_channels)
        return ComposerClassifier(module, num_classes=self.num_classes)
