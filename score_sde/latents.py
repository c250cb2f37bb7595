"""The latents that a diffusion model of an autoencoder sees, and its context from prompts.

Latents are those of the autoencoder times a scale, by which they have about unit variance. Functions here take a
network and its parameters, and are pure.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from score_sde.errors import UserError
from score_sde.models.autoencoder import Autoencoder, gaussian
from score_sde.models.clip_text import CLIPText
from score_sde.space import Space, pixels
from score_sde.tokenizer import Tokenizer


class Coder(NamedTuple):
    """An autoencoder without its config, as a Diffusion is a model without its own."""

    network: Autoencoder
    space: Space  # of the images that it codes, in [-1, 1]
    init: Callable  # key -> params before training


def encoder(network: Autoencoder, params: dict, scale: float) -> Callable:
    """(key, image (H, W, C) in [-1, 1]) -> latent (h, w, E); vmap it over keys and images, or map it to save memory.

    For KL a sample of the encoder's distribution, its mean if the key is None; with a codebook what it has not yet
    quantized. UserError for images that are not a whole number of latents high and wide.
    """

    def encode(key: Array | None, image: Array) -> Array:
        require_whole(network, *image.shape[:2])
        moments = network.apply({"params": params}, image[None], method="encode")
        if network.num_codes:
            return scale * moments[0]
        mean, log_variance = gaussian(moments)
        if key is None:
            return scale * mean[0]
        noise = jax.random.normal(key, mean.shape, mean.dtype)
        return scale * (mean + jnp.exp(log_variance / 2) * noise)[0]

    return encode


def decoder(network: Autoencoder, params: dict, scale: float, at_once: int = 1) -> Callable:
    """Latents (B, h, w, E) -> images (B, H, W, C), about in [-1, 1], not clipped; `at_once` images at a time.

    Stable Diffusion's takes 0.9 GB for an image of 512 x 512 in float32, for 128 features and more at full size.
    """

    def decode(latents: Array) -> Array:
        one = lambda z: network.apply({"params": params}, z[None], method="decode")[0]
        return jax.lax.map(one, latents / scale, batch_size=at_once if at_once > 1 else None)

    return decode


def space(network: Autoencoder, params: dict, scale: float, height: int, width: int) -> Space:
    """The latents of images of height x width pixels; UserError if these are no whole number of latents.

    It decodes one image after the other, by a program of one image, outside of `jax.jit`, where the parameters would
    become constants.
    """
    require_whole(network, height, width)
    unit = pixels((height, width, network.channels))
    params = jax.tree.map(jnp.asarray, params)
    encode_one = encoder(network, params, scale)
    decode_one = jax.jit(lambda params, x: unit.decode(decoder(network, params, scale)(x)))

    def encode(key: Array, image: Array) -> Array:
        return encode_one(jax.random.split(key)[1], unit.encode(key, image))

    shape = (height // network.factor, width // network.factor, network.embed_dim)
    decode = lambda x: jnp.concatenate([decode_one(params, x[i : i + 1]) for i in range(len(x))])
    return Space(shape, encode, decode)


def require_whole(network: Autoencoder, height: int, width: int) -> None:
    """Refuse images that are not a whole number of latents high and wide."""
    if height % network.factor or width % network.factor:
        raise UserError(f"images of {height} x {width}: height and width must be multiples of {network.factor}")


def contexts(network: CLIPText, params: dict, tokenizer: Tokenizer, prompts: Sequence[str]) -> tuple[Array, np.ndarray]:
    """The context (B, L, D) of prompts, and how many tokens of each did not fit (B,).

    The context of the empty prompt is that of "no condition". UserError if the tokenizer is another model's.
    """
    require_fit(network, tokenizer)
    tokens, cut = tokenizer(prompts, network.length)
    return network.apply({"params": params}, jnp.asarray(tokens)), cut


def require_fit(network: CLIPText, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer of another model than the text encoder's."""
    if tokenizer.vocab_size != network.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the text encoder {network.vocab_size}: "
            "it is another model's"
        )
