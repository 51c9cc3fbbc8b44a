"""What holds for every corruption, the two tables of severities, and `corrupt`."""

import inspect
import sys
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import strictly
from scipy import ndimage

from bayescal.data import DIGITS, SMALL_IMAGES, Corruption, corrupt, digits
from bayescal.data import corruptions as c

pytestmark = pytest.mark.core

NOISES = {"gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"}
RANDOM = NOISES | {"glass_blur", "motion_blur", "fog", "snow", "spatter", "elastic"}
CHANGE_IN_KIND = {
    "glass_blur",
    "saturate",
    "elastic",
}  # whose mean squared change does not rise, with CIFAR-10-C's constants


def photographs(rows=5, height=32, width=32, channels=3) -> np.ndarray:
    """Smooth colours, a few edges, fine grain; from 0.05 to 0.95."""
    rng = np.random.default_rng(3)
    images = ndimage.gaussian_filter(rng.normal(size=(rows, height, width, channels)), (0, 4, 4, 0.5), mode="wrap") * 12
    for image in images:
        y, x = np.mgrid[:height, :width]
        image[(y - rng.uniform(0, height)) * rng.normal() + (x - rng.uniform(0, width)) * rng.normal() > 0] += (
            rng.normal(size=channels)
        )
    images += 0.15 * rng.normal(size=images.shape)
    return (0.05 + 0.9 / (1 + np.exp(-images))).astype(np.float32)


IMAGES = photographs()
TWICE = np.random.default_rng(4).random((1, 9, 12, 1)).astype(np.float32).repeat(2, 0)  # a grey image of unequal sides


def strongest(name, images, key):
    return corrupt(name, images, 5, key)


@pytest.mark.parametrize("name", SMALL_IMAGES)
def test_five_severities(name, key):
    results = [corrupt(name, IMAGES, severity, key) for severity in range(1, 6)]
    for result in results:
        assert isinstance(result, jax.Array) and result.shape == IMAGES.shape and result.dtype == np.float32
        assert float(result.min()) >= 0 and float(result.max()) <= 1
    assert all((a != b).any() for a, b in pairwise([IMAGES, *results]))
    change = [float(((result - IMAGES) ** 2).mean()) for result in results]
    assert all(a < b for a, b in pairwise(change)) == (name not in CHANGE_IN_KIND), change
    assert min(change) > 1e-5 and max(change) < 0.2
    np.testing.assert_array_equal(results[4], strongest(name, IMAGES, key))
    other = strongest(name, IMAGES, jax.random.key(8))
    assert bool((results[4] != other).any()) == (name in RANDOM)


@pytest.mark.parametrize(
    "name", [name for name in SMALL_IMAGES if name != "jpeg"]
)  # whose bytes hold no NaN: it raises
def test_rows_stand_alone_and_nan_comes_through(name, key):
    """Row 0 has the same bits whatever the others hold; a NaN reaches its own image, and no other."""
    function, strengths = SMALL_IMAGES[name]
    drawn = (key,) if name in RANDOM else ()
    others = IMAGES[::-1].copy()
    others[0], others[1, 20, 20, 0] = IMAGES[0], np.nan
    result = function(others, *drawn, **strengths[4])
    np.testing.assert_array_equal(result[0], function(IMAGES, *drawn, **strengths[4])[0])
    assert np.isnan(result[1]).any() and np.isfinite(result[jnp.array([0, 2, 3, 4])]).all()


@pytest.mark.parametrize("name", sorted(set(SMALL_IMAGES) - {"saturate", "jpeg"} - NOISES))
def test_grey_images_of_unequal_sides(name, key):
    with strictly():
        result = strongest(name, TWICE, key)
    assert result.shape == TWICE.shape and (result != TWICE).any()
    same = bool((result[0] == result[1]).all())
    assert same == (name not in RANDOM), "each row draws its own"


@pytest.mark.parametrize("name", ["gaussian_noise", "motion_blur"])
def test_in_jit_under_vmap_and_row_by_row(name, key):
    function, strengths = SMALL_IMAGES[name]
    whole = function(IMAGES, key, **strengths[4])
    in_jit = jax.jit(lambda images, key, strength: function(images, key, **strength))(IMAGES, key, strengths[4])
    np.testing.assert_allclose(in_jit, whole, atol=2e-6)
    keys = jnp.stack([key, jax.random.key(8)])
    over_keys = jax.vmap(lambda k: function(IMAGES[:3], k, **strengths[4]))(keys)
    np.testing.assert_allclose(over_keys[0], whole[:3], atol=2e-6)  # a row's draws are those of its place
    assert (over_keys[0] != over_keys[1]).any()


