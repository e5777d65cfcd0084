"""The common corruptions of CIFAR-10-C, computed in torch on the images' device.

Constants follow ``make_cifar_c.py`` (github.com/hendrycks/robustness; Hendrycks and Dietterich 2019), which states them
for 32x32 pixels. What it gives as a multiple of the image's size scales with the size here too; radii and widths
in pixels stay. Where a detail of OpenCV, Pillow, ImageMagick or scikit-image shapes the published sets, a comment names
it. Not the same: frost, which overlays photographs there and a procedural texture here, and all random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

from redoubt.attacks.base import Attack, Draws, Logits
from redoubt.errors import UserError

#: The kinds of CURE's figure by group.
GROUPS: dict[str, tuple[str, ...]] = {
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "gaussian_blur", "zoom_blur"),
    "digital": ("contrast", "elastic_transform", "jpeg_compression", "pixelate"),
    "weather": ("brightness", "fog", "frost", "snow"),
    "noise": ("gaussian_noise", "impulse_noise", "speckle_noise", "shot_noise"),
}
KINDS = tuple(kind for kinds in GROUPS.values() for kind in kinds)
SEVERITIES = (1, 2, 3, 4, 5)


class Corruption(Attack):
    """One corruption at one severity: no adversary, but scored as an attack without a bound.

    Everything is computed in float64, as the published sets were: no TF32, and no last bit of float32 that truncation
    to 8 bits would magnify.

    Args:
        kind: One of `KINDS`.
        severity: 1 (mild) to 5. With the same draws a severity changes the constants only; Poisson's counts (shot
            noise) are the exception.

    Raises:
        UserError: The kind or the severity is not known.
    """

    eps = None
    needs_gradients = False
    cost = 0.0

    def __init__(self, *, kind: str, severity: int) -> None:
        if kind not in KINDS:
            raise UserError(f"kind={kind!r} is not a corruption: take one of {', '.join(KINDS)}")
        if severity not in SEVERITIES:
            raise UserError(f"severity={severity!r} is not known: take a whole number from 1 to 5")
        self.kind, self.severity = kind, int(severity)
        self.settings = [kind, self.severity]
        self.group = next(group for group, kinds in GROUPS.items() if kind in kinds)

    @torch.no_grad()
    def __call__(self, logits: Logits, x: Tensor, y: Tensor, draws: Draws) -> Tensor:
        """The corrupted images.

        Args:
            logits: Not used.
            x: Images [B, 3, H, W] in [0, 1], H and W at least 8; not modified.
            y: Not used.
            draws: Random numbers, drawn for the whole chunk at once on ``draws.device``, which is that of x.

        Returns:
            Float32 images [B, 3, H, W] of whole 255ths in [0, 1], as the published sets are uint8.
        """
        corrupted = _FUNCTIONS[self.kind](x.double(), self.severity - 1, draws.generator())
        return _truncate(corrupted).float()


def corruptions(*, kinds: Sequence[str] | None = None, severities: Sequence[int] = SEVERITIES) -> dict[str, Corruption]:
    """Corruptions by name, ``<kind>_<severity>``: what conf/attack/corruptions.yaml asks for.

    Args:
        kinds: Some of `KINDS`; None: all of them.
        severities: Some of 1 to 5.

    Raises:
        UserError: A kind or a severity is not known.
    """
    for name, value in (("kinds", kinds), ("severities", severities)):
        if value is not None and (isinstance(value, str) or not isinstance(value, Sequence) or not value):
            raise UserError(f"{name}={value!r} must be a list of at least one, as kinds=[fog] or severities=[1,3]")
    return {
        f"{kind}_{severity}": Corruption(kind=kind, severity=severity)
        for kind in (KINDS if kinds is None else kinds)
        for severity in severities
    }


# Helpers. Images are float64 [B, C, H, W]; g draws on their device.


def _truncate(x: Tensor) -> Tensor:
    """To whole 255ths, downwards, as NumPy's uint8 does."""
    # Float32 images lie up to 8e-6 levels below their level; they shall stay on it.
    return (x.clamp(0.0, 1.0) * 255.0 + 1e-4).floor() / 255.0


def _round(x: Tensor) -> Tensor:
    """To the nearest 255ths, halves upwards, as Pillow and ImageMagick do."""
    return _truncate(x + 0.5 / 255.0)


def _uniform(x: Tensor, g: Generator, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=g, device=x.device, dtype=x.dtype)


def _normal(x: Tensor, g: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, device=x.device, dtype=x.dtype)


def _separable(x: Tensor, matrix: Callable[[int], Tensor]) -> Tensor:
    """Maps columns and rows by the matrices [out, n] for their lengths n."""
    return matrix(x.shape[-2]).to(x.device) @ x @ matrix(x.shape[-1]).to(x.device).T


