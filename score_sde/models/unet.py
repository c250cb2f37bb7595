"""The U-Net of Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis" (2021): ADM, and its classifier.

EDM's network for ImageNet (Karras et al. 2022) is the same one. Shapes: images (B, H, W, C), embeddings (B, D). `dtype`
is the computation type; parameters are float32.

A network is one list of stages, `input_0` to `input_N`, `middle_0`, `middle_1`, `output_0` to `output_N`, with a skip
connection from the k-th input to the k-th output from the end. A stage is a residual block, attention behind it, and a
change of resolution, each of which may be absent.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from score_sde.errors import UserError
from score_sde.models.attention import multihead
from score_sde.models.layers import (
    DTYPES,
    Conv,
    Dropout,
    GroupNorm,
    class_weights,
    convolve,
    default_init,
    require,
    require_multiple,
)
from score_sde.models.resample import downsample_2d, upsample_2d
from score_sde.models.transformer import SpatialTransformer

POOLS = ("adaptive", "attention", "spatial", "spatial_v2")


class Options(NamedTuple):
    """What all stages of a network share; see UNet."""

    groups: int
    scale_shift: bool
    resblock_updown: bool
    conv_resample: bool
    dropout: float
    dtype: str
    convolve: Callable | None = None  # in place of jax.lax.conv_general_dilated for 3 x 3 convolutions of stride 1
    depth: int = 0  # of transformers in place of attention; 0: there are none

    def norm(self, name: str) -> GroupNorm:
        return GroupNorm(jnp.dtype(self.dtype), self.groups, 1e-5, name=name)

    def conv(self, features: int, name: str, init_scale: float = 1.0, **stride) -> nn.Conv:
        return nn.Conv(
            features,
            (3, 3),
            padding=1,
            kernel_init=default_init(init_scale),
            dtype=jnp.dtype(self.dtype),
            conv_general_dilated=None if stride else self.convolve,
            name=name,
            **stride,
        )


RESAMPLE = {"up": upsample_2d, "down": downsample_2d, "": lambda h: h}


class Block(nn.Module):
    """The residual block, (B, H, W, C) -> (B, H', W', features), with H', W' doubled or halved by `resample`.

    It is told the embedding (B, D) between its convolutions: added to what the second normalization sees or, with
    `scale_shift`, as scale and shift of what it gives ("adaptive group normalization", section 3.1).
    """

    features: int
    options: Options
    resample: str = ""

    @nn.compact
    def __call__(self, x: Array, embedding: Array, dropout_keys: Array | None) -> Array:
        options, dtype = self.options, jnp.dtype(self.options.dtype)
        resample = RESAMPLE[self.resample]
        h = resample(nn.swish(options.norm("norm_0")(x)))
        h = options.conv(self.features, "conv_0")(h)
        features = self.features * (2 if options.scale_shift else 1)
        shift = nn.Dense(features, kernel_init=default_init(), dtype=dtype, name="embed")(nn.swish(embedding))
        shift = shift[:, None, None, :]
        if options.scale_shift:
            scale, shift = jnp.split(shift, 2, axis=-1)
            h = options.norm("norm_1")(h) * (1 + scale) + shift
        else:
            h = options.norm("norm_1")(h + shift)
        h = Dropout(options.dropout)(nn.swish(h), dropout_keys)
        h = options.conv(self.features, "conv_1", init_scale=0.0)(h)
        x = resample(x)
        return h + (x if x.shape[-1] == self.features else Conv(self.features, dtype, name="skip")(x))


class Resample(nn.Module):
    """Halves ("down") or doubles ("up") the resolution of (B, H, W, C), with a 3 x 3 convolution if `conv_resample`."""

    resample: str
    options: Options

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv = functools.partial(self.options.conv, x.shape[-1], "conv")
        if not self.options.conv_resample:
            return RESAMPLE[self.resample](x)
        return conv()(upsample_2d(x)) if self.resample == "up" else conv(strides=2)(x)


class Attention(nn.Module):
    """Self-attention over the pixels of (B, H, W, C), with a residual connection.

    The channels of `qkv` are all queries, then all keys, then all values, each by heads. Published networks order them
    in three ways, which published_unets.py permutes to this one.
    """

    heads: int
    options: Options

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtype, channels = jnp.dtype(self.options.dtype), x.shape[-1]
        h = self.options.norm("norm")(x).reshape(len(x), -1, channels)
        query, key, value = jnp.split(Conv(3 * channels, dtype, name="qkv")(h), 3, axis=-1)
        h = multihead(query, key, value, self.heads)
        return x + Conv(channels, dtype, init_scale=0.0, name="proj")(h).reshape(x.shape)


class Plan(NamedTuple):
    """What a stage holds."""

    features: int  # of its residual block; 0: it has none
    heads: int = 0  # of its attention; 0: it has none
    resample: str = ""  # "down" or "up", behind both


class Stage(nn.Module):
    """One entry of the list. A latent model's transformer, told a context (B, M, D), takes the place of `Attention`."""

    plan: Plan
    options: Options

    @nn.compact
    def __call__(self, h: Array, embedding: Array, dropout_keys: Array | None, context: Array | None = None) -> Array:
        features, heads, resample = self.plan
        if features:
            h = Block(features, self.options, name="block")(h, embedding, dropout_keys)
        if heads and self.options.depth:
            options = self.options
            h = SpatialTransformer(heads, options.depth, options.dtype, options.groups, name="transformer")(h, context)
        elif heads:
            h = Attention(heads, self.options, name="attention")(h)
        if resample and self.options.resblock_updown:
            h = Block(h.shape[-1], self.options, resample, name="resample")(h, embedding, dropout_keys)
        elif resample:
            h = Resample(resample, self.options, name="resample")(h)
        return h


