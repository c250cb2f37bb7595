"""The U-Nets of latent diffusion and Stable Diffusion as published: names, and what their descriptions say of them.

There are two namings, that of latent-diffusion (CompVis) and that of diffusers, and two kinds of descriptions, the
`unet_config` of a .yaml of the former and the config.json of the latter.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from score_sde.errors import UserError, one_line
from score_sde.models.names import parameters, published, shapes_of
from score_sde.models.published_unets import ORDERS
from score_sde.models.unet import UNet

# Ours: (latent-diffusion's, diffusers').
TOP = {
    "noise_0": ("time_embed.0", "time_embedding.linear_1"),
    "noise_1": ("time_embed.2", "time_embedding.linear_2"),
    "classes": ("label_emb", "class_embedding"),
    "input_0": ("input_blocks.0.0", "conv_in"),
    "out_norm": ("out.0", "conv_norm_out"),
    "out_conv": ("out.2", "conv_out"),
}
BLOCK = {
    "norm_0": ("in_layers.0", "norm1"),
    "conv_0": ("in_layers.2", "conv1"),
    "embed": ("emb_layers.1", "time_emb_proj"),
    "norm_1": ("out_layers.0", "norm2"),
    "conv_1": ("out_layers.3", "conv2"),
    "skip": ("skip_connection", "conv_shortcut"),
}
ATTENTION = {  # qkv is three layers in diffusers, see `_joined`
    "norm": ("norm", "group_norm"),
    "qkv": ("qkv", "qkv"),
    "proj": ("proj_out", "to_out.0"),
}
TRANSFORMER = {name: (name, name) for name in ("norm", "proj_in", "proj_out")}
TRANSFORMER_BLOCK = {  # the same in both
    "norm_0": "norm1",
    "to_self/query": "attn1.to_q",
    "to_self/key": "attn1.to_k",
    "to_self/value": "attn1.to_v",
    "to_self/out": "attn1.to_out.0",
    "norm_1": "norm2",
    "to_context/query": "attn2.to_q",
    "to_context/key": "attn2.to_k",
    "to_context/value": "attn2.to_v",
    "to_context/out": "attn2.to_out.0",
    "norm_2": "norm3",
    "gated": "ff.net.0.proj",
    "linear": "ff.net.2",
}
RESAMPLE = {"down": ("op", "downsamplers.0.conv"), "up": ("conv", "upsamplers.0.conv")}
# What diffusers called the layers of attention before version 0.18: what it calls them now.
RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def from_published(state: Mapping[str, np.ndarray], network: UNet, order: str = "legacy") -> dict:
    """The parameter tree of `network` from a state_dict of latent-diffusion or diffusers, told apart by its names.

    The names begin with `time_embed` and so on. order: "legacy" or "new", of the channels of qkv in latent-diffusion's
    files (`use_new_attention_order` there). UserError as of names.parameters.
    """
    side = 2 ** (len(network.ch_mult) - 1)
    diffusers = "conv_in.weight" in state
    layers = published_layers(network, diffusers)
    channels = state[f"{layers['input_0']}.weight"].shape[1] if f"{layers['input_0']}.weight" in state else 4
    if network.low_res:
        channels //= 2
    shapes = shapes_of(
        network,
        jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.float32),
    )
    state = _joined(state) if diffusers else dict(state)
    for stage, plan in network.stages().items():
        if not (diffusers or network.context_dim) and plan.heads:
            for leaf in ("weight", "bias"):
                name = f"{layers[f'{stage}/attention/qkv']}.{leaf}"
                if name in state:
                    state[name] = state[name][ORDERS[order](len(state[name]) // 3, plan.heads)]
    if f"{layers['classes']}.weight" in state:
        state[f"{layers['classes']}.weight"] = state[f"{layers['classes']}.weight"].T  # a table, not a linear layer
    return parameters(state, published(layers, shapes), shapes)


def published_layers(network: UNet, diffusers: bool) -> dict[str, str]:
    """The published names of our layers, as paths joined by "/"; also of layers that this network has not."""
    per_level = network.num_res_blocks + 1
    layers = {ours: theirs[diffusers] for ours, theirs in TOP.items()}
    for stage, plan in network.stages().items():
        side, number = stage.split("_")
        number = int(number)
        # behind the first convolution, a level's blocks and its downsampling are as many as the blocks of one going up
        level, place = divmod(number - (side == "input"), per_level)
        if side == "middle":
            # the middle's two blocks and its attention are one list in latent-diffusion
            block = ("middle_block.0", "middle_block.2")[number], f"mid_block.resnets.{number}"
            attention = "middle_block.1", "mid_block.attentions.0"
            resample = "", ""
        else:
            theirs = f"{side}_blocks.{number}", f"{'down' if side == 'input' else 'up'}_blocks.{level}"
            block = f"{theirs[0]}.0", f"{theirs[1]}.resnets.{place}"
            attention = f"{theirs[0]}.1", f"{theirs[1]}.attentions.{place}"
            behind = sum(map(bool, plan[:2]))  # members of the stage before the resampling
            resample = f"{theirs[0]}.{behind}", theirs[1]
        prefix, behind = f"{stage}/", resample[diffusers]
        inside = BLOCK.items()
        layers |= {f"{prefix}block/{ours}": f"{block[diffusers]}.{name[diffusers]}" for ours, name in inside}
        if plan.resample:
            layers[f"{prefix}resample/conv"] = f"{behind}.{RESAMPLE[plan.resample][diffusers]}"
            layers |= {f"{prefix}resample/{ours}": f"{behind}.{name[diffusers]}" for ours, name in inside}
        for part, names in (("attention", ATTENTION), ("transformer", TRANSFORMER)):
            start = f"{prefix}{part}/"
            layers |= {f"{start}{ours}": f"{attention[diffusers]}.{name[diffusers]}" for ours, name in names.items()}
        for i in range(network.transformer_depth):
            start, theirs = f"{prefix}transformer/block_{i}/", f"{attention[diffusers]}.transformer_blocks.{i}."
            layers |= {f"{start}{ours}": f"{theirs}{name}" for ours, name in TRANSFORMER_BLOCK.items()}
    return layers


def _joined(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state_dict of diffusers, in which the queries, keys and values of attention without a context are one layer."""
    joined = {}
    for name, array in state.items():
        layer, _, leaf = name.rpartition(".")
        stage, _, last = layer.rpartition(".")
        if ".attentions." not in name or "transformer_blocks" in name:
            joined[name] = array
        elif (last := RENAMED.get(last, last)) in ("to_q", "to_k", "to_v"):
            joined.setdefault(f"{stage}.qkv.{leaf}", {})[last] = array
        else:
            joined[f"{stage}.{last}.{leaf}" if last == "to_out.0" else name] = array
    parts = lambda three: np.concatenate([three[part] for part in ("to_q", "to_k", "to_v") if part in three])
    return {name: parts(array) if isinstance(array, dict) else array for name, array in joined.items()}


