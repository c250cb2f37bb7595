"""Layers that networks share (Song et al., "Score-Based Generative Modeling through SDEs", Appendix H; DDPM).

Shapes: images (B, H, W, C), embeddings (B, D). Class and parameter names are those of the official JAX code, so that
its checkpoints load by identity. `dtype` is the computation type; parameters are float32, and the statistics of norms
and softmax are float32 or better.
"""

import functools
import math
import zlib
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from score_sde.errors import UserError
from score_sde.models.resample import BOX, downsample_2d, smooth_2d, upsample_2d

NONLINEARITIES = {
    "elu": nn.elu,
    "relu": nn.relu,
    "lrelu": lambda x: nn.leaky_relu(x, negative_slope=0.2),
    "swish": nn.swish,
}
DTYPES = ("float32", "bfloat16", "float64")


def require(network: nn.Module, **legal: Sequence[str]) -> None:
    """Refuse options of a network that are not among the legal ones."""
    for name, values in legal.items():
        if getattr(network, name) not in values:
            raise UserError(f"{name} = {getattr(network, name)!r} is not one of {', '.join(values)}")


def require_multiple(x: Array, multiple: int) -> None:
    """Refuse images (B, H, W, C) that a network cannot halve as often as it has to."""
    _, height, width, _ = x.shape
    if height % multiple or width % multiple:
        raise UserError(
            f"image size {height} x {width} does not fit this network: height and width must be multiples of {multiple}"
        )


def default_init(scale: float = 1.0) -> nn.initializers.Initializer:
    """Uniform with variance scale / mean(fan in, fan out) (DDPM's choice). Scale 0 becomes 1e-10: almost zero."""
    return nn.initializers.variance_scaling(scale or 1e-10, "fan_avg", "uniform")


def at_least_float32(dtype: DTypeLike) -> DTypeLike:
    return jnp.float32 if jnp.dtype(dtype).itemsize < 4 else dtype


def conv3x3(channels: int, dtype: DTypeLike, init_scale: float = 1.0, stride: int = 1) -> nn.Conv:
    return nn.Conv(channels, (3, 3), strides=stride, kernel_init=default_init(init_scale), dtype=dtype)


def merge(x: Array, h: Array, skip_rescale: bool) -> Array:
    """Adds a branch to its skip connection, over sqrt(2) if rescaled (Appendix H.1: variances then stay the same)."""
    return (x + h) / math.sqrt(2.0) if skip_rescale else x + h


