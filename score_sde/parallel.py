"""The only file that knows devices and hosts. Everything else is written for one device.

Data-parallel by `jax.pmap`: arguments carry a leading device axis, `mean` averages over it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from score_sde.errors import UserError

AXIS = "devices"


def pmap(function: Callable, **options) -> Callable:
    """jax.pmap over all devices, with the axis that `mean` averages over."""
    return jax.pmap(function, axis_name=AXIS, **options)


def mean(x):
    """Mean of a tree over the devices inside a `pmap`; outside, where one device holds the batch, x itself."""
    try:
        return jax.lax.pmean(x, AXIS)
    except NameError:  # no such axis is bound
        return x


def batch_per_device(batch_size: int) -> int:
    """The share of one device in a global batch."""
    n = jax.device_count()
    if batch_size % n:
        raise UserError(f"a batch of {batch_size} does not divide over {n} devices: use a multiple of {n}")
    return batch_size // n


def replicate(tree):
    """A copy of a host tree on each local device, with a leading device axis."""
    n = jax.local_device_count()
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *np.shape(x))), tree)


def shard(tree):
    """Split the leading axis of host arrays over the local devices: (n, ...) -> (devices, n / devices, ...)."""
    n = jax.local_device_count()
    return jax.tree.map(lambda x: x.reshape(n, x.shape[0] // n, *x.shape[1:]), tree)


def first(tree):
    """The first local device's copy of a replicated tree, as NumPy arrays of their own memory."""
    return jax.tree.map(lambda x: np.array(x.addressable_shards[0].data)[0], tree)


def gather(tree):
    """Undo `shard` for outputs of a pmapped function: this host's devices' results, concatenated, as NumPy arrays."""
    join = lambda x: np.concatenate([np.asarray(s.data) for s in x.addressable_shards]).reshape(-1, *x.shape[2:])
    return jax.tree.map(join, tree)
