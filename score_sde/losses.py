"""Denoising score matching: one loss, of which all published ones are cases; a classifier's, and an autoencoder's.

The loss is w(t) | eps(x_t, t) - z |^2 with x_t = alpha_t x_0 + sigma_t z. Two tables say at which times, TIMES, and
with which w, WEIGHTS: the continuous, SMLD and DDPM losses (Song et al. 2021, eq. 7; Ho et al. 2020, eq. 14), EDM's
(Karras et al. 2022) and flow matching's (Lipman et al. 2023) are rows of each, under their own SDE.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from score_sde.denoiser import NoiseFn
from score_sde.models.autoencoder import Autoencoder, gaussian, kl_divergence
from score_sde.sde import SDE


def times_of_lam(key, shape, sde: SDE, *, t_min: float, mean: float, std: float):
    """Times of a normal lam, cut to those of (t_min, t_max) (Karras et al. 2022, Table 1, where ln sigma is -lam).

    Times uniform for VP lie to a half where x_t is hardly more than noise and there is little to learn. On the path of
    flow matching lam is -logit(t), so that these are its logit-normal times (Esser et al. 2024, section 3.1).
    """
    ends = np.array([sde.t_max, t_min])
    lower, upper = (sde.lam(ends) - mean) / std
    lam = mean + std * jax.random.truncated_normal(key, lower, upper, shape)
    return jnp.clip(sde.t_of_lam(lam), t_min, sde.t_max)  # against rounding


# How times are drawn: (key, shape, sde, smallest time, nodes n of a chain, mean and deviation of lam) -> t.
TIMES = {
    "uniform": lambda key, shape, sde, t_min, n, lam: jax.random.uniform(key, shape, minval=t_min, maxval=sde.t_max),
    "chain": lambda key, shape, sde, t_min, n, lam: jax.random.randint(key, shape, 0, n).astype(jnp.float32) / (n - 1),
    "lam_normal": lambda key, shape, sde, t_min, n, lam: times_of_lam(
        key, shape, sde, t_min=t_min, mean=lam[0], std=lam[1]
    ),
}

# What the squared error of eps is multiplied with: (sde, t, the network's Coefficients at t) -> w (B,).
WEIGHTS = {
    "eps": lambda sde, t, own: jnp.ones_like(t),
    # the error of the network itself, |F - F*|^2: with its rows EDM's loss, flow matching's, and that of v
    "network": lambda sde, t, own: jnp.broadcast_to(1 / jnp.square(own.out), t.shape),
    "v": lambda sde, t, own: 1 + jnp.exp(-2 * sde.lam(t)),  # for VP the error of v: "SNR + 1" (Salimans & Ho 2022)
    "likelihood": lambda sde, t, own: (sde.diffusion(t) / sde.sigma(t)) ** 2,  # a bound (Song et al. 2021b, eq. 7)
}


def denoising_score_matching(noise: NoiseFn, sde: SDE, x0, t, z, *, weight=1.0, reduce_mean: bool = True):
    """Loss of each image: (B,).

    x0, z: (B, H, W, C) data and standard normal noise; t: (B,). weight: (B,), of WEIGHTS.
    reduce_mean: mean over pixels, or half of their sum.
    """
    error = jnp.square(noise(sde.perturb(x0, t, z), t) - z).reshape(len(x0), -1)
    return weight * (error.mean(1) if reduce_mean else 0.5 * error.sum(1))


def reconstruction(network: Autoencoder, params: dict, x, keys, *, kl_weight: float):
    """Mean |x - D(z)| over the numbers of an image, plus kl_weight KL(q(z|x) || N(0, 1)) divided by their count: (B,).

    x: (B, H, W, C) in [-1, 1]; z is drawn from q(z|x), the encoder's, by `keys` (B,). The objective of Rombach et al.
    2022 (appendix G) without its perceptual and adversarial parts.
    """
    moments = network.apply({"params": params}, x, method="encode")
    mean, log_variance = gaussian(moments)
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
    back = network.apply({"params": params}, mean + jnp.exp(log_variance / 2) * noise, method="decode")
    return jnp.abs(back - x).mean((1, 2, 3)) + kl_weight / x[0].size * kl_divergence(moments)


def log_probability(logits: Callable, y) -> Callable:
    """(x, t) -> log p(y | x, t) (B,), in nats, of classes y (B,); logits: (x, t) -> (B, K)."""
    return lambda x, t: -optax.softmax_cross_entropy_with_integer_labels(logits(x, t), y)


def cross_entropy(logits: Callable, sde: SDE, x0, t, z, y):
    """-log p(y | x_t, t) of each image, in nats: (B,). Arguments as above, and classes y (B,)."""
    return -log_probability(logits, y)(sde.perturb(x0, t, z), t)
