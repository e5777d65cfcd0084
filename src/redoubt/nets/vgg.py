"""VGG-16 as FSR uses it: torchvision's vgg16_bn features under a small head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.vgg import cfgs, make_layers

from redoubt.nets.base import Backbone, first_layer


class VGG16(Backbone):
    """torchvision's `vgg16_bn` features; GAP -> 512 -> ReLU -> 512 -> ReLU -> K (methods.md 0.1).

    `feature_layer` is the ReLU that ends the fourth block, before its max-pool: 512 x H/8 x W/8 (methods.md
    F.4).

    Args:
        num_classes: K.
        normalize: Whether the first layer normalises; FSR's net sees raw pixels.
        mean: Per-channel mean for `normalize`.
        std: Per-channel standard deviation for `normalize`.
    """

    feature_layer = "features.32"

    def __init__(
        self,
        *,
        num_classes: int,
        normalize: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.normalize = first_layer(normalize, mean, std)
        self.features = make_layers(cfgs["D"], batch_norm=True)
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                layer.ceil_mode = True  # same on even maps; a 1x1 map (images under 32 pixels) passes through
        self.classifier = nn.Sequential(
            nn.Linear(512, 512),
            nn.ReLU(inplace=True),
            nn.Linear(512, 512),
            nn.ReLU(inplace=True),
            nn.Linear(512, num_classes),
        )
        self.initialise(self)

    def initialise(self, module: nn.Module) -> None:
        """Conv Kaiming-normal (fan-out), BN 1/0, linear N(0, 0.01), biases 0 (methods.md 0.1)."""
        for m in module.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, 0, 0.01)
            elif isinstance(m, nn.BatchNorm2d):
                nn.init.ones_(m.weight)
            if isinstance(m, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)) and m.bias is not None:
                nn.init.zeros_(m.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """Pixels [B,3,H,W] to the last block's output after its max-pool, [B,512,H/32,W/32]."""
        return self.features(self.normalize(x))

    def forward_head(self, f: Tensor, pre_logits: bool = False) -> Tensor:
        """[B,512,h,w] to logits [B,K], or to the hidden feature [B,512] that enters the last linear layer."""
        hidden = F.adaptive_avg_pool2d(f, 1).flatten(1)
        for layer in list(self.classifier)[:-1]:  # a slice would build a new Sequential at every call
            hidden = layer(hidden)
        return hidden if pre_logits else self.get_classifier()(hidden)

    def get_classifier(self) -> nn.Linear:
        return cast(nn.Linear, self.classifier[-1])  # or what a defense has put in its place
