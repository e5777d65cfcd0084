"""The common corruptions: what holds for all of them, and scipy, Pillow and plain NumPy as oracles."""

from __future__ import annotations

import io
import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.ndimage as ndi
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from redoubt.attacks import corruptions as module
from redoubt.attacks.base import Draws
from redoubt.attacks.corruptions import GROUPS, KINDS, SEVERITIES, Corruption, corruptions
from redoubt.errors import UserError

DETERMINISTIC = ("defocus_blur", "gaussian_blur", "zoom_blur", "contrast", "jpeg_compression", "pixelate", "brightness")
ALL = [(kind, severity) for kind in KINDS for severity in SEVERITIES]


def draws(chunk=0, seed=0):
    return Draws(seed, "test", chunk, torch.device("cpu"))


def no_logits(x):
    raise AssertionError("a corruption does not ask the net")


def corrupt(x, kind, severity, chunk=0):
    y = torch.zeros(len(x), dtype=torch.long)
    return Corruption(kind=kind, severity=severity)(no_logits, x, y, draws(chunk))


def noise_images(b, h, w, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (b, 3, h, w), generator=g).float() / 255


def photographs(size=32):
    """Patches [N, 3, size, size] of two photographs: a temple and a flower."""
    patches = []
    for photograph in load_sample_images().images:
        small = torch.from_numpy(np.array(Image.fromarray(photograph).resize((192, 128), Image.Resampling.BOX)))
        patches.append(small.permute(2, 0, 1).unfold(1, size, size).unfold(2, size, size).permute(1, 2, 0, 3, 4))
    return torch.cat([p.reshape(-1, 3, size, size) for p in patches]).float() / 255


@pytest.fixture(scope="module")
def photos():
    return photographs()


def flat(value, size=32, b=2):
    return torch.tensor([value, 0.4, 1.0]).view(1, 3, 1, 1).mul(255).round().div(255).expand(b, 3, size, size).clone()


def channels(image):
    """[3, H, W] tensor -> float64 arrays [H, W]."""
    return list(image.double().numpy())


def floor255(array):
    return np.floor(np.clip(array, 0, 1) * 255 + 1e-4).astype(np.uint8)


def levels(x):
    return (x * 255).round().byte().numpy()


# What holds for all of them.


def test_kinds_and_names():
    assert list(GROUPS) == ["blur", "digital", "weather", "noise"]
    assert [len(kinds) for kinds in GROUPS.values()] == [5, 4, 4, 4]
    assert len(set(KINDS)) == 17
    everything = corruptions()
    assert list(everything) == [f"{kind}_{severity}" for kind, severity in ALL]
    assert all(f"{c.kind}_{c.severity}" == name for name, c in everything.items())
    assert list(corruptions(kinds=["snow", "fog"], severities=[5, 2])) == ["snow_5", "snow_2", "fog_5", "fog_2"]


def test_is_an_attack_without_bound_or_gradients():
    corruption = Corruption(kind="fog", severity=1)
    assert corruption.eps is None
    assert not corruption.needs_gradients
    assert corruption.cost == 0


@pytest.mark.parametrize("make", [Corruption, lambda kind, severity: corruptions(kinds=[kind], severities=[severity])])
@pytest.mark.parametrize(("kind", "severity"), [("rain", 1), (["fog"], 1), ("fog", 0), ("fog", 6), ("fog", "3")])
def test_mistakes_are_one_line(make, kind, severity):
    with pytest.raises(UserError) as caught:
        make(kind=kind, severity=severity)
    text = str(caught.value)
    assert "\n" not in text
    if kind == "fog":
        assert repr(severity) in text
    else:
        assert all(known in text for known in KINDS)


