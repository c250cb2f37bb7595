"""Seeds: a seed is the whole number that was given, all 64 bits of it."""

import jax
import numpy as np

LARGEST = 2**64 - 1


def key(seed: int) -> jax.Array:
    """The key of a whole number, counted modulo 2^64: that of `jax.random.key` with x64, also without.

    Without x64 `jax.random.key` drops the upper half, so that 2^32 would give what 0 gives.
    """
    high, low = np.array([seed >> 32, seed], object) % 2**32
    if not high:
        return jax.random.key(np.uint32(low))
    return jax.random.wrap_key_data(np.array([high, low], np.uint32), impl="threefry2x32")
