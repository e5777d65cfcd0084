"""Any timm classifier by name."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from redoubt.errors import UserError
from redoubt.nets.base import first_layer
from redoubt.nets.library import LibraryNet, unknown


class Timm(LibraryNet):
    """A timm classifier (the optional extra ``redoubt[timm]``).

    Args:
        name: timm's name, as ``resnet18`` or ``convnext_atto.d2_in1k``.
        num_classes: K.
        image_size: Side of the images in pixels; nets of a fixed size (ViT) are built for it.
        pretrained: Whether timm loads its weights (ImageNet; downloads). They want ImageNet's normalisation.
        normalize: Whether the first layer normalises.
        mean: Per-channel mean for `normalize`.
        std: Per-channel standard deviation for `normalize`.

    Raises:
        UserError: timm is not installed, has no such net or weights, or the net does not fit the interface.
    """

    def __init__(
        self,
        *,
        name: str,
        num_classes: int,
        image_size: int | Sequence[int],
        pretrained: bool = False,
        normalize: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        model = _create(name, num_classes=num_classes, image_size=image_size, pretrained=pretrained)
        super().__init__(model, first_layer(normalize, mean, std))
        splits = "pre_logits" in inspect.signature(model.forward_head).parameters
        if not splits or not isinstance(model.get_classifier(), nn.Linear):
            raise UserError(f"model.name={name} has no single linear classifier: choose another net")
        self.examine(name, image_size)

    def forward_features(self, x: Tensor) -> Tensor:
        """Pixels [B,3,H,W] to timm's unpooled features."""
        return self.model.forward_features(self.normalize(x))

    def forward_head(self, f: Tensor, pre_logits: bool = False) -> Tensor:
        """timm's head: features to logits [B,K], or to what enters the last linear layer, [B,d]."""
        return self.model.forward_head(f, pre_logits=pre_logits)

    def get_classifier(self) -> nn.Linear:
        return self.model.get_classifier()


def _create(name: str, *, num_classes: int, image_size: int | Sequence[int], pretrained: bool) -> Any:
    """timm's net; a net of fixed input size (ViT) is told ours."""
    try:
        import timm
    except ImportError:
        raise UserError("model=timm needs the package timm: pip install redoubt[timm]") from None
    more: dict[str, Any] = {}
    if ":" not in name:  # timm itself looks up hf-hub:owner/net
        if not timm.is_model(name):
            raise unknown("timm", name, timm.list_models())
        published = timm.get_pretrained_cfg(name)
        if published is not None and published.fixed_input_size:
            more["img_size"] = image_size if isinstance(image_size, int) else tuple(image_size)
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **more)
    except Exception as error:  # unknown tag, no network, no weights, another image size: many classes
        raise UserError(
            f"model.name={name}: timm cannot build it ({str(error)[:150]}): check the name, "
            "model.pretrained, data.image_size and the network"
        ) from error