def label_features(label: Array, dimension: int) -> Array:
    """Positional embedding (B,) -> (B, dimension): cosines, then sines, of frequencies from 1 to almost 1/10000."""
    half = dimension // 2
    frequencies = jnp.exp(-math.log(10000.0) / half * jnp.arange(half, dtype=label.dtype))
    angles = label[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)


class _Encoder(nn.Module):
    """What the U-Net and its classifier have in common; see UNet."""

    nf: int = 128
    ch_mult: Sequence[int] = (1, 2, 3, 4)
    num_res_blocks: int = 2
    attn_levels: Sequence[int] = (1, 2, 3)
    num_heads: int = 1
    head_channels: int = 64
    groups: int = 32
    scale_shift: bool = True
    resblock_updown: bool = True
    conv_resample: bool = True
    channel_mult_noise: int = 1
    channel_mult_emb: int = 4
    dropout: float = 0.0
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        require(self, dtype=DTYPES)
        for name in ("ch_mult", "attn_levels"):
            setattr(self, name, tuple(getattr(self, name)))  # configs hold lists, which do not hash
        super().__post_init__()

    def _heads(self, features: int, num_heads: int) -> int:
        heads = features // self.head_channels if self.head_channels else num_heads
        if heads and features % heads:
            raise UserError(f"{features} channels are no multiple of {heads} heads: choose nf, ch_mult or the heads so")
        return heads

    def _way_down(self) -> dict[str, Plan]:
        """The stages after the first convolution, `input_0`, to the middle, by name."""
        plans: list[Plan] = []
        for level, multiplier in enumerate(self.ch_mult):
            features = self.nf * multiplier
            heads = self._heads(features, self.num_heads) if level in self.attn_levels else 0
            plans += [Plan(features, heads)] * self.num_res_blocks
            if level < len(self.ch_mult) - 1:
                plans.append(Plan(0, 0, "down"))
        middle = {"middle_0": Plan(features, self._heads(features, self.num_heads)), "middle_1": Plan(features)}
        return {f"input_{i}": plan for i, plan in enumerate(plans, 1)} | middle

    def _options(self, **changes) -> Options:
        fields = Options._fields[: -len(Options._field_defaults)]
        return Options(**{name: getattr(self, name) for name in fields} | changes)

    def _run(self, name: str, plan: Plan, options: Options) -> Callable:
        """(h, embedding, dropout keys, context) -> h of one stage. To be called within a compact method."""
        return (nn.remat(Stage) if self.remat else Stage)(plan, options, name=name)

    def _dense(self, name: str, **changes) -> nn.Dense:
        width = changes.pop("features", self.nf * self.channel_mult_emb)
        return nn.Dense(width, kernel_init=default_init(), dtype=jnp.dtype(self.dtype), name=name, **changes)

    def _encode(
        self,
        x: Array,
        embedding: Array,
        dropout_keys: Array | None,
        options: Options,
        context: Array | None = None,
    ) -> list[Array]:
        """What every input stage gives, then what the middle gives. To be called within a compact method."""
        require_multiple(x, 2 ** (len(self.ch_mult) - 1))
        hs = [options.conv(self.nf * self.ch_mult[0], "input_0")(x)]
        for name, plan in self._way_down().items():
            hs.append(self._run(name, plan, options)(hs[-1], embedding, dropout_keys, context))
        hs.pop(-2)  # the middle's first half is on no skip connection
        return hs


