"""From a network to a NoiseFn: the one function type that samplers, solvers, losses and EMS know.

    NoiseFn = (x, t) -> eps,  x and eps (B, H, W, C), t () or (B,)

eps is the prediction of z in x_t = alpha_t x_0 + sigma_t z; the score is -eps / sigma_t. Everything that bends a model
(guidance, thresholding, a latent space) is a function NoiseFn -> NoiseFn.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from score_sde.sde import SDE, VP, numpy_of, per_image
from score_sde.space import Space

NoiseFn = Callable[[jax.Array, jax.Array], jax.Array]


class Diffusion(NamedTuple):
    """A model without its config: what sampling, EMS, likelihood, search and evaluation ask of it.

    A condition is a tree of arrays (B, ...): class labels, embeddings; None for a model that knows none.
    """

    sde: SDE
    space: Space
    init: Callable  # key -> params before training
    noise_of: Callable  # (params, condition or None for "none", dropout keys (B,) or None) -> NoiseFn
    null: Any = None  # the condition that says nothing, one example's; None: training never showed it
    conditions: Callable = lambda index: None  # numbers of samples (B,) -> their conditions
    num_classes: int = 0  # of a model conditioned on class labels (B,)


def by_turns(num_classes: int) -> Callable:
    """`Diffusion.conditions` of class labels: sample i has class i modulo num_classes."""
    return lambda index: index % num_classes


class Coefficients(NamedTuple):
    """What makes eps of a network's own output F, each a number or of the shape of t: eps = skip x + out F(inp x)."""

    inp: jax.Array | float
    skip: jax.Array | float
    out: jax.Array | float


def _v(alpha, sigma, d) -> Coefficients:
    """F = alpha z - sigma x_0 (Salimans & Ho 2022, appendix D)."""
    square = alpha**2 + sigma**2
    rounding = 8 * jnp.finfo(square.dtype).eps
    square = jnp.where(jnp.abs(square - 1) < rounding, jnp.ones_like(square), square)  # for VP it is 1, not rounded
    return Coefficients(1.0, sigma / square, alpha / square)


def _edm(alpha, sigma, d) -> Coefficients:
    """F of the denoiser D(y) = d^2 / q^2 y + r d / q F(y / q) at y = x / alpha (Karras et al. 2022, eq. 7, Table 1).

    With r = sigma / alpha and q^2 = r^2 + d^2: for data of standard deviation d, what F sees and what it learns have
    unit variance at every noise level.
    """
    r = sigma / alpha
    q = numpy_of(r).hypot(r, d)
    return Coefficients(1 / (alpha * q), r / (alpha * q**2), -d / q)


# What a network outputs, as F: (alpha, sigma, standard deviation d of the data) -> Coefficients.
PARAMETERIZATIONS = {
    "eps": lambda alpha, sigma, d: Coefficients(1.0, 0.0, 1.0),
    "score": lambda alpha, sigma, d: Coefficients(1.0, 0.0, -sigma),
    "scaled_score": lambda alpha, sigma, d: Coefficients(1.0, 0.0, -1.0),  # sigma score: NCSN, before it divides
    "x0": lambda alpha, sigma, d: Coefficients(1.0, 1 / sigma, -alpha / sigma),
    "v": _v,
    "edm": _edm,
    # eps of x scaled to alpha^2 + sigma^2 = 1: how a network of VP serves any SDE (Karras et al. 2022, Table 1)
    "vp": lambda alpha, sigma, d: Coefficients(1 / numpy_of(sigma).hypot(alpha, sigma), 0.0, 1.0),
    "flow": lambda alpha, sigma, d: Coefficients(1.0, 1 / (alpha + sigma), alpha / (alpha + sigma)),  # F = z - x_0
}


@functools.cache
def iddpm_sigmas(n: int) -> np.ndarray:
    """The noise levels (n + 1,), float64, from the largest to 0, of iDDPM's cosine chain of n steps.

    As Karras et al. 2022 continue it (Table 1, appendix C.3): u_n = 0 and, with a_j = sin^2(pi j / (2 n 1.008)),
    u_(j-1) = sqrt((u_j^2 + 1) / max(a_(j-1) / a_j, 0.001) - 1).
    """
    a = np.sin(np.pi / 2 * np.arange(n + 1) / (n * 1.008)) ** 2
    u = np.zeros(n + 1)
    for j in range(n, 0, -1):
        u[j - 1] = np.sqrt((u[j] ** 2 + 1) / max(a[j - 1] / a[j], 0.001) - 1)
    return u


