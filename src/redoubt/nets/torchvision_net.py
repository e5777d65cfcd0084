"""Any torchvision classifier by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from redoubt.errors import UserError
from redoubt.nets.base import first_layer
from redoubt.nets.library import LibraryNet, unknown


class TorchVision(LibraryNet):
    """A torchvision classifier with random weights.

    torchvision's nets have no common split into features and head, but nearly all run their children in
    order: those before the pooling are the features. The trial image shows whether that is so.

    Args:
        name: torchvision's name, as ``mobilenet_v3_small``.
        num_classes: K.
        image_size: Side of the images in pixels.
        normalize: Whether the first layer normalises.
        mean: Per-channel mean for `normalize`.
        std: Per-channel standard deviation for `normalize`.

    Raises:
        UserError: torchvision has no such classifier, or the net does not fit the interface.
    """

    def __init__(
        self,
        *,
        name: str,
        num_classes: int,
        image_size: int | Sequence[int],
        normalize: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        names = models.list_models(module=models)
        if name not in names:
            raise unknown("torchvision", name, names)
        more: dict[str, Any] = {}
        if name in ("googlenet", "inception_v3"):
            more = {
                "aux_logits": False,
                "init_weights": True,
            }  # auxiliary logits would make the output a tuple
        model = models.get_model(name, weights=None, num_classes=num_classes, **more)
        super().__init__(model, first_layer(normalize, mean, std))
        children = [child for child, _ in model.named_children()]
        linear = [child for child, m in model.named_modules() if isinstance(m, nn.Linear)]
        if not linear or linear[-1].split(".")[0] != children[-1]:
            raise UserError(f"model.name={name} has no linear classifier at its end: choose another net")
        cut = children.index("avgpool") if "avgpool" in children else len(children) - 1
        self._trunk, self._head = children[:cut], [child for child in children[cut:] if child != "avgpool"]
        self._classifier = linear[-1]
        self._relu = name.startswith("densenet")  # DenseNet calls relu between its last child and the pooling
        self.examine(name, image_size)

    def forward_features(self, x: Tensor) -> Tensor:
        """Pixels [B,3,H,W] to the map before the global pooling."""
        x = self.normalize(x)
        for child in self._trunk:
            x = getattr(self.model, child)(x)
        return F.relu(x) if self._relu else x

    def forward_head(self, f: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map to logits [B,K], or to what enters the last linear layer, [B,d]."""
        f = self.model.avgpool(f) if hasattr(self.model, "avgpool") else F.adaptive_avg_pool2d(f, 1)
        layers: list[nn.Module] = []
        for child in self._head:
            module = getattr(self.model, child)
            layers += list(module) if isinstance(module, nn.Sequential) else [module]
        if not any(isinstance(layer, nn.Flatten) for layer in layers):
            f = f.flatten(1)
        for layer in layers[:-1]:
            f = layer(f)
        return f if pre_logits else layers[-1](f)

    def get_classifier(self) -> nn.Linear:
        return self.model.get_submodule(self._classifier)