# -- descriptions --


def of_compvis(config: Mapping[str, Any], **changes) -> UNet:
    """The network that the parameters of a `unet_config` of latent-diffusion describe; `changes` are arguments of ours.

    UserError where they are no such description.
    """
    given = lambda name, default=None: default if config.get(name) in (None, -1) else config[name]
    try:
        context = given("context_dim", 0)
        context = context[0] if isinstance(context, (list, tuple)) else context
        arguments = dict(
            nf=config["model_channels"],
            ch_mult=given("channel_mult", (1, 2, 4, 8)),
            num_res_blocks=config["num_res_blocks"],
            attn_levels=sorted(int(factor).bit_length() - 1 for factor in config["attention_resolutions"]),
            num_heads=given("num_heads", 1),
            head_channels=given("num_head_channels", 0),
            num_heads_upsample=0 if given("use_spatial_transformer") else given("num_heads_upsample", 0),
            scale_shift=given("use_scale_shift_norm", False),
            resblock_updown=given("resblock_updown", False),
            conv_resample=given("conv_resample", True),
            num_classes=given("num_classes", 0),
            context_dim=context if given("use_spatial_transformer", False) else 0,
            transformer_depth=given("transformer_depth", 1),
            out_channels=config["out_channels"],
        )
        return UNet(**_within_reason(arguments) | changes)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"this is no description of a U-Net of latent diffusion: {error!r}") from None


# What of a diffusers' config.json must be so, if it is told at all, for the network is not ours otherwise.
EXPECTED = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
}
# Classes: (the kind of a level with attention, whether `attention_head_dim` is a number of heads).
CLASSES = {"UNet2DConditionModel": ("CrossAttnDownBlock2D", True), "UNet2DModel": ("AttnDownBlock2D", False)}
PLAIN = "DownBlock2D"


