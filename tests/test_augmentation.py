"""Augmentation: exact where pixels fall on pixels, told as done, and nothing where nothing is done."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from score_sde import augmentation

IMAGE = np.random.default_rng(0).uniform(-1, 1, (8, 8, 3)).astype(np.float32)
MOVES = {
    "nothing": (np.eye(2), (0, 0), IMAGE),
    "x-flip": (np.diag([-1, 1]), (0, 0), IMAGE[:, ::-1]),
    "y-flip": (np.diag([1, -1]), (0, 0), IMAGE[::-1]),
    "a quarter turn": (np.array([[0, -1], [1, 0]]), (0, 0), np.rot90(IMAGE, -1)),
    "two pixels to the right, three down": (
        np.eye(2),
        (2, 3),
        np.pad(IMAGE, [(3, 0), (2, 0), (0, 0)], "reflect")[:8, :8],
    ),
}


@pytest.mark.parametrize("move", MOVES)
def test_moves_from_pixel_to_pixel_are_exact(move):
    matrix, shift, expected = MOVES[move]
    result = augmentation.transform(jnp.asarray(IMAGE), jnp.float32(matrix), jnp.float32(shift))
    np.testing.assert_allclose(result, expected, atol=1e-6)


def test_a_plane_stays_a_plane():
    """Each inner pixel of a gradient, which bilinear interpolation keeps, comes from where the inverse says."""
    y, x = np.mgrid[:16, :16].astype(np.float32)
    plane = (2 * x - 3 * y)[..., None]
    matrix, shift = np.array([[0.9, 0.3], [-0.2, 1.1]]), np.array([0.4, -0.7])
    result = augmentation.transform(jnp.asarray(plane), jnp.float32(matrix), jnp.float32(shift))
    source = (np.stack([x, y], -1) - 7.5 - shift) @ np.linalg.inv(matrix).T + 7.5
    inside = ((source > 0) & (source < 15)).all(-1)
    assert inside.sum() > 100
    np.testing.assert_allclose(result[..., 0][inside], (2 * source[..., 0] - 3 * source[..., 1])[inside], atol=1e-4)


def many(probability: float, n: int = 2000):
    keys = jax.random.split(jax.random.key(0), n)
    return jax.vmap(lambda key: augmentation.augment(key, jnp.asarray(IMAGE), probability))(keys)


def test_labels_have_the_published_distribution():
    _, labels = many(0.12)
    labels = np.asarray(labels)
    assert labels.shape == (2000, augmentation.NUM_LABELS)
    shares = (labels != 0).mean(0)
    np.testing.assert_allclose(shares, [0.5, 0.06, *[0.12] * 7], atol=0.035)
    full = np.asarray(many(1.0)[1])
    np.testing.assert_allclose(full[:, [2, 7, 8]].std(0), 1, atol=0.06)
    np.testing.assert_allclose((full[:, 3] + 1) ** 2 + full[:, 4] ** 2, 1, atol=1e-5)
    np.testing.assert_allclose(np.hypot(full[:, 5], full[:, 6]).mean(), np.sqrt(2 / np.pi), atol=0.05)


def test_without_augmentation_only_flips_remain():
    images, labels = many(0.0, 64)
    assert not np.asarray(labels)[:, 1:].any()
    for image, flipped in zip(images, labels[:, 0], strict=True):
        np.testing.assert_allclose(image, IMAGE[:, ::-1] if flipped else IMAGE, atol=1e-5)