def _gaussian(n: int, sigma: float, truncate: float = 4.0, reflect: bool = False) -> Tensor:
    """The matrix [n, n] of scipy's Gaussian filter; its border is mode ``nearest`` or ``reflect``."""
    radius = int(truncate * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets.double() / max(sigma, 1e-9)) ** 2)
    rows = torch.arange(n)[:, None].expand(n, len(offsets))
    columns = rows + offsets
    if reflect:
        columns = columns % (2 * n)
        columns = torch.minimum(columns, 2 * n - 1 - columns)
    weights = (weights / weights.sum()).expand(n, -1)
    return torch.zeros(n, n, dtype=torch.float64).index_put_((rows, columns.clamp(0, n - 1)), weights, accumulate=True)


def _zoom(n: int, factor: float) -> Tensor:
    """The matrix [n, n] that cuts out the middle 1/factor of a line and stretches it linearly, end to end."""
    cut = math.ceil(n / factor)
    long = round(cut * factor)
    at = (torch.arange(n, dtype=torch.float64) + (long - n) // 2) * ((cut - 1) / (long - 1)) + (n - cut) // 2
    # A line interpolates between its two neighbours by the hat function of the distance.
    return (1.0 - (at[:, None] - torch.arange(n)).abs()).clamp_min(0.0)


def _box(n: int, m: int) -> Tensor:
    """The matrix [m, n] of Pillow's BOX resize: the mean of the pixels whose centres fall into the new one."""
    scale = n / m
    middle = (torch.arange(m, dtype=torch.float64)[:, None] + 0.5) * scale
    width, column = max(scale, 1.0), torch.arange(n)
    # On a tie rounding errors decide: both of Pillow's conditions, in its order of operations.
    inside = (column >= (middle - 0.5 * width + 0.5).floor()) & (column < (middle + 0.5 * width + 0.5).floor())
    distance = (column - middle + 0.5) * (1.0 / width)
    inside &= (distance > -0.5) & (distance <= 0.5)
    return inside / inside.sum(1, keepdim=True).double()


def _gather(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """x at each image's own whole coordinates (both broadcast to [B, H, W]), clamped to the border."""
    b, c, h, w = x.shape
    index = rows.clamp(0, h - 1) * w + columns.clamp(0, w - 1)
    return x.flatten(2).gather(2, index.view(b, 1, h * w).expand(-1, c, -1)).view_as(x)


def _interpolate(x: Tensor, across: Tensor, down: Tensor, align_corners: bool) -> Tensor:
    """x at real coordinates [B, H, W], bilinear; mirrored at the border pixels' centres, or at their outer edges."""
    size = torch.tensor([x.shape[-1], x.shape[-2]], dtype=x.dtype, device=x.device)
    at = torch.stack((across, down), dim=-1)
    grid = 2.0 * at / (size - 1.0) - 1.0 if align_corners else (2.0 * at + 1.0) / size - 1.0
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=align_corners)


def _smear(x: Tensor, angle: Tensor, radius: int, sigma: float) -> Tensor:
    """ImageMagick's motion blur to 8 bits: half a Gaussian along each image's angle [B] in degrees, in whole pixels."""
    steps = torch.arange(2 * radius + 1, dtype=x.dtype, device=x.device)
    weights = torch.exp(-0.5 * (steps / sigma) ** 2)
    weights = weights / weights.sum()
    direction = torch.deg2rad(angle)[:, None]
    right = torch.ceil(steps * direction.cos() - 0.5).long()
    down = torch.ceil(steps * direction.sin() - 0.5).long()
    row = torch.arange(x.shape[-2], device=x.device)[:, None]
    column = torch.arange(x.shape[-1], device=x.device)
    out = torch.zeros_like(x)
    for i in range(len(steps)):
        out += weights[i] * _gather(x, row + down[:, i, None, None], column + right[:, i, None, None])
    return _round(out)


def _plasma(x: Tensor, g: Generator, decay: float) -> Tensor:
    """Fractal noise [B, 1, H, W] in [0, 1] by midpoint displacement on a torus; the noise falls by decay² an octave."""

    def displaced(four: Tensor, by: float) -> Tensor:
        return four / 4.0 + _uniform(x, g, *four.shape, low=-by, high=by)

    b, _, h, w = x.shape
    step = 1 << (max(h, w) - 1).bit_length()
    z = torch.zeros(b, step, step, dtype=x.dtype, device=x.device)
    size = 1.0
    while step >= 2:
        half = step // 2
        corners = z[:, ::step, ::step]
        pairs = corners + corners.roll(-1, 2)
        centres = displaced(pairs + pairs.roll(-1, 1), size)
        z[:, half::step, half::step] = centres
        z[:, ::step, half::step] = displaced(centres + centres.roll(1, 1) + pairs, size)
        z[:, half::step, ::step] = displaced(centres + centres.roll(1, 2) + corners + corners.roll(-1, 1), size)
        step, size = half, size / decay**2
    low, high = z.amin((1, 2), keepdim=True), z.amax((1, 2), keepdim=True)
    return ((z - low) / (high - low))[:, None, :h, :w]


# Blur.


def _defocus_blur(x: Tensor, s: int, g: Generator) -> Tensor:
    radius, alias = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))[s]
    near = torch.arange(-1, 2, dtype=x.dtype, device=x.device)
    square = near[:, None] ** 2 + near**2
    disk = (square <= radius**2).to(x.dtype)
    smooth = torch.exp(-0.5 * square / alias**2)
    # A disk of at most 3x3 pixels, antialiased by a Gaussian of 3x3.
    kernel = F.conv2d((disk / disk.sum())[None, None], (smooth / smooth.sum())[None, None], padding=2)
    padded = F.pad(x, (2, 2, 2, 2), mode="reflect")
    return F.conv2d(padded.flatten(0, 1)[:, None], kernel).view_as(x)