@pytest.mark.parametrize(
    ("table", "name"), [(t, name) for t, x in (("SMALL_IMAGES", SMALL_IMAGES), ("DIGITS", DIGITS)) for name in x]
)
def test_float32_where_float64_is_allowed(table, name, key):
    """The same numbers as without it; also from float64 images and strengths that are arrays of float64."""
    severities = getattr(c, table)
    plain = corrupt(name, IMAGES, 5, key, severities=severities)
    function, strengths = severities[name]
    drawn = (key,) if "key" in inspect.signature(function).parameters else ()
    with jax.enable_x64(True):
        found = corrupt(name, IMAGES, 5, key, severities=severities)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, plain)
        if name not in ("defocus_blur", "pixelate", "jpeg"):  # whose strengths are static
            wide = {k: jnp.asarray(x, jnp.float64 if isinstance(x, float) else None) for k, x in strengths[4].items()}
            found = function(IMAGES.astype(np.float64), *drawn, **wide)
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, plain, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("gaussian_noise", "rbg"), ("shot_noise", "unsafe_rbg"), ("glass_blur", "rbg"), ("elastic", "rbg")],
)
def test_keys_of_other_kinds(name, kind):
    """Rows draw apart, and do not depend on how many there are, but for the rounding of matrices of other shapes."""
    key, other = (jax.random.key(seed, impl=kind) for seed in (7, 8))
    result = strongest(name, TWICE, key)
    assert (result[0] != result[1]).any() and (result != strongest(name, TWICE, other)).any()
    np.testing.assert_allclose(strongest(name, TWICE[[0, 1, 0]], key)[:2], result, atol=1e-6)


def test_without_jit(key):
    for name in ("impulse_noise", "gaussian_blur", "brightness", "contrast", "pixelate"):
        with jax.disable_jit():
            eager = strongest(name, IMAGES, key)
        np.testing.assert_allclose(eager, strongest(name, IMAGES, key), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "strengths"),
    [
        ("elastic", [{"affine": 0.0, "amplitude": a, "sigma": 0.03} for a in (0.02, 0.05, 0.1)]),
        ("elastic", [{"affine": a, "amplitude": 0.05, "sigma": 0.03} for a in (0.02, 0.05, 0.1)]),
        ("glass_blur", [{"sigma": 0.3, "reach": r, "iterations": 1} for r in (1, 2, 4)]),
        ("glass_blur", [{"sigma": 0.3, "reach": 1, "iterations": i} for i in (1, 2, 4)]),
        ("saturate", [{"factor": f, "amount": 0.0} for f in (0.8, 0.4, 0.1)]),
        ("saturate", [{"factor": f, "amount": 0.0} for f in (1.2, 1.6, 2.5)]),
    ],
)
def test_change_rises_with_one_strength(name, strengths, key):
    """For those whose five severities change in kind."""
    drawn = (key,) if name in RANDOM else ()
    change = [float(((getattr(c, name)(IMAGES, *drawn, **s) - IMAGES) ** 2).mean()) for s in strengths]
    assert all(a < b for a, b in pairwise(change)), change


def test_digits_strengths():
    """What earlier results were made with."""
    values = lambda name, strength: [s[strength] for s in DIGITS[name].strengths]
    assert values("noise", "std") == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert values("rotation", "degrees") == [15, 30, 45, 60, 75]
    assert values("contrast", "factor") == [0.75, 0.6, 0.45, 0.3, 0.15]


@pytest.fixture(scope="module")
def written():
    return digits(0).test.inputs


@pytest.mark.parametrize("name", DIGITS)
def test_digits_change_more_with_severity(name, written, key):
    results = [corrupt(name, written, severity, key, severities=DIGITS) for severity in range(1, 6)]
    change = [float(((result - written) ** 2).mean()) for result in results]
    assert all(a < b for a, b in pairwise(change)), change


@pytest.mark.parametrize("severity", range(1, 6))
def test_digits_against_scipy(severity, written, key):
    shifted = {name: corrupt(name, written, severity, key, severities=DIGITS) for name in set(DIGITS) - {"noise"}}
    degrees, factor = 15 * severity, (0.75, 0.6, 0.45, 0.3, 0.15)[severity - 1]
    turned = ndimage.rotate(written.astype(float), degrees, axes=(2, 1), reshape=False, order=1, mode="constant")
    np.testing.assert_allclose(shifted["rotation"], turned, atol=1e-5)
    mean = written.mean((1, 2), keepdims=True)
    np.testing.assert_allclose(shifted["contrast"], mean + factor * (written - mean), atol=1e-5)
    pixels = 8 * 0.05 * severity
    moved = ndimage.shift(written.astype(float), (0, pixels, pixels, 0), order=1, mode="constant")
    np.testing.assert_allclose(shifted["translation"], moved, atol=1e-5)


