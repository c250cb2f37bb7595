"""Parameters of the published PyTorch checkpoints, to and from the trees of this library's networks.

The official PyTorch NCSN++ keeps its layers in one list, `all_modules.<i>`, in order of use, where Flax counts them per
class. Tracing the network gives that order, so there is no table of names to keep.
"""

import re
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from score_sde.errors import UserError

Path = tuple[str, ...]


def from_torch(state: Mapping[str, np.ndarray], network: nn.Module, image_shape: tuple[int, int, int]) -> dict:
    """The parameter tree of `network`, for images of `image_shape` (H, W, C), from a PyTorch state_dict.

    Accepts the prefix `module.` of DataParallel. Two kinds of entries have no counterpart here and are left out: the
    buffer `sigmas`, and the embedding layers of an unconditional network's blocks (official, but without effect).
    """
    state = {name.removeprefix("module."): np.asarray(array) for name, array in state.items()}
    unused = [name for name in state if name == "sigmas" or _without_effect(name, network)]
    names, shapes = _torch_names(network, image_shape)
    params = {}
    for path, name in names.items():
        if name not in state:
            raise UserError(f"the checkpoint has no {name}, which the configured network needs for {'/'.join(path)}")
        params[path] = _to_flax(name, state[name])
        if params[path].shape != shapes[path]:
            raise UserError(
                f"{name} of the checkpoint gives shape {params[path].shape}, "
                f"but {'/'.join(path)} of the configured network has {shapes[path]}"
            )
    left_over = sorted(set(state) - set(names.values()) - set(unused))
    if left_over:
        raise UserError(f"the configured network has no place for {len(left_over)} entries, such as {left_over[0]}")
    return traverse_util.unflatten_dict(params)


def to_torch(params: Mapping, network: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`. PyTorch must load the result with strict=False, as the official code does."""
    names, _ = _torch_names(network, image_shape)
    flat = traverse_util.flatten_dict(params)
    return {name: _to_pytorch(name, np.asarray(flat[path])) for path, name in names.items()}


def _torch_names(network: nn.Module, image_shape: tuple[int, int, int]) -> tuple[dict[Path, str], dict[Path, tuple]]:
    """The PyTorch name and the Flax shape of every parameter, by Flax path."""
    order = []

    def record(call, args, kwargs, context):
        path = context.module.path
        if len(path) == 1 and context.method_name == "__call__" and path[0] not in order:
            # PyTorch resamples image pyramids by plain functions, which have no place in the list.
            resamples = re.match("(Up|Down)sample_", path[0]) and not context.module.with_conv
            if not (resamples and args[0].shape[-1] == image_shape[-1]):
                order.append(path[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        variables = jax.eval_shape(
            network.init,
            jax.random.key(0),
            jax.ShapeDtypeStruct((1, *image_shape), jnp.float32),
            jax.ShapeDtypeStruct((1,), jnp.float32),
        )
    shapes = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(variables["params"]).items()}
    # The class embedding, which PyTorch does not know, comes under its own name.
    listed = [layer for layer in order if not layer.startswith("Embed_")]
    places = {layer: f"all_modules.{i}" for i, layer in enumerate(listed)}
    leaves = {"kernel": "weight", "scale": "weight"}
    names = {
        (layer, *inner, leaf): ".".join([places.get(layer, layer), *inner, leaves.get(leaf, leaf)])
        for layer, *inner, leaf in shapes
    }
    return names, shapes


def _without_effect(name: str, network: nn.Module) -> bool:
    return not network.conditional and re.fullmatch(r"all_modules\.\d+\.Dense_0\.(weight|bias)", name) is not None


def _to_flax(name: str, array: np.ndarray) -> np.ndarray:
    """Convolutions from OIHW to HWIO, dense layers from (out, in) to (in, out)."""
    if name.endswith("weight") and array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T if name.endswith("weight") and array.ndim == 2 else array


def _to_pytorch(name: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `_to_flax`."""
    if name.endswith("weight") and array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    return array.T if name.endswith("weight") and array.ndim == 2 else array
