"""The wide ResNet (Zagoruyko and Komodakis 2016, arXiv 1605.07146)."""

from dataclasses import asdict, dataclass

import torch.nn.functional as F
from composer.models import ComposerClassifier, ComposerModel
from torch import Tensor, nn

from composer_sassha.recipes.schema import at_least, checked, within


class _Block(nn.Module):
    """BatchNorm and ReLU before each of two 3x3 convolutions; dropout between them."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.project = None
        if stride != 1 or channels_in != channels_out:
            self.project = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features after this block."""
        y = F.relu(self.norm1(x))
        shortcut = x if self.project is None else self.project(y)
        y = self.dropout(F.relu(self.norm2(self.conv1(y))))
        return shortcut + self.conv2(y)


class WideResNet(nn.Module):
    """WRN-d-k: 6n + 4 layers in three stages of 16k, 32k and 64k channels.

    Args:
        depth: number of convolutions d, 6n + 4 with n >= 1; three of them are projections in shortcuts.
        widen: the factor k, >= 1.
        num_classes: number of outputs.
        dropout: between the convolutions of a block, in [0, 1).
        in_channels: channels of the images.

    Raises:
        ValueError: `depth` is not 6n + 4.

    >>> sum(p.numel() for p in WideResNet(16, 4, num_classes=10).parameters())  # 2.7 M in the paper
    2748890
    """

    def __init__(
        self, depth: int, widen: int, num_classes: int, dropout: float = 0.0, in_channels: int = 3
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            near = max(10, 6 * round((depth - 4) / 6) + 4)
            raise ValueError(f"depth={depth} is not 6n + 4; the nearest that is: {near}")
        self.stem = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        stages: list[nn.Module] = []
        channels = 16
        for stage in range(3):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                stages.append(_Block(channels, 16 * widen * 2**stage, stride, dropout))
                channels = 16 * widen * 2**stage
        self.blocks = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, num_classes)
        nn.init.zeros_(self.head.bias)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images."""
        x = F.relu(self.norm(self.blocks(self.stem(x))))
        return self.head(x.mean(dim=(2, 3)))


@dataclass
class WRN:
    """`WideResNet` as a Composer classifier; by default WRN-28-10."""

    depth: int = checked(28, at_least(10))
    widen: int = checked(10, at_least(1))
    num_classes: int = checked(10, at_least(2))
    dropout: float = checked(0.0, within(0, 1))
    in_channels: int = checked(3, at_least(1))

    def build(self) -> ComposerModel:
        """Return the model."""
        return ComposerClassifier(WideResNet(**asdict(self)), num_classes=self.num_classes)
