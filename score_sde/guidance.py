"""What bends a model while sampling: each function takes NoiseFns, (x, t) -> eps, and returns one.

They compose: guidance first, then a guidance interval, then thresholding, which sees what the solver would see.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from score_sde.denoiser import NoiseFn
from score_sde.errors import UserError
from score_sde.sde import SDE, per_image


def classifier_guidance(noise: NoiseFn, sde: SDE, log_probability: Callable, scale: float = 1.0) -> NoiseFn:
    """eps - scale sigma_t grad_x log p(y | x, t) (Song et al. 2021, eq. 14; Dhariwal & Nichol 2021, algorithm 2).

    log_probability: (x (B, H, W, C), t (B,)) -> (B,), in nats, each from its own image alone.
    """

    def guided(x, t):
        t = jnp.broadcast_to(t, x.shape[:1])
        gradient = jax.grad(lambda x: log_probability(x, t).sum())(x)
        return noise(x, t) - scale * per_image(sde.sigma(t), x) * gradient

    return guided


def classifier_free(noise_of: Callable, y, null, scale: float) -> NoiseFn:
    """eps_null + scale (eps_y - eps_null), both from one call on twice the batch (Ho & Salimans 2022, eq. 6).

    noise_of: conditions (N, ...) -> NoiseFn on N images.
    y: (B, ...) conditions, class labels say; null: "no condition", broadcast to their shape.
    scale: in the convention of the DPM-Solver papers, one more than Ho & Salimans' w: 1 is the conditional model,
        evaluated alone; 0 the unconditional one.
    """
    if scale == 1:
        return noise_of(y)
    y = jnp.asarray(y)
    noise = noise_of(jnp.concatenate([y, jnp.broadcast_to(jnp.asarray(null, y.dtype), y.shape)]))

    def guided(x, t):
        t = jnp.broadcast_to(t, x.shape[:1])
        conditional, unconditional = jnp.split(noise(jnp.concatenate([x, x]), jnp.concatenate([t, t])), 2)
        return unconditional + scale * (conditional - unconditional)

    return guided


def within(noise: NoiseFn, guided: NoiseFn, t_low: float, t_high: float) -> NoiseFn:
    """`guided` at times in (t_low, t_high], `noise` at others (Kynkaanniemi et al. 2024, eq. 6).

    One of the two is evaluated where t is (), as in every sampler; for different times (B,) in a batch both are.
    """

    def chosen(x, t):
        inside = (t_low < t) & (t <= t_high)
        if jnp.ndim(t) == 0:
            return jax.lax.cond(inside, guided, noise, x, t)
        return jnp.where(per_image(inside, x), guided(x, t), noise(x, t))

    return chosen


def static_threshold(noise: NoiseFn, sde: SDE, low: float, high: float) -> NoiseFn:
    """The eps whose data prediction is that of `noise`, clipped to the data range [low, high] (Saharia et al. 2022)."""
    return _on_data_prediction(noise, sde, low, high, lambda u: jnp.clip(u, -1.0, 1.0))


def dynamic_threshold(
    noise: NoiseFn, sde: SDE, low: float, high: float, *, quantile: float = 0.995, minimum: float = 1.0
) -> NoiseFn:
    """The eps of a dynamically thresholded data prediction (Saharia et al. 2022, sec. 2.3).

    With u the data prediction mapped from the data range [low, high] to [-1, 1], and s the larger of `minimum` and the
    `quantile` of |u| over an image: u <- clip(u, -s, s) / s. Where s is 1 this is the static threshold.
    """

    def threshold(u):
        s = jnp.maximum(jnp.quantile(jnp.abs(u).reshape(len(u), -1), quantile, axis=1), minimum)
        s = per_image(s, u)
        return jnp.clip(u, -s, s) / s

    return _on_data_prediction(noise, sde, low, high, threshold)


def _on_data_prediction(noise: NoiseFn, sde: SDE, low: float, high: float, threshold: Callable) -> NoiseFn:
    """The NoiseFn whose data prediction is `threshold` of that of `noise`, mapped from the data range to [-1, 1]."""
    if not (np.isfinite([low, high]).all() and low < high):
        raise UserError(
            f"thresholding data in [{low}, {high}]: expected a bounded range, which latents do not have: leave it out"
        )
    middle, half = (low + high) / 2, (high - low) / 2

    def thresholded(x, t):
        eps = noise(x, t)
        alpha, sigma = per_image(sde.alpha(t), x), per_image(sde.sigma(t), x)
        u = ((x - sigma * eps) / alpha - middle) / half
        # eps + ..., not (x - alpha x0) / sigma: what no threshold touches stays the same bit for bit
        return eps + half * alpha / sigma * (u - threshold(u))

    return thresholded
