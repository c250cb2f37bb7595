"""Where x lives: how a uint8 image becomes the data x_0 of a model and comes back, and what range the data have."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Space(NamedTuple):
    """The space of a model's data, pixels or an autoencoder's latents; solvers, EMS and losses see x alone."""

    shape: tuple[int, int, int]  # (H, W, C) of one x
    encode: Callable  # (key, uint8 image) -> x_0 (H, W, C) float32; vmap it over keys and a batch
    decode: Callable  # x (B, H, W, C) -> uint8 images
    low: float = -math.inf  # the least and greatest value of data; without a range there is no thresholding
    high: float = math.inf


def pixels(shape: tuple[int, int, int], *, centered: bool = True, dequantize: bool = False) -> Space:
    """Pixels in [-1, 1] if centered, else in [0, 1].

    Levels x of 0..255 become x / 255, or with `dequantize` (x + u) / 256 with u uniform in [0, 1), whose density bounds
    the likelihood of the levels (Theis et al. 2016, eq. 3). They come back by truncation, the rule behind published
    FIDs: floor(255 unit), clipped. The tolerance of 1e-4 of a level is ours: without it, rounding takes one from 63 of
    the 256 levels in [-1, 1].
    """
    from_unit = (lambda unit: 2.0 * unit - 1.0) if centered else lambda unit: unit
    to_unit = (lambda x: (x + 1.0) / 2.0) if centered else lambda x: x

    def encode(key, image):
        level = image.astype(jnp.float32)
        if dequantize:
            return from_unit((level + jax.random.uniform(jax.random.split(key)[1], image.shape)) / 256.0)
        return from_unit(level / 255.0)

    decode = lambda x: jnp.clip(255.0 * to_unit(x) + 1e-4, 0.0, 255.0).astype(jnp.uint8)
    return Space(tuple(shape), encode, decode, from_unit(0.0), from_unit(1.0))


def random_flip(key, image):
    """The image (H, W, C) or its mirror image; the key's other half is left to `Space.encode`."""
    return jnp.where(jax.random.bernoulli(jax.random.split(key)[0]), image[:, ::-1], image)
