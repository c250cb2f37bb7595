"""Published parameters of ADM (guided-diffusion) and of EDM, by name, as trees of this library's networks.

Each code's names are literal tables, of the layers within a block and of the blocks within a network. The files
themselves are read by foreign.py.
"""

import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from score_sde.errors import UserError
from score_sde.models.names import parameters, published, shapes_of, unwrapped
from score_sde.models.ncsnpp import NCSNpp
from score_sde.models.resample import BOX
from score_sde.models.unet import Plan, UNet, UNetClassifier

Shapes = Mapping[str, tuple[int, ...]]  # by path, joined by "/"

# Our layer: the published one.
ADM_LAYERS = {
    "block": {
        "norm_0": "in_layers.0",
        "conv_0": "in_layers.2",
        "embed": "emb_layers.1",
        "norm_1": "out_layers.0",
        "conv_1": "out_layers.3",
        "skip": "skip_connection",
    },
    "attention": {"norm": "norm", "qkv": "qkv", "proj": "proj_out"},
    "down": {"conv": "op"},
    "up": {"conv": "conv"},
}
ADM_TOP = {
    "noise_0": "time_embed.0",
    "noise_1": "time_embed.2",
    "classes": "label_emb",
    "input_0": "input_blocks.0.0",
    "out_norm": "out.0",
    "out_conv": "out.2",
}
ADM_POOLS = {
    "adaptive": {"out_norm": "out.0", "out": "out.3"},
    "attention": {
        "out_norm": "out.0",
        "positions": "out.2.positional_embedding",
        "qkv": "out.2.qkv_proj",
        "out": "out.2.c_proj",
    },
    "spatial": {"hidden": "out.0", "out": "out.2"},
    "spatial_v2": {"hidden": "out.0", "hidden_norm": "out.1", "out": "out.3"},
}
EDM_BLOCK = {
    "norm_0": "norm0",
    "conv_0": "conv0",
    "embed": "affine",
    "norm_1": "norm1",
    "conv_1": "conv1",
    "skip": "skip",
}
EDM_ATTENTION = {"norm": "norm2", "qkv": "qkv", "proj": "proj"}
EDM_TOP = {
    "noise_0": "map_layer0",
    "noise_1": "map_layer1",
    "classes": "map_label",
    "augment": "map_augment",
    "out_norm": "out_norm",
    "out_conv": "out_conv",
}
# The same of NCSNpp, whose layers Flax counts by class.
SONG_BLOCK = {
    "GroupNorm_0": "norm0",
    "Conv_0": "conv0",
    "Dense_0": "affine",
    "GroupNorm_1": "norm1",
    "Conv_1": "conv1",
    "Conv_2": "skip",
}
SONG_ATTENTION = {"GroupNorm_0": "norm2", "NIN_0": "qkv", "NIN_1": "qkv", "NIN_2": "qkv", "NIN_3": "proj"}
SONG_TOP = {
    "GaussianFourierProjection_0/W": "map_noise.freqs",
    "Dense_0": "map_layer0",
    "Dense_1": "map_layer1",
    "classes": "map_label",
    "augment": "map_augment",
}
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "W": "weight", "b": "bias", "weight": "weight"}

# The order of the channels of qkv in a published network, q, k and v being j = 0, 1, 2: (channels, heads) -> the
# position there of each channel of ours, j C + head C / heads + channel.
ORDERS: dict[str, Callable[[int, int], np.ndarray]] = {
    "new": lambda channels, heads: np.arange(3 * channels),
    "legacy": lambda channels, heads: np.arange(3 * channels).reshape(heads, 3, -1).swapaxes(0, 1).ravel(),
    "interleaved": lambda channels, heads: np.arange(3 * channels).reshape(-1, 3).T.ravel(),  # EDM's
}
# The one published network in the new order is that for 64 x 64: (nf, ch_mult, num_res_blocks).
IN_NEW_ORDER = [(192, (1, 2, 3, 4), 3)]