def of_diffusers(config: Mapping[str, Any], **changes) -> UNet:
    """The network that a config.json of diffusers describes; `changes` are arguments of ours. UserError for others."""
    if config.get("_class_name") not in CLASSES:
        raise UserError(f"the U-Net is a {config.get('_class_name')}; expected {' or '.join(CLASSES)}")
    for name, expected in EXPECTED.items():
        if config.get(name, expected) != expected:
            raise UserError(f"the U-Net has {name} = {config[name]!r}; known is {expected!r} alone")
    attentive, counts_heads = CLASSES[config["_class_name"]]
    try:
        widths, kinds = config["block_out_channels"], config["down_block_types"]
        if unknown := set(kinds) - {attentive, PLAIN}:
            raise UserError(f"the U-Net has levels of kind {min(unknown)}; known are {attentive} and {PLAIN}")
        told = config.get("num_attention_heads") if counts_heads else None
        told = told or config.get("attention_head_dim", 8)
        heads = told if isinstance(told, Sequence) else [told] * len(widths)
        depth = config.get("transformer_layers_per_block", 1)
        depths = set(depth) if isinstance(depth, Sequence) else {depth}
        if len(depths) != 1 or any(width % widths[0] for width in widths):
            raise UserError(f"the U-Net's levels have {widths} features and transformers of depth {depth}")
        arguments = dict(
            nf=widths[0],
            ch_mult=[width // widths[0] for width in widths],
            num_res_blocks=config["layers_per_block"],
            attn_levels=[level for level, kind in enumerate(kinds) if kind == attentive],
            groups=config.get("norm_num_groups", 32),
            scale_shift=False,
            resblock_updown=False,
            num_classes=config.get("num_class_embeds") or 0,
            context_dim=config.get("cross_attention_dim", 1280) if counts_heads else 0,
            transformer_depth=depths.pop(),
            out_channels=config.get("out_channels", 4),
            **(_heads(widths, heads) if counts_heads else dict(num_heads=1, head_channels=told or 0)),
        )
        return UNet(**_within_reason(arguments) | changes)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"this is no description of a U-Net of diffusers: {error!r}") from None


# The most that published networks have, several times over; a description that asks for more is damaged.
MOST = {"nf": 4096, "num_res_blocks": 16, "transformer_depth": 32, "context_dim": 16384, "num_classes": 100_000}


def _within_reason(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments, of which UserError says what is no number of layers or features."""
    numbers = {name: arguments[name] for name in MOST} | {"levels": len(arguments["ch_mult"])}
    for name, value in numbers.items():
        if not isinstance(value, int) or not 0 <= value <= MOST.get(name, 10):
            raise UserError(f"the description of the U-Net makes {name} = {one_line(value)!r}: it is damaged")
    return arguments


def _heads(widths: Sequence[int], heads: Sequence[int]) -> dict[str, int]:
    """Heads of each level as our arguments: all the same, or all of the same width."""
    if len(set(heads)) == 1:
        return dict(num_heads=heads[0], head_channels=0)
    channels = {width // count for width, count in zip(widths, heads, strict=True)}
    if len(channels) > 1:
        raise UserError(f"the U-Net's levels of {widths} features have {heads} heads: neither all as many, nor as wide")
    return dict(num_heads=1, head_channels=channels.pop())


# Heads of the published networks without a description, which no shape tells: (model_channels, context_dim) -> them.
HEADS = {
    (320, 768): dict(num_heads=8),  # Stable Diffusion 1
    (320, 1024): dict(num_head_channels=64),  # Stable Diffusion 2
    (320, 1280): dict(num_heads=8),  # the text-to-image model of latent diffusion
    (192, 512): dict(num_heads=1),  # class-conditional ImageNet
    (224, 0): dict(num_head_channels=32),  # LSUN bedrooms, CelebA-HQ, FFHQ
}


def description(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The `unet_config` of a published state_dict of latent-diffusion, by names and shapes; UserError for others."""
    blocks: list[list[int]] = [[]]  # widths, by level
    attention: set[int] = set()
    number = 1
    while f"input_blocks.{number}.0.in_layers.0.weight" in state or f"input_blocks.{number}.0.op.weight" in state:
        if f"input_blocks.{number}.0.op.weight" in state:
            blocks.append([])
        else:
            blocks[-1].append(len(state.get(f"input_blocks.{number}.0.out_layers.3.weight", ())))
        if f"input_blocks.{number}.1.norm.weight" in state:
            attention.add(2 ** (len(blocks) - 1))
        number += 1
    first, last = (state.get(name, np.zeros(())).shape for name in ("input_blocks.0.0.weight", "out.2.weight"))
    if len(first) != 4 or not last or not all(blocks) or any(widths[0] % first[0] for widths in blocks):
        raise UserError("this is no U-Net of latent diffusion: its layers have other names or shapes")
    inner = "middle_block.1.transformer_blocks."
    keys = state.get(f"{inner}0.attn2.to_k.weight", np.zeros((0, 0))).shape
    key = (first[0], keys[-1])
    if key not in HEADS:
        raise UserError(
            f"a U-Net of {key[0]} features for a context of {key[1]} is none of the published ones, and shapes do not "
            "tell its heads: put its .yaml, of the same name, beside the file"
        )
    depth = len({name.removeprefix(inner).split(".")[0] for name in state if name.startswith(inner)})
    return dict(
        in_channels=first[1],
        out_channels=last[0],
        model_channels=first[0],
        num_res_blocks=len(blocks[0]),
        channel_mult=[widths[0] // first[0] for widths in blocks],
        attention_resolutions=sorted(attention),
        use_spatial_transformer=bool(keys[-1]),
        context_dim=keys[-1],
        transformer_depth=max(1, depth),
        **HEADS[key],
    )
