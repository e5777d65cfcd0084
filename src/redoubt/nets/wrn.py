"""Wide ResNet with the parameter names of TRADES' and MART's code, so that published weights load."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from redoubt.errors import UserError
from redoubt.nets.base import Backbone, first_layer


class WideBlock(nn.Module):
    """Pre-activation block; the projection, where the width changes, sees the activated input."""

    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inplanes)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.convShortcut = None if inplanes == planes else nn.Conv2d(inplanes, planes, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,h,w] to [B,C',h/stride,w/stride]."""
        active = self.relu1(self.bn1(x))
        out = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return out + (x if self.convShortcut is None else self.convShortcut(active))


class WideGroup(nn.Module):
    """`n` blocks of one width, the first one with the stride; the blocks' names start with ``layer.``."""

    def __init__(self, inplanes: int, planes: int, *, n: int, stride: int) -> None:
        super().__init__()
        first = WideBlock(inplanes, planes, stride)
        self.layer = nn.Sequential(first, *(WideBlock(planes, planes, 1) for _ in range(n - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,h,w] to [B,C',h/stride,w/stride]."""
        return self.layer(x)


class WideResNet(Backbone):
    """WRN-depth-width: stem 3->16, three groups, strides 1/2/2, final BN-ReLU, GAP, linear (methods.md 0.1).

    `feature_layer` is the final ReLU: 64*width x H/4 x W/4. Dropout is 0 in every paper here and left out.
    Published files may hold a group `sub_block1` that no forward uses (methods.md 0.2); loading ignores it.

    Args:
        num_classes: K.
        depth: 6n + 4, with n blocks per group.
        width: Widening factor of the groups' 16/32/64 channels.
        normalize: Whether the first layer normalises; the papers' nets see raw pixels.
        mean: Per-channel mean for `normalize`.
        std: Per-channel standard deviation for `normalize`.

    Raises:
        UserError: `depth` is not 6n + 4.
    """

    feature_layer = "relu"
    key_dead = r"^sub_block1\."

    def __init__(
        self,
        *,
        num_classes: int,
        depth: int = 34,
        width: int = 10,
        normalize: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        n, rest = divmod(depth - 4, 6)
        if rest or n < 1:
            raise UserError(f"model.depth={depth} is not 6n + 4: give 10, 16, 22, 28, 34, ...")
        self.normalize = first_layer(normalize, mean, std)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = WideGroup(16, 16 * width, n=n, stride=1)
        self.block2 = WideGroup(16 * width, 32 * width, n=n, stride=2)
        self.block3 = WideGroup(32 * width, 64 * width, n=n, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(64 * width, num_classes)
        self.initialise(self)

    def initialise(self, module: nn.Module) -> None:
        """Conv N(0, sqrt(2 / (k k C_out))), BN 1/0, linear bias 0 (methods.md 0.1)."""
        for m in module.modules():
            if isinstance(m, nn.Conv2d):
                fan_out = m.kernel_size[0] * m.kernel_size[1] * m.out_channels
                nn.init.normal_(m.weight, 0, math.sqrt(2 / fan_out))
            elif isinstance(m, nn.BatchNorm2d):
                nn.init.ones_(m.weight)
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.Linear) and m.bias is not None:
                nn.init.zeros_(m.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """Pixels [B,3,H,W] to the final ReLU's output, [B,64*width,H/4,W/4]."""
        x = self.block3(self.block2(self.block1(self.conv1(self.normalize(x)))))
        return self.relu(self.bn1(x))

    def get_classifier(self) -> nn.Linear:
        return self.fc
