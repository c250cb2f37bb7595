"""The probability-flow ODE, solved adaptively and wholly on the device, and the exact likelihood along it.

Divided by r = sqrt(alpha^2 + sigma^2), x keeps the size of the data; let u = x / r. The angle w with

    alpha : sigma = cos^2(w) : sin^2(w)

grows from nearly 0 (data) to nearly pi / 2 (prior). With h = sqrt(cos^4(w) + sin^4(w)), the ODE of every SDE (Song et
al. 2021, eq. 13) is

    du / dw = (2 tan(w) / h) (eps - sin^2(w) / h u).

It has no stiff linear part and is at rest for data of unit variance. The square in w spreads both ends: sampling,
encoding and likelihood together need fewest evaluations in it, among t, lam, sigma / alpha and other angles
(`python -m benchmarks.likelihood` compares it with the published t). The density changes by d log p(u) / dw =
-div (du / dw) (Song et al. 2021, eq. 39), and log p(x) = log p(u) - D log r for D pixels times channels.
"""

from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from score_sde import parallel
from score_sde.denoiser import NoiseFn, score_fn
from score_sde.errors import UserError
from score_sde.sde import SDE, per_image
from score_sde.space import Space
from solvers.predictor_corrector import reverse_diffusion

MAX_STEPS = 4096  # accepted and rejected
FIRST_STEPS = 0.01, -0.05  # of w in radians, from data, where the ODE turns fastest, and from the prior; then adapted
LARGEST_TRACE = 1024  # dimensions of an exact trace


class Run(NamedTuple):
    """What a solution cost and where it ended; `check` it on the host."""

    evaluations: jax.Array  # () of the network, those of rejected steps included
    steps: jax.Array  # () accepted and rejected
    t: jax.Array  # () the time reached
    finished: jax.Array  # () bool


@parallel.full_precision  # rounded to bfloat16, the field would seem to turn, and steps shrink without end
def solve(
    noise: NoiseFn,
    sde: SDE,
    x,
    *,
    rtol: float,
    atol: float,
    t_start: float | None = None,
    t_end: float | None = None,
    denoise: int | None = None,
) -> tuple[jax.Array, Run]:
    """Integrate images x (B, H, W, C) from t_start (t_max by default) to t_end (t_min); either may be the larger.

    From prior to data this decodes, from data to prior it encodes. rtol, atol: the error of a step in x / r that is
    accepted, as its RMS over all pixels, images and devices, so that all devices take the same steps.
    denoise: end with the noise-free step of `reverse_diffusion` for a chain of that many steps, as published; it costs
    one evaluation. Pure and jittable. Errors: UserError for tolerances below what the type of x resolves.
    """
    times = sde.t_max if t_start is None else t_start, sde.t_min if t_end is None else t_end

    def field(w, u, _):
        return _velocity(noise, sde, w, u)

    first, last = (_radius(sde, t, x) for t in times)
    u, run = _integrate(field, sde, x / first, times, rtol, atol)
    x = last * u
    if denoise is None:
        return x, run
    t = jnp.asarray(times[1], x.dtype)
    x = reverse_diffusion(sde, score_fn(noise, sde), x, t, jnp.zeros_like(x), n=denoise).mean
    return x, run._replace(evaluations=run.evaluations + 1)


@parallel.full_precision
def log_likelihood(
    noise: NoiseFn, sde: SDE, x, probes, *, rtol: float, atol: float, t_min: float | None = None
) -> tuple[jax.Array, jax.Array, Run]:
    """log p(x) in nats (B,) of images x (B, H, W, C) at time t_min (the SDE's by default), their latents, the run.

    probes: (P, B, H, W, C) of zero mean and unit covariance, as PROBES draws them: the divergence is the mean of
    v (J v) over them (Skilling 1989, Hutchinson 1990). Velocity and divergence share one network evaluation, which is
    linearized and applied to all probes. The step control of `solve` holds for log p / D too. Errors: as `solve`.
    """
    times = sde.t_min if t_min is None else t_min, sde.t_max

    def field(w, state, _):
        velocity, jacobian = jax.linearize(lambda u: _velocity(noise, sde, w, u), state[0])
        return velocity, jax.vmap(lambda v: (v * jacobian(v)).mean((1, 2, 3)))(probes).mean(0)

    first, last = (_radius(sde, t, x) for t in times)
    (u, growth), run = _integrate(field, sde, (x / first, jnp.zeros(len(x), x.dtype)), times, rtol, atol)
    z = last * u
    return sde.prior_logp(z) + x[0].size * (growth + jnp.log(last / first)), z, run


def bits_per_dim(logp, space: Space, *, levels: int = 256):
    """Bits per dimension of `levels` discrete levels whose dequantized images have the log density logp, in nats.

    A level is dx wide in the data range, so -log2 p(level) >= -log2 (p(x) dx^D) (Theis et al. 2016, eq. 3).
    """
    width = (space.high - space.low) / levels
    if not np.isfinite(width):
        raise UserError("bits/dim are those of pixels: latents have no levels")
    return -logp / (np.prod(space.shape) * np.log(2)) - np.log2(width)


