"""ResNet-18 in its CIFAR form: torchvision's blocks and names, another stem."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models import resnet as torchvision_resnet

from redoubt.errors import UserError
from redoubt.nets.base import Backbone, first_layer

#: kuangliu's pytorch-cifar, the source of most papers' CIFAR ResNet, names two things otherwise.
KUANGLIU = ((r"^linear\.", "fc."), (r"\.shortcut\.", ".downsample."))


def default_init(net: nn.Module) -> None:
    """Draws every layer's weights anew by PyTorch's default; torchvision's constructor chose another."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            module.reset_parameters()


class ResNet18(Backbone, torchvision_resnet.ResNet):
    """ResNet-18 with a 3x3 stem of stride 1 and no max-pool (methods.md 0.1).

    Four stages of two basic blocks, widths 64/128/256/512, strides 1/2/2/2: the last map is 512 x H/8 x W/8.
    Parameters have torchvision's names and PyTorch's default initialisation, as in the papers' code.

    Args:
        num_classes: K.
        normalize: Whether the first layer normalises; the papers' nets see raw pixels.
        mean: Per-channel mean for `normalize`.
        std: Per-channel standard deviation for `normalize`.
        stem_padding: Of the stem; None is 1. AFD's copy of the net has 0 (methods.md 7.9): maps of 30, 15, 8, 4.
    """

    feature_layer = "layer4"
    key_aliases = KUANGLIU
    relu: nn.Module  # torchvision ships no types
    bn1: nn.Module
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module
    fc: nn.Linear

    def __init__(
        self,
        *,
        num_classes: int,
        normalize: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        stem_padding: int | None = None,
    ) -> None:
        padding = 1 if stem_padding is None else stem_padding
        if padding not in (0, 1):
            raise UserError(f"model.stem_padding={stem_padding} is not known: take 0 or 1")
        torchvision_resnet.ResNet.__init__(self, torchvision_resnet.BasicBlock, [2, 2, 2, 2], num_classes)
        self.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=padding, bias=False)
        self.maxpool = nn.Identity()
        default_init(self)
        self.normalize = first_layer(normalize, mean, std)

    def forward_features(self, x: Tensor) -> Tensor:
        """Pixels [B,3,H,W] to the output of stage 4, [B,512,H/8,W/8]."""
        x = self.relu(self.bn1(self.conv1(self.normalize(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def get_classifier(self) -> nn.Linear:
        return self.fc
