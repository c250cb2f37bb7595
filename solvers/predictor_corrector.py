"""Predictor-corrector sampling of the reverse SDE (Song et al. 2021, algorithms 1-5).

At each of n times, from the prior down, some corrector steps and then one predictor step, at the same time, in the
published order. The last step's mean is the sample.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from score_sde import parallel
from score_sde.denoiser import NoiseFn, score_fn
from score_sde.errors import UserError
from score_sde.sde import SDE, per_image


class Update(NamedTuple):
    """One update of x: its value, and the same without its last noise."""

    x: jax.Array
    mean: jax.Array


def reverse_diffusion(sde: SDE, score: Callable, x, t, z, *, n: int, probability_flow: bool = False) -> Update:
    """Invert x <- a x + G z: x_mean = (2 - a) x + G^2 score, and G z on top (eq. 46); half of G^2 for the ODE."""
    a, noise = (per_image(c, x) for c in sde.transition(t, n))
    mean = (2 - a) * x + noise**2 * score(x, t) * (0.5 if probability_flow else 1.0)
    return Update(mean if probability_flow else mean + noise * z, mean)


def euler_maruyama(sde: SDE, score: Callable, x, t, z, *, n: int, probability_flow: bool = False) -> Update:
    """An Euler-Maruyama step of length t_max / n of the reverse SDE, or Euler's of the ODE."""
    dt = sde.t_max / n
    f, g = per_image(sde.drift(t), x), per_image(sde.diffusion(t), x)
    mean = x - (f * x - g**2 * score(x, t) * (0.5 if probability_flow else 1.0)) * dt
    return Update(mean if probability_flow else mean + g * jnp.sqrt(dt) * z, mean)


def no_predictor(sde, score, x, t, z, *, n, probability_flow=False) -> Update:
    return Update(x, x)


def langevin(sde: SDE, score: Callable, x, t, z, *, n: int, snr: float) -> Update:
    """A Langevin step whose size holds the ratio of the norms of score and noise at `snr` (algorithms 4 and 5).

    The norms are means over the global batch, as published: here alone a sample depends on its companions.
    """
    gradient = score(x, t)
    norm = lambda values: parallel.mean(jnp.sqrt(jnp.square(values).sum((1, 2, 3))).mean())
    a, _ = sde.transition(t, n)
    step = per_image(2 * a**2 * (snr * norm(z) / norm(gradient)) ** 2, x)
    mean = x + step * gradient
    return Update(mean + jnp.sqrt(2 * step) * z, mean)


def annealed_langevin(sde: SDE, score: Callable, x, t, z, *, n: int, snr: float) -> Update:
    """A Langevin step whose size follows sigma_t (Song & Ermon 2019, algorithm 1; snr sets its scale)."""
    a, _ = sde.transition(t, n)
    step = per_image(2 * a**2 * (snr * sde.sigma(t)) ** 2, x)
    mean = x + step * score(x, t)
    return Update(mean + jnp.sqrt(2 * step) * z, mean)


def no_corrector(sde, score, x, t, z, *, n, snr) -> Update:
    return Update(x, x)


PREDICTORS = {"euler_maruyama": euler_maruyama, "reverse_diffusion": reverse_diffusion, "none": no_predictor}
CORRECTORS = {"langevin": langevin, "ald": annealed_langevin, "none": no_corrector}


def evaluations(n: int, *, predictor: str, corrector: str, corrector_steps: int) -> int:
    """Network evaluations of a run."""
    return n * ((predictor != "none") + (corrector != "none") * corrector_steps)


def noise_of_keys(keys, shape) -> Callable:
    """The i-th noise draw (B, H, W, C) of samples with keys (B,): a function of the sample's own key alone."""
    return lambda i: jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), shape))(keys)


def sample(
    noise: NoiseFn,
    sde: SDE,
    x,
    draw: Callable,
    *,
    n: int,
    predictor: str = "reverse_diffusion",
    corrector: str = "langevin",
    snr: float = 0.16,
    corrector_steps: int = 1,
    probability_flow: bool = False,
    denoise: bool = True,
    t_end: float | None = None,
):
    """Sample from x (B, H, W, C) of the prior, over n times uniform from t_max to t_end (the SDE's t_min by default).

    draw: i -> (B, H, W, C), the i-th standard normal draw; step k uses corrector_steps of them, then one.
    snr: the corrector's signal-to-noise ratio; denoise: return the last mean, without its noise.
    """
    for name, table in ((predictor, PREDICTORS), (corrector, CORRECTORS)):
        if name not in table:
            raise UserError(f"unknown predictor or corrector {name!r}: use one of {', '.join(table)}")
    score = score_fn(noise, sde)
    correct, predict = CORRECTORS[corrector], PREDICTORS[predictor]
    correcting = corrector_steps if corrector != "none" else 0
    per_step = correcting + (predictor != "none")
    times = jnp.linspace(sde.t_max, sde.t_min if t_end is None else t_end, n, dtype=x.dtype)

    def step(carry, inputs):
        x, _ = carry
        k, t = inputs
        update = Update(x, x)
        for j in range(correcting):
            update = correct(sde, score, update.x, t, draw(k * per_step + j), n=n, snr=snr)
        z = draw(k * per_step + correcting) if predictor != "none" else None
        return predict(sde, score, update.x, t, z, n=n, probability_flow=probability_flow), None

    update, _ = jax.lax.scan(step, Update(x, x), (jnp.arange(n), times))
    return update.mean if denoise else update.x
