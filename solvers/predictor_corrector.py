"""Predictor-corrector sampling of the reverse SDE (Song et al. 2021, algorithms 1-5).

At each of n times, from the prior down, some corrector steps and then one predictor step, at the same time, in the
published order. The last step's mean is the sample. A condition (solvers/conditioning.py) may wrap each of the two.
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


# How a sample is bent towards what is known of it: (update, score, x, t, z) -> Update, called in place of update(score,
# x) for each call of the corrector (with all its steps) and of the predictor, with a standard normal draw z of its own.
Condition = Callable[[Callable, Callable, jax.Array, jax.Array, jax.Array], Update]


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


def ancestral_sampling(sde: SDE, score: Callable, x, t, z, *, n: int, probability_flow: bool = False) -> Update:
    """Draw from the chain's posterior: x_mean = (x + G^2 score) / a, and noise of `ancestral_std` (eqs. 4 and 47).

    It has no ODE: UserError with probability_flow.
    """
    if probability_flow:
        raise UserError("ancestral_sampling has no probability flow: use predictor reverse_diffusion or euler_maruyama")
    a, noise = (per_image(c, x) for c in sde.transition(t, n))
    mean = (x + noise**2 * score(x, t)) / a
    return Update(mean + per_image(sde.ancestral_std(t, n), x) * z, mean)


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


PREDICTORS = {
    "euler_maruyama": euler_maruyama,
    "reverse_diffusion": reverse_diffusion,
    "ancestral_sampling": ancestral_sampling,
    "none": no_predictor,
}
CORRECTORS = {"langevin": langevin, "ald": annealed_langevin, "none": no_corrector}


def evaluations(n: int, *, predictor: str, corrector: str, corrector_steps: int) -> int:
    """Network evaluations of a run."""
    return n * ((predictor != "none") + (corrector != "none") * corrector_steps)


def noise_of_keys(keys, shape) -> Callable:
    """The i-th noise draw (B, H, W, C) of samples with keys (B,): a function of the sample's own key alone."""
    return lambda i: jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), shape))(keys)


def times(sde: SDE, n: int, t_end: float | None = None, dtype=jnp.float32):
    """The n times of a run: uniform from t_max to t_end (the SDE's t_min by default)."""
    return jnp.linspace(sde.t_max, sde.t_min if t_end is None else t_end, n, dtype=dtype)


def stepper(
    noise: NoiseFn,
    sde: SDE,
    draw: Callable,
    *,
    n: int,
    predictor: str = "reverse_diffusion",
    corrector: str = "langevin",
    snr: float = 0.16,
    corrector_steps: int = 1,
    probability_flow: bool = False,
    t_end: float | None = None,
    condition: Condition | None = None,
) -> Callable:
    """(k, Update) -> Update: step k of n, the body of `sample`'s loop.

    draw: i -> (B, H, W, C), the i-th standard normal draw; each step uses corrector_steps of them, then one of the
        condition, then one of the predictor, then one of the condition.
    snr: the corrector's signal-to-noise ratio.
    """
    for name, table in ((predictor, PREDICTORS), (corrector, CORRECTORS)):
        if name not in table:
            raise UserError(f"unknown predictor or corrector {name!r}: use one of {', '.join(table)}")
    correcting = corrector_steps if corrector != "none" else 0
    predicting = int(predictor != "none")
    conditioning = int(condition is not None)
    per_step = correcting + predicting + 2 * conditioning

    def conditioned(update, x, t, draw_index) -> Update:
        score = score_fn(noise, sde)
        return update(score, x) if condition is None else condition(update, score, x, t, draw(draw_index))

    def step(k, before: Update) -> Update:
        t = times(sde, n, t_end, before.x.dtype)[k]
        first = k * per_step

        def correct(score, x) -> Update:
            update = Update(x, x)
            for j in range(correcting):
                update = CORRECTORS[corrector](sde, score, update.x, t, draw(first + j), n=n, snr=snr)
            return update

        def predict(score, x) -> Update:
            z = draw(first + correcting + conditioning) if predicting else None
            return PREDICTORS[predictor](sde, score, x, t, z, n=n, probability_flow=probability_flow)

        corrected = conditioned(correct, before.x, t, first + correcting)
        return conditioned(predict, corrected.x, t, first + per_step - 1)

    return step


def sample(noise: NoiseFn, sde: SDE, x, draw: Callable, *, n: int, denoise: bool = True, **options):
    """Sample from x (B, H, W, C) of the prior in n steps.

    denoise: return the last mean, without its noise. draw and the options: see `stepper`.
    """
    update = jax.lax.fori_loop(0, n, stepper(noise, sde, draw, n=n, **options), Update(x, x))
    return update.mean if denoise else update.x
