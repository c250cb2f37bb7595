"""The noise-conditional classifier that guides sampling towards a class (Song et al. 2021, Appendix I.1).

A Wide ResNet (Zagoruyko & Komodakis 2016) with group normalization, which is told the noise level. Class and parameter
names are those of the official JAX code, so that its checkpoints load by identity.
"""

import functools
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from score_sde.denoiser import LABELS
from score_sde.models.layers import (
    DTYPES,
    GaussianFourierProjection,
    GroupNorm,
    at_least_float32,
    convolve,
    require,
    require_multiple,
)
from score_sde.models.resample import downsample_2d
from score_sde.models.unet import UNetClassifier
from score_sde.sde import SDE, per_image


def _norm_relu(name: str, dtype: DTypeLike):
    """Group normalization, then ReLU; the names `*_bn` are from a time of batch normalization."""
    return lambda h: nn.relu(GroupNorm(dtype, epsilon=1e-5, name=name)(h))


class Conv3x3(nn.Module):
    """(B, H, W, C) -> (B, H / stride, W / stride, features), without a bias."""

    features: int
    dtype: DTypeLike
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al. 2015
        kernel = self.param("kernel", init, (3, 3, x.shape[-1], self.features), jnp.float32)
        return convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.stride)


class WideResnetBlock(nn.Module):
    """(B, H, W, C), embedding (B, D) -> (B, H / stride, W / stride, features), by a shortcut without parameters.

    activate_first: the shortcut starts behind the first normalization and activation.
    """

    features: int
    stride: int
    activate_first: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, embedding: Array) -> Array:
        h = _norm_relu("init_bn", self.dtype)(x)
        shortcut = h if self.activate_first else x
        h = Conv3x3(self.features, self.dtype, self.stride, name="conv1")(h)
        h = h + nn.Dense(self.features, dtype=self.dtype)(nn.swish(embedding))[:, None, None, :]
        h = _norm_relu("bn_2", self.dtype)(h)
        h = Conv3x3(self.features, self.dtype, name="conv2")(h)
        if self.stride == 2:
            shortcut = downsample_2d(shortcut)
        new_channels = self.features - shortcut.shape[-1]
        return h + jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (0, new_channels)))


class WideResnetGroup(nn.Module):
    """`blocks` blocks of the same width; the first may halve the resolution."""

    blocks: int
    features: int
    stride: int
    activate_first: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, h: Array, embedding: Array) -> Array:
        for block in range(self.blocks):
            first = block == 0
            stride = self.stride if first else 1
            h = WideResnetBlock(self.features, stride, first and self.activate_first, self.dtype)(h, embedding)
        return h


class WideResnet(nn.Module):
    """Logits of the class of a noisy image; the defaults are the published WRN-28-10 for CIFAR-10.

    `classifier(x, sigma)`: x (B, H, W, C) = data + sigma z, H and W multiples of 4; sigma (B,), as of the VE SDE; the
    result (B, num_outputs) has the type of x. `logits_fn` brings the images of other SDEs to that form.

    mean, std: of the pixels of each channel of the data, in the data range. The published ones are of [0, 1].
    fourier_scale: how fast the embedding of log sigma varies. The published 16 tells noise levels apart that differ by
        a hundredth, but a network trained for minutes is rough in them.
    """

    blocks_per_group: int = 4
    channel_multiplier: int = 10
    num_outputs: int = 10
    mean: Sequence[float] = (0.49139968, 0.48215841, 0.44653091)
    std: Sequence[float] = (0.24703223, 0.24348513, 0.26158784)
    fourier_scale: float = 16.0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        require(self, dtype=DTYPES)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, sigma: Array) -> Array:
        require_multiple(x, 4)
        dtype = jnp.dtype(self.dtype)
        features = GaussianFourierProjection(128, self.fourier_scale)(jnp.log(sigma))
        dense = functools.partial(nn.Dense, 512, dtype=dtype)
        embedding = dense()(features)
        embedding = dense()(nn.swish(embedding))

        h = Conv3x3(16, dtype, name="init_conv")(self._standardized(x.astype(at_least_float32(dtype))))
        for group, (width, stride) in enumerate(((16, 1), (32, 2), (64, 2))):
            width = width * self.channel_multiplier
            h = WideResnetGroup(self.blocks_per_group, width, stride, group == 0, dtype)(h, embedding)
        h = _norm_relu("pre-pool-bn", dtype)(h).mean((1, 2))
        bound = 1 / math.sqrt(self.num_outputs)
        init = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
        return nn.Dense(self.num_outputs, kernel_init=init, dtype=dtype)(h).astype(x.dtype)

    def _standardized(self, x: Array) -> Array:
        """Channels by the data's mean and std; then each image by its own, the std being at least 1 / sqrt(H W C).

        The bound is on the variance: the gradient of a root at zero, at an image of one colour, would not be a number.
        """
        mean, std = (jnp.asarray(values, x.dtype).reshape(1, 1, 1, -1) for values in (self.mean, self.std))
        x = (x - mean) / std
        variance = x.var((1, 2, 3), keepdims=True)
        return (x - x.mean((1, 2, 3), keepdims=True)) * jax.lax.rsqrt(jnp.maximum(variance, 1 / math.prod(x.shape[1:])))


# Config name -> network, which gives logits; how each is called is a row of LOGITS.
CLASSIFIERS = {"wide_resnet": WideResnet, "unet_classifier": UNetClassifier}


def logits_fn(network: Callable, sde: SDE) -> Callable:
    """(x (B, H, W, C), t () or (B,)) -> logits (B, K) of a network told (x, sigma) of data + sigma z.

    For any SDE: x_t / alpha is data + (sigma / alpha) z.
    """

    def logits(x, t):
        t = jnp.broadcast_to(t, x.shape[:1])
        alpha = sde.alpha(t)
        return network(x / per_image(alpha, x), sde.sigma(t) / alpha)

    return logits


def labelled_logits_fn(network: Callable, sde: SDE, label: str, num_scales: int) -> Callable:
    """(x (B, H, W, C), t () or (B,)) -> logits (B, K) of a network told x_t and a label, a key of denoiser.LABELS."""
    return lambda x, t: network(x, LABELS[label](sde, jnp.broadcast_to(t, x.shape[:1]), num_scales))


# Config name -> (network, sde, the config's `denoiser`) -> logits of (x, t).
LOGITS = {
    "wide_resnet": lambda network, sde, told: logits_fn(network, sde),
    "unet_classifier": lambda network, sde, told: labelled_logits_fn(network, sde, told.label, told.num_scales),
}
