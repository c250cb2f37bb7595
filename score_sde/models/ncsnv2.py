"""NCSN (Song & Ermon 2019) and NCSNv2 (Song & Ermon 2020): RefineNets (Lin et al. 2017) with dilated convolutions.

The two differ in their normalization. NCSN's scales and shifts depend on the noise level, which NCSNv2 is not told: its
output is the score times that level. Each block is therefore one class, whose conditional variant has its own name and
normalization.

Shapes: images (B, H, W, C), indices of noise levels (B,) int32. Class and parameter names, resizing with half-pixel
centres and biased variances are those of the official JAX code, on whose checkpoints the PyTorch code differs.
"""

import functools
from collections.abc import Callable, Sequence
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from score_sde.errors import UserError
from score_sde.models.layers import (
    DTYPES,
    NONLINEARITIES,
    at_least_float32,
    require,
    require_multiple,
)
from score_sde.models.resample import downsample_2d

# Kernels and biases are uniform within 1 / sqrt(fan in), which is PyTorch's way.
_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _near_one(key: Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Array:
    return 1.0 + 0.02 * jax.random.normal(key, shape, dtype)


def _near_one_and_zero(key: Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Array:
    """(n, 3 C): two thirds of each row near one, the last third zero."""
    scales = 2 * shape[1] // 3
    return jnp.pad(_near_one(key, (shape[0], scales), dtype), ((0, 0), (0, shape[1] - scales)))


# -- Normalization --


class InstanceNorm2dPlus(nn.Module):
    """Instance normalization++ (NCSN, Appendix A): keeps the channels' means, normalized over the channels.

    gamma * (x - mean) / std + gamma * alpha * (mean - average of the means) / (std of the means) + beta
    """

    num_scales: int = 0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, index: Array) -> Array:
        precise = at_least_float32(self.dtype)
        x = x.astype(precise)
        gamma, alpha, beta = (c.astype(precise) for c in self.coefficients(index, x.shape[-1]))
        means = x.mean((1, 2), keepdims=True)
        relative_means = (means - means.mean(3, keepdims=True)) * jax.lax.rsqrt(means.var(3, keepdims=True) + 1e-5)
        h = (x - means) * jax.lax.rsqrt(x.var((1, 2), keepdims=True) + 1e-5)
        return ((h + relative_means * alpha) * gamma + beta).astype(self.dtype)

    def coefficients(self, index: Array, channels: int) -> tuple[Array, Array, Array]:
        """gamma, alpha, beta: (1, 1, 1, C)."""
        shape = (1, 1, 1, channels)
        gamma, alpha = (self.param(name, _near_one, shape, jnp.float32) for name in ("gamma", "alpha"))
        return gamma, alpha, self.param("beta", nn.initializers.zeros, shape, jnp.float32)


class ConditionalInstanceNorm2dPlus(InstanceNorm2dPlus):
    """Instance normalization++ with coefficients for each of `num_scales` noise levels."""

    def coefficients(self, index: Array, channels: int) -> tuple[Array, Array, Array]:
        """gamma, alpha, beta: (B, 1, 1, C)."""
        table = nn.Embed(self.num_scales, 3 * channels, embedding_init=_near_one_and_zero)
        return tuple(jnp.split(table(index)[:, None, None, :], 3, axis=-1))


# -- Blocks --


class _Block(nn.Module):
    """What all blocks share; `normalize` is for use within their compact `__call__`."""

    features: int
    act: Callable[[Array], Array]
    num_scales: int = 0
    dtype: DTypeLike = jnp.float32

    def normalize(self, x: Array, index: Array) -> Array:
        """None in the unconditional blocks of RefineNet."""
        return x

    def conv3x3(self, h: Array, features: int | None = None, bias: bool = False, dilation: int = 1) -> Array:
        return conv(features or self.features, h.shape[-1], self.dtype, bias, dilation)(h)


def conv(features: int, channels: int, dtype: DTypeLike, bias: bool = True, dilation: int = 1) -> nn.Conv:
    """A 3 x 3 convolution, channels -> features, initialized as by PyTorch."""
    bound = 1 / (9 * channels) ** 0.5
    return nn.Conv(
        features,
        (3, 3),
        kernel_dilation=dilation,
        use_bias=bias,
        kernel_init=_kernel_init,
        bias_init=lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound),
        dtype=dtype,
    )