@pytest.mark.parametrize(("kind", "severity"), ALL)
def test_contract(kind, severity):
    state = torch.get_rng_state()
    for b, h, w in ((2, 8, 8), (1, 16, 16), (2, 32, 32), (1, 64, 64), (1, 8, 20)):
        x = noise_images(b, h, w)
        before = x.clone()
        out = corrupt(x, kind, severity)
        assert out.shape == x.shape
        assert out.dtype == torch.float32
        assert out.min() >= 0
        assert out.max() <= 1
        assert torch.equal(out, (out.double() * 255).round().div(255).float()), "not whole 255ths"
        assert torch.equal(x, before), "modified its input"
        assert h < 32 or not torch.equal(out, x)  # zooming 8 pixels by 6 % changes nothing
        assert torch.equal(out, corrupt(x, kind, severity)), "the same draws gave other bits"
        assert torch.equal(out, corrupt(x, kind, severity, chunk=1)) == (kind in DETERMINISTIC)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_differ_by_their_random_numbers_alone(kind):
    image = noise_images(1, 16, 16)
    two = corrupt(image.expand(2, -1, -1, -1).contiguous(), kind, 3)
    assert torch.equal(two[0], two[1]) == (kind in DETERMINISTIC)
    # With the random numbers the same, an image's neighbours in the chunk do not matter.
    x, other = noise_images(2, 16, 16, seed=1), noise_images(2, 16, 16, seed=1)
    other[1] = 0.5
    if kind != "shot_noise":  # Poisson's sampler takes as many numbers as the rates ask for.
        assert torch.equal(corrupt(x, kind, 3)[0], corrupt(other, kind, 3)[0])


#: Of these the constants themselves let the mean distance fall or stand still; each has a test of its own below.
NOT_GROWING = ("glass_blur", "motion_blur", "elastic_transform", "frost")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in NOT_GROWING])
def test_severity_moves_photographs_further(photos, kind):
    distances = [(corrupt(photos, kind, s) - photos).abs().mean().item() for s in SEVERITIES]
    assert all(a < b for a, b in pairwise(distances)), distances
    assert distances[0] > 0.001
    assert distances[-1] < 0.35


@pytest.mark.parametrize("kind", [*GROUPS["blur"], "contrast", "elastic_transform", "pixelate"])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_flat_images_stay(kind, severity):
    x = flat(1 / 255)
    assert torch.equal(corrupt(x, kind, severity), x)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_float32_keeps_every_level(severity):
    """float32(k / 255) may lie below k / 255: truncation must not take it a level down."""
    x = (torch.arange(256).float() / 255).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    out = corrupt(x, "impulse_noise", severity)
    assert (out == x).float().mean() > 0.9
    assert ((out == x) | (out == 0) | (out == 1)).all()
    stripes = (torch.arange(0, 256, 4).float() / 255).view(1, 1, 64, 1).expand(1, 3, 64, 64)
    out = corrupt(stripes, "defocus_blur", 1)[:, :, 1:-1]  # a symmetric kernel on a ramp: the ramp
    assert torch.equal(out, stripes[:, :, 1:-1])


# Blur.


@pytest.mark.parametrize("severity", SEVERITIES)
def test_gaussian_blur_is_scipys(severity):
    x = noise_images(2, 9, 16)
    sigma = (0.4, 0.6, 0.7, 0.8, 1.0)[severity - 1]
    out = levels(corrupt(x, "gaussian_blur", severity))
    for i in range(2):
        for c, channel in enumerate(channels(x[i])):
            assert np.array_equal(out[i, c], floor255(ndi.gaussian_filter(channel, sigma, mode="nearest", truncate=4)))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_defocus_blur_is_a_correlation_with_an_antialiased_disk(severity):
    radius, alias = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))[severity - 1]
    disk = np.array([[float(i * i + j * j <= radius**2) for i in range(-8, 9)] for j in range(-8, 9)])
    line = np.exp(-np.array([1, 0, 1]) / (2 * alias**2))
    line /= line.sum()
    kernel = ndi.convolve(disk / disk.sum(), np.outer(line, line), mode="constant")
    x = noise_images(1, 8, 16)
    out = levels(corrupt(x, "defocus_blur", severity))
    for c, channel in enumerate(channels(x[0])):
        assert np.array_equal(out[0, c], floor255(ndi.correlate(channel, kernel, mode="mirror")))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_zoom_blur_is_the_mean_of_scipys_zooms(severity):
    def zoomed(array, factor):
        n = len(array)
        cut = math.ceil(n / factor)
        top = (n - cut) // 2
        large = ndi.zoom(array[top : top + cut, top : top + cut], factor, order=1)
        trim = (len(large) - n) // 2
        return large[trim : trim + n, trim : trim + n]

    factors = np.arange(1, (1.06, 1.11, 1.16, 1.21, 1.26)[severity - 1], 0.01)
    for size in (8, 16, 32, 64):
        x = noise_images(1, size, size)
        out = levels(corrupt(x, "zoom_blur", severity))
        for c, channel in enumerate(channels(x[0])):
            mean = (channel + sum(zoomed(channel, factor) for factor in factors)) / (len(factors) + 1)
            assert np.array_equal(out[0, c], floor255(mean))