def _glass_blur(x: Tensor, s: int, g: Generator) -> Tensor:
    sigma, times = ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))[s]
    b, _, h, w = x.shape
    row, column = torch.arange(h, device=x.device)[:, None], torch.arange(w, device=x.device)
    inner = (row >= 2) & (column >= 2)
    x = _truncate(_separable(x, partial(_gaussian, sigma=sigma)))
    for _ in range(times):
        # The original means to swap each pixel with one of its neighbours up and left (itself included), from the last
        # pixel to the first. Its arrays are views, so a pixel is overwritten and its neighbour is not: a gather.
        up, left = (_uniform(x, g, 2, b, h, w) < 0.5) & inner
        x = _gather(x, row - up.long(), column - left.long())
    return _separable(x, partial(_gaussian, sigma=sigma))


def _motion_blur(x: Tensor, s: int, g: Generator) -> Tensor:
    radius, sigma = ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))[s]
    return _smear(x, _uniform(x, g, len(x), low=-45.0, high=45.0), radius, sigma)


def _gaussian_blur(x: Tensor, s: int, g: Generator) -> Tensor:
    return _separable(x, partial(_gaussian, sigma=(0.4, 0.6, 0.7, 0.8, 1.0)[s]))


def _zoom_blur(x: Tensor, s: int, g: Generator) -> Tensor:
    # NumPy's arange(1, 1.06, 0.01) adds 1.01 - 1, a little over 0.01: it includes 1.06, and 26 * 1.25 rounds to 33.
    count = (7, 12, 16, 21, 26)[s]
    out = x.clone()
    for i in range(count):
        out += _separable(x, partial(_zoom, factor=1.0 + i * (1.01 - 1.0)))
    return out / (count + 1)


# Digital.


def _contrast(x: Tensor, s: int, g: Generator) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * (0.75, 0.5, 0.4, 0.3, 0.15)[s] + mean


def _elastic_transform(x: Tensor, s: int, g: Generator) -> Tensor:
    b, _, h, w = x.shape
    n = min(h, w)
    strength, sigma, shear = (
        n * c for c in ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))[s]
    )
    # Three corners of a square about the middle move at random and take the image along (affinely).
    middle, arm = torch.tensor([w // 2, h // 2]), n // 3
    corners = (middle + arm * torch.tensor([[1, 1], [1, -1], [-1, -1]])).to(x)
    moved = corners + _uniform(x, g, b, 3, 2, low=-shear, high=shear)
    back = torch.linalg.solve(F.pad(moved, (0, 1), value=1.0), corners.expand(b, 3, 2))
    down, across = torch.meshgrid(torch.arange(h).to(x), torch.arange(w).to(x), indexing="ij")
    source = torch.stack((across, down, torch.ones_like(down)), dim=-1).view(1, h * w, 3) @ back
    x = _interpolate(x, source[..., 0].view(b, h, w), source[..., 1].view(b, h, w), align_corners=True)

    wobble = _separable(
        _uniform(x, g, 2, b, h, w, low=-1.0), partial(_gaussian, sigma=sigma, truncate=3.0, reflect=True)
    )
    return _interpolate(x, across + strength * wobble[0], down + strength * wobble[1], align_corners=False)


def _jpeg_compression(x: Tensor, s: int, g: Generator) -> Tensor:
    encoded = encode_jpeg(list((_round(x) * 255.0).round().byte().cpu()), quality=(80, 65, 58, 50, 40)[s])
    return torch.stack([decode_jpeg(image, mode=ImageReadMode.RGB) for image in encoded]).to(x) / 255.0


def _pixelate(x: Tensor, s: int, g: Generator) -> Tensor:
    c = (0.95, 0.9, 0.85, 0.75, 0.65)[s]
    h, w = x.shape[-2:]
    height, width = int(h * c), int(w * c)
    # Pillow resizes rows, then columns, and rounds to 8 bits after each.
    x = _round(_round(x) @ _box(w, width).to(x.device).T)
    x = _round(_box(h, height).to(x.device) @ x)
    return _box(height, h).to(x.device) @ x @ _box(width, w).to(x.device).T


# Weather.


def _brightness(x: Tensor, s: int, g: Generator) -> Tensor:
    # The largest channel is HSV's value; with hue and saturation kept the others go along in proportion.
    value = x.amax(1, keepdim=True)
    brighter = (value + (0.05, 0.1, 0.15, 0.2, 0.3)[s]).clamp_max(1.0)
    return torch.where(value > 0.0, x * (brighter / value.clamp_min(1e-9)), brighter)


def _fog(x: Tensor, s: int, g: Generator) -> Tensor:
    density, decay = ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))[s]
    brightest = x.amax((1, 2, 3), keepdim=True)
    return (x + density * _plasma(x, g, decay)) * brightest / (brightest + density)