def from_guided_diffusion(
    state: Mapping[str, np.ndarray], network: UNet | UNetClassifier, image_shape: tuple[int, int, int], order: str = ""
) -> dict:
    """The parameter tree of `network`, for images of `image_shape` (H, W, C), from a state_dict of guided-diffusion.

    order: "new" or "legacy", of the channels of qkv (`use_new_attention_order` there), which a file does not tell;
        by default that of the published networks.
    """
    shapes = shapes_of(network, *_inputs(image_shape))
    if not order:
        order = "new" if (network.nf, network.ch_mult, network.num_res_blocks) in IN_NEW_ORDER else "legacy"
    layers = ADM_TOP | ADM_POOLS.get(getattr(network, "pool", ""), {})
    for stage, plan in network.stages().items():
        layers |= _adm_names(stage, plan, network.resblock_updown)
    names = published(layers, shapes, LEAVES)
    state = unwrapped(state, names.values())
    _require(state, "time_embed.0.weight", "guided diffusion")
    rows_of = lambda path: _rows(network, path, shapes, order)
    return parameters(state, names, shapes, _arranged(rows_of, "classes/kernel"), dtype="float32")


def from_edm(state: Mapping[str, np.ndarray], network: UNet | NCSNpp, image_shape: tuple[int, int, int]) -> dict:
    """The parameter tree of `network`, for images of `image_shape` (H, W, C), from a state_dict of EDM.

    UNet takes a DhariwalUNet, NCSNpp a SongUNet, each in its preconditioner, whose names begin with `model.`. Filters
    must be those of the network; iDDPM's noise levels, `u`, are left out.
    """
    shapes = shapes_of(network, *_inputs(image_shape))
    layers_of, rows, taps = {
        UNet: (_dhariwal_names, _rows, lambda network: BOX),
        NCSNpp: (_song_names, _song_rows, lambda network: network.fir_kernel if network.fir else BOX),
    }[type(network)]
    names = published(layers_of(network, image_shape[0]), shapes, LEAVES)
    state = unwrapped(state, names.values())
    _require(state, "map_layer0.weight", "EDM")
    filters = {name for name in state if name.endswith("resample_filter")}
    for name in filters:
        _require_filter(name, np.asarray(state[name]), np.asarray(taps(network), np.float64))
    arranged = _arranged(lambda path: rows(network, path, shapes, "interleaved"))
    return parameters(state, names, shapes, arranged, unused=filters | {"u"}, dtype="float32")


def _inputs(image_shape: tuple[int, int, int]) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """An image and its label, without their numbers."""
    return jax.ShapeDtypeStruct((1, *image_shape), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)


