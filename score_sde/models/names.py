"""Reads a network's parameters from published ones, by a table of names."""

from collections.abc import Collection, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from score_sde.errors import UserError

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def shapes_of(network: nn.Module, *inputs: jax.ShapeDtypeStruct) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by its path joined by "/"; nothing is computed."""
    variables = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(variables["params"], sep="/").items()}


def parameters(
    state: Mapping[str, np.ndarray],
    layers: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    unused: Collection[str] = (),
) -> dict:
    """The tree of parameters of these shapes, from PyTorch's by name; each keeps the floating-point type that it has.

    layers: our layers, as paths joined by "/", and their published names; more of them than there are do not matter.
    unused: entries that may be left over. Kernels are transposed, not copied; a 1 x 1 convolution and a linear layer
    are the same. UserError for an entry that is missing, left over, of another shape or no floating-point number.
    """
    params, used = {}, set(unused)
    for path, shape in shapes.items():
        layer, _, leaf = path.rpartition("/")
        name = f"{layers[layer]}.{LEAVES[leaf]}"
        if name not in state:
            raise UserError(f"the checkpoint has no {name}, which the network needs for {path}")
        used.add(name)
        array = np.asarray(state[name])
        if leaf == "kernel" and array.shape[:2] == shape[:-3:-1] and array.size == np.prod(shape):
            array = array.reshape(*array.shape[:2], *shape[:-2]).transpose(*range(2, len(shape)), 1, 0)
        if array.shape != shape:
            raise UserError(
                f"{name} of the checkpoint gives shape {array.shape}, but {path} of the network has {shape}"
            )
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(f"{name} of the checkpoint has type {array.dtype}; parameters are floating-point numbers")
        params[path] = array
    if left := state.keys() - used:
        raise UserError(f"the network has no place for {len(left)} entries of the checkpoint, such as {min(left)}")
    return traverse_util.unflatten_dict(params, sep="/")