def naive_smear(channel, angle, radius, sigma):
    h, w = channel.shape
    taps = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(2 * radius + 1)]
    out = np.zeros_like(channel)
    for r in range(h):
        for c in range(w):
            for i, tap in enumerate(taps):
                right = math.ceil(i * math.cos(math.radians(angle)) - 0.5)
                down = math.ceil(i * math.sin(math.radians(angle)) - 0.5)
                out[r, c] += tap / sum(taps) * channel[min(max(r + down, 0), h - 1), min(max(c + right, 0), w - 1)]
    return np.floor(out * 255 + 0.5).astype(np.uint8)


def test_smear_is_imagemagicks_pixel_by_pixel():
    x = noise_images(2, 8, 10).double()
    angles = [33.3, -80.0]
    out = levels(module._smear(x, torch.tensor(angles, dtype=torch.float64), 4, 2.5))
    for i, angle in enumerate(angles):
        assert np.array_equal(out[i, 1], naive_smear(channels(x[i])[1], angle, 4, 2.5))


def test_motion_blur_is_that_smear_at_its_angles():
    x = noise_images(2, 10, 10)
    for severity, (radius, sigma) in zip(SEVERITIES, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)), strict=True):
        angles = -45 + 90 * torch.rand(2, generator=draws().generator(), dtype=torch.float64)
        out = levels(corrupt(x, "motion_blur", severity))
        for i in range(2):
            assert np.array_equal(out[i, 0], naive_smear(channels(x[i])[0], angles[i].item(), radius, sigma))


def test_motion_blur_grows_but_for_a_step_that_only_lengthens_its_tail(photos):
    distances = [(corrupt(photos, "motion_blur", s) - photos).abs().mean().item() for s in SEVERITIES]
    assert distances[0] < distances[1] < distances[2] < distances[4]
    assert distances[3] == pytest.approx(distances[2], abs=1e-4)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_glass_blur_is_the_sequential_swap_of_views(severity):
    sigma, times = ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))[severity - 1]
    n = 12
    x = noise_images(1, n, n)
    g = draws().generator()
    image = np.stack([ndi.gaussian_filter(c, sigma, mode="nearest") for c in channels(x[0])], axis=-1)
    image = floor255(image)
    for _ in range(times):
        up, left = (torch.rand(2, 1, n, n, generator=g, dtype=torch.float64) < 0.5).long().numpy()[:, 0]
        for h in range(n - 1, 1, -1):
            for w in range(n - 1, 1, -1):
                h2, w2 = h - up[h, w], w - left[h, w]
                image[h, w], image[h2, w2] = image[h2, w2], image[h, w]
    out = levels(corrupt(x, "glass_blur", severity))[0]
    for c in range(3):
        assert np.array_equal(out[c], floor255(ndi.gaussian_filter(image[..., c] / 255.0, sigma, mode="nearest")))


# Digital.


@pytest.mark.parametrize("severity", SEVERITIES)
def test_contrast_is_numpys(severity):
    x = noise_images(3, 8, 16)
    array, factor = x.double().numpy(), (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]
    mean = array.mean(axis=(2, 3), keepdims=True)
    assert np.array_equal(levels(corrupt(x, "contrast", severity)), floor255((array - mean) * factor + mean))


