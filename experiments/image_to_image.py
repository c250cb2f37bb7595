"""Samples that begin at a noisy image instead of pure noise (Meng et al. 2022, SDEdit), by any few-step solver."""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from experiments import restoration, runs, samplers
from score_sde.errors import UserError
from score_sde.metrics import features
from solvers import grids


class Beginning(NamedTuple):
    """Where samples begin: the options of a solver from that time on, keys of samples -> x, and the image's hash."""

    options: dict
    start: Callable
    identity: str


def begin(model: runs.Model, image: str | None, strength: float, steps: int, options: dict) -> Beginning:
    """What begins at the image, noisy as it is at a time.

    strength: that time, as a share of the SDE's range: 1 leaves nothing of the image, 0 all. image: a file of the size
    that the model draws. The named grid and t_end among `options` are kept, from that time on.
    """
    sde, space = model.diffusion.sde, model.diffusion.space
    if image is None:
        raise UserError("--strength says how much of an image is drawn anew: name it by --image=FILE.png")
    if not 0 < strength <= 1:
        raise UserError(f"--strength={strength:g}: expected more than 0, which keeps the image, and at most 1")
    levels = restoration.read_image(image, space._replace(shape=restoration.image_shape(model)))
    grid = options.get("grid", "time" if model.config.autoencoder else "logsnr")
    if not isinstance(grid, str) or grid not in grids.GRIDS:
        raise UserError(
            f"--strength begins within the time range, for which the times {grid} were not made: take a named grid, "
            f"--option grid={' or '.join(grids.GRIDS)}"
        )
    t_start = np.float64(sde.t_min + strength * (sde.t_max - sde.t_min))
    times = grids.times(grid, sde, steps, t_start=t_start, t_end=options.get("t_end"))
    x0 = jax.jit(space.encode)(jax.random.key(0), levels)
    alpha, share = float(sde.alpha(t_start)), float(sde.sigma(t_start)) / sde.prior_std

    start = lambda keys: alpha * x0[None] + share * samplers.prior(model.diffusion, keys)
    identity = features.fingerprint(strength, hashlib.sha256(np.ascontiguousarray(levels).tobytes()).hexdigest())
    return Beginning(options | dict(grid=times.tolist()), start, identity)
