"""FSR: Feature Separation and Recalibration (Kim et al., CVPR 2023)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redoubt.defenses.module import RobustModule
from redoubt.errors import UserError
from redoubt.nets import attack_mode
from redoubt.objectives.base import wrong_label
from redoubt.units import as_number, height_width

TINY = 1e-8  # the authors' constant inside every logarithm

Sides = tuple[Tensor, Tensor, Tensor]


def bottleneck(channels: int, hidden: int) -> nn.Sequential:
    """Conv-BN-ReLU twice, then a convolution back to ``channels``; 3x3, stride 1, no bias."""
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 3, padding=1, bias=False),
        nn.BatchNorm2d(hidden),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden, hidden, 3, padding=1, bias=False),
        nn.BatchNorm2d(hidden),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden, channels, 3, padding=1, bias=False),
    )


def gumbel_difference(uniform: Tensor) -> Tensor:
    """``g(U1) - g(U2)`` with ``g(U) = -log(-log(U + 1e-8) + 1e-8)``; [B, 2, ...] -> [B, ...]."""
    g = -((-((uniform + TINY).log())) + TINY).log()
    return g[:, 0] - g[:, 1]


class FSRLayer(nn.Module):
    """Separates the feature map of the module that it replaces, recalibrates the non-robust part, adds them.

    With f the map [B, C, H, W], r = S(f), s = sigmoid(r), the mask of each activation is the first of a
    two-way Gumbel-softmax over (log s, log(1 - s)) at temperature tau, that is the sigmoid of their difference
    over tau; without noise about sigmoid(r / tau). The output is ``f + (1 - m) * R((1 - m) * f)``.

    An adaptive attack changes what the mask's gradient is (``backward``), never its value.

    In the training forward (``noise`` given) ``sides`` holds the auxiliary head's logits on f+, f- and the
    recalibrated f-. Mask and logarithms are computed in float32: in bfloat16 ``1 - s`` would lose the mask's
    gradient.
    """

    def __init__(
        self, inner: nn.Module, *, shape: tuple[int, int, int], num_classes: int, tau: float, hidden: int = 64
    ) -> None:
        super().__init__()
        self.inner, self.shape = inner, shape
        channels = shape[0]
        self.separation = bottleneck(channels, hidden)
        self.recalibration = bottleneck(channels, hidden)
        self.head = nn.Linear(channels, num_classes)
        self.tau = tau
        self.noise: Tensor | None = None
        self.sides: Sides | None = None
        self.backward = "exact"

    def forward(self, x: Tensor) -> Tensor:
        f = self.inner(x)
        robust = self.mask(self.separation(f)).to(f.dtype)
        rest = 1 - robust
        negative = rest * f
        gain = rest * self.recalibration(negative)
        if self.noise is not None:
            self.sides = (
                self.auxiliary(robust * f),
                self.auxiliary(negative),
                self.auxiliary(negative + gain),
            )
        return f + gain

    def mask(self, r: Tensor) -> Tensor:
        """Share of each activation that counts as robust, in (0, 1); same shape as r, float32."""
        s = torch.sigmoid(r.float() if r.dtype in (torch.float16, torch.bfloat16) else r)
        logit = (s + TINY).log() - (1 - s + TINY).log()
        if self.noise is not None:
            logit = logit + self.noise
        m = torch.sigmoid(logit / (self.tau + TINY))
        if self.backward == "detached":
            return m.detach()
        if self.backward == "tau1":  # the value at tau, the slope at 1
            smooth = torch.sigmoid(logit)
            return smooth + (m - smooth).detach()
        return m

    def auxiliary(self, f: Tensor) -> Tensor:
        """Logits [B, K] of the auxiliary head on the pooled map."""
        return self.head(f.mean(dim=(2, 3)))


class FSR(RobustModule):
    """Adds ``lambda_sep * L_sep + lambda_rec * L_rec`` to any base, on what was crafted.

    ``L_sep = mean_m CE(q+, y) + CE(q-, y')`` and ``L_rec = mean_m CE(q~, y)`` over the M inserted layers, with y'
    the highest-scoring wrong class of the final logits of the same forward (methods: the authors' code; batch
    means where the supplement writes a sum). Attacks, the training attack included, and evaluation see the mask
    without noise.

    With TRADES and MART the paper only says that the classification loss is replaced by the base's objective.
    Not published and chosen here: the auxiliary losses and y' are taken on the crafted examples only, noise is on
    in every training-mode forward (clean ones too), the attack sees no noise; 64 bottleneck channels at every
    position. Modules added to a net with an initialisation of its own (VGG-16, WRN) are initialised by it too.

    Args:
        at: Dotted name of the submodule after which to insert a layer, or several; the net's ``feature_layer``
            where None.
        lambda_sep, lambda_rec: Weights of the two losses.
        tau: Temperature of the mask.
        hidden: Channels of the Separation and Recalibration nets.

    Raises:
        UserError: No such submodule, or its output is no feature map [B, C, H, W].
    """

    def __init__(
        self,
        *,
        net: nn.Module,
        num_classes: int,
        image_size: int | Sequence[int],
        at: str | Sequence[str] | None = None,
        lambda_sep: float = 1.0,
        lambda_rec: float = 1.0,
        tau: float = 0.1,
        hidden: int = 64,
        **rest: Any,
    ) -> None:
        for name, value in (("lambda_sep", lambda_sep), ("lambda_rec", lambda_rec)):
            if as_number(value, f"defense.{name}") < 0:
                raise UserError(f"defense.{name}={value} must not be negative")
        if as_number(tau, "defense.tau") <= 0:
            raise UserError(f"defense.tau={tau} must be positive")
        if int(hidden) != as_number(hidden, "defense.hidden") or hidden < 1:
            raise UserError(f"defense.hidden={hidden} must be a whole number of at least 1")
        names = [str(net.feature_layer)] if at is None else [at] if isinstance(at, str) else list(at)
        shapes = map_shapes(net, names, image_size)
        layers = []
        # The innermost first: replacing a module changes the names of those inside it.
        for name, shape in sorted(shapes.items(), key=lambda item: -item[0].count(".")):
            layer = FSRLayer(net.get_submodule(name), shape=shape, num_classes=num_classes, tau=tau, hidden=hidden)
            initialise = getattr(net, "initialise", None)
            if initialise is not None:
                for added in (layer.separation, layer.recalibration, layer.head):
                    initialise(added)
            net.set_submodule(name, layer)
            layers.append(layer)
        super().__init__(net=net, num_classes=num_classes, image_size=image_size, **rest)
        self.layers, self.shapes = layers, [layer.shape for layer in layers]
        self.lambda_sep, self.lambda_rec = float(lambda_sep), float(lambda_rec)

    def run(self, x: Tensor, noise: Sequence[Tensor] | None = None) -> tuple[Tensor, list[Sides]]:
        """One forward: (logits, the layers' side outputs); the latter only where noise is given."""
        if noise is None:
            return self.net(x), []
        try:
            for layer, n in zip(self.layers, noise, strict=True):
                layer.noise = n
            logits = self.net(x)
            return logits, [layer.sides for layer in self.layers if layer.sides is not None]
        finally:
            for layer in self.layers:
                layer.noise = layer.sides = None

    def adaptive(self, x: Tensor, y: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
        """Around the steep mask: its slope at tau = 1, or none; and by the auxiliary head's logits on f+, f- and f~."""

        def around(backward: str, adv: Tensor) -> Tensor:
            try:
                for layer in self.layers:
                    layer.backward = backward
                return F.cross_entropy(self.logits(adv), y, reduction="none")
            finally:
                for layer in self.layers:
                    layer.backward = "exact"

        def head(which: int, adv: Tensor) -> Tensor:
            _, sides = self.run(adv, [adv.new_zeros(()) for _ in self.layers])  # noise of zero: the mask as it is
            return torch.stack([F.cross_entropy(side[which].float(), y, reduction="none") for side in sides]).mean(0)

        heads = ("head_robust", "head_nonrobust", "head_recalibrated")
        return {
            **{f"mask_{kind}": functools.partial(around, kind) for kind in ("tau1", "detached")},
            **{name: functools.partial(head, i) for i, name in enumerate(heads)},
        }

    def draw_noise(self, x: Tensor, purpose: str) -> list[Tensor]:
        """Logistic noise [B, C, H, W] for each layer: this share's rows of the global batch's numbers."""
        first, total = (self.share.first, self.share.total) if self.share else (0, len(x))
        noise = []
        for i, shape in enumerate(self.shapes):
            g = self.generator(f"gumbel/{purpose}", x.device, i)
            u = torch.rand(total, 2, *shape, generator=g, device=x.device)[first : first + len(x)]
            noise.append(gumbel_difference(u))
        return noise

    def auxiliary(self, logits: Tensor, sides: list[Sides], y: Tensor) -> dict[str, Tensor]:
        """The weighted separation and recalibration losses (methods F.5), averaged over the layers."""
        wrong = wrong_label(logits, y)
        smooth = self.objective.label_smoothing
        sep, rec = [], []
        for positive, negative, recalibrated in sides:
            true = F.cross_entropy(positive.float(), y, label_smoothing=smooth)
            sep.append(true + F.cross_entropy(negative.float(), wrong))
            rec.append(F.cross_entropy(recalibrated.float(), y, label_smoothing=smooth))
        return {
            "sep": self.lambda_sep * torch.stack(sep).mean(),
            "rec": self.lambda_rec * torch.stack(rec).mean(),
        }


def map_shapes(
    net: nn.Module, names: Sequence[str], image_size: int | Sequence[int]
) -> dict[str, tuple[int, int, int]]:
    """(C, H, W) of the named submodules' outputs, by a dry run on one black image that leaves no trace."""
    modules = dict(net.named_modules())
    for name in names:
        if name not in modules or not name:
            last = [n for n in modules if n.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
            near = ", ".join(last[:4] or [n for n, _ in net.named_children()])
            raise UserError(f"defense.at={name!r} is not a module of this net: take one such as {near}")
    if len(set(names)) < len(names) or not names:
        raise UserError(f"defense.at={list(names)} must name at least one module, and each once")
    shapes: dict[str, tuple[int, int, int]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or output.dim() != 4:
                raise UserError(f"defense.at={name!r} puts out no feature map [B, C, H, W]: name another module")
            if name in shapes:
                raise UserError(f"defense.at={name!r} is called more than once in a forward: name the module around it")
            shapes[name] = (output.shape[1], output.shape[2], output.shape[3])

        return hook

    handles = [modules[name].register_forward_hook(note(name)) for name in names]
    try:
        with attack_mode(net), torch.no_grad():
            net(torch.zeros(1, 3, *height_width(image_size), device=next(net.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    if missing := [n for n in names if n not in shapes]:
        raise UserError(f"defense.at={missing[0]!r} is never called by this net: name another module")
    return shapes
