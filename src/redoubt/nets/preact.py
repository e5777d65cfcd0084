"""PreAct ResNet-18 with a final BatchNorm and ReLU, as CURE and the fast-training line of work use it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from redoubt.errors import UserError
from redoubt.nets.base import Backbone, first_layer


class PreActBlock(nn.Module):
    """Pre-activation basic block; the 1x1 projection has no BatchNorm and exists where the shape changes."""

    def __init__(self, inplanes: int, planes: int, stride: int, *, project_input: bool) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inplanes)
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.project_input = project_input
        self.shortcut: nn.Module | None = None
        if stride != 1 or inplanes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,h,w] to [B,C',h/stride,w/stride]."""
        active = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(x if self.project_input else active)
        return self.conv2(F.relu(self.bn2(self.conv1(active)))) + shortcut


class PreActResNet18(Backbone):
    """PreAct ResNet-18: kuangliu's names, plus the final `bn` and `relu` (methods.md 0.2).

    Widths 64/128/256/512, strides 1/2/2/2. `feature_layer` is the final ReLU: 512 x H/8 x W/8. PyTorch's
    default initialisation.

    Args:
        num_classes: K.
        shortcut: What the projections see. ``"active"``: the activated input (He et al. 2016; RobustBench's
            PreActBlockV2). ``"input"``: the block's raw input (RobustBench's PreActBlock: Wong2020Fast,
            Rice2020Overfitting). Both have the same state_dict, so a file cannot tell which one it needs.
        normalize: Whether the first layer normalises.
        mean: Per-channel mean for `normalize`.
        std: Per-channel standard deviation for `normalize`.

    Raises:
        UserError: Another `shortcut`.
    """

    feature_layer = "relu"

    def __init__(
        self,
        *,
        num_classes: int,
        shortcut: Literal["active", "input"] = "active",
        normalize: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if shortcut not in ("active", "input"):
            raise UserError(f"model.shortcut={shortcut} is neither of: active, input")
        raw = shortcut == "input"
        self.normalize = first_layer(normalize, mean, std)
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.layer1 = _stage(64, 64, stride=1, project_input=raw)
        self.layer2 = _stage(64, 128, stride=2, project_input=raw)
        self.layer3 = _stage(128, 256, stride=2, project_input=raw)
        self.layer4 = _stage(256, 512, stride=2, project_input=raw)
        self.bn = nn.BatchNorm2d(512)
        self.relu = nn.ReLU(inplace=True)
        self.linear = nn.Linear(512, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Pixels [B,3,H,W] to the final ReLU's output, [B,512,H/8,W/8]."""
        x = self.conv1(self.normalize(x))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.relu(self.bn(x))

    def get_classifier(self) -> nn.Linear:
        return self.linear


def _stage(inplanes: int, planes: int, *, stride: int, project_input: bool) -> nn.Sequential:
    """Two blocks, the first one with the stride."""
    return nn.Sequential(
        PreActBlock(inplanes, planes, stride, project_input=project_input),
        PreActBlock(planes, planes, 1, project_input=project_input),
    )
