"""NCSN++ and DDPM++: the U-Nets of Song et al., "Score-Based Generative Modeling through SDEs" (2021), Appendix H."""

import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from score_sde.errors import UserError
from score_sde.models.layers import (
    NONLINEARITIES,
    AttnBlockpp,
    Combine,
    Downsample,
    GaussianFourierProjection,
    GroupNorm,
    ResnetBlockBigGANpp,
    ResnetBlockDDPMpp,
    Upsample,
    class_weights,
    conv3x3,
    default_init,
    merge,
    require,
    require_multiple,
    sinusoidal_embedding,
)
from score_sde.models.resample import depth_to_space, space_to_depth

_LEGAL = {
    "resblock_type": ("biggan", "ddpm"),
    "progressive": ("none", "output_skip", "residual"),
    "progressive_input": ("none", "input_skip", "residual"),
    "progressive_combine": ("sum", "cat"),
    "embedding_type": ("positional", "fourier"),
    "nonlinearity": tuple(NONLINEARITIES),
    "class_embedding": ("table", "linear"),
    "dtype": ("float32", "bfloat16", "float64"),
}


class NCSNpp(nn.Module):
    """The noise-conditional U-Net of Appendix H; the defaults are the published CIFAR-10 DDPM++ (continuous).

    `network(x, label, y=None, dropout_keys=None, augment=None)`:
        x       (B, H, W, C), H and W multiples of patch_size 2^(levels - 1); data range [-1, 1]
        label   (B,) what the embedding gets: sigma itself if `log_label` (the logarithm is taken here), else any label
        y       (B,) int32 classes, if `num_classes`; `num_classes` itself, or y=None, means "no class"; if `linear`
                also (B, num_classes) weights of classes
        dropout_keys    (B,) PRNG keys, one for each example: turns dropout on
        augment (B, augment_dim) how the images were augmented, if `augment_dim`; None: not at all, which is zeros
    The result has the shape and type of x. What it means (noise, score, ...) is the caller's choice.

    Residual blocks, by level: features nf * ch_mult[level], `num_res_blocks` going down and one more going up;
    attention where the height is one of `attn_resolutions`, after each block going down but once per level going up.

    Arguments have the official names. What is not self-explanatory:
        fir, fir_kernel     low-pass filter whatever is resampled, as in StyleGAN-2
        skip_rescale        divide residual sums by sqrt(2)
        resblock_type       "biggan": blocks resample; "ddpm": layers between them do, by resamp_with_conv with weights
        progressive         the output as a sum over resolutions ("output_skip"), or a residual pyramid ("residual")
        progressive_input   the downsampled input at each resolution, likewise; "input_skip" obeys progressive_combine
        init_scale          scale of the last layer of each branch and of the network; 0 means almost zero
        conditional         whether blocks see the embedding
    Not in the official code: num_classes (class embedding, added to that of the noise level, as in Dhariwal & Nichol
    2021), dtype (of the computation), remat (recompute the blocks in the backward pass, to save memory), patch_size
    (each square of so many pixels enters and leaves as one pixel with its values as channels, as in Hoogeboom et al.,
    "simple diffusion", 2023, for the sake of speed; heights above are then those after it).

    EDM's SongUNet is this network with other inputs (Karras et al. 2022, appendix F.1):
        class_embedding     "table": a vector for each class, and for none, behind the two layers of the embedding;
                            "linear": a linear map of sqrt(num_classes) times the one-hot class, before them
        augment_dim         numbers that tell of the augmentation, by a linear map before the two layers; 0: none
        channel_mult_noise, channel_mult_emb    widths of the label's features and of the embedding, over nf;
                            0: the official 1 if "positional", 2 if "fourier"
        log_label           whether "fourier" takes the logarithm of the label
        fir_reversed        the filter going down has its taps in the other order; symmetric ones stay the same
        learn_sigma         twice the channels, the second half of variances, which the denoiser cuts
    """

    nf: int = 128
    ch_mult: Sequence[int] = (1, 2, 2, 2)
    num_res_blocks: int = 4
    attn_resolutions: Sequence[int] = (16,)
    resamp_with_conv: bool = True
    dropout: float = 0.1
    fir: bool = False
    fir_kernel: Sequence[float] = (1, 3, 3, 1)
    skip_rescale: bool = True
    resblock_type: str = "biggan"
    progressive: str = "none"
    progressive_input: str = "none"
    progressive_combine: str = "sum"
    embedding_type: str = "positional"
    init_scale: float = 0.0
    fourier_scale: float = 16.0
    nonlinearity: str = "swish"
    conditional: bool = True
    num_classes: int = 0
    dtype: str = "float32"
    remat: bool = False
    patch_size: int = 1
    class_embedding: str = "table"
    augment_dim: int = 0
    channel_mult_noise: int = 0
    channel_mult_emb: int = 4
    log_label: bool = True
    fir_reversed: bool = False
    learn_sigma: bool = False

    def __post_init__(self) -> None:
        require(self, **_LEGAL)
        if self.num_classes and not self.conditional:
            raise UserError("num_classes > 0 needs conditional = True: classes enter through the embedding")
        if self.fir and len(self.fir_kernel) < 2:
            raise UserError(f"fir_kernel = {list(self.fir_kernel)} needs at least two taps, for example [1, 3, 3, 1]")
        for name in ("ch_mult", "attn_resolutions", "fir_kernel"):
            setattr(self, name, tuple(getattr(self, name)))  # configs hold lists, which do not hash
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Array,
        label: Array,
        y: Array | None = None,
        dropout_keys: Array | None = None,
        augment: Array | None = None,
    ) -> Array:
        image_channels = x.shape[-1] * self.patch_size**2 * (2 if self.learn_sigma else 1)
        levels = len(self.ch_mult)
        require_multiple(x, self.patch_size * 2 ** (levels - 1))
        dtype = jnp.dtype(self.dtype)
        act = NONLINEARITIES[self.nonlinearity]
        kernel = self.fir_kernel if self.fir else None
        down_kernel = kernel[::-1] if kernel and self.fir_reversed else kernel
        biggan = self.resblock_type == "biggan"
        rescaled = functools.partial(merge, skip_rescale=self.skip_rescale)
        embedding = self._embedding(label, y, augment, dtype)

        Block = _remat_if(self.remat, ResnetBlockBigGANpp if biggan else ResnetBlockDDPMpp)
        Attention = _remat_if(self.remat, AttnBlockpp)
        options = {
            "nonlinearity": act,
            "dropout": self.dropout,
            "skip_rescale": self.skip_rescale,
            "init_scale": self.init_scale,
            "dtype": dtype,
        } | ({"fir_kernel": kernel} if biggan else {})

        def block(h: Array, features: int, **changes) -> Array:
            return Block(features, **options | changes)(h, embedding, dropout_keys)

        def attention(h: Array) -> Array:
            return Attention(self.skip_rescale, self.init_scale, dtype)(h)

        def downsample(h: Array) -> Array:
            if biggan:
                return block(h, h.shape[-1], resample="down", fir_kernel=down_kernel)
            return Downsample(down_kernel, self.resamp_with_conv, dtype=dtype)(h)

        def upsample(h: Array) -> Array:
            if biggan:
                return block(h, h.shape[-1], resample="up")
            return Upsample(kernel, self.resamp_with_conv, dtype=dtype)(h)

        def to_image(h: Array, channels: int = image_channels, init_scale: float = self.init_scale) -> Array:
            return conv3x3(channels, dtype, init_scale)(act(GroupNorm(dtype)(h)))

        h = input_pyramid = space_to_depth(x.astype(dtype), self.patch_size)

        h = conv3x3(self.nf, dtype)(h)
        skips = [h]
        for level, multiplier in enumerate(self.ch_mult):
            for _ in range(self.num_res_blocks):
                h = block(h, self.nf * multiplier)
                if h.shape[1] in self.attn_resolutions:
                    h = attention(h)
                skips.append(h)
            if level < levels - 1:
                h = downsample(h)
                if self.progressive_input == "input_skip":
                    input_pyramid = Downsample(down_kernel, with_conv=False)(input_pyramid)
                    h = Combine(self.progressive_combine, dtype)(input_pyramid, h)
                elif self.progressive_input == "residual":
                    input_pyramid = Downsample(down_kernel, True, h.shape[-1], dtype)(input_pyramid)
                    h = input_pyramid = rescaled(input_pyramid, h)
                skips.append(h)

        features = h.shape[-1]
        h = block(h, features)
        h = attention(h)
        h = block(h, features)

        pyramid = None
        for level, multiplier in reversed(list(enumerate(self.ch_mult))):
            for _ in range(self.num_res_blocks + 1):
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), self.nf * multiplier)
            if h.shape[1] in self.attn_resolutions:
                h = attention(h)
            if self.progressive == "output_skip":
                coarse = pyramid
                pyramid = to_image(h) if coarse is None else Upsample(kernel, with_conv=False)(coarse) + to_image(h)
            elif self.progressive == "residual" and pyramid is None:
                pyramid = to_image(h, h.shape[-1], init_scale=1.0)
            elif self.progressive == "residual":
                h = pyramid = rescaled(Upsample(kernel, True, h.shape[-1], dtype)(pyramid), h)
            if level > 0:
                h = upsample(h)

        h = pyramid if self.progressive == "output_skip" else to_image(h)
        return depth_to_space(h, self.patch_size).astype(x.dtype)

    def _embedding(self, label: Array, y: Array | None, augment: Array | None, dtype: jnp.dtype) -> Array | None:
        """(B,) noise levels, classes -> (B, 4 nf). The features are computed in the label's own precision."""
        fourier = self.embedding_type == "fourier"
        width = self.nf * (self.channel_mult_noise or (2 if fourier else 1))
        if fourier:
            label = jnp.log(label) if self.log_label else label
            features = GaussianFourierProjection(width // 2, self.fourier_scale)(label)
        else:
            features = sinusoidal_embedding(label, width)
        if y is not None and not self.num_classes:
            raise UserError("this network has no classes (num_classes = 0), so it takes no y")
        if augment is not None and not self.augment_dim:
            raise UserError("this network was not told of augmentations (augment_dim = 0), so it takes none")
        if not self.conditional:
            return None
        dense = functools.partial(nn.Dense, kernel_init=default_init(), dtype=dtype)
        linear = self.num_classes and self.class_embedding == "linear"
        if linear:
            weights = class_weights(y, len(label), self.num_classes, dtype)
            features = features.astype(dtype) + dense(width, name="classes")(weights * math.sqrt(self.num_classes))
        if self.augment_dim:
            augment = jnp.zeros((len(label), self.augment_dim), dtype) if augment is None else augment
            features = features.astype(dtype) + dense(width, use_bias=False, name="augment")(augment)
        embedding = dense(self.channel_mult_emb * self.nf)(features)
        embedding = dense(self.channel_mult_emb * self.nf)(NONLINEARITIES[self.nonlinearity](embedding))
        if self.num_classes and not linear:
            y = jnp.full(label.shape, self.num_classes) if y is None else y
            init = nn.initializers.normal(1.0)
            embed = nn.Embed(self.num_classes + 1, embedding.shape[-1], dtype=dtype, embedding_init=init)
            embedding = embedding + embed(y)
        return embedding


def _remat_if(remat: bool, layer: type[nn.Module]) -> type[nn.Module]:
    """The layer class with recomputation in the backward pass; the name stays, since it is part of parameter paths."""
    if not remat:
        return layer
    lifted = nn.remat(layer)
    lifted.__name__ = layer.__name__
    return lifted
