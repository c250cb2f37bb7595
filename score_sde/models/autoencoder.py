"""The autoencoders of latent diffusion (Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion
Models", section 3.1 and appendix G): regularized by a KL divergence, or by a codebook (van den Oord et al. 2017).

Shapes: images (B, H, W, C) in [-1, 1], latents (B, h, w, E), with h = H / 2^(levels - 1). `dtype` is the computation
type; parameters are float32 where they are initialized here, and may have any floating-point type.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from score_sde.errors import UserError
from score_sde.models.attention import multihead
from score_sde.models.layers import DTYPES, Conv, GroupNorm, at_least_float32, default_init, require
from score_sde.models.names import parameters, published, shapes_of
from score_sde.models.resample import upsample_2d


class Options(NamedTuple):
    """What the layers of an autoencoder share; see Autoencoder."""

    groups: int
    dtype: str

    def norm(self, name: str) -> GroupNorm:
        return GroupNorm(jnp.dtype(self.dtype), self.groups, 1e-6, name=name)

    def conv(self, features: int, name: str, **changes) -> nn.Conv:
        return nn.Conv(features, (3, 3), kernel_init=default_init(), dtype=jnp.dtype(self.dtype), name=name, **changes)

    def linear(self, features: int, name: str) -> Conv:
        return Conv(features, jnp.dtype(self.dtype), name=name)


class Block(nn.Module):
    """The residual block, (B, H, W, C) -> (B, H, W, features)."""

    features: int
    options: Options

    @nn.compact
    def __call__(self, x: Array) -> Array:
        options = self.options
        h = options.conv(self.features, "conv_0")(nn.swish(options.norm("norm_0")(x)))
        h = options.conv(self.features, "conv_1")(nn.swish(options.norm("norm_1")(h)))
        return h + (x if x.shape[-1] == self.features else options.linear(self.features, "skip")(x))


class Attention(nn.Module):
    """Self-attention of one head over the pixels of (B, H, W, C), with a residual connection."""

    options: Options

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = self.options.norm("norm")(x).reshape(len(x), -1, x.shape[-1])
        query, key, value = (self.options.linear(x.shape[-1], name)(h) for name in ("query", "key", "value"))
        h = multihead(query, key, value, heads=1)
        return x + self.options.linear(x.shape[-1], "proj")(h).reshape(x.shape)


class Encoder(nn.Module):
    """Images (B, H, W, C) -> (B, h, w, features); an odd size is halved to the smaller half."""

    features: int
    widths: Sequence[int]
    num_res_blocks: int
    attn_levels: Sequence[int]
    options: Options

    @nn.compact
    def __call__(self, x: Array) -> Array:
        options = self.options
        h = options.conv(self.widths[0], "conv_in")(x.astype(jnp.dtype(options.dtype)))
        for level, width in enumerate(self.widths):
            for i in range(self.num_res_blocks):
                h = Block(width, options, name=f"level_{level}_block_{i}")(h)
                if level in self.attn_levels:
                    h = Attention(options, name=f"level_{level}_attention_{i}")(h)
            if level < len(self.widths) - 1:
                # zeros below and to the right alone, whatever the size
                padding = ((0, 1), (0, 1))
                h = options.conv(width, f"level_{level}_down", strides=2, padding=padding)(h)
        h = _middle(h, options)
        return options.conv(self.features, "conv_out")(nn.swish(options.norm("norm_out")(h)))


class Decoder(nn.Module):
    """Latents (B, h, w, z) -> images (B, H, W, channels), not clipped."""

    channels: int
    widths: Sequence[int]
    num_res_blocks: int
    attn_levels: Sequence[int]
    options: Options

    @nn.compact
    def __call__(self, z: Array) -> Array:
        options = self.options
        h = _middle(options.conv(self.widths[-1], "conv_in")(z), options)
        for level, width in reversed(list(enumerate(self.widths))):
            for i in range(self.num_res_blocks + 1):
                h = Block(width, options, name=f"level_{level}_block_{i}")(h)
                if level in self.attn_levels:
                    h = Attention(options, name=f"level_{level}_attention_{i}")(h)
            if level:
                h = options.conv(width, f"level_{level}_up")(upsample_2d(h))
        return options.conv(self.channels, "conv_out")(nn.swish(options.norm("norm_out")(h)))


def _middle(h: Array, options: Options) -> Array:
    """Block, attention, block at the lowest resolution. To be called within a compact method."""
    h = Block(h.shape[-1], options, name="middle_block_0")(h)
    h = Attention(options, name="middle_attention")(h)
    return Block(h.shape[-1], options, name="middle_block_1")(h)


class Autoencoder(nn.Module):
    """Images to latents and back; the defaults are those of Stable Diffusion (kl-f8).

    `network.apply(variables, x, method="encode")`: x (B, H, W, channels) -> for KL the moments (B, h, w, 2 E), of which
    `gaussian` makes mean and log variance; with a codebook what it has not yet quantized, (B, h, w, E)
    `network.apply(variables, z, method="decode")`: z (B, h, w, E) -> images; with a codebook the nearest entries of z,
    unless `quantize` is False. Both give the type of what they get.

    nf, ch_mult     features nf * ch_mult[level]; each level has half of the resolution of the one before
    num_res_blocks  blocks of a level of the encoder; one more in the decoder
    attn_levels     levels with attention behind each block, beside the middle; 0 is the full resolution
    z_channels, embed_dim   channels of the coders' narrow end, and E, those of a latent
    num_codes       entries of the codebook; 0: there is none, the latents are regularized by a KL divergence
    groups          of normalizations
    """

    nf: int = 128
    ch_mult: Sequence[int] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_levels: Sequence[int] = ()
    z_channels: int = 4
    embed_dim: int = 4
    num_codes: int = 0
    channels: int = 3
    groups: int = 32
    dtype: str = "float32"

    def __post_init__(self) -> None:
        require(self, dtype=DTYPES)
        for name in ("ch_mult", "attn_levels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # configs hold lists, which do not hash
        super().__post_init__()

    @property
    def factor(self) -> int:
        """How many pixels a latent is wide."""
        return 2 ** (len(self.ch_mult) - 1)

    def setup(self) -> None:
        options = Options(self.groups, self.dtype)
        moments = 1 if self.num_codes else 2
        levels = [self.nf * multiplier for multiplier in self.ch_mult], self.num_res_blocks, self.attn_levels
        self.encoder = Encoder(moments * self.z_channels, *levels, options)
        self.decoder = Decoder(self.channels, *levels, options)
        self.quant_conv = Conv(moments * self.embed_dim, jnp.dtype(self.dtype))
        self.post_quant_conv = Conv(self.z_channels, jnp.dtype(self.dtype))
        if self.num_codes:
            init = nn.initializers.uniform(2 / self.num_codes)
            centred = lambda *arguments: init(*arguments) - 1 / self.num_codes
            self.codebook = nn.Embed(self.num_codes, self.embed_dim, embedding_init=centred)

    def encode(self, x: Array) -> Array:
        return self.quant_conv(self.encoder(x)).astype(x.dtype)

    def decode(self, z: Array, quantize: bool = True) -> Array:
        dtype = z.dtype
        if self.num_codes and quantize:
            z, _ = self.quantized(z)
        return self.decoder(self.post_quant_conv(z.astype(jnp.dtype(self.dtype)))).astype(dtype)

    def quantized(self, z: Array) -> tuple[Array, Array]:
        """The nearest entries of the codebook to z (B, h, w, E), in squared distance, and their numbers (B, h, w)."""
        return nearest(self.codebook.embedding, z)

    def __call__(self, x: Array) -> Array:
        """Decodes what is encoded, by the means for KL."""
        z = self.encode(x)
        return self.decode(z if self.num_codes else gaussian(z)[0])


AUTOENCODERS = {"autoencoder": Autoencoder}  # config name -> network


def gaussian(moments: Array) -> tuple[Array, Array]:
    """Mean and log variance of a latent, each (B, h, w, E), from moments (B, h, w, 2 E); the latter in [-30, 20]."""
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(log_variance, -30.0, 20.0)


def kl_divergence(moments: Array) -> Array:
    """KL(N(mean, variance) || N(0, 1)) of each latent in nats: moments (B, h, w, 2 E) -> (B,)."""
    mean, log_variance = gaussian(moments)
    return 0.5 * (mean**2 + jnp.exp(log_variance) - 1 - log_variance).sum((1, 2, 3))


def nearest(codebook: Array, z: Array) -> tuple[Array, Array]:
    """The entries of codebook (K, E) that are nearest to z (B, h, w, E), in z's type, and their numbers (B, h, w)."""
    precise = at_least_float32(z.dtype)
    codes = codebook.astype(precise)

    def of_image(z: Array) -> Array:
        """One image at a time, since 64 x 64 positions by 8192 codes are 128 MB."""
        distances = (codes**2).sum(1)[None, None, :] - 2 * jnp.einsum("hwe,ke->hwk", z.astype(precise), codes)
        return distances.argmin(2)

    numbers = jax.lax.map(of_image, z)
    return codes[numbers].astype(z.dtype), numbers


