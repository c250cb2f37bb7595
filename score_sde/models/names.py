"""Reads a network's parameters from published ones, by their names there."""

import collections
import re
from collections.abc import Callable, Collection, Iterable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from score_sde.errors import UserError

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
# What PyTorch's wrappers put into names: DataParallel, compile, FSDP, DeepSpeed and activation checkpointing.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_forward_module", "_checkpoint_wrapped_module")
_WRAPPED = re.compile(rf"(?:(?<=\.)|^)(?:{'|'.join(WRAPPERS)})\.")


def shapes_of(network: nn.Module, *inputs: jax.ShapeDtypeStruct) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by its path joined by "/"; nothing is computed."""
    variables = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(variables["params"], sep="/").items()}


def published(layers: Mapping[str, str], paths: Iterable[str], leaves: Mapping[str, str] = LEAVES) -> dict[str, str]:
    """The published name of each parameter, by its path, from those of the layers; a path may be in `layers` itself.

    leaves: PyTorch's names of Flax's leaves, where they differ.
    """
    names = {}
    for path in paths:
        layer, _, leaf = path.rpartition("/")
        names[path] = layers.get(path) or f"{layers.get(layer, layer)}.{leaves.get(leaf, leaf)}"
    return names


def bare(name: str) -> str:
    """A name without what PyTorch's wrappers put into it."""
    return _WRAPPED.sub("", name)


def unwrapped(state: Mapping[str, np.ndarray], names: Iterable[str], sep: str = ".") -> dict[str, np.ndarray]:
    """A network's own entries in a file, by its names there.

    names: those that the network asks for. Whatever is written before them in the file, such as `model.` of Lightning,
    is taken away: the words before which stand most of them. Entries without these words belong to something else.
    UserError where the file holds the network several times.
    """
    state, names = {bare(name): array for name, array in state.items()}, set(names)
    counts = collections.Counter()
    for name in state:
        parts = name.split(sep)
        for i in range(len(parts)):
            if sep.join(parts[i:]) in names:
                counts["".join(part + sep for part in parts[:i])] += 1
    if not counts:
        return _undotted(state, names)
    (prefix, most), *others = counts.most_common()
    if others and others[0][1] == most:
        raise UserError(
            f"the checkpoint holds the network twice, as {prefix or 'its names alone'} and as {others[0][0]}: "
            "keep one of them in the file"
        )
    return {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}


def _undotted(state: dict[str, np.ndarray], names: set[str]) -> dict[str, np.ndarray]:
    """The same where names have lost their dots, as averages of latent-diffusion have; else the whole state."""
    joined = {name.replace(".", ""): name for name in names}
    longest = max(joined, key=len, default="")
    prefix = next((name.removesuffix(longest) for name in state if longest and name.endswith(longest)), None)
    if prefix is None:
        return state
    inside = {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
    return {joined.get(name, name): array for name, array in inside.items()}


def transposed(path: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A kernel in Flax's order of axes; a 1 x 1 convolution and a linear layer are the same."""
    if path.endswith("kernel") and array.shape[:2] == shape[:-3:-1] and array.size == np.prod(shape):
        return array.reshape(*array.shape[:2], *shape[:-2]).transpose(*range(2, len(shape)), 1, 0)
    return array


def parameters(
    state: Mapping[str, np.ndarray],
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    arranged: Callable[[str, np.ndarray, tuple[int, ...]], np.ndarray] = transposed,
    *,
    unused: Collection[str] = (),
    dtype: str | None = None,
) -> dict:
    """The tree of parameters of these shapes, from published ones by name, views of them where that is enough.

    names: the published name of each parameter, by its path joined by "/". arranged: (path, published array, shape) ->
    the array in our order of axes. unused: entries that may be left over. dtype: by default, each keeps the type that
    it has. UserError for an entry that is missing, left over, of another shape or no floating-point number.
    """
    params, used = {}, set(unused)
    for path, shape in shapes.items():
        name = names[path]
        if name not in state:
            raise UserError(f"the checkpoint has no {name}, which the network needs for {path}; {contents(state)}")
        used.add(name)
        array = arranged(path, np.asarray(state[name]), shape)
        if array.shape != shape:
            raise UserError(
                f"{name} of the checkpoint gives shape {array.shape}, but {path} of the configured network has {shape}"
            )
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(f"{name} of the checkpoint has type {array.dtype}; parameters are floating-point numbers")
        params[path] = array if dtype is None else np.asarray(array, dtype)
    if left := state.keys() - used:
        raise UserError(f"the configured network has no place for {len(left)} entries, such as {min(left)}")
    return traverse_util.unflatten_dict(params, sep="/")


def contents(state: Mapping) -> str:
    """What a file holds, a tree of arrays, in a few words."""
    state = traverse_util.flatten_dict(dict(state), sep="/")
    shown = ", ".join(f"{' '.join(name.split())[:60]} {np.shape(state[name])}" for name in list(state)[:4])
    return f"it holds {len(state)} entries" + (f", {shown}{', ...' if len(state) > 4 else ''}" if state else "")
