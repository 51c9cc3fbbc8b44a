"""Each corruption against another library, loops, or a number worked by hand."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage
from test_corruptions import IMAGES, TWICE, strongest

from bayescal.data import corruptions as c
from bayescal.data.corruptions.blur import _disc, smooth, trail, zoom
from bayescal.data.corruptions.geometry import _mirrored
from bayescal.data.corruptions.images import bilinear, row_keys
from bayescal.data.corruptions.weather import MUD, plasma

pytestmark = pytest.mark.core

HALF = np.full_like(IMAGES, 0.5)


def test_moments_of_noise(key, strict):
    number = HALF.size
    for result, variance in [
        (c.gaussian_noise(HALF, key, std=0.1), 0.01),
        (c.speckle_noise(HALF, key, std=0.2), 0.01),
        (c.shot_noise(HALF, key, photons=100.0), 0.5 / 100),
    ]:
        values = np.asarray(result, np.float64)
        assert abs(values.mean() - 0.5) < 4 * np.sqrt(variance / number)
        assert abs(values.var() / variance - 1) < 4 * np.sqrt(2.1 / number)
    assert len(np.unique(np.asarray(result) * 100)) < 80, "whole photons"
    salted = np.asarray(c.impulse_noise(HALF, key, share=0.3))
    for value in (0, 1):
        assert abs((salted == value).mean() - 0.15) < 4 * np.sqrt(0.15 * 0.85 / number)
    assert (salted[(salted != 0) & (salted != 1)] == 0.5).all()


@pytest.mark.parametrize("photons", [9e4, 1e6, 1e7, 1e8, 3e9, 1e10])
def test_moments_of_many_photons(key, strict, photons):
    """Where jax's Poisson ends, or is no longer one: in units of the noise, which is far below a pixel's value."""
    images = np.full((4, 64, 64, 3), 0.5, np.float32)
    images[:2] = 0.25
    result = np.asarray(c.shot_noise(images, key, photons=photons), np.float64)
    np.testing.assert_array_equal(c.shot_noise(images[:2], key, photons=photons), result[:2])  # whatever rows follow
    noise = (result - images) / np.sqrt(images / photons)
    assert abs(noise.mean()) < 4 / np.sqrt(noise.size)
    rounding = np.spacing(np.float32(0.5)) * np.sqrt(photons / 0.5)  # of a float32 result
    assert abs(noise.var() - 1) < 4 * np.sqrt(2 / noise.size) + rounding**2
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 4 / np.sqrt(noise[0].size)


def test_a_row_draws_from_its_own_key(key):
    draw = jax.random.normal(jax.random.fold_in(key, 3), IMAGES.shape[1:])
    np.testing.assert_allclose(c.gaussian_noise(HALF, key, std=0.05)[3], 0.5 + 0.05 * draw, atol=1e-6)
    key = jax.random.key(7, impl="rbg")  # under vmap a row's draw would be another than by itself
    draw = jax.random.normal(row_keys(key, jnp.asarray(IMAGES))[3], IMAGES.shape[1:])
    np.testing.assert_allclose(c.gaussian_noise(HALF, key, std=0.05)[3], 0.5 + 0.05 * draw, atol=1e-6)


def test_noise_leaves_no_number_where_none_was(key):
    nothing = np.full_like(IMAGES, np.nan)
    for result in (c.impulse_noise(nothing, key, share=0.5), c.shot_noise(nothing, key, photons=50.0)):
        assert np.isnan(result).all()


def test_no_noise_is_the_image(key):
    np.testing.assert_array_equal(c.gaussian_noise(HALF, key, std=0.0), HALF)
    np.testing.assert_array_equal(c.speckle_noise(HALF, key, std=0.0), HALF)
    np.testing.assert_array_equal(c.impulse_noise(HALF, key, share=0.0), HALF)
    assert not c.shot_noise(0 * HALF, key, photons=100.0).any() and not c.speckle_noise(0 * HALF, key, std=1.0).any()


@pytest.mark.parametrize(("edges", "mode"), [("edge", "nearest"), ("symmetric", "reflect")])
@pytest.mark.parametrize(("sigma", "truncate"), [(0.4, 4.0), (1.7, 4.0), (2.9, 3.0)])
def test_smooth_against_scipy(edges, mode, sigma, truncate):
    truth = ndimage.gaussian_filter(TWICE.astype(float), (0, sigma, sigma, 0), mode=mode, truncate=truncate)
    np.testing.assert_allclose(smooth(jnp.asarray(TWICE), sigma, edges=edges, truncate=truncate), truth, atol=1e-6)
    if edges == "edge" and truncate == 4:
        np.testing.assert_allclose(c.gaussian_blur(TWICE, sigma=sigma), truth, atol=1e-6)


@pytest.mark.parametrize(("radius", "softness"), [(0.3, 0.4), (1.5, 0.1), (2.2, 0.7), (9.0, 0.5)])
def test_defocus_against_scipy(radius, softness):
    kernel = _disc(radius, softness)
    assert abs(kernel.sum() - 1) < 1e-6 and (kernel == kernel.T).all() and (kernel == kernel[::-1]).all()
    truth = ndimage.convolve(TWICE.astype(float), kernel[None, :, :, None].astype(float), mode="mirror")
    np.testing.assert_allclose(c.defocus_blur(TWICE, radius=radius, softness=softness), truth, atol=1e-6)


def test_disc_by_hand():
    """Radius 1.5 is a square of nine pixels; below 1 only the softened rim of one pixel is left."""
    np.testing.assert_allclose(_disc(1.5, 0.1)[1:4, 1:4], np.full((3, 3), 1 / 9), rtol=1e-6)
    side = np.exp(-0.5 / 0.4**2)
    line = np.array([side, 1, side]) / (1 + 2 * side)
    np.testing.assert_allclose(_disc(0.3, 0.4), np.outer(line, line), rtol=1e-6)


@pytest.mark.parametrize("degrees", [0.0, 31.0, -45.0, -90.0])
def test_trail_against_scipy(degrees):
    weights = np.exp(-0.5 * (np.arange(7) / 2.5) ** 2)
    y, x = np.mgrid[:9, :12]
    angle = np.deg2rad(degrees)
    truth = sum(
        w
        * ndimage.map_coordinates(
            TWICE[0, ..., 0], (y + i * np.sin(angle), x + i * np.cos(angle)), order=1, mode="nearest"
        )
        for i, w in enumerate(weights / weights.sum())
    )
    np.testing.assert_allclose(trail(jnp.asarray(TWICE[0]), degrees, 6, 2.5)[..., 0], truth, atol=3e-6)


@pytest.mark.parametrize("factor", [1.0, 1.13, 2.25])
def test_zoom_against_scipy(factor):
    middle = (np.array(TWICE.shape[1:3]) - 1) / 2
    truth = ndimage.affine_transform(TWICE[0, ..., 0], np.full(2, 1 / factor), middle - middle / factor, order=1)
    np.testing.assert_allclose(zoom(jnp.asarray(TWICE), factor)[0, ..., 0], truth, atol=2e-6)


def test_zoom_blur_is_the_mean_of_zooms():
    truth = (TWICE + sum(zoom(jnp.asarray(TWICE), z) for z in (1.0, 1.1, 1.2))) / 4
    np.testing.assert_allclose(c.zoom_blur(TWICE, largest=1.2, num_zooms=3), truth, atol=1e-6)


def test_glass_shows_neighbours(key):
    image = np.zeros_like(IMAGES) + (np.arange(32 * 32, dtype=np.float32) / 1024).reshape(32, 32, 1)
    place = np.rint(np.asarray(c.glass_blur(image, key, sigma=0.0, reach=1, iterations=1))[0, ..., 0] * 1024).astype(
        int
    )
    y, x = np.mgrid[:32, :32]
    offset = np.stack([place // 32 - y, place % 32 - x])
    assert set(np.unique(offset)) == {-1, 0}
    moved = offset.any(0)
    assert not moved[:2].any() and not moved[:, :2].any() and moved[31].any() and moved[:, 31].any()
    share = np.mean([(offset[:, 2:, 2:] == np.array(o)[:, None, None]).all(0).mean() for o in [(0, 0), (-1, -1)]])
    assert abs(share - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 900 / 2)
    np.testing.assert_array_equal(c.glass_blur(image, key, sigma=0.0, reach=1, iterations=0), image)


@pytest.mark.parametrize("name", ["gaussian_blur", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic"])
def test_a_constant_image_stays(name, key):
    image = np.full_like(IMAGES, 0.3)
    np.testing.assert_allclose(strongest(name, image, key), image, atol=1e-6)


@pytest.mark.parametrize("decay", [3.0, 1.75])
def test_plasma_against_loops(key, decay):
    draws = np.asarray(jax.random.uniform(key, (63,), minval=-1.0), np.float64)
    heights, count = np.zeros((8, 8)), 0
    for level, step in enumerate((8, 4, 2)):
        half, cells = step // 2, [(y, x) for y in range(0, 8, step) for x in range(0, 8, step)]
        for dy, dx, around in [
            (half, half, [(-half, -half), (-half, half), (half, -half), (half, half)]),
            (0, half, [(0, -half), (0, half), (-half, 0), (half, 0)]),
            (half, 0, [(0, -half), (0, half), (-half, 0), (half, 0)]),
        ]:
            for y, x in cells:
                near = [heights[(y + dy + a) % 8, (x + dx + b) % 8] for a, b in around]
                heights[y + dy, x + dx] = np.mean(near) + draws[count] / decay ** (2 * level)
                count += 1
    heights -= heights.min()
    np.testing.assert_allclose(plasma(key, 7, decay), heights / heights.max(), atol=1e-6)


def test_fog_by_hand(key):
    clouds = np.asarray(c.fog(np.full((1, 16, 16, 1), 0.6, np.float32), key, amount=0.4, decay=2.0))
    assert (
        abs(clouds.min() - 0.6 * 0.6) < 1e-6 and abs(clouds.max() - 0.6) < 1e-6
    )  # (0.6 + 0.4 * [0, 1]) * 0.6 / (0.6 + 0.4)
    np.testing.assert_allclose(c.fog(IMAGES, key, amount=0.0, decay=2.0), IMAGES, atol=1e-6)
    assert not c.fog(0 * IMAGES, key, amount=0.0, decay=2.0).any()


def test_snow_by_hand(key):
    still = {"size": 1.0, "threshold": 0.5, "radius": 4, "sigma": 2.0, "keep": 0.8}
    image = np.zeros_like(IMAGES) + np.array([0.1, 0.2, 0.6], np.float32)
    grey = 0.299 * 0.1 + 0.587 * 0.2 + 0.114 * 0.6
    white = 0.8 * image + 0.2 * np.maximum(image, 1.5 * grey + 0.5)
    np.testing.assert_allclose(c.snow(image, key, mean=0.0, std=0.0, **still), white, atol=1e-6)  # no noise, no flakes
    full = c.snow(image, key, mean=0.6, std=0.0, **still)
    np.testing.assert_allclose(full, np.clip(white + 2 * 0.6, 0, 1), atol=1e-6)
    flakes = np.asarray(c.snow(0 * image, key, mean=0.0, std=0.3, **{**still, "keep": 1.0}))
    np.testing.assert_array_equal(flakes, flakes[:, ::-1, ::-1])


def test_spatter_by_hand(key):
    shape = {"mean": 0.65, "std": 0.1, "sigma": 0.6, "softness": 0.6}
    np.testing.assert_array_equal(c.spatter(IMAGES, key, threshold=5.0, **shape), IMAGES)
    mud = np.asarray(c.spatter(IMAGES, key, threshold=-5.0, **shape))
    np.testing.assert_allclose(mud, np.broadcast_to(np.array(MUD), mud.shape), atol=1e-6)
    some = np.asarray(c.spatter(IMAGES, key, threshold=0.66, **shape))
    covered = (np.abs(some - np.array(MUD)) < 0.2 * np.abs(IMAGES - np.array(MUD)) + 1e-6).all(-1)
    assert 0.05 < covered.mean() < 0.6 and ((some == IMAGES).all(-1) | covered).all()


def in_hsv(image, change):
    return np.array([colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*map(float, p)))) for p in image.reshape(-1, 3)])


def test_brightness_and_saturation_against_colorsys():
    image = np.concatenate([IMAGES[0].reshape(-1, 3), [[0, 0, 0], [0.4, 0.4, 0.4], [1, 1, 1], [1, 0, 0]]])
    image = image.reshape(1, -1, 2, 3).astype(np.float32)
    one = lambda x: min(max(x, 0.0), 1.0)
    for amount in (0.2, -0.1):
        truth = in_hsv(image, lambda h, s, v, a=amount: (h, s, one(v + a)))
        np.testing.assert_allclose(c.brightness(image, amount=amount).reshape(-1, 3), truth, atol=2e-6)
    for factor, amount in ((0.3, 0.0), (2.0, 0.1)):
        truth = in_hsv(image, lambda h, s, v, f=factor, a=amount: (h, one(f * s + a), v))
        np.testing.assert_allclose(c.saturate(image, factor=factor, amount=amount).reshape(-1, 3), truth, atol=2e-6)


def test_brightness_of_grey_is_a_sum():
    np.testing.assert_allclose(c.brightness(TWICE, amount=0.3), np.clip(TWICE + 0.3, 0, 1), atol=1e-6)
    assert (c.brightness(0 * TWICE, amount=0.3) == np.float32(0.3)).all()


def test_contrast_is_of_each_channel():
    mean = IMAGES.astype(float).mean((1, 2), keepdims=True)
    np.testing.assert_allclose(c.contrast(IMAGES, factor=0.4), mean + 0.4 * (IMAGES - mean), atol=1e-6)


@pytest.mark.parametrize("share", [1.0, 0.95, 0.75, 0.65, 0.34])
def test_pixelate_against_pillow(share):
    from PIL import Image

    height, width = TWICE.shape[1:3]
    small = Image.fromarray(TWICE[0, ..., 0]).resize((int(share * width), int(share * height)), Image.Resampling.BOX)
    truth = np.asarray(small.resize((width, height), Image.Resampling.BOX))
    np.testing.assert_allclose(c.pixelate(TWICE, share=share)[0, ..., 0], truth, atol=1e-6)


def test_jpeg():
    """Quality 50 keeps an even image in steps of 2 levels from 128, quality 10 in steps of 10: the table's 16, and 80, / 8."""
    flat = np.full((2, 16, 16, 1), 99.6 / 255, np.float32)
    np.testing.assert_allclose(c.jpeg(flat, quality=50), 100 / 255, atol=1e-6)
    np.testing.assert_allclose(c.jpeg(flat, quality=10), 98 / 255, atol=1e-6)
    change = [float(((c.jpeg(IMAGES[..., :1], quality=q) - IMAGES[..., :1]) ** 2).mean()) for q in (95, 60, 10)]
    assert change[0] < change[1] < change[2]