class UNet(_Encoder):
    """The noise-conditional U-Net of ADM; the defaults are its model for 64 x 64, without classes and variances.

    `network(x, label, y=None, dropout_keys=None, augment=None, low_res=None)`:
        x       (B, H, W, C), H and W multiples of 2^(levels - 1); data range [-1, 1]
        label   (B,) what the positional embedding gets
        y       (B,) int32 classes, or (B, num_classes) weights of classes, if `num_classes`; `num_classes` itself, or
                y=None, means "no class". If `context_dim`, the context (B, M, context_dim) instead
        dropout_keys    (B,) PRNG keys, one for each example: turns dropout on
        augment (B, augment_dim) how the images were augmented, if `augment_dim`; None: not at all, which is zeros
        low_res (B, h, w, C) the small images that an upsampler (`low_res`) enlarges
    The result has the type of x and its shape, with twice its channels if `learn_sigma`.

    nf, ch_mult         features nf * ch_mult[level]; each level has half of the resolution of the one before
    num_res_blocks      stages of a level going down; one more going up
    attn_levels         levels whose stages have attention, beside the lowest's middle; 0 is the full resolution
    num_heads, num_heads_upsample   heads of attention, other ones going up unless 0; without effect if
    head_channels       channels of each head, unless 0; attention narrower than one head is left out, as in EDM
    groups              of normalizations; 0: min(C / 4, 32), as in EDM
    scale_shift         whether blocks are scaled by the embedding, or it is added
    resblock_updown     whether blocks resample, or layers: convolutions if `conv_resample`, means and copies if not
    channel_mult_noise, channel_mult_emb    widths of the label's features and of the embedding, over nf
    num_classes, augment_dim, low_res       of the inputs above; 0 or False: there is none
    learn_sigma         as many channels more, of the variances (Nichol & Dhariwal 2021), which the denoiser cuts
    context_dim, transformer_depth      of latent diffusion: features of a context, and blocks of the transformers that
                        take the place of attention; 0: there is no context
    out_channels        of the result, if it is another number: an inpainting network is told more than x
    remat               recompute the stages in the backward pass, to save memory
    """

    num_res_blocks: int = 3
    nf: int = 192
    num_heads_upsample: int = 0
    num_classes: int = 0
    augment_dim: int = 0
    low_res: bool = False
    learn_sigma: bool = False
    context_dim: int = 0
    transformer_depth: int = 1
    out_channels: int = 0

    def __post_init__(self) -> None:
        if self.context_dim and self.num_classes:
            raise UserError("a network has a context (context_dim) or classes (num_classes), not both")
        super().__post_init__()

    def stages(self) -> dict[str, Plan]:
        """All stages in order of use, by name, but for the first convolution, `input_0`."""
        return self._way_down() | self._way_up()

    def _way_up(self) -> dict[str, Plan]:
        plans: list[Plan] = []
        for level, multiplier in reversed(list(enumerate(self.ch_mult))):
            features = self.nf * multiplier
            num_heads = self.num_heads_upsample or self.num_heads
            heads = self._heads(features, num_heads) if level in self.attn_levels else 0
            plans += [Plan(features, heads)] * self.num_res_blocks
            plans.append(Plan(features, heads, "up" if level else ""))
        return {f"output_{i}": plan for i, plan in enumerate(plans)}

    @nn.compact
    def __call__(
        self,
        x: Array,
        label: Array,
        y: Array | None = None,
        dropout_keys: Array | None = None,
        augment: Array | None = None,
        low_res: Array | None = None,
    ) -> Array:
        dtype = jnp.dtype(self.dtype)
        options = self._options(depth=self.transformer_depth if self.context_dim else 0)
        context, y = (self._context(x, y), None) if self.context_dim else (None, y)
        embedding = self._embedding(label, y, augment)
        h = x.astype(dtype)
        if self.low_res:
            h = jnp.concatenate([h, self._enlarged(low_res, x).astype(dtype)], axis=-1)
        *skips, h = self._encode(h, embedding, dropout_keys, options, context)
        for name, plan in self._way_up().items():
            h = jnp.concatenate([h, skips.pop()], axis=-1)
            h = self._run(name, plan, options)(h, embedding, dropout_keys, context)
        h = nn.swish(options.norm("out_norm")(h))
        channels = self.out_channels or x.shape[-1] * (2 if self.learn_sigma else 1)
        return options.conv(channels, "out_conv", init_scale=0.0)(h).astype(x.dtype)

    def _embedding(self, label: Array, y: Array | None, augment: Array | None) -> Array:
        """(B,) noise levels, classes and augmentations -> (B, D). The features have the label's own precision."""
        if y is not None and not self.num_classes:
            raise UserError("this network has no classes (num_classes = 0), so it takes no y")
        if augment is not None and not self.augment_dim:
            raise UserError("this network was not told of augmentations (augment_dim = 0), so it takes none")
        width = self.nf * self.channel_mult_noise
        features = label_features(label, width).astype(jnp.dtype(self.dtype))
        if self.augment_dim:
            augment = jnp.zeros((len(label), self.augment_dim), features.dtype) if augment is None else augment
            features = features + self._dense("augment", features=width, use_bias=False)(augment)
        embedding = self._dense("noise_1")(nn.swish(self._dense("noise_0")(features)))
        if self.num_classes:
            embedding = embedding + self._dense("classes", use_bias=False)(
                class_weights(y, len(label), self.num_classes, features.dtype)
            )
        return embedding

    def _context(self, x: Array, y: Array | None) -> Array:
        """The context (B, M, D), if it is one for this network."""
        if y is None and self.is_initializing():
            return jnp.zeros((len(x), 1, self.context_dim), x.dtype)
        if y is None or y.ndim != 3 or y.shape[-1] != self.context_dim:
            got = "none" if y is None else f"one of shape {y.shape}"
            raise UserError(f"this network needs a context (B, M, {self.context_dim}), but got {got}")
        return y

    def _enlarged(self, low_res: Array | None, x: Array) -> Array:
        """The small images (B, h, w, C) at the size of x, bilinearly."""
        if low_res is not None:
            return jax.image.resize(low_res, (*x.shape[:3], low_res.shape[-1]), "bilinear")
        if self.is_initializing():
            return jnp.zeros_like(x)
        raise UserError("this network enlarges small images: give them as low_res (B, h, w, C)")


