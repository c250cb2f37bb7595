"""Augmentation that does not leak: the network is told of it, so that samples are drawn without (Karras et al. 2022,
arXiv 2206.00364, appendix F.2 and Table 6; Jun et al. 2020).

The image is mapped by flips, scaling, rotation, stretching and translation about its centre, each applied with a given
probability; pixels in between are taken bilinearly, and the image goes on as its mirror image beyond its edges.
"""

import jax
import jax.numpy as jnp
from jax import Array

NUM_LABELS = 9
SCALE_LOG2_STD = 0.2  # of both scalings; the aspect ratio changes by twice the logarithm
TRANSLATION_STD = 1 / 8  # of height and width


def augment(key, image: Array, probability: float) -> tuple[Array, Array]:
    """An image (H, W, C), and the labels (9,) of what was done to it; zeros stand for nothing.

    The labels: x-flip, y-flip, log scale, cos - 1 and sin of the rotation, cos and sin of the direction times the log
    of the stretch, and x- and y-translation; logarithms and translations in standard deviations. The x-flip has
    probability 1/2 whatever the others have, as published; the y-flip is one half of `probability`.
    """
    height, width, _ = image.shape
    which, flips, normals, angles = jax.random.split(key, 4)
    applied = jax.random.bernoulli(which, probability, (5,)).astype(jnp.float32)  # y-flip, scale, rotate, stretch, move
    x_flip, y_flip = jax.random.bernoulli(flips, 0.5, (2,)).astype(jnp.float32)
    y_flip = y_flip * applied[0]
    scale, stretch, right, down = jax.random.normal(normals, (4,)) * applied[jnp.array([1, 3, 4, 4])]
    rotation, direction = jax.random.uniform(angles, (2,), minval=-jnp.pi, maxval=jnp.pi)
    rotation = rotation * applied[2]
    cos, sin = jnp.cos(direction), jnp.sin(direction)

    ratio = 2.0 ** (SCALE_LOG2_STD * stretch)
    along = jnp.array([[cos, -sin], [sin, cos]])
    matrix = (
        along @ jnp.diag(jnp.stack([ratio, 1 / ratio])) @ along.T
        @ _rotation(rotation)
        @ jnp.diag(2.0 ** (SCALE_LOG2_STD * scale) * jnp.stack([1 - 2 * x_flip, 1 - 2 * y_flip]))
    )  # fmt: skip
    shift = TRANSLATION_STD * jnp.stack([width * right, height * down])
    labels = jnp.stack(
        [x_flip, y_flip, scale, jnp.cos(rotation) - 1, jnp.sin(rotation), stretch * cos, stretch * sin, right, down]
    )
    return transform(image, matrix, shift), labels


def _rotation(angle: Array) -> Array:
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.array([[cos, -sin], [sin, cos]])


def transform(image: Array, matrix: Array, shift: Array) -> Array:
    """The image (H, W, C) whose point p, counted from the centre in pixels (x to the right, y down), has moved to
    matrix p + shift."""
    height, width, _ = image.shape
    centre = jnp.array([(width - 1) / 2, (height - 1) / 2], jnp.float32)
    x, y = jnp.meshgrid(jnp.arange(width, dtype=jnp.float32), jnp.arange(height, dtype=jnp.float32))
    target = jnp.stack([x, y], axis=-1) - (centre + shift)[None, None]
    source = target @ jnp.linalg.inv(matrix).T + centre[None, None]
    at = lambda channel: jax.scipy.ndimage.map_coordinates(
        channel, (source[..., 1], source[..., 0]), order=1, mode="mirror"
    )
    return jax.vmap(at, 2, 2)(image)