def _iddpm(sde: SDE, t, n: int):
    """The step of iDDPM's chain with the nearest noise level, counted from 0 at the lowest."""
    xp = numpy_of(t)
    sigma, u = xp.exp(-sde.lam(t)), iddpm_sigmas(n).astype(t.dtype)
    return (n - 1 - xp.abs(sigma[..., None] - u.reshape(*(1,) * t.ndim, -1)).argmin(-1)).astype(t.dtype)


# What a network is told of the time: (sde, t, number of noise levels) -> label (B,).
LABELS = {
    "time": lambda sde, t, n: 999 * t,  # continuous VP and sub-VP
    "sigma": lambda sde, t, n: sde.sigma(t),  # continuous VE
    "t": lambda sde, t, n: t,  # t itself
    "index": lambda sde, t, n: t * (n - 1),  # n discrete steps of VP; not rounded, as published
    "node": lambda sde, t, n: t * n - 1,  # the same where the first node stands at 1 / n (DPM-Solver, Stable Diffusion)
    "lam": lambda sde, t, n: sde.lam(t),  # any SDE; smooth in what few-step solvers integrate over
    "edm": lambda sde, t, n: -sde.lam(t) / 4,  # log(sigma / alpha) / 4 (Karras et al. 2022, Table 1: c_noise)
    # as networks of the VP and VE SDEs and of iDDPM are told any SDE's sigma / alpha (Karras et al. 2022, Table 1)
    "vp": lambda sde, t, n: (n - 1) * VP().t_of_lam(sde.lam(t)),
    "ve": lambda sde, t, n: -sde.lam(t) - np.log(2),
    "iddpm": _iddpm,
    "reversed_index": lambda sde, t, n: jnp.round((1 - t) * (n - 1)),  # n discrete steps of VE, largest sigma first
}

# The time whose noise level a rounded label names: (t, number of noise levels) -> t.
NODES = {"reversed_index": lambda t, n: 1 - jnp.round((1 - t) * (n - 1)) / (n - 1)}


def coefficients(output: str, sde: SDE, t, sigma_data: float = 0.5) -> Coefficients:
    """Coefficients of a parameterization at times t of an SDE.

    output: a key of PARAMETERIZATIONS; sigma_data: standard deviation of the data, which "edm" alone asks for.
    """
    return PARAMETERIZATIONS[output](sde.alpha(t), sde.sigma(t), sigma_data)


def noise_fn(
    network: Callable,
    sde: SDE,
    *,
    output: str,
    label: str,
    num_scales: int = 1000,
    sigma_data: float = 0.5,
    data_range: tuple[float, float] = (-1.0, 1.0),
) -> NoiseFn:
    """The NoiseFn of a network under an SDE.

    network: (u (B, H, W, C), label (B,)) -> F (B, H, W, C or more), with its parameters bound; channels of F beyond
        those of x (learned variances) are cut.
    output, sigma_data: see `coefficients`; label: a key of LABELS; num_scales: the noise levels of a discrete label.
    data_range: lowest and highest value of the data. Networks are trained on [-1, 1], so u is inp x mapped there: the
        published 2 x - 1 of VE, whose data are in [0, 1].
    """
    low, high = data_range
    scale, shift = 2 / (high - low), (high + low) / (high - low)

    def noise(x, t):
        t = jnp.broadcast_to(t, x.shape[:1])
        node = NODES[label](t, num_scales) if label in NODES else t
        inp, skip, out = (per_image(jnp.asarray(c, x.dtype), x) for c in coefficients(output, sde, node, sigma_data))
        F = network(scale * (inp * x) - shift, LABELS[label](sde, t, num_scales))
        eps = out * F[..., : x.shape[-1]] + skip * x
        if node is t:
            return eps
        return eps * per_image(sde.sigma(t) / sde.sigma(node), x)  # between nodes the score is that of the nearest

    return noise


def score_fn(noise: NoiseFn, sde: SDE) -> Callable:
    """The score that stochastic samplers need."""
    return lambda x, t: -noise(x, t) / per_image(sde.sigma(t), x)