def sinusoidal_embedding(label: Array, dimension: int) -> Array:
    """Positional embedding (B,) -> (B, dimension): sines, then cosines, of frequencies 1 down to 1/10000 (DDPM)."""
    half = dimension // 2
    frequencies = jnp.exp(-math.log(10000.0) / (half - 1) * jnp.arange(half, dtype=label.dtype))
    angles = label[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


def class_weights(y: Array | None, batch: int, num_classes: int, dtype: DTypeLike) -> Array:
    """(B, num_classes): one for the class, nothing for "no class", y being None or `num_classes`; weights stay."""
    if y is None:
        return jnp.zeros((batch, num_classes), dtype)
    return jax.nn.one_hot(y, num_classes, dtype=dtype) if y.ndim == 1 else y.astype(dtype)


class GaussianFourierProjection(nn.Module):
    """Random Fourier features (B,) -> (B, 2 features) of a noise level (Tancik et al. 2020).

    The frequencies are a parameter without gradient, since checkpoints hold them.
    """

    features: int
    scale: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        W = self.param("W", nn.initializers.normal(stddev=self.scale), (self.features,), jnp.float32)
        W = jax.lax.stop_gradient(W).astype(x.dtype)
        angles = x[:, None] * W[None, :] * (2 * math.pi)
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


class GroupNorm(nn.Module):
    """Group normalization (Wu & He 2018) with `groups` groups; None: min(C / 4, 32).

    Used in place of `flax.linen.GroupNorm`, whose parameters it shares: faster on CPU (statistics per channel first,
    then one multiply-add), no cancellation (the variance is that of centred values), and it accepts bfloat16 under
    strict promotion.
    """

    dtype: DTypeLike = jnp.float32
    groups: int | None = None
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, _, _, channels = x.shape
        groups = self.groups or min(channels // 4, 32)
        if groups == 0 or channels % groups:
            number, multiples = ("min(C / 4, 32) = ", "4, and of 32 above 128") if self.groups is None else ("", groups)
            raise UserError(
                f"GroupNorm cannot split {channels} channels into {number}{groups} groups; "
                f"choose nf and ch_mult such that channel counts are multiples of {multiples}"
            )
        precise = at_least_float32(self.dtype)
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32).astype(precise)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32).astype(precise)

        def group_mean(values: Array) -> Array:
            """(B, H, W, C) -> (B, C): the mean over the pixels and channels of each channel's group."""
            means = values.mean((1, 2)).reshape(batch, groups, -1).mean(2)
            return jnp.repeat(means, channels // groups, axis=1)

        x = x.astype(precise)
        mean = group_mean(x)
        variance = group_mean(jnp.square(x - mean[:, None, None, :]))
        gain = scale[None, :] * jax.lax.rsqrt(variance + self.epsilon)
        offset = bias[None, :] - mean * gain
        return (x * gain[:, None, None, :] + offset[:, None, None, :]).astype(self.dtype)


def linear(x: Array, weight: Array, bias: Array) -> Array:
    """(..., C) -> (..., D) as one matrix product: its weight gradient takes a third of a batched one's time on CPU."""
    return (x.reshape(-1, x.shape[-1]) @ weight + bias[None, :]).reshape(*x.shape[:-1], -1)


def _convolve(x: Array, kernel: Array, stride: int) -> Array:
    """Convolution of images (B, H, W, C) with a kernel (h, w, C, D); zeros outside, ceil(H / stride) rows remain."""
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=layout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: Array, kernel: Array, stride: int) -> Array:
    """`_convolve`, with the gradient to x written as a convolution with the flipped kernel.

    XLA on CPU takes a slow path for its own form of that gradient inside the loops of samplers. No forward-mode
    derivatives.
    """
    return _convolve(x, kernel, stride)


def _convolve_forward(x, kernel, stride):
    return _convolve(x, kernel, stride), (x, kernel)


def _convolve_backward(stride, saved, gradient):
    x, kernel = saved
    _, of_kernel = jax.vjp(lambda kernel: _convolve(x, kernel, stride), kernel)
    padding = []
    for size, rows, width in zip(x.shape[1:3], gradient.shape[1:3], kernel.shape[:2], strict=True):
        extent = (rows - 1) * stride + 1
        before = width - 1 - max(extent - 1 + width - size, 0) // 2
        padding.append((before, size + width - 1 - extent - before))
    flipped = kernel[::-1, ::-1].swapaxes(2, 3)
    of_x = jax.lax.conv_general_dilated(
        gradient,
        flipped,
        (1, 1),
        padding,
        lhs_dilation=(stride, stride),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return of_x, of_kernel(gradient)[0]


convolve.defvjp(_convolve_forward, _convolve_backward)


class NIN(nn.Module):
    """A linear map of the channels, (..., C) -> (..., features) ("network in network")."""

    features: int
    init_scale: float = 0.1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        W = self.param("W", default_init(self.init_scale), (x.shape[-1], self.features), jnp.float32).astype(self.dtype)
        b = self.param("b", nn.initializers.zeros, (self.features,), jnp.float32).astype(self.dtype)
        return linear(x, W, b)


class Conv(nn.Module):
    """A 1 x 1 convolution, with the parameters (and, for checkpoints, the name) of `flax.linen.Conv`."""

    features: int
    dtype: DTypeLike = jnp.float32
    init_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", default_init(self.init_scale), (1, 1, x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return linear(x, kernel[0, 0].astype(self.dtype), bias.astype(self.dtype))


# Queries at a time: the published networks attend over 256 pixels; over 4096 the logits alone are 64 MB an image.
ATTENTION_BLOCK = 1024


def attend(query: Array, key: Array, value: Array, causal: bool = False) -> Array:
    """softmax(query key^T) value of (G, N, C), (G, M, C) and (G, M, D) -> (G, N, D); softmax in float32 or better.

    causal: a query sees the keys up to its own place alone.
    """
    logits = jnp.einsum("gnc,gmc->gnm", query, key).astype(at_least_float32(query.dtype))
    if causal:
        visible = jnp.tril(jnp.ones(logits.shape[1:], bool))
        logits = jnp.where(visible[None], logits, -jnp.inf)
    # The softmax is normalized after the product with the values: derivatives take half the time on CPU.
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(2, keepdims=True)))
    h = jnp.einsum("gnm,gmd->gnd", weights.astype(query.dtype), value)
    return h / weights.sum(2, keepdims=True).astype(query.dtype)


