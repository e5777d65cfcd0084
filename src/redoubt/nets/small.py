"""Two small nets for a CPU: a thin ResNet and a plain convolutional net. They are ours, no paper's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from redoubt.errors import UserError
from redoubt.nets.base import Backbone, first_layer
from redoubt.nets.resnet import KUANGLIU


class ResNetSmall(Backbone):
    """ResNet of one torchvision basic block per stage: 0.31 M parameters at the default widths, K=10.

    Stage 1 has stride 1, every later one stride 2: with four widths the last map is widths[-1] x H/8 x W/8,
    as in ResNet-18. PyTorch's default initialisation. Takes images from 8 pixels up.

    Args:
        num_classes: K.
        widths: Channels of each stage.
        normalize: Whether the first layer normalises.
        mean: Per-channel mean for `normalize`.
        std: Per-channel standard deviation for `normalize`.
    """

    key_aliases = KUANGLIU

    def __init__(
        self,
        *,
        num_classes: int,
        widths: Sequence[int] = (16, 32, 64, 128),
        normalize: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if not widths or min(widths) < 1:
            raise UserError(f"model.widths={list(widths)}: give the channels of each stage, as [16,32,64,128]")
        self.normalize = first_layer(normalize, mean, std)
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.stages = [f"layer{i}" for i in range(1, len(widths) + 1)]
        for i, (name, width) in enumerate(zip(self.stages, widths, strict=True)):
            self.add_module(name, nn.Sequential(_block(widths[max(i - 1, 0)], width, stride=2 if i else 1)))
        self.fc = nn.Linear(widths[-1], num_classes)
        self.feature_layer = self.stages[-1]

    def forward_features(self, x: Tensor) -> Tensor:
        """Pixels [B,3,H,W] to the output of the last stage."""
        x = self.relu(self.bn1(self.conv1(self.normalize(x))))
        for name in self.stages:
            x = getattr(self, name)(x)
        return x

    def get_classifier(self) -> nn.Linear:
        return self.fc


def _block(inplanes: int, planes: int, stride: int) -> BasicBlock:
    """torchvision's basic block, with its 1x1 projection where the shape changes."""
    shortcut = None
    if stride != 1 or inplanes != planes:
        shortcut = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride=stride, bias=False), nn.BatchNorm2d(planes))
    return BasicBlock(inplanes, planes, stride, shortcut)


class CNNSmall(Backbone):
    """Four 3x3 convolutions with ReLU and no BatchNorm: 0.13 M parameters at the default widths, K=10.

    The second and third convolution have stride 2, the others 1: the last map is widths[-1] x H/4 x W/4.
    PyTorch's default initialisation. Takes images from 4 pixels up.

    Args:
        num_classes: K.
        widths: Channels of each convolution.
        normalize: Whether the first layer normalises.
        mean: Per-channel mean for `normalize`.
        std: Per-channel standard deviation for `normalize`.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        widths: Sequence[int] = (32, 64, 64, 128),
        normalize: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if not widths or min(widths) < 1:
            raise UserError(f"model.widths={list(widths)}: give the channels of each convolution, as [32,64,64,128]")
        self.normalize = first_layer(normalize, mean, std)
        layers: list[nn.Module] = []
        for i, (c_in, c_out) in enumerate(zip([3, *widths], widths, strict=False)):
            layers += [
                nn.Conv2d(c_in, c_out, 3, stride=2 if i in (1, 2) else 1, padding=1),
                nn.ReLU(inplace=True),
            ]
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(widths[-1], num_classes)
        self.feature_layer = f"features.{len(layers) - 1}"

    def forward_features(self, x: Tensor) -> Tensor:
        """Pixels [B,3,H,W] to the output of the last ReLU."""
        return self.features(self.normalize(x))

    def get_classifier(self) -> nn.Linear:
        return self.fc