@pytest.mark.parametrize(("align_corners", "mode"), [(True, "mirror"), (False, "reflect")])
def test_interpolation_mirrors_as_scipy_does(align_corners, mode):
    g = torch.Generator().manual_seed(3)
    x = noise_images(2, 8, 12).double()
    across = 22 * torch.rand(2, 8, 12, generator=g, dtype=torch.float64) - 5
    down = 18 * torch.rand(2, 8, 12, generator=g, dtype=torch.float64) - 5
    out = module._interpolate(x, across, down, align_corners)
    for i in range(2):
        for c, channel in enumerate(channels(x[i])):
            expected = ndi.map_coordinates(channel, [down[i].numpy(), across[i].numpy()], order=1, mode=mode)
            assert np.allclose(out[i, c].numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("sigma", [0.96, 6.4])
def test_reflecting_gaussian_is_scipys(sigma):
    x = noise_images(1, 16, 16)[0, 0].double().numpy()
    matrix = module._gaussian(16, sigma, truncate=3.0, reflect=True).numpy()
    assert np.allclose(matrix @ x @ matrix.T, ndi.gaussian_filter(x, sigma, mode="reflect", truncate=3))


@pytest.mark.parametrize("size", [16, 32])
def test_elastic_transform_is_affine_and_then_ever_wavier(size):
    # On a plane of grey an affine map is a plane again: its second differences are those of 8 bits.
    plane = torch.linspace(0.2, 0.8, size).expand(20, 3, size, size)
    waves = []
    for severity in SEVERITIES:
        middle = corrupt(plane, "elastic_transform", severity)[:, :, size // 4 : -size // 4, size // 4 : -size // 4]
        waves.append(middle.diff(n=2, dim=3).abs().mean().item())
    assert max(waves[:2]) < 0.5 / 255
    assert waves[1] < waves[2] < waves[3] < waves[4]
    assert waves[4] > 3 * waves[0]


def test_elastic_transform_moves_corners_as_far_as_the_size_says():
    # Severity 1 maps three corners to within 0.08 sizes of where they were: half a plane's slope tells how far.
    for size in (16, 64):
        ramp = torch.linspace(0, 1, size).expand(200, 3, size, size)
        shift = (corrupt(ramp, "elastic_transform", 1) - ramp)[:, 0, size // 2, size // 2]
        # The middle is the mean of two of the corners: a triangular law on ±0.08 of standard deviation 0.08 / sqrt(6).
        assert shift.abs().max() < 0.08 + 2 / size
        assert shift.std().item() == pytest.approx(0.08 / math.sqrt(6), rel=0.2)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_jpeg_is_pillows(photos, severity):
    out = levels(corrupt(photos[:6], "jpeg_compression", severity))
    for i in range(6):
        file = io.BytesIO()
        Image.fromarray(levels(photos[i]).transpose(1, 2, 0)).save(
            file, "JPEG", quality=(80, 65, 58, 50, 40)[severity - 1]
        )
        expected = np.array(Image.open(file)).transpose(2, 0, 1).astype(int)
        assert np.abs(out[i].astype(int) - expected).mean() < 0.5


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize(("h", "w"), [(32, 32), (8, 24), (17, 64), (19, 23)])
def test_pixelate_is_pillows_box(severity, h, w):
    factor = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]
    x = noise_images(2, h, w)
    out = levels(corrupt(x, "pixelate", severity))
    for i in range(2):
        image = Image.fromarray(levels(x[i]).transpose(1, 2, 0))
        image = image.resize((int(w * factor), int(h * factor)), Image.Resampling.BOX)
        image = image.resize((w, h), Image.Resampling.BOX)
        assert np.array_equal(out[i], np.array(image).transpose(2, 0, 1))


# Weather.


@pytest.mark.parametrize("severity", SEVERITIES)
def test_brightness_raises_the_value_of_hsv(severity):
    import colorsys

    x = noise_images(1, 8, 8)
    x[0, :, 0, 0] = 0.0
    x[0, :, 1, :] = 1.0
    out = levels(corrupt(x, "brightness", severity))
    for r in range(8):
        for c in range(8):
            hue, saturation, value = colorsys.rgb_to_hsv(*x[0, :, r, c].double().tolist())
            value = min(value + (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1], 1.0)
            expected = np.array(colorsys.hsv_to_rgb(hue, saturation, value))
            # HSV loses a last bit, which decides truncation where the exact value is a whole level.
            assert np.abs(out[0, :, r, c].astype(float) - (expected * 255 - 0.5)).max() <= 0.5 + 1e-4


@pytest.mark.parametrize("severity", SEVERITIES)
def test_fog_is_grey_smooth_and_of_the_density_of_its_severity(severity):
    density = (0.2, 0.5, 0.75, 1.0, 1.5)[severity - 1]
    out = corrupt(torch.ones(20, 3, 32, 32), "fog", severity)
    assert torch.equal(out[:, 0], out[:, 1])
    assert torch.equal(out[:, 0], out[:, 2])
    # White under no fog is dimmed by 1 + density; under the thickest it is white again.
    assert torch.equal(out.amin((1, 2, 3)), torch.full((20,), math.floor(255 / (1 + density) + 1e-6) / 255))
    assert torch.equal(out.amax((1, 2, 3)), torch.ones(20))
    fog = out[:, 0]
    assert fog.diff(dim=2).abs().mean() < 0.25 * (fog - fog.roll(1, 0)).abs().mean()
    assert not corrupt(torch.zeros(2, 3, 32, 32), "fog", severity).any()
    # Colours differ by what they did, dimmed alike, each image by its own brightest channel.
    brightest = torch.tensor([0.8, 0.4])
    coloured = (brightest[:, None] * torch.tensor([1.0, 0.5, 0.0])).view(2, 3, 1, 1).expand(2, 3, 16, 16)
    out = corrupt(coloured, "fog", severity)
    expected = (brightest**2 / (brightest + density)).view(2, 1, 1)
    assert ((out[:, 0] - out[:, 2] - expected).abs() < 1.1 / 255).all()


def test_plasma_displaces_midpoints_on_a_torus():
    x = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    g = draws().generator()

    def noise(size, *shape):
        return size * (2 * torch.rand(1, *shape, generator=g, dtype=torch.float64)[0].numpy() - 1)

    decay, z = 2.0, np.zeros((8, 8))
    for step, size in ((8, 1.0), (4, decay**-2), (2, decay**-4)):
        half, cells = step // 2, 8 // step
        for (r0, c0), reach in (((half, half), "x"), ((0, half), "+"), ((half, 0), "+")):
            wobble = noise(size, cells, cells)
            for i in range(cells):
                for j in range(cells):
                    r, c = i * step + r0, j * step + c0
                    ways = [(-1, -1), (-1, 1), (1, -1), (1, 1)] if reach == "x" else [(-1, 0), (1, 0), (0, -1), (0, 1)]
                    around = [z[(r + a * half) % 8, (c + b * half) % 8] for a, b in ways]
                    z[r, c] = sum(around) / 4 + wobble[i, j]
    z = (z - z.min()) / (z.max() - z.min())
    assert np.allclose(module._plasma(x, draws().generator(), decay)[0, 0].numpy(), z)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_frost_adds_bluish_ice_to_a_dimmed_image(severity):
    keep, ice = ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[severity - 1]
    black, grey = torch.zeros(20, 3, 32, 32), torch.full((20, 3, 32, 32), 102 / 255)
    frost = corrupt(black, "frost", severity)
    assert frost.max() <= ice
    assert frost.max() > 0.95 * ice
    assert (frost[:, 2] >= frost[:, 0]).all()
    # Ice and gaps both, in patches: neither a veil nor noise.
    assert 0.4 < frost.mean() / ice < 0.8
    assert frost.std() / ice > 0.15
    assert (corrupt(grey, "frost", severity) - frost).median().item() == pytest.approx(keep * 0.4, abs=1.1 / 255)


def test_frost_hides_more_of_photographs(photos):
    """Severities 4 and 5 also darken, which brings bright pixels back; what falls is the likeness."""

    def likeness(severity):
        pairs = torch.stack((corrupt(photos, "frost", severity).flatten(1), photos.flatten(1)), dim=1)
        return torch.stack([torch.corrcoef(pair)[0, 1] for pair in pairs]).median().item()

    values = [likeness(s) for s in SEVERITIES]
    assert all(a > b for a, b in pairwise(values)), values


@pytest.mark.parametrize("severity", SEVERITIES)
def test_snow_falls_on_both_the_image_and_its_half_turn(severity):
    mean, std, factor, threshold, radius, sigma, keep = (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    )[severity - 1]
    n = 16
    g = draws().generator()
    layer = mean + std * torch.randn(1, 1, n, n, generator=g, dtype=torch.float64)[0, 0].numpy()
    angle = -135 + 90 * torch.rand(1, generator=g, dtype=torch.float64).item()
    cut = math.ceil(n / factor)
    top = (n - cut) // 2
    layer = ndi.zoom(layer[top : top + cut, top : top + cut], factor, order=1)
    trim = (len(layer) - n) // 2
    layer = layer[trim : trim + n, trim : trim + n]
    layer = floor255(np.where(layer < threshold, 0, layer)) / 255
    layer = naive_smear(layer, angle, radius, sigma) / 255

    x = noise_images(1, n, n)
    array = x[0].double().numpy()
    grey = 0.299 * array[0] + 0.587 * array[1] + 0.114 * array[2]
    expected = keep * array + (1 - keep) * np.maximum(array, grey * 1.5 + 0.5) + layer + np.rot90(layer, 2)
    assert np.array_equal(levels(corrupt(x, "snow", severity))[0], floor255(expected))


# Noise. 120 000 numbers: a standard error of 0.2 % for a standard deviation.


@pytest.mark.parametrize("severity", SEVERITIES)
def test_gaussian_noise(severity):
    noise = corrupt(torch.full((10, 3, 64, 64), 0.5), "gaussian_noise", severity) - 0.5 + 0.5 / 255
    assert noise.std().item() == pytest.approx((0.04, 0.06, 0.08, 0.09, 0.1)[severity - 1], rel=0.02)
    assert noise.mean().abs() < 0.002


@pytest.mark.parametrize("severity", SEVERITIES)
def test_speckle_noise_is_proportional(severity):
    std = (0.06, 0.1, 0.12, 0.16, 0.2)[severity - 1]
    for value in (0.2, 0.5):
        noise = corrupt(torch.full((10, 3, 64, 64), value), "speckle_noise", severity) - value + 0.5 / 255
        assert noise.std().item() == pytest.approx(std * value, rel=0.02)
        assert noise.mean().abs() < 0.002
    assert not corrupt(torch.zeros(1, 3, 8, 8), "speckle_noise", severity).any()


@pytest.mark.parametrize("severity", SEVERITIES)
def test_shot_noise_is_poissons(severity):
    photons = (500, 250, 100, 75, 50)[severity - 1]
    out = corrupt(torch.full((10, 3, 64, 64), 0.4), "shot_noise", severity)
    assert out.mean().item() == pytest.approx(0.4 - 0.5 / 255, abs=0.002)
    assert out.var().item() == pytest.approx(0.4 / photons, rel=0.04)
    assert len(out.unique()) < photons
    assert not corrupt(torch.zeros(1, 3, 8, 8), "shot_noise", severity).any()


@pytest.mark.parametrize("severity", SEVERITIES)
def test_impulse_noise_is_salt_and_pepper_in_equal_parts(severity):
    rate = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    grey = 128 / 255
    out = corrupt(torch.full((10, 3, 64, 64), grey), "impulse_noise", severity)
    assert out.unique().numpy() == pytest.approx([0, grey, 1])
    assert (out == 1).float().mean().item() == pytest.approx(rate / 2, rel=0.15)
    assert (out == 0).float().mean().item() == pytest.approx(rate / 2, rel=0.15)