def rademacher(key, n: int, shape) -> jax.Array:
    """(n, *shape) of random signs."""
    return jax.random.rademacher(key, (n, *shape), jnp.float32)


def gaussian(key, n: int, shape) -> jax.Array:
    """(n, *shape) of the standard normal."""
    return jax.random.normal(key, (n, *shape))


def exact(key, n: int, shape) -> jax.Array:
    """(D, *shape), the unit vectors times sqrt(D), whose mean is the trace itself; for small D."""
    size = int(np.prod(shape))
    if size > LARGEST_TRACE:
        raise UserError(f"the exact trace of {size} dimensions takes as many derivatives: use rademacher or gaussian")
    return (np.sqrt(size) * jnp.eye(size)).reshape(size, *shape)


# name: (key, number, image shape) -> (P, H, W, C), the probes of one image
PROBES = {"rademacher": rademacher, "gaussian": gaussian, "exact": exact}


def interpolate(z0, z1, share):
    """Latents (B, H, W, C) on the great circle from z0 to z1; share: (B,), 0 gives z0 and 1 gives z1."""
    inner = lambda a, b: (a * b).sum((1, 2, 3))
    cosine = inner(z0, z1) / np.sqrt(inner(z0, z0) * inner(z1, z1))
    angle = np.arccos(np.clip(cosine, -1, 1))
    weights = (np.sin((1 - share) * angle) / np.sin(angle), np.sin(share * angle) / np.sin(angle))
    return per_image(weights[0], z0) * z0 + per_image(weights[1], z1) * z1


def check(run: Run, x, index):
    """Refuse, on the host, what was not solved to its end: UserError with the time, the step and, of `index`, which.

    run: as `parallel.gather` returns it; x: (B, H, W, C); index: (B,) how the user knows these images.
    """
    bad = ~np.isfinite(x).all((1, 2, 3))
    if run.finished.all() and not bad.any():
        return
    problem = f"sample {index[bad.argmax()]} is not finite" if bad.any() else "the end is not reached"
    raise UserError(
        f"{problem} after {run.steps[0]} steps of the ODE, at t = {run.t[0]:.3g}: "
        "try larger rtol and atol, or another checkpoint"
    )


def _velocity(noise: NoiseFn, sde: SDE, w, u):
    """du / dw."""
    t = _time(sde, w)
    eps = noise(u * jnp.hypot(sde.alpha(t), sde.sigma(t)), t)
    h = jnp.hypot(jnp.cos(w) ** 2, jnp.sin(w) ** 2)
    return 2 * jnp.tan(w) / h * (eps - jnp.sin(w) ** 2 / h * u)


def _time(sde: SDE, w):
    return sde.t_of_lam(-2 * jnp.log(jnp.tan(w)))


def _radius(sde: SDE, t: float, x):
    """r at a time of the host, in the type of x."""
    t = np.float64(t)
    return jnp.asarray(np.hypot(sde.alpha(t), sde.sigma(t)), x.dtype)


def _finite(tree):
    """The share of finite entries, over all devices."""
    return parallel.mean(jnp.stack([jnp.isfinite(leaf).mean() for leaf in jax.tree.leaves(tree)]).min())


def _global_rms(errors):
    """The norm of a step's errors, relative to what is asked: RMS over all entries and devices, of each part alike.

    What is not finite does not count: shorter steps would not mend it, and `_integrate` stops at it.
    """
    finite = lambda leaf: jnp.where(jnp.isfinite(leaf), leaf, 0)
    return jnp.sqrt(parallel.mean(sum(jnp.square(finite(leaf)).mean() for leaf in jax.tree.leaves(errors))))


def _integrate(field, sde: SDE, state, times: tuple[float, float], rtol: float, atol: float):
    """The state at times[1] from that at times[0], by Dormand and Prince's method of order 5; and the Run."""
    dtype = jax.tree.leaves(state)[0].dtype
    finest = 10 * float(jnp.finfo(dtype).eps)
    if not min(rtol, atol) >= finest:
        raise UserError(
            f"rtol={rtol:g}, atol={atol:g}: {dtype} cannot tell errors below {finest:.1e} from rounding: "
            f"use at least {finest:.1e}, as in --option rtol=1e-5"
        )
    start, end = (jnp.asarray(np.arctan(np.exp(-sde.lam(np.float64(t)) / 2)), dtype) for t in times)
    # diffrax mixes types and ranks in its own arithmetic
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Dopri5(),
            start,
            end,
            jnp.where(end > start, *FIRST_STEPS),
            state,
            stepsize_controller=diffrax.PIDController(rtol, atol, _global_rms, pcoeff=0.4, icoeff=0.3),
            event=diffrax.Event(lambda t, state, args, **_: _finite(state) < 1),
            max_steps=MAX_STEPS,
            throw=False,
        )
    steps = solution.stats["num_steps"]
    # six evaluations a step: the last of an accepted one is the first of the next, and a rejected one keeps its first
    run = Run(1 + 6 * steps, steps, _time(sde, solution.ts[0]), solution.result == diffrax.RESULTS.successful)
    return jax.tree.map(lambda leaf: leaf[0], solution.ys), run
