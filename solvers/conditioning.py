"""Controllable generation: what is known of an image, as a condition of the predictor-corrector sampler.

A condition wraps each call of the corrector and of the predictor (solvers/predictor_corrector.py, `Condition`). For
class labels none is needed: guidance bends the NoiseFn itself (score_sde/guidance.py).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from score_sde.errors import UserError
from score_sde.sde import SDE, per_image
from solvers.predictor_corrector import Condition, Update


def inpainting(sde: SDE, known, mask) -> Condition:
    """Complete images `known` (B, H, W, C) where `mask` (B or 1, H, W, C or 1) is 0 (Song et al. 2021, Appendix I.2).

    After each call, pixels under mask 1 are drawn anew from q(x_t | known). In the end they are alpha known, and the
    others have the mean of the last step. The published code leaves the noise of the last step in the others, even
    where it denoises: its result is that of `sample` without denoising, with alpha known put in under the mask.
    """
    if mask.ndim != 4 or mask.shape[1:3] != known.shape[1:3] or mask.shape[3] not in (1, known.shape[3]):
        raise UserError(
            f"a mask of shape {mask.shape[1:]} does not fit images of shape {known.shape[1:]}: "
            "it needs their height and width, and one channel or as many"
        )
    return _known_part(sde, known, lambda x, values: jnp.where(mask > 0, values, x), lambda z: z)


def colorization(sde: SDE, gray) -> Condition:
    """Colour images `gray` (B, H, W, C), of which the mean over channels counts (Song et al. 2021, Appendix I.3).

    Inpainting of the first channel after an orthogonal transform of the channels with first axis u = (1, ..., 1) /
    sqrt(C): x + u (u . values - u . x). The other axes, which the published code writes out, cancel. The first channel
    takes the noise of the draw's first channel, as published.
    """
    channels = gray.shape[-1]
    if channels == 1:
        raise UserError("colorization needs a model of colour images, these have one channel: use --task=inpaint")
    unit = jnp.full(gray.shape, channels**-0.5, gray.dtype)
    replace = lambda x, values: x + (values - x).mean(-1, keepdims=True)
    return _known_part(sde, gray, replace, lambda z: z[..., :1] * unit)


def _known_part(sde: SDE, known, replace: Callable, known_noise: Callable) -> Condition:
    """replace: (x, values) -> x with its known part taken from images `values`; known_noise: draw z -> its noise."""

    def condition(update, score, x, t, z) -> Update:
        new = update(score, x)
        mean = per_image(sde.alpha(t), known) * known
        return Update(replace(new.x, sde.perturb(known, t, known_noise(z))), replace(new.mean, mean))

    return condition


def inverse_problem(measured_at: Callable, log_likelihood: Callable) -> Condition:
    """Sample from p(x | y) for any measurement y, linear or not (Song et al. 2021, Appendix I.4).

    The score of each call becomes grad_x [log p_t(x) + log p(y_t | x)], with one draw y_t of p(y_t | y) for the call.

    measured_at: (t, z (B, H, W, C) standard normal) -> y_t, the measurement of the image diffused to t: alpha y +
        sigma A z where y = A x_0.
    log_likelihood: (y_t, x (B, H, W, C), t) -> (B,), log p(y_t | x) in nats, each of its own image alone.
    """

    def condition(update, score, x, t, z) -> Update:
        y = measured_at(t, z)
        gradient = lambda x, t: jax.grad(lambda x: log_likelihood(y, x, t).sum())(x)
        return update(lambda x, t: score(x, t) + gradient(x, t), x)

    return condition