def _frost(x: Tensor, s: int, g: Generator) -> Tensor:
    keep, ice = ((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[s]
    return keep * x + ice * _ice(x, g)


def _ice(x: Tensor, g: Generator) -> Tensor:
    """A frosted pane [B, 3, H, W]: needles at 60° to one another, as ice grows, thick where fractal noise is high."""
    b, _, h, w = x.shape
    cover = (2.5 * _plasma(x, g, 1.4) - 0.75).clamp(0.0, 1.0)
    seeds = (_uniform(x, g, b, 1, h, w) < 0.1 * cover).to(x.dtype)
    angle = _uniform(x, g, b, high=360.0)
    needles = torch.stack([_smear(seeds, angle + 60.0 * i, 6, 4.0) for i in range(6)]).amax(0)
    white = (0.3 * cover + 2.2 * needles).clamp(0.0, 1.0)
    blue = torch.tensor([0.15, 0.25, 0.35], dtype=x.dtype, device=x.device).view(3, 1, 1)
    return blue + (1.0 - blue) * white


def _snow(x: Tensor, s: int, g: Generator) -> Tensor:
    mean, std, factor, threshold, radius, sigma, keep = (
        (0.1, 0.2, 1.0, 0.6, 8, 3.0, 0.95),
        (0.1, 0.2, 1.0, 0.5, 10, 4.0, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4.0, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6.0, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12.0, 0.8),
    )[s]
    b, _, h, w = x.shape
    flakes = _separable(mean + std * _normal(x, g, b, 1, h, w), partial(_zoom, factor=factor))
    flakes = _truncate(torch.where(flakes < threshold, 0.0, flakes))
    flakes = _smear(flakes, _uniform(x, g, b, low=-135.0, high=-45.0), radius, sigma)
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=x.dtype, device=x.device).view(3, 1, 1)
    whitened = torch.maximum(x, 1.5 * (x * luma).sum(1, keepdim=True) + 0.5)
    return keep * x + (1.0 - keep) * whitened + flakes + flakes.flip(2, 3)


# Noise.


def _gaussian_noise(x: Tensor, s: int, g: Generator) -> Tensor:
    return x + (0.04, 0.06, 0.08, 0.09, 0.1)[s] * _normal(x, g, *x.shape)


def _impulse_noise(x: Tensor, s: int, g: Generator) -> Tensor:
    hit = _uniform(x, g, *x.shape) < (0.01, 0.02, 0.03, 0.05, 0.07)[s]
    salt = _uniform(x, g, *x.shape) < 0.5
    return torch.where(hit, salt.to(x.dtype), x)


def _speckle_noise(x: Tensor, s: int, g: Generator) -> Tensor:
    return x + x * (0.06, 0.1, 0.12, 0.16, 0.2)[s] * _normal(x, g, *x.shape)


def _shot_noise(x: Tensor, s: int, g: Generator) -> Tensor:
    photons = (500.0, 250.0, 100.0, 75.0, 50.0)[s]
    return torch.poisson(x * photons, generator=g) / photons


#: (images, severity - 1, generator) -> images, not yet 8 bits.
_FUNCTIONS: dict[str, Callable[[Tensor, int, Generator], Tensor]] = {
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "gaussian_blur": _gaussian_blur,
    "zoom_blur": _zoom_blur,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "jpeg_compression": _jpeg_compression,
    "pixelate": _pixelate,
    "brightness": _brightness,
    "fog": _fog,
    "frost": _frost,
    "snow": _snow,
    "gaussian_noise": _gaussian_noise,
    "impulse_noise": _impulse_noise,
    "speckle_noise": _speckle_noise,
    "shot_noise": _shot_noise,
}
