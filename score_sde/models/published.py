"""Parameters of the published checkpoints, of the PyTorch and the JAX code, as trees of this library's networks.

The official PyTorch U-Nets keep their layers in one list, `all_modules.<i>`, in order of use, where Flax counts them
per class. Tracing the network gives that order, so there is no table of names to keep. The PyTorch RefineNets (NCSN,
NCSNv2) name their layers instead, by rules that `_refinenet_name` states.

The files themselves are read by foreign.py; the program is `python -m tools.import_checkpoint`.
"""

import re
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from score_sde.errors import UserError
from score_sde.models.names import LEAVES, parameters, shapes_of, unwrapped
from score_sde.models.ncsnpp import NCSNpp
from score_sde.models.ncsnv2 import NCSNv2
from score_sde.models.published_unets import from_edm, from_guided_diffusion
from score_sde.models.unet import UNet, UNetClassifier

Path = tuple[str, ...]


# What a file's entries become, by the kind of file and the network that they are for.
CONVERTERS = {
    ("torch", UNet): from_guided_diffusion,
    ("torch", UNetClassifier): from_guided_diffusion,
    ("edm", UNet): from_edm,
    ("edm", NCSNpp): from_edm,
}


def convert(kind: str, params: Mapping, network: nn.Module, image_shape: tuple[int, int, int]) -> dict:
    """The parameter tree of `network`, for images of `image_shape` (H, W, C), from what foreign.py read.

    kind: "torch", "flax" or "edm", of the file; UserError where such a file holds no network of this family.
    """
    converter = CONVERTERS.get((kind, type(network)), {"torch": from_torch, "flax": from_flax}.get(kind))
    if converter is None:
        raise UserError(f"EDM's files hold networks ncsnpp and unet, the configured one is {type(network).__name__}")
    return converter(params, network, image_shape)


def from_torch(state: Mapping[str, np.ndarray], network: nn.Module, image_shape: tuple[int, int, int]) -> dict:
    """The parameter tree of `network`, for images of `image_shape` (H, W, C), from a PyTorch state_dict.

    Names may be wrapped, see names.unwrapped. Two kinds of entries have no counterpart here and are left out: the
    buffer `sigmas`, and the embedding layers of an unconditional network's blocks (official, but without effect).

    A PyTorch NCSNv2 computes something slightly different (other resizing, unbiased variances), so its parameters suit
    these networks as a start for training rather than for sampling; the one for 64 x 64 has another width as well.
    """
    names, shapes = _torch_names(network, image_shape)
    state = unwrapped(state, names.values())
    unused = [name for name in state if name == "sigmas" or _without_effect(name, network)]
    return parameters(state, names, shapes, _to_flax, unused=unused, dtype="float32")