def attention(query: Array, key: Array, value: Array) -> Array:
    """`attend`, each (B, N, C), without ever holding more than ATTENTION_BLOCK rows of the logits."""
    batch, pixels, channels = query.shape
    if pixels <= ATTENTION_BLOCK or pixels % ATTENTION_BLOCK:
        return attend(query, key, value)
    blocks = query.reshape(batch, -1, ATTENTION_BLOCK, channels).swapaxes(0, 1)
    at_once = jax.checkpoint(lambda block: attend(block, key, value))  # the backward pass computes its logits again
    blocks = jax.lax.map(at_once, blocks)
    return blocks.swapaxes(0, 1).reshape(query.shape)


class AttnBlockpp(nn.Module):
    """Single-head self-attention over the pixels, with a residual connection (DDPM, rescaled)."""

    skip_rescale: bool
    init_scale: float
    dtype: DTypeLike = jnp.float32
    groups: int | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, height, width, channels = x.shape
        h = GroupNorm(self.dtype, self.groups)(x).reshape(batch, height * width, channels)
        query, key, value = (NIN(channels, dtype=self.dtype)(h) for _ in range(3))
        h = attention(query * channels**-0.5, key, value)
        h = NIN(channels, self.init_scale, self.dtype)(h)
        return merge(x, h.reshape(x.shape), self.skip_rescale)


class Combine(nn.Module):
    """Brings the downsampled input (B, H, W, C) into the features (B, H, W, D): added ("sum") or put before ("cat")."""

    method: str
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, h: Array) -> Array:
        x = Conv(h.shape[-1], self.dtype)(x)
        return jnp.concatenate([x, h], axis=-1) if self.method == "cat" else x + h