def codebook_loss(z: Array, entries: Array, commitment: float = 0.25) -> tuple[Array, Array]:
    """What trains a codebook (van den Oord et al. 2017, eq. 3, as published for latent diffusion).

    Returns the entries with the gradient of z, and the loss (): mean (sg[entries] - z)^2 + commitment times
    mean (entries - sg[z])^2, where sg stops the gradient.
    """
    stop = jax.lax.stop_gradient
    loss = jnp.mean((stop(entries) - z) ** 2) + commitment * jnp.mean((entries - stop(z)) ** 2)
    return z + stop(entries - z), loss


# -- published names --

# Layers of a stage, ours: (latent-diffusion's, diffusers').
BLOCK = {
    "/norm_0": (".norm1", ".norm1"),
    "/conv_0": (".conv1", ".conv1"),
    "/norm_1": (".norm2", ".norm2"),
    "/conv_1": (".conv2", ".conv2"),
    "/skip": (".nin_shortcut", ".conv_shortcut"),
}
ATTENTION = {
    "/norm": (".norm", ".group_norm"),
    "/query": (".q", ".to_q"),
    "/key": (".k", ".to_k"),
    "/value": (".v", ".to_v"),
    "/proj": (".proj_out", ".to_out.0"),
}
CONV = {"": ("", "")}
# Stages, ours: (latent-diffusion's, diffusers', their layers). l is the level, r the same counted from the lowest, i
# the number within the level.
STAGES = {
    "encoder/conv_in": ("encoder.conv_in", "encoder.conv_in", CONV),
    "encoder/level_{l}_block_{i}": ("encoder.down.{l}.block.{i}", "encoder.down_blocks.{l}.resnets.{i}", BLOCK),
    "encoder/level_{l}_attention_{i}": (
        "encoder.down.{l}.attn.{i}",
        "encoder.down_blocks.{l}.attentions.{i}",
        ATTENTION,
    ),
    "encoder/level_{l}_down": (
        "encoder.down.{l}.downsample.conv",
        "encoder.down_blocks.{l}.downsamplers.0.conv",
        CONV,
    ),
    "encoder/middle_block_0": ("encoder.mid.block_1", "encoder.mid_block.resnets.0", BLOCK),
    "encoder/middle_attention": ("encoder.mid.attn_1", "encoder.mid_block.attentions.0", ATTENTION),
    "encoder/middle_block_1": ("encoder.mid.block_2", "encoder.mid_block.resnets.1", BLOCK),
    "encoder/norm_out": ("encoder.norm_out", "encoder.conv_norm_out", CONV),
    "encoder/conv_out": ("encoder.conv_out", "encoder.conv_out", CONV),
    "decoder/conv_in": ("decoder.conv_in", "decoder.conv_in", CONV),
    "decoder/middle_block_0": ("decoder.mid.block_1", "decoder.mid_block.resnets.0", BLOCK),
    "decoder/middle_attention": ("decoder.mid.attn_1", "decoder.mid_block.attentions.0", ATTENTION),
    "decoder/middle_block_1": ("decoder.mid.block_2", "decoder.mid_block.resnets.1", BLOCK),
    "decoder/level_{l}_block_{i}": ("decoder.up.{l}.block.{i}", "decoder.up_blocks.{r}.resnets.{i}", BLOCK),
    "decoder/level_{l}_attention_{i}": ("decoder.up.{l}.attn.{i}", "decoder.up_blocks.{r}.attentions.{i}", ATTENTION),
    "decoder/level_{l}_up": ("decoder.up.{l}.upsample.conv", "decoder.up_blocks.{r}.upsamplers.0.conv", CONV),
    "decoder/norm_out": ("decoder.norm_out", "decoder.conv_norm_out", CONV),
    "decoder/conv_out": ("decoder.conv_out", "decoder.conv_out", CONV),
    "quant_conv": ("quant_conv", "quant_conv", CONV),
    "post_quant_conv": ("post_quant_conv", "post_quant_conv", CONV),
    "codebook": ("quantize.embedding", "quantize.embedding", CONV),
}
# What diffusers called the layers of attention before version 0.18: what it calls them now.
RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def from_published(state: Mapping[str, np.ndarray], network: Autoencoder) -> dict:
    """The parameter tree of `network` from a state_dict of latent-diffusion or diffusers, told apart by its names.

    The names begin with `encoder`, `decoder` and so on; those of the training loss, `loss...`, are left out. UserError
    as of names.parameters.
    """
    state = {_renamed(name): array for name, array in state.items() if not name.startswith("loss.")}
    image = jax.ShapeDtypeStruct((1, network.factor, network.factor, network.channels), jnp.float32)
    diffusers = any(name.startswith("encoder.down_blocks") for name in state)
    shapes = shapes_of(network, image)
    return parameters(state, published(published_layers(network, diffusers), shapes), shapes)