def to_torch(params: Mapping, network: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`. PyTorch must load the result with strict=False, as the official code does."""
    if getattr(network, "patch_size", 1) > 1:  # networks of other families have no such option
        raise UserError(f"patch_size = {network.patch_size}: the official code has no networks on patches to export to")
    names, _ = _torch_names(network, image_shape)
    flat = traverse_util.flatten_dict(params, sep="/")
    return {name: _to_pytorch(path, np.asarray(flat[path])) for path, name in names.items()}


def from_flax(params: Mapping, network: nn.Module, image_shape: tuple[int, int, int]) -> dict:
    """The same tree as `from_torch`, from that of a JAX checkpoint, such as one of the official code.

    Accepts the official training state as a whole, of which it takes the averaged parameters, {"params": ...}, and the
    parameters of group normalizations as (1, 1, 1, C), which is how flax 0.3.1 stored them.
    """
    _, shapes = _trace(network, image_shape)
    stored = traverse_util.flatten_dict(dict(params.get("params_ema", params)))
    stored = {"/".join(map(str, path)): array for path, array in stored.items()}
    return parameters(
        unwrapped(stored, shapes, "/"), {path: path for path in shapes}, shapes, _as_vector, dtype="float32"
    )


def _as_vector(path: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return array.reshape(shape) if path.endswith(("scale", "bias")) and array.shape == (1, 1, 1, *shape) else array


def _trace(network: nn.Module, image_shape: tuple[int, int, int]) -> tuple[list[str], dict[str, tuple]]:
    """The top-level layers that PyTorch lists, in order of use, and the shape of every parameter, by Flax path.

    Paths are joined by "/".
    """
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
        shapes = shapes_of(
            network, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
        )
    # The class embedding, which PyTorch does not know, comes under its own name.
    return [layer for layer in order if not layer.startswith("Embed_")], shapes


def _torch_names(network: nn.Module, image_shape: tuple[int, int, int]) -> tuple[dict[str, str], dict[str, tuple]]:
    """The PyTorch name and the Flax shape of every parameter, by Flax path."""
    if type(network) in (UNet, UNetClassifier):
        raise UserError("the official code of Score-SDE has no network of this family")
    order, shapes = _trace(network, image_shape)
    if isinstance(network, NCSNv2):
        layers = lambda path: _refinenet_layers(path[:-1], len(network.widths))
    else:
        places = {layer: f"all_modules.{i}" for i, layer in enumerate(order)}
        layers = lambda path: [places.get(path[0], path[0]), *path[1:-1]]
    named = lambda path: ".".join([*layers(path), LEAVES.get(path[-1], path[-1])])
    return {path: named(tuple(path.split("/"))) for path in shapes}, shapes


# (class of the enclosing layer, class of the layer) -> the PyTorch name of the layer, from its number in Flax, that of
# the enclosing layer, and the PyTorch names of the levels. The prefix of conditional classes is left out.
_REFINENET: dict[tuple[str, str], Callable[[int, int, list[str]], str]] = {
    ("", "Conv"): lambda i, outer, levels: ("begin_conv", "end_conv")[i],
    ("", "InstanceNorm2dPlus"): lambda i, outer, levels: "normalizer",
    ("", "ResidualBlock"): lambda i, outer, levels: f"res{levels[i // 2]}.{i % 2}",
    ("", "RefineBlock"): lambda i, outer, levels: f"refine{(levels[:2] + levels[2:-2][::-1] + levels[-2:])[i]}",
    ("ResidualBlock", "InstanceNorm2dPlus"): lambda i, outer, levels: f"normalize{i + 1}",
    ("ResidualBlock", "Conv"): lambda i, outer, levels: ("conv1", "conv2", "shortcut")[i],
    ("ResidualBlock", "ConvMeanPool"): lambda i, outer, levels: ("conv2", "shortcut")[i],
    ("ConvMeanPool", "Conv"): lambda i, outer, levels: "conv",
    # The first RefineBlock has one input, the others two; one more RCUBlock follows those of the inputs.
    ("RefineBlock", "RCUBlock"): lambda i, outer, levels: (
        "output_convs" if i == min(outer + 1, 2) else f"adapt_convs.{i}"
    ),
    ("RefineBlock", "MSFBlock"): lambda i, outer, levels: "msf",
    ("RefineBlock", "CRPBlock"): lambda i, outer, levels: "crp",
    ("RCUBlock", "Conv"): lambda i, outer, levels: f"{i // 2 + 1}_{i % 2 + 1}_conv",
    ("RCUBlock", "InstanceNorm2dPlus"): lambda i, outer, levels: f"{i // 2 + 1}_{i % 2 + 1}_norm",
    ("InstanceNorm2dPlus", "Embed"): lambda i, outer, levels: "embed",
} | {
    (block, layer): lambda i, outer, levels, name=name: f"{name}.{i}"
    for block in ("MSFBlock", "CRPBlock")
    for layer, name in (("Conv", "convs"), ("InstanceNorm2dPlus", "norms"))
}


def _refinenet_layers(path: Path, levels: int) -> list[str]:
    """The PyTorch names of nested layers of an NCSN or NCSNv2 with that many levels."""
    # The level that six have more than five came between the third and the fourth.
    level_names = ["1", "2", "3", "31", "4", "5"] if levels == 6 else [str(i + 1) for i in range(levels)]
    names, enclosing, outer = [], "", 0
    for part in path:
        layer, _, number = re.sub("^Cond(itional)?", "", part).rpartition("_")
        names.append(_REFINENET[enclosing, layer](int(number), outer, level_names))
        enclosing, outer = layer, int(number)
    return names


def _without_effect(name: str, network: nn.Module) -> bool:
    unconditional = not getattr(network, "conditional", True)
    return unconditional and re.fullmatch(r"all_modules\.\d+\.Dense_0\.(weight|bias)", name) is not None


def _to_flax(path: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Convolutions from OIHW to HWIO, dense layers from (out, in) to (in, out), instance norms to (1, 1, 1, C)."""
    if path.endswith(("kernel", "weight")) and array.ndim in (2, 4):
        return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return array.reshape(1, 1, 1, -1) if path.endswith(_INSTANCE_NORM) else array


_INSTANCE_NORM = ("alpha", "gamma", "beta")


def _to_pytorch(path: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `_to_flax`."""
    if path.endswith(("kernel", "weight")):
        return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    return array.reshape(-1) if path.endswith(_INSTANCE_NORM) else array
