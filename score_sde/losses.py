"""Denoising score matching: one loss, of which the published continuous, SMLD and DDPM losses are cases; and a
classifier's cross-entropy.

In terms of eps all three are | eps(x_t, t) - z |^2 with x_t = alpha_t x_0 + sigma_t z (Song et al. 2021, eq. 7; Ho et
al. 2020, eq. 14). They differ in the SDE and in the times drawn: continuous, or the nodes of a chain.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from score_sde.denoiser import NoiseFn
from score_sde.sde import SDE


def draw_time(key, shape, *, t_min: float, t_max: float, num_scales: int | None = None):
    """Times uniform in (t_min, t_max), or uniform among the num_scales nodes i / (num_scales - 1) of a chain."""
    if num_scales is None:
        return jax.random.uniform(key, shape, minval=t_min, maxval=t_max)
    return jax.random.randint(key, shape, 0, num_scales).astype(jnp.float32) / (num_scales - 1)


def draw_time_of_lam(key, shape, sde: SDE, *, t_min: float, mean: float, std: float):
    """Times of a normal lam, cut to those of (t_min, t_max) (Karras et al. 2022, Table 1, where ln sigma is -lam).

    Times uniform for VP lie to a half where x_t is hardly more than noise and there is little to learn.
    """
    ends = np.array([sde.t_max, t_min])
    lower, upper = (sde.lam(ends) - mean) / std
    lam = mean + std * jax.random.truncated_normal(key, lower, upper, shape)
    return jnp.clip(sde.t_of_lam(lam), t_min, sde.t_max)  # against rounding


def denoising_score_matching(
    noise: NoiseFn,
    sde: SDE,
    x0,
    t,
    z,
    *,
    likelihood_weighting: bool = False,
    v_weighting: bool = False,
    reduce_mean: bool = True,
):
    """Loss of each image: (B,).

    x0, z: (B, H, W, C) data and standard normal noise; t: (B,).
    likelihood_weighting: weight g(t)^2 / sigma^2 instead of 1, a bound on the likelihood (Song et al. 2021b, eq. 7).
    v_weighting: weight 1 + exp(-2 lam), for VP the squared error of v (Salimans & Ho 2022, section 4: "SNR + 1").
    reduce_mean: mean over pixels, or half of their sum.
    """
    error = jnp.square(noise(sde.perturb(x0, t, z), t) - z).reshape(len(x0), -1)
    loss = error.mean(1) if reduce_mean else 0.5 * error.sum(1)
    if likelihood_weighting:
        loss *= (sde.diffusion(t) / sde.sigma(t)) ** 2
    if v_weighting:
        loss *= 1 + jnp.exp(-2 * sde.lam(t))
    return loss


def log_probability(logits: Callable, y) -> Callable:
    """(x, t) -> log p(y | x, t) (B,), in nats, of classes y (B,); logits: (x, t) -> (B, K)."""
    return lambda x, t: -optax.softmax_cross_entropy_with_integer_labels(logits(x, t), y)


def cross_entropy(logits: Callable, sde: SDE, x0, t, z, y):
    """-log p(y | x_t, t) of each image, in nats: (B,). Arguments as above, and classes y (B,)."""
    return -log_probability(logits, y)(sde.perturb(x0, t, z), t)