class _Conditional:
    """Makes the normalization of a block depend on the noise level."""

    def normalize(self, x: Array, index: Array) -> Array:
        return ConditionalInstanceNorm2dPlus(self.num_scales, self.dtype)(x, index)


class ConvMeanPool(nn.Module):
    """(B, H, W, C) -> (B, H/2, W/2, features): a convolution of `size`, then the mean of 2 x 2 pixels."""

    features: int
    size: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return downsample_2d(nn.Conv(self.features, (self.size, self.size), dtype=self.dtype)(x))


class ResidualBlock(_Block):
    """(B, H, W, C) -> (B, H', W', features): twice norm, act, conv; and a skip connection.

    Where a new level begins (`down`), the shortcut is a convolution too. Dilated levels then keep the resolution, H, W,
    as in DeepLab (Chen et al. 2017); others halve it.
    """

    down: bool = False
    dilation: int = 1

    def normalize(self, x: Array, index: Array) -> Array:
        return InstanceNorm2dPlus(dtype=self.dtype)(x, index)

    @nn.compact
    def __call__(self, x: Array, index: Array) -> Array:
        dilated = functools.partial(self.conv3x3, bias=True, dilation=self.dilation)
        h = dilated(self.act(self.normalize(x, index)), x.shape[-1])
        h = self.act(self.normalize(h, index))
        if not self.down:
            return x + dilated(h)
        if self.dilation > 1:
            return dilated(h) + dilated(x)
        return ConvMeanPool(self.features, 3, self.dtype)(h) + ConvMeanPool(self.features, 1, self.dtype)(x)


class ConditionalResidualBlock(_Conditional, ResidualBlock):
    """The same with conditional normalization."""


class RCUBlock(_Block):
    """Residual convolution unit (RefineNet, Figure 3b), `blocks` in sequence: x + two times (norm,) act, conv."""

    blocks: int = 2

    @nn.compact
    def __call__(self, x: Array, index: Array) -> Array:
        for _ in range(self.blocks):
            h = x
            for _ in range(2):
                h = self.conv3x3(self.act(self.normalize(h, index)))
            x = x + h
        return x


class CondRCUBlock(_Conditional, RCUBlock):
    """The same with conditional normalization."""


class MSFBlock(_Block):
    """Multi-resolution fusion (RefineNet, Figure 3c): maps (B, H_i, W_i, C_i) -> their sum (B, H, W, features)."""

    @nn.compact
    def __call__(self, maps: Sequence[Array], index: Array) -> Array:
        height, width = maps[0].shape[1:3]

        def fused(h: Array) -> Array:
            h = self.conv3x3(self.normalize(h, index), bias=True)
            return jax.image.resize(h, (h.shape[0], height, width, self.features), "bilinear")

        return sum(fused(h) for h in maps)


class CondMSFBlock(_Conditional, MSFBlock):
    """The same with conditional normalization."""


class CRPBlock(_Block):
    """Chained residual pooling (RefineNet, Figure 3d), two 5 x 5 pools long: the sum of the chain's stages."""

    def pool(self, h: Array) -> Array:
        return nn.max_pool(h, (5, 5), padding="SAME")

    @nn.compact
    def __call__(self, x: Array, index: Array) -> Array:
        x = path = self.act(x)
        for _ in range(2):
            path = self.conv3x3(self.pool(self.normalize(path, index)))
            x = x + path
        return x


class CondCRPBlock(_Conditional, CRPBlock):
    """The same with conditional normalization, and averages for maxima."""

    def pool(self, h: Array) -> Array:
        """Over 25 pixels, of which those beyond the border are zero. (nn.avg_pool fails under strict promotion.)"""
        return nn.pool(h, 0.0, jax.lax.add, (5, 5), (1, 1), "SAME") / 25.0


