"""What every backbone offers, in timm's names, and normalisation as a net's first layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from redoubt.errors import UserError


class Normalize(nn.Module):
    """``(x - mean) / std`` per channel.

    The values belong to the configuration, not to the weights: the buffers are not in the state_dict.

    Args:
        mean: One value per channel (or one for all), in pixel units of [0,1].
        std: Likewise, above 0.

    Raises:
        UserError: The values are not on the scale of pixels in [0,1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        means, stds = [float(m) for m in mean], [float(s) for s in std]
        sound = all(0 <= m <= 1 for m in means) and all(0 < s <= 1 for s in stds)
        if not sound or len(means) != len(stds):
            raise UserError(
                f"model.normalize: mean {means} and std {stds} are not those of pixels in [0,1]: give one "
                "mean from 0 to 1 and one std above 0 and up to 1 per channel"
            )
        self.register_buffer("mean", torch.tensor(means).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(stds).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels [B,3,H,W] in [0,1] to what the net's first convolution sees."""
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


def first_layer(normalize: bool, mean: Sequence[float] | None, std: Sequence[float] | None) -> nn.Module:
    """The `normalize` submodule: the identity, as in the papers' raw-pixel nets (methods.md 0.1), or ours."""
    if not normalize:
        return nn.Identity()
    if mean is None or std is None:
        raise UserError("model.normalize=true needs model.mean and model.std: give both")
    return Normalize(mean, std)


class Backbone(nn.Module):
    """A classifier of pixels in [0,1].

    A backbone defines `forward_features`, `get_classifier`, `feature_layer` and `normalize`; its head is
    global average pooling and the classifier unless it says otherwise. It knows no defense: a defense
    replaces submodules by name, so every submodule is looked up when it is called.
    """

    #: Dotted name of the submodule whose output is the last feature map: a defense's default insertion point.
    feature_layer: str
    #: First layer: `Normalize` or `nn.Identity`.
    normalize: nn.Module

    #: Where in this module a library's own net stands; its plain state_dict lacks this prefix.
    key_prefix: ClassVar[str] = ""
    #: (pattern, replacement) that turn other repositories' parameter names into this net's.
    key_aliases: ClassVar[tuple[tuple[str, str], ...]] = ()
    #: Pattern of parameters that published files hold and no forward uses.
    key_dead: ClassVar[str] = r"(?!)"

    def forward(self, x: Tensor) -> Tensor:
        """Pixels [B,3,H,W] in [0,1] to logits [B,K]: a plain tensor, always."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Pixels [B,3,H,W] in [0,1] to the last feature map [B,C,h,w]."""
        raise NotImplementedError

    def forward_head(self, f: Tensor, pre_logits: bool = False) -> Tensor:
        """The last feature map to logits [B,K], or to the feature [B,d] that enters the last linear layer."""
        pooled = F.adaptive_avg_pool2d(f, 1).flatten(1)
        return pooled if pre_logits else self.get_classifier()(pooled)

    def get_classifier(self) -> nn.Linear:
        """The last linear layer, d to K."""
        raise NotImplementedError

    @property
    def head_name(self) -> str:
        """Dotted name of `get_classifier`."""
        head = self.get_classifier()
        return next(name for name, module in self.named_modules() if module is head)

    def initialise(self, module: nn.Module) -> None:
        """Applies this net's initialisation to all submodules of `module`: what a defense adds starts alike.

        Does nothing here: PyTorch's default initialisation stands where a net states none.
        """