def published_layers(network: Autoencoder, diffusers: bool) -> dict[str, str]:
    """The published names of our layers, as paths joined by "/"; also of layers that this network has not."""
    levels, layers = len(network.ch_mult), {}
    for level in range(levels):
        for i in range(network.num_res_blocks + 1):
            numbers = dict(l=level, r=levels - 1 - level, i=i)
            for ours, (*theirs, parts) in STAGES.items():
                stage = theirs[diffusers].format(**numbers)
                layers |= {ours.format(**numbers) + part: stage + names[diffusers] for part, names in parts.items()}
    return layers


def _renamed(name: str) -> str:
    """An older diffusers' name as today's."""
    layer, _, leaf = name.rpartition(".")
    stage, _, last = layer.rpartition(".")
    return f"{stage}.{RENAMED[last]}.{leaf}" if ".attentions." in name and last in RENAMED else name


def of_state(state: Mapping[str, np.ndarray], **changes) -> Autoencoder:
    """The network that a published state_dict belongs to, by its names and shapes; `changes` are further arguments."""
    try:
        widths, blocks, attention = [], 0, []
        down, block, first = (
            ("encoder.down_blocks", "resnets", "attentions.0.group_norm.weight")
            if any(name.startswith("encoder.down_blocks") for name in state)
            else ("encoder.down", "block", "attn.0.norm.weight")
        )
        while (name := f"{down}.{len(widths)}.{block}.0.conv2.weight") in state:
            if f"{down}.{len(widths)}.{first}" in state:
                attention.append(len(widths))
            widths.append(len(state[name]))
        while f"{down}.0.{block}.{blocks}.conv2.weight" in state:
            blocks += 1
        nf, channels = state["encoder.conv_in.weight"].shape[:2]
        z_channels, embed_dim = state["post_quant_conv.weight"].shape[:2]
        codes = state.get("quantize.embedding.weight", ())
    except (KeyError, ValueError) as error:
        raise UserError(f"this is no autoencoder of latent diffusion: {error}") from None
    if not widths or any(width % nf for width in widths):
        raise UserError(f"this is no autoencoder of latent diffusion: its levels have {widths} features")
    return Autoencoder(
        nf=nf,
        ch_mult=[width // nf for width in widths],
        num_res_blocks=blocks,
        attn_levels=attention,
        z_channels=z_channels,
        embed_dim=embed_dim,
        num_codes=len(codes),
        channels=channels,
        **changes,
    )
