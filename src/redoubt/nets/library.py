"""What timm's and torchvision's nets share here: one submodule that is tried on one image."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from redoubt.errors import UserError
from redoubt.nets.base import Backbone
from redoubt.nets.mode import attack_mode
from redoubt.units import height_width


class LibraryNet(Backbone):
    """A library's net as the submodule `model`; files hold its plain state_dict, without that prefix.

    The constructor tries the net on one image: its logits must follow from its features, and `feature_layer`
    is the last submodule of the features whose output is a map [B,C,h,w]. The trial runs in eval mode without
    gradients, draws no random number and leaves modes, buffers and hooks as they were.
    """

    key_prefix = "model."
    model: Any

    def __init__(self, model: nn.Module, normalize: nn.Module) -> None:
        super().__init__()
        self.normalize = normalize
        self.model = model
        self.feature_layer = ""

    def examine(self, name: str, image_size: int | Sequence[int]) -> None:
        """Sets `feature_layer` and checks the net on one image.

        Raises:
            UserError: The net takes no such image, has no feature map, or its logits do not follow from its
                features.
        """
        device = next(self.model.parameters()).device
        height, width = height_width(image_size)
        x = torch.linspace(0, 1, 3 * height * width, device=device).view(1, 3, height, width)
        with attack_mode(self), torch.no_grad():
            try:
                reference = self.model(self.normalize(x))
            except (RuntimeError, AssertionError, ValueError) as error:
                cause = " ".join(str(error).split())[:120]
                raise UserError(
                    f"model.name={name} cannot take {height}x{width} images ({cause}): choose "
                    "another net or a larger data.image_size"
                ) from error
            try:
                self.feature_layer = last_map(self, lambda: self.forward_features(x))
                pooled = self.forward_head(self.forward_features(x), pre_logits=True)
                logits = self.get_classifier()(pooled)
                sound = bool(self.feature_layer) and _same(logits, reference) and _same(self(x), reference)
            except (RuntimeError, AssertionError, ValueError):
                sound = False
        if not sound:
            raise UserError(
                f"model.name={name}: its logits do not follow from a feature map by pooling and linear "
                "layers: choose another net, or the other library (model=timm, model=torchvision)"
            )


def last_map(net: nn.Module, run: Callable[[], Tensor]) -> str:
    """Dotted name of the last submodule that, during `run`, returns the feature map that `run` returns.

    A container ends after its contents, so the outermost of several with the same output is named. Where
    `run` returns no map [B,C,h,w] of a square image (ViT's tokens, Swin's channels-last map), the last
    convolution with such a map is named; "" if there is none.
    """
    seen: list[tuple[str, nn.Module, torch.Size]] = []

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, args: object, out: object) -> None:
            if isinstance(out, Tensor) and _is_map(out):
                seen.append((name, module, out.shape))

        return hook

    named = [(name, module) for name, module in net.named_modules() if name not in ("", "normalize")]
    hooks = [module.register_forward_hook(watch(name)) for name, module in named]
    try:
        f = run()
    finally:
        for handle in hooks:
            handle.remove()
    if _is_map(f):
        fitting = [name for name, _, shape in seen if shape == f.shape]
    else:
        fitting = [name for name, module, _ in seen if isinstance(module, nn.Conv2d)]
    return fitting[-1] if fitting else ""


def _is_map(t: Tensor) -> bool:
    return t.dim() == 4 and t.shape[2] == t.shape[3]


def unknown(library: str, name: str, names: list[str]) -> UserError:
    """The error for a name that the library does not have, with close ones."""
    close = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else f"choose one of {library}'s list_models()"
    return UserError(f"model.name={name}: {library} has no such classifier: {hint}")


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two logits agree but for the order of float32 sums; on the meta device: two shapes."""
    if a.shape != b.shape or a.device.type == "meta":
        return a.shape == b.shape
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())