@pytest.mark.parametrize("degrees", [0, 75, 90, 180, -37.5])
def test_rotation_of_unequal_sides_against_scipy(degrees):
    turned = ndimage.rotate(TWICE.astype(float), degrees, axes=(2, 1), reshape=False, order=1, mode="constant")
    np.testing.assert_allclose(c.rotation(TWICE, degrees=degrees), turned, atol=1e-5)


def test_elastic_of_no_strength_is_the_identity(key):
    still = c.elastic(IMAGES, key, affine=0.0, amplitude=0.0, sigma=0.0)
    np.testing.assert_array_equal(still, IMAGES)


def test_elastic_moves(key):
    """On a ramp the value is the place: affine fields stay affine, ripples have the spread of smoothed noise."""
    down, across = np.meshgrid(np.arange(96), np.arange(96), indexing="ij")
    ramps = np.repeat(np.stack([down, across], -1)[None] / 95, 8, 0).astype(np.float32)
    move = (c.elastic(ramps, key, affine=0.03, amplitude=0.0, sigma=0.0) - ramps)[:, 24:72, 24:72] * 95
    for axis in (1, 2):
        assert np.abs(np.diff(move, n=2, axis=axis)).max() < 1e-3
    points = np.stack([move[:, y - 24, x - 24] for y, x in [(48 - 24, 48 - 24), (48 + 23, 48 + 23)]])
    assert 0.1 < np.abs(points).max() < 1.05 * 0.03 * 96 and np.std(points[0]) > 0.3
    ripples = np.asarray(c.elastic(ramps, key, affine=0.0, amplitude=0.05, sigma=0.02) - ramps) * 95
    noise = np.random.default_rng(0).uniform(-1, 1, (50, 96, 96))
    truth = 0.05 * 96 * ndimage.gaussian_filter(noise, (0, 0.02 * 96, 0.02 * 96), mode="reflect", truncate=3)
    both = np.stack([ripples[..., 0], ripples[..., 1].swapaxes(1, 2)])[
        :, :, 12:84
    ]  # away from where ramps are mirrored
    assert abs(both.std() / truth.std() - 1) < 0.05
    assert abs(both[..., [0, -1]].std() / truth[:, 12:84, [0, -1]].std() - 1) < 0.1


def test_elastic_mirrors_at_the_edge():
    np.testing.assert_allclose(
        _mirrored(jnp.array([-1.5, 0, 2.5, 3, 4.25, 7.0]), 4), [1.5, 0, 2.5, 3, 1.75, 1], atol=1e-6
    )
    assert not _mirrored(jnp.array([-1.5, 3.0]), 1).any()


def test_bilinear_by_hand():
    image = jnp.array([[0.0, 1.0], [2.0, 4.0]])[..., None]
    places = jnp.array([0.5, 1.0, 0.25]), jnp.array([0.5, 1.0, 0.0])
    np.testing.assert_allclose(bilinear(image, *places)[:, 0], [1.75, 4, 0.5], rtol=1e-6)