def test_digits_by_hand():
    image = np.array([[0.0, 1.0], [0.0, 1.0]], np.float32)[None, ..., None]
    np.testing.assert_allclose(c.contrast(image, factor=0.15)[0, 0, :, 0], [0.425, 0.575], rtol=1e-6)
    arm = np.zeros((1, 9, 9, 1), np.float32)
    arm[0, 4, 4:] = 1  # to the right
    turned = c.rotation(arm, degrees=75)[0]
    assert turned[:4].sum() > 5 * turned[5:].sum(), "counter-clockwise: the arm points up"
    moved = c.translation(arm, down=1 / 9, right=2 / 9)[0, ..., 0]
    np.testing.assert_allclose(moved, np.roll(arm[0, ..., 0], 1, 0) * (np.arange(9) > 5), atol=1e-5)


def test_a_table_of_your_own(key):
    table = {"dark": Corruption(lambda images, *, factor: images * factor, ({"factor": 0.5}, {"factor": 0.25}))}
    np.testing.assert_array_equal(corrupt("dark", IMAGES, 2, key, severities=table), IMAGES * np.float32(0.25))
    with pytest.raises(ValueError, match="`severity` must be a whole number from 1 to 2, got 3"):
        corrupt("dark", IMAGES, 3, key, severities=table)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"name": "frost"}, ValueError, "`name` must be one of .*'brightness'.*, got 'frost'. Check the spelling."),
        ({"severity": 6}, ValueError, "`severity` must be a whole number from 1 to 5, got 6. The largest"),
        ({"severity": 0}, ValueError, "`severity` must be a whole number from 1 to 5, got 0"),
        ({"key": 0}, TypeError, "`key` must be one key of jax, got 0. Make it from a seed"),
        ({"key": jax.random.split(jax.random.key(0), 2)}, TypeError, "`key` must be one key of jax, got Array"),
        ({"images": 255 * IMAGES}, ValueError, r"`images` must lie in \[0, 1\], got values from .* to 2.*. Divide by"),
        ({"images": IMAGES * np.nan}, ValueError, r"`images` must lie in \[0, 1\], got values from nan to nan"),
        ({"images": IMAGES[..., 0]}, ValueError, r"`images` must have shape \(rows, height, width, channels\), .*add"),
        ({"images": IMAGES[:0]}, ValueError, r"none of them 0, got \(0, 32, 32, 3\). Add the channel"),
        ({"images": (255 * IMAGES).astype(np.uint8)}, TypeError, "`images` must be floats in .*, got uint8. Divide by"),
        (
            {"name": "snow", "images": IMAGES[..., :2]},
            ValueError,
            "`images` must have 1 or 3 channels, got 2. Channels",
        ),
        ({"name": "spatter", "images": IMAGES[..., :2]}, ValueError, "`images` must have 1 or 3 channels, got 2"),
        ({"name": "jpeg", "images": IMAGES[..., :2]}, ValueError, "`images` must have 1 or 3 channels, got 2"),
        (
            {"name": "saturate", "images": TWICE},
            ValueError,
            "`images` must have 3 channels, got 1. Channels come last.",
        ),
    ],
)
def test_what_corrupt_refuses(unchecked, changes, error, message):
    arguments = {"name": "contrast", "images": IMAGES, "severity": 1, "key": jax.random.key(0), **changes}
    with pytest.raises(error, match=f"(?i){message}"):
        corrupt(arguments["name"], arguments["images"], arguments["severity"], arguments["key"])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: c.defocus_blur(TWICE, radius=-1.0, softness=0.5),
            ValueError,
            "`radius` must be 0 or more and `softness` a",
        ),
        (
            lambda: c.defocus_blur(TWICE, radius=1.0, softness=0.0),
            ValueError,
            "above 0, got 1.0 and 0.0. Both are in pixels",
        ),
        (lambda: c.pixelate(TWICE, share=1.5), ValueError, r"`share` must be in \(0, 1\] and leave a pixel, got 1.5"),
        (lambda: c.pixelate(TWICE, share=0.05), ValueError, r"got 0.05 for images of \(9, 12\). Enlarge it."),
        (
            lambda: c.jpeg(TWICE, quality=100),
            ValueError,
            "`quality` must be a whole number from 1 to 95, got 100. 40 is",
        ),
        (lambda: c.jpeg(TWICE * np.nan, quality=50), ValueError, r"`images` must lie in \[0, 1\], got values from nan"),
        (
            lambda: jax.jit(lambda x: c.jpeg(x, quality=50))(TWICE),
            TypeError,
            "`images` must be arrays on the host, got a",
        ),
    ],
)
def test_what_functions_refuse(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_jpeg_without_pillow(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"`jpeg` needs Pillow, which is not installed\. Run `pip install pillow`"):
        c.jpeg(TWICE, quality=50)