class RefineBlock(_Block):
    """(RefineNet, Figure 3a) feature maps, the finest first -> (B, H, W, features) at the finest resolution.

    output_blocks: length of the last residual convolution unit.
    """

    output_blocks: int = 1
    layers: ClassVar = (RCUBlock, MSFBlock, CRPBlock)

    @nn.compact
    def __call__(self, maps: Sequence[Array], index: Array) -> Array:
        RCU, MSF, CRP = self.layers
        shared = {"act": self.act, "num_scales": self.num_scales, "dtype": self.dtype}
        maps = [RCU(h.shape[-1], **shared)(h, index) for h in maps]
        h = MSF(self.features, **shared)(maps, index) if len(maps) > 1 else maps[0]
        h = CRP(self.features, **shared)(h, index)
        return RCU(self.features, **shared, blocks=self.output_blocks)(h, index)


class CondRefineBlock(RefineBlock):
    """The same with conditional layers."""

    layers: ClassVar = (CondRCUBlock, CondMSFBlock, CondCRPBlock)


# -- Networks --


class NCSNv2(nn.Module):
    """NCSNv2 for images of side 32 and 64 ("ncsnv2_64" of the official code).

    `network(x, label, y=None, dropout_keys=None)`:
        x       (B, H, W, C), H and W even; data range [-1, 1]
        label   (B,) index of the noise level, truncated; without effect in NCSNv2
        y       None: this network has no classes
        dropout_keys    without effect: this network has no dropout
    The result has the shape and type of x.

    Two residual blocks a level: level i has nf * widths[i] features and dilation dilations[i]; levels after the first
    halve the resolution, if not dilated. Then one RefineBlock a level, coarsest first, of nf * refine_widths features;
    the first keeps the width of its level.
    """

    nf: int = 128
    nonlinearity: str = "elu"
    dtype: str = "float32"
    widths: Sequence[int] = (1, 2, 2, 2)
    dilations: Sequence[int] = (1, 1, 2, 4)
    refine_widths: Sequence[int] = (2, 2, 2, 1)
    num_scales: ClassVar[int] = 0
    layers: ClassVar = (InstanceNorm2dPlus, ResidualBlock, RefineBlock)

    def __post_init__(self) -> None:
        require(self, nonlinearity=NONLINEARITIES, dtype=DTYPES)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, label: Array, y: Array | None = None, dropout_keys: Array | None = None) -> Array:
        if y is not None:
            raise UserError(f"{type(self).__name__} has no classes, so it takes no y")
        require_multiple(x, 2 ** sum(dilation == 1 for dilation in self.dilations[1:]))
        dtype = jnp.dtype(self.dtype)
        act = NONLINEARITIES[self.nonlinearity]
        index = label.astype(jnp.int32)
        Norm, Residual, Refine = self.layers
        shared = {"act": act, "num_scales": self.num_scales, "dtype": dtype}

        h = conv(self.nf, x.shape[-1], dtype)(x.astype(dtype))
        levels = []
        for level, (width, dilation) in enumerate(zip(self.widths, self.dilations, strict=True)):
            for down in (level > 0, False):
                h = Residual(self.nf * width, **shared, down=down, dilation=dilation)(h, index)
            levels.append(h)

        refined = []  # the output of the coarser level
        for level, width in zip(reversed(range(len(levels))), self.refine_widths, strict=True):
            last = 3 if level == 0 else 1
            refined = [Refine(self.nf * width, **shared, output_blocks=last)([levels[level], *refined], index)]

        h = act(Norm(self.num_scales, dtype)(refined[0], index))
        return conv(x.shape[-1], h.shape[-1], dtype)(h).astype(x.dtype)


class NCSN(NCSNv2):
    """NCSN: called as NCSNv2, which see. Every normalization is conditional on the index among num_scales levels."""

    num_scales: int = 10
    layers: ClassVar = (ConditionalInstanceNorm2dPlus, ConditionalResidualBlock, CondRefineBlock)


ncsnv2_128 = functools.partial(NCSNv2, widths=(1, 2, 2, 4, 4), dilations=(1, 1, 1, 2, 4), refine_widths=(4, 2, 2, 1, 1))
ncsnv2_256 = functools.partial(
    NCSNv2, widths=(1, 2, 2, 2, 4, 4), dilations=(1, 1, 1, 1, 2, 4), refine_widths=(4, 2, 2, 2, 1, 1)
)
