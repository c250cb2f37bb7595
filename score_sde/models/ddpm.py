"""The U-Net of DDPM (Ho et al. 2020), as Song et al. 2021 use it: without resampling filters and rescaled skips."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from score_sde.errors import UserError
from score_sde.models.layers import (
    DTYPES,
    NONLINEARITIES,
    AttnBlockpp,
    Downsample,
    GroupNorm,
    ResnetBlockDDPMpp,
    Upsample,
    conv3x3,
    default_init,
    require,
    require_multiple,
    sinusoidal_embedding,
)

GROUPS = 32  # of every normalization, whatever the number of channels; NCSN++ has fewer in narrow layers


class ResnetBlockDDPM(ResnetBlockDDPMpp):
    """The residual block (B, H, W, C) -> (B, H, W, features) with a plain skip; its branch starts almost zero."""

    skip_rescale: bool = False
    init_scale: float = 0.0
    groups: int | None = GROUPS


class AttnBlock(AttnBlockpp):
    """Single-head self-attention over the pixels with a plain skip; its branch starts almost zero."""

    skip_rescale: bool = False
    init_scale: float = 0.0
    groups: int | None = GROUPS


class DDPM(nn.Module):
    """The U-Net of DDPM; the defaults are those for CIFAR-10.

    `network(x, label, y=None, dropout_keys=None)`:
        x       (B, H, W, C), H and W multiples of 2^(levels - 1); data range [-1, 1]
        label   (B,) what the sinusoidal embedding gets; need not be whole
        y       None: this network has no classes
        dropout_keys    (B,) PRNG keys, one for each example: turns dropout on
    The result has the shape and type of x. What it means (noise, score, ...) is the caller's choice.

    Residual blocks, by level: features nf * ch_mult[level], `num_res_blocks` going down and one more going up;
    attention where the height is one of `attn_resolutions`, after each block going down but once per level going up.
    All numbers of features must be multiples of 32.

    Arguments have the official names. What is not self-explanatory:
        resamp_with_conv    whether convolutions follow nearest upsampling, and stand in for averages in downsampling
        conditional         whether blocks see the label
    """

    nf: int = 128
    ch_mult: Sequence[int] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attn_resolutions: Sequence[int] = (16,)
    dropout: float = 0.1
    resamp_with_conv: bool = True
    nonlinearity: str = "swish"
    conditional: bool = True
    dtype: str = "float32"

    def __post_init__(self) -> None:
        require(self, nonlinearity=NONLINEARITIES, dtype=DTYPES)
        for name in ("ch_mult", "attn_resolutions"):
            setattr(self, name, tuple(getattr(self, name)))  # configs hold lists, which do not hash
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, label: Array, y: Array | None = None, dropout_keys: Array | None = None) -> Array:
        if y is not None:
            raise UserError("DDPM has no classes, so it takes no y")
        levels = len(self.ch_mult)
        require_multiple(x, 2 ** (levels - 1))
        dtype = jnp.dtype(self.dtype)
        act = NONLINEARITIES[self.nonlinearity]
        embedding = self._embedding(label, dtype) if self.conditional else None

        def block(h: Array, features: int) -> Array:
            return ResnetBlockDDPM(features, act, self.dropout, dtype=dtype)(h, embedding, dropout_keys)

        def attention(h: Array) -> Array:
            return AttnBlock(dtype=dtype)(h)

        h = conv3x3(self.nf, dtype)(x.astype(dtype))
        skips = [h]
        for level, multiplier in enumerate(self.ch_mult):
            for _ in range(self.num_res_blocks):
                h = block(h, self.nf * multiplier)
                if h.shape[1] in self.attn_resolutions:
                    h = attention(h)
                skips.append(h)
            if level < levels - 1:
                h = Downsample(None, self.resamp_with_conv, dtype=dtype)(h)
                skips.append(h)

        features = h.shape[-1]
        h = block(h, features)
        h = attention(h)
        h = block(h, features)

        for level, multiplier in reversed(list(enumerate(self.ch_mult))):
            for _ in range(self.num_res_blocks + 1):
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), self.nf * multiplier)
            if h.shape[1] in self.attn_resolutions:
                h = attention(h)
            if level > 0:
                h = Upsample(None, self.resamp_with_conv, dtype=dtype)(h)

        return conv3x3(x.shape[-1], dtype, init_scale=0.0)(act(GroupNorm(dtype, GROUPS)(h))).astype(x.dtype)

    def _embedding(self, label: Array, dtype: jnp.dtype) -> Array:
        """(B,) -> (B, 4 nf). The sines are computed in the label's own precision."""
        dense = functools.partial(nn.Dense, 4 * self.nf, kernel_init=default_init(), dtype=dtype)
        embedding = dense()(sinusoidal_embedding(label, self.nf))
        return dense()(NONLINEARITIES[self.nonlinearity](embedding))