def _convolve(x, kernel, *unused, **described) -> Array:
    """3 x 3, stride 1: what classifiers call through options.convolve, for the sake of their gradient in loops."""
    return convolve(x, kernel, 1)


class UNetClassifier(_Encoder):
    """Logits of the class of a noisy image by the U-Net's way down (section 4.1); the defaults are those of 256 x 256.

    `classifier(x, label)`: x (B, H, W, C), label (B,) as the network that it guides is told; the result (B,
    num_outputs) has the type of x. Attention pools over as many pixels as it was made for.

    pool    "attention": a token with the mean of the pixels attends to them; "adaptive": their mean; "spatial" and
            "spatial_v2": a hidden layer sees the means of all stages
    The other options are those of UNet.
    """

    ch_mult: Sequence[int] = (1, 1, 2, 2, 4, 4)
    attn_levels: Sequence[int] = (3, 4, 5)
    num_outputs: int = 1000
    pool: str = "attention"

    def __post_init__(self) -> None:
        require(self, pool=POOLS)
        super().__post_init__()

    def stages(self) -> dict[str, Plan]:
        """All stages in order of use, by name, but for the first convolution, `input_0`."""
        return self._way_down()

    @nn.compact
    def __call__(self, x: Array, label: Array) -> Array:
        dtype, options = jnp.dtype(self.dtype), self._options(convolve=_convolve)
        features = label_features(label, self.nf * self.channel_mult_noise).astype(dtype)
        embedding = self._dense("noise_1")(nn.swish(self._dense("noise_0")(features)))
        hs = self._encode(x.astype(dtype), embedding, None, options)
        out = self._dense("out", features=self.num_outputs)
        if self.pool in ("spatial", "spatial_v2"):
            h = self._dense("hidden", features=2048)(jnp.concatenate([h.mean((1, 2)) for h in hs], axis=-1))
            if self.pool == "spatial":
                return out(nn.relu(h)).astype(x.dtype)
            return out(nn.swish(options.norm("hidden_norm")(h[:, None, None, :])[:, 0, 0, :])).astype(x.dtype)
        h = nn.swish(options.norm("out_norm")(hs[-1]))
        h = h.reshape(len(h), -1, h.shape[-1])
        mean = h.mean(1, keepdims=True)
        if self.pool == "adaptive":
            return out(mean[:, 0]).astype(x.dtype)
        h = jnp.concatenate([mean, h], axis=1)
        init = nn.initializers.normal(h.shape[-1] ** -0.5)
        h = h + self.param("positions", init, h.shape[1:], jnp.float32).astype(dtype)[None]
        query, key, value = jnp.split(Conv(3 * h.shape[-1], dtype, name="qkv")(h), 3, axis=-1)
        h = multihead(query[:, :1], key, value, self._heads(h.shape[-1], self.num_heads))
        return out(h[:, 0]).astype(x.dtype)