def _arranged(rows_of: Callable[[str], np.ndarray | None], table: str = "") -> Callable:
    """The `arranged` of names.parameters: published rows in our order, then axes; those of a table stay."""

    def arranged(path: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        rows = rows_of(path)
        if rows is not None and len(array) > rows.max():
            array = array[rows]
        if array.ndim > 1 and path != table and array.size == np.prod(array.shape[:2] + shape[:-2]):
            array = array.reshape(*array.shape[:2], *shape[:-2]).transpose(*range(2, len(shape)), 1, 0)
        return array

    return arranged


def _require(state: Mapping[str, np.ndarray], name: str, code: str):
    """Refuse at once what is of another code."""
    if name not in state:
        raise UserError(f"the checkpoint has no {name}, so it is none of {code}")


def _require_filter(name: str, stored: np.ndarray, taps: np.ndarray):
    """Refuse a stored filter (1, 1, K, K) other than that of these taps (K,)."""
    expected = np.outer(taps, taps) / taps.sum() ** 2
    if stored.shape[2:] != expected.shape or not np.allclose(stored[0, 0], expected, atol=1e-6):
        raise UserError(f"{name} of the checkpoint is not the filter of the configured network's taps {taps.tolist()}")


def _adm_names(stage: str, plan: Plan, resblock_updown: bool) -> dict[str, str]:
    """Our layers of a stage, as paths joined by "/": guided-diffusion's names."""
    side, number = stage.split("_")
    parts = [name for name, present in zip(("block", "attention", "resample"), plan, strict=True) if present]
    first = {"middle_1": 2}.get(stage, 0)  # the middle's two stages are one list there
    prefix = "middle_block" if side == "middle" else f"{side}_blocks.{number}"
    names = {}
    for place, part in enumerate(parts, first):
        layers = ADM_LAYERS[part if part != "resample" else "block" if resblock_updown else plan.resample]
        names |= {f"{stage}/{part}/{ours}": f"{prefix}.{place}.{theirs}" for ours, theirs in layers.items()}
    return names


def _dhariwal_names(network: UNet, size: int) -> dict[str, str]:
    """Our layers of a UNet for images of side `size`, as paths joined by "/": DhariwalUNet's names."""
    names = EDM_TOP | {"input_0": f"enc.{size}x{size}_conv"}
    block = 0  # number within its level
    for stage, plan in network.stages().items():
        coder = "enc" if stage.startswith("input") else "dec"
        if plan.features:
            place = {"middle_0": "in0", "middle_1": "in1"}.get(stage, f"block{block}")
            block = 0 if place.startswith("in") else block + 1
            prefix = f"{coder}.{size}x{size}_{place}"
            names |= {f"{stage}/block/{ours}": f"{prefix}.{theirs}" for ours, theirs in EDM_BLOCK.items()}
            names |= {f"{stage}/attention/{ours}": f"{prefix}.{theirs}" for ours, theirs in EDM_ATTENTION.items()}
        if plan.resample:
            size, block = size // 2 if plan.resample == "down" else size * 2, 0
            prefix = f"{coder}.{size}x{size}_{plan.resample}"
            names |= {f"{stage}/resample/{ours}": f"{prefix}.{theirs}" for ours, theirs in EDM_BLOCK.items()}
    return names


def _song_names(network: NCSNpp, size: int) -> dict[str, str]:
    """Our layers of an NCSNpp for images of side `size`, as paths joined by "/": SongUNet's names."""
    blocks, attentions, heads = [], [], []  # in order of use
    sizes = [size >> level for level in range(len(network.ch_mult))]
    names = SONG_TOP | {"Conv_0": f"enc.{size}x{size}_conv"}
    for level, side in enumerate(sizes):
        if level:
            blocks.append(f"enc.{side}x{side}_down")
            names[f"Combine_{level - 1}/Conv_0"] = f"enc.{side}x{side}_aux_skip"
            names[f"Downsample_{level - 1}/Conv2d_0"] = f"enc.{side}x{side}_aux_residual"
        inside = [f"enc.{side}x{side}_block{i}" for i in range(network.num_res_blocks)]
        blocks += inside
        attentions += inside if side in network.attn_resolutions else []
    lowest = f"dec.{side}x{side}"
    blocks += [f"{lowest}_in0", f"{lowest}_in1"]
    attentions.append(f"{lowest}_in0")
    for side in reversed(sizes):
        if side != sizes[-1]:
            blocks.append(f"dec.{side}x{side}_up")
        inside = [f"dec.{side}x{side}_block{i}" for i in range(network.num_res_blocks + 1)]
        blocks += inside
        attentions += inside[-1:] if side in network.attn_resolutions else []
        if network.progressive == "output_skip" or side == size:
            heads.append(f"dec.{side}x{side}")
    for i, name in enumerate(blocks):
        names |= {f"ResnetBlockBigGANpp_{i}/{ours}": f"{name}.{theirs}" for ours, theirs in SONG_BLOCK.items()}
    for i, name in enumerate(attentions):
        names |= {f"AttnBlockpp_{i}/{ours}": f"{name}.{theirs}" for ours, theirs in SONG_ATTENTION.items()}
    for i, name in enumerate(heads):
        names |= {f"GroupNorm_{i}": f"{name}_aux_norm", f"Conv_{i + 1}": f"{name}_aux_conv"}
    return names


def _rows(network: UNet | UNetClassifier, path: str, shapes: Shapes, order: str) -> np.ndarray | None:
    """Which entries along the published first axis make ours at `path`, None for all as they are."""
    stage, *inner = path.split("/")
    if inner[-2:-1] != ["qkv"]:  # the classifier's pool, on top, always has our order
        return None
    return ORDERS[order](shapes[path][-1] // 3, network.stages()[stage].heads)


def _song_rows(network: NCSNpp, path: str, shapes: Shapes, order: str) -> np.ndarray | None:
    """As `_rows`, for NCSNpp, which keeps q, k and v apart, of a single head."""
    if part := re.match(r"AttnBlockpp_\d+/NIN_([012])/", path):
        channels = shapes[path][-1]
        return ORDERS[order](channels, 1).reshape(3, channels)[int(part[1])]
    return None
