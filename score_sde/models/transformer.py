"""Transformer blocks that let a U-Net attend to a context (Rombach et al. 2022, section 3.3 and appendix E.2.1).

`dtype` is the computation type; parameters are float32 where they are initialized here, and may have any floating-point
type.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from score_sde.models.attention import multihead
from score_sde.models.layers import GroupNorm, at_least_float32, default_init


class LayerNorm(nn.Module):
    """Layer normalization of the last axis, with the parameters of `flax.linen.LayerNorm`, in float32 or better."""

    dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        precise = at_least_float32(jnp.dtype(self.dtype))
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32).astype(precise)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32).astype(precise)
        x = x.astype(precise)
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)
        channels = (1,) * (x.ndim - 1) + (-1,)
        return (x * scale.reshape(channels) + bias.reshape(channels)).astype(jnp.dtype(self.dtype))


class CrossAttention(nn.Module):
    """Attention of h (B, N, C) to a context (B, M, D), without a residual connection: (B, N, C)."""

    heads: int
    dtype: str

    @nn.compact
    def __call__(self, h: Array, context: Array) -> Array:
        channels = h.shape[-1]
        dense = lambda name, **options: nn.Dense(channels, dtype=jnp.dtype(self.dtype), name=name, **options)
        query = dense("query", use_bias=False)(h)
        key, value = (dense(name, use_bias=False)(context) for name in ("key", "value"))
        return dense("out")(multihead(query, key, value, self.heads))


class TransformerBlock(nn.Module):
    """Attention of h (B, N, C) to itself, to a context (B, M, D), and a feed-forward part, each with a residual.

    The feed-forward part is gated, W (a gelu(g)) with (a, g) linear in h (Shazeer 2020, GEGLU); the gelu is the exact
    one.
    """

    heads: int
    dtype: str

    @nn.compact
    def __call__(self, h: Array, context: Array) -> Array:
        norm = lambda name: LayerNorm(self.dtype, name=name)
        attend = lambda name: CrossAttention(self.heads, self.dtype, name=name)
        dense = lambda features, name: nn.Dense(features, dtype=jnp.dtype(self.dtype), name=name)
        x = norm("norm_0")(h)
        h = h + attend("to_self")(x, x)
        h = h + attend("to_context")(norm("norm_1")(h), context)
        x, gate = jnp.split(dense(8 * h.shape[-1], "gated")(norm("norm_2")(h)), 2, axis=-1)
        return h + dense(h.shape[-1], "linear")(x * jax.nn.gelu(gate, approximate=False))


class SpatialTransformer(nn.Module):
    """`depth` transformer blocks over the pixels of x (B, H, W, C), told a context (B, M, D), with a residual.

    Projections before and behind the blocks are linear maps of the channels: 1 x 1 convolutions in the files of Stable
    Diffusion 1, linear layers in those of 2.
    """

    heads: int
    depth: int
    dtype: str
    groups: int = 32

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        batch, height, width, channels = x.shape
        dtype = jnp.dtype(self.dtype)
        h = GroupNorm(dtype, self.groups, 1e-6, name="norm")(x).reshape(batch, height * width, channels)
        h = nn.Dense(channels, dtype=dtype, name="proj_in")(h)
        for i in range(self.depth):
            h = TransformerBlock(self.heads, self.dtype, name=f"block_{i}")(h, context.astype(dtype))
        # almost zero, so that a network begins without attention
        h = nn.Dense(channels, kernel_init=default_init(0.0), dtype=dtype, name="proj_out")(h)
        return x + h.reshape(x.shape)