class Conv2d(nn.Module):
    """A 3 x 3 convolution without padding, which resamples together with a FIR filter; its kernel is named `weight`.

    The official code computes "up" as transposed convolution, then filter. The two commute, and the filter first is
    several times faster on CPU.
    """

    features: int
    fir_kernel: Sequence[float]
    resample: str  # "up" or "down"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        weight = self.param("weight", default_init(), (3, 3, x.shape[-1], self.features), jnp.float32).astype(
            self.dtype
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(self.dtype)
        up = self.resample == "up"
        x = upsample_2d(x, self.fir_kernel, margin=1) if up else smooth_2d(x, self.fir_kernel)
        strides = (1, 1) if up else (2, 2)
        x = jax.lax.conv_general_dilated(x, weight, strides, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return x + bias.reshape(1, 1, 1, -1)


class Upsample(nn.Module):
    """(B, H, W, C) -> (B, 2H, 2W, features or C): nearest or FIR (`fir_kernel`), then a convolution if `with_conv`."""

    fir_kernel: Sequence[float] | None
    with_conv: bool
    features: int | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        features = self.features or x.shape[-1]
        if not self.with_conv:
            return upsample_2d(x, self.fir_kernel or BOX)
        if self.fir_kernel:
            return Conv2d(features, self.fir_kernel, "up", self.dtype)(x)
        return conv3x3(features, self.dtype)(upsample_2d(x))


class Downsample(nn.Module):
    """(B, H, W, C) -> (B, H/2, W/2, features or C): averaged or, with `fir_kernel`, filtered.

    If `with_conv`, a strided convolution follows the filter, or takes the place of the average.
    """

    fir_kernel: Sequence[float] | None
    with_conv: bool
    features: int | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        features = self.features or x.shape[-1]
        if not self.with_conv:
            return downsample_2d(x, self.fir_kernel or BOX)
        if self.fir_kernel:
            return Conv2d(features, self.fir_kernel, "down", self.dtype)(x)
        return conv3x3(features, self.dtype, stride=2)(x)


class Dropout(nn.Module):
    """Dropout with one key (B,) for each example, so that a mask does not depend on how a batch is split; None: off."""

    rate: float

    @nn.compact
    def __call__(self, h: Array, keys: Array | None) -> Array:
        if keys is None or self.rate == 0.0:
            return h
        layer = zlib.crc32("/".join(self.path).encode())  # each layer draws its own mask from an example's key
        size = math.prod(h.shape[1:])

        def mask(key: Array) -> Array:
            """Each random number decides on two elements: a fifth of the time of one Bernoulli draw for each on CPU."""
            bits = jax.random.bits(jax.random.fold_in(key, layer), ((size + 1) // 2,))
            halves = jnp.concatenate([bits >> 16, bits & 0xFFFF])[:size]
            return halves.reshape(h.shape[1:]) >= round(self.rate * 2**16)

        return jnp.where(jax.vmap(mask)(keys), h / (1.0 - self.rate), jnp.zeros_like(h))


def _residual_branch(
    x: Array,
    embedding: Array | None,
    features: int,
    nonlinearity: Callable[[Array], Array],
    dropout: float,
    init_scale: float,
    dtype: DTypeLike,
    dropout_keys: Array | None,
    resample: Callable[[Array], Array] = lambda h: h,
    groups: int | None = None,
) -> Array:
    """norm, act, [resample], conv, + embedding, norm, act, dropout, conv: what both kinds of residual block share.

    To be called within a compact method, to whose module the layers belong.
    """
    h = resample(nonlinearity(GroupNorm(dtype, groups)(x)))
    h = conv3x3(features, dtype)(h)
    if embedding is not None:
        shift = nn.Dense(features, kernel_init=default_init(), dtype=dtype)(nonlinearity(embedding))
        h = h + shift[:, None, None, :]
    h = nonlinearity(GroupNorm(dtype, groups)(h))
    h = Dropout(dropout)(h, dropout_keys)
    return conv3x3(features, dtype, init_scale)(h)


class ResnetBlockDDPMpp(nn.Module):
    """The residual block of DDPM, (B, H, W, C) -> (B, H, W, features), with rescaled skip."""

    features: int
    nonlinearity: Callable[[Array], Array]
    dropout: float
    skip_rescale: bool
    init_scale: float
    dtype: DTypeLike = jnp.float32
    groups: int | None = None

    @nn.compact
    def __call__(self, x: Array, embedding: Array | None, dropout_keys: Array | None) -> Array:
        h = _residual_branch(
            x,
            embedding,
            self.features,
            self.nonlinearity,
            self.dropout,
            self.init_scale,
            self.dtype,
            dropout_keys,
            groups=self.groups,
        )
        if x.shape[-1] != self.features:
            x = NIN(self.features, dtype=self.dtype)(x)
        return merge(x, h, self.skip_rescale)


class ResnetBlockBigGANpp(nn.Module):
    """The residual block of BigGAN (Brock et al. 2019), which can resample: inside the branch and on the skip.

    (B, H, W, C) -> (B, H', W', features), with H', W' doubled if `resample` is "up", halved if "down".
    """

    features: int
    nonlinearity: Callable[[Array], Array]
    dropout: float
    skip_rescale: bool
    init_scale: float
    resample: str | None = None
    fir_kernel: Sequence[float] | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, embedding: Array | None, dropout_keys: Array | None) -> Array:
        kernel = self.fir_kernel or BOX
        resample = {
            "up": lambda h: upsample_2d(h, kernel),
            "down": lambda h: downsample_2d(h, kernel),
            None: lambda h: h,
        }[self.resample]
        h = _residual_branch(
            x,
            embedding,
            self.features,
            self.nonlinearity,
            self.dropout,
            self.init_scale,
            self.dtype,
            dropout_keys,
            resample,
        )
        x = resample(x)
        if self.resample or x.shape[-1] != self.features:
            x = Conv(self.features, self.dtype)(x)
        return merge(x, h, self.skip_rescale)
