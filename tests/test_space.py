"""Pixels: levels that come back, their range, flips, and dequantization."""

import jax
import numpy as np
import pytest

from score_sde.space import pixels, random_flip

LEVELS = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)


def many(image, count, *, flip=False, centered=False, dequantize=False):
    """One image, encoded under many keys."""
    encode = pixels(image.shape, centered=centered, dequantize=dequantize).encode
    one = lambda key: encode(key, random_flip(key, image) if flip else image)
    return np.asarray(jax.vmap(one)(jax.random.split(jax.random.key(0), count)))


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("jit", [False, True])
def test_every_level_survives_the_round_trip(centered, jit):
    x = many(LEVELS, 1, centered=centered)
    back = pixels(LEVELS.shape, centered=centered).decode
    np.testing.assert_array_equal((jax.jit(back) if jit else back)(x)[0], LEVELS)


def test_decoding_truncates_and_clips():
    unit = np.array([-1.0, 0.0, 0.9 / 255, 1.1 / 255, 254.9 / 255, 1.0, 2.0], np.float32)
    for x, centered in ((unit, False), (2 * unit - 1, True)):
        decode = pixels((1, 1, 1), centered=centered).decode
        np.testing.assert_array_equal(decode(x), [0, 0, 0, 1, 254, 255, 255])


@pytest.mark.parametrize("centered", [False, True])
def test_the_range_is_that_of_what_is_encoded(centered):
    image, space = many(LEVELS, 1, centered=centered), pixels(LEVELS.shape, centered=centered)
    assert image.dtype == np.float32
    assert (image.min(), image.max()) == (space.low, space.high) == ((-1, 1) if centered else (0, 1))


def test_flip_mirrors_width_with_probability_one_half():
    image = np.broadcast_to(np.arange(3, dtype=np.uint8)[None, :, None], (2, 3, 1))
    x = np.round(255 * many(image, 4000, flip=True)).astype(np.uint8)
    flipped = (x == image[:, ::-1]).all((1, 2, 3))
    assert (flipped | (x == image).all((1, 2, 3))).all()
    assert abs(flipped.mean() - 0.5) < 0.04  # five standard deviations


def test_dequantization_is_uniform_within_its_level():
    x = 256 * many(LEVELS, 2000, dequantize=True).astype(np.float64)
    u = x - LEVELS
    assert u.min() >= 0 and u.max() <= 1
    assert abs(u.mean() - 1 / 2) < 0.003 and abs(u.var() - 1 / 12) < 0.001  # five standard deviations
    assert np.abs(u.mean(0) - 1 / 2).max() < 0.04  # at each level
