"""Linear SDEs, each fixed by two functions of time: log_alpha(t) and sigma(t).

The forward process is dx = f(t) x dt + g(t) dw (Song et al. 2021, eq. 5), with Gaussian marginals

    q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I).

An SDE of this package gives `log_alpha`, `sigma` and the inverse `t_of_lam`; all else follows from these in the base
class,

    f = d log_alpha / dt,   g^2 = d sigma^2 / dt - 2 f sigma^2,   lam = log(alpha / sigma),

but for what a published chain does otherwise: its discrete transition, the noise of its ancestral sampling, its prior.

Time runs from 0 (data) to `t_max` (prior). Every function of time takes an array of any shape. A NumPy array is worked
on in NumPy, in its own precision (solver tables are built on the host in float64); a JAX array in JAX.
"""

import abc
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from score_sde.errors import UserError


def numpy_of(t):
    """The array module `t` belongs to."""
    return jnp if isinstance(t, jax.Array) else np


def derivative(function, t):
    """d function(t) / dt, elementwise; for a NumPy `t` in float64."""
    if isinstance(t, jax.Array):
        return jax.jvp(function, (t,), (jnp.ones_like(t),))[1]
    with jax.enable_x64(True):
        return np.asarray(derivative(function, jnp.asarray(t, jnp.float64)))


def per_image(coefficient, x):
    """A coefficient of shape () or (B,), ready to multiply images x of shape (B, H, W, C)."""
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim))


# The smallest alpha at which eps in float32 still holds x_0 = (x - sigma eps) / alpha, to some 1e-4, and EMS.
ALPHA_MIN = 1e-3


@dataclasses.dataclass(frozen=True)
class SDE(abc.ABC):
    """A linear SDE. Subclasses define the abstract methods and, where a chain is published, the three after them.

    t_min: where sampling and likelihood end by default; the marginals are defined on (0, t_max].
    t_max: where the prior stands. Where alpha falls below ALPHA_MIN before, time ends there: x is noise from there on,
        and what a network says of x_0 would be lost in the rounding of eps.
    """

    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self):
        noise_only = lambda t: float(self.log_alpha(np.float64(t))) < np.log(ALPHA_MIN) - 1e-6
        with np.errstate(all="ignore"):
            if not (0 < self.t_min < self.t_max and noise_only(self.t_max)):
                return
            low, high = self.t_min, self.t_max
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (low, middle) if noise_only(middle) else (middle, high)
        object.__setattr__(self, "t_max", high)

    @abc.abstractmethod
    def log_alpha(self, t):
        """log of the factor that x_0 has kept at time t."""

    @abc.abstractmethod
    def sigma(self, t):
        """Standard deviation of x_t given x_0."""

    @abc.abstractmethod
    def t_of_lam(self, lam):
        """The time at which log(alpha / sigma) equals lam."""

    @property
    def prior_std(self) -> float:
        """Standard deviation of the prior N(0, prior_std^2 I) that sampling starts from."""
        return 1.0

    def transition(self, t, n: int):
        """One of n forward steps, that which ends at t: x <- a x + G z, z ~ N(0, I). Returns (a, G), of the shape of t.

        By default the exact one of length t_max / n, by which the marginals follow each other. Reverse-diffusion
        sampling (Song et al. 2021, eq. 46) inverts this step.
        """
        xp = numpy_of(t)
        before = xp.maximum(t - self.t_max / n, 0.0)
        a = xp.exp(self.log_alpha(t) - self.log_alpha(before))
        return a, xp.sqrt(self.sigma(t) ** 2 - (a * self.sigma(before)) ** 2)

    def ancestral_std(self, t, n: int):
        """Standard deviation of the noise that ancestral sampling adds when it goes back over `transition(t, n)`.

        By default that of x before given x_t and x_0, sigma_before G / sigma (Song et al. 2021, eq. 47, for VE);
        published for VP is G (Ho et al. 2020, algorithm 2). UserError where no chain is published.
        """
        before = numpy_of(t).maximum(t - self.t_max / n, 0.0)
        return self.sigma(before) * self.transition(t, n)[1] / self.sigma(t)

    def alpha(self, t):
        return numpy_of(t).exp(self.log_alpha(t))

    def lam(self, t):
        """log(alpha / sigma): half the log signal-to-noise ratio, falling in t."""
        return self.log_alpha(t) - numpy_of(t).log(self.sigma(t))

    def drift(self, t):
        """f(t), the factor of x in the forward drift."""
        return derivative(self.log_alpha, t)

    def diffusion(self, t):
        """g(t)."""
        variance = lambda t: self.sigma(t) ** 2
        return numpy_of(t).sqrt(derivative(variance, t) - 2 * self.drift(t) * variance(t))

    def reverse_drift(self, x, t, eps, probability_flow: bool = False):
        """Drift of the reverse SDE, or of the probability-flow ODE (Song et al. 2021, eqs. 6 and 13).

        x, eps: (B, H, W, C); t: () or (B,). With score = -eps / sigma: f x + g^2 eps / sigma, half of the latter for
        the ODE.
        """
        noise = self.diffusion(t) ** 2 / self.sigma(t) * (0.5 if probability_flow else 1.0)
        return per_image(self.drift(t), x) * x + per_image(noise, x) * eps

    def perturb(self, x0, t, z):
        """x_t = alpha_t x_0 + sigma_t z for images (B, H, W, C) and times () or (B,)."""
        return per_image(self.alpha(t), x0) * x0 + per_image(self.sigma(t), x0) * z

    def prior_logp(self, z):
        """log density of the prior, in nats, at images z (B, H, W, C); returns (B,)."""
        z = z.reshape(len(z), -1)
        variance = self.prior_std**2
        return -0.5 * (z.shape[1] * np.log(2 * np.pi * variance) + (z**2).sum(1) / variance)


def _vp_sigma(log_alpha):
    """sigma where sigma^2 = 1 - alpha^2, without cancellation at small t."""
    xp = numpy_of(log_alpha)
    return xp.sqrt(-xp.expm1(2 * log_alpha))


def _vp_log_alpha(lam):
    """log_alpha from lam where sigma^2 = 1 - alpha^2."""
    return -0.5 * numpy_of(lam).logaddexp(-2 * lam, 0 * lam)


def _linear_beta_log_alpha(t, beta_min, beta_max):
    """-1/2 of the integral of beta(s) = beta_min + s (beta_max - beta_min) over [0, t]."""
    return -0.25 * t**2 * (beta_max - beta_min) - 0.5 * t * beta_min


def _linear_beta_time(log_alpha, beta_min, beta_max):
    """Inverse of `_linear_beta_log_alpha`, in the form of the quadratic's root that does not cancel."""
    if beta_min == beta_max:
        return -2 * log_alpha / beta_min
    rest = -4 * log_alpha * (beta_max - beta_min)
    return rest / (numpy_of(log_alpha).sqrt(beta_min**2 + rest) + beta_min) / (beta_max - beta_min)


@dataclasses.dataclass(frozen=True)
class VP(SDE):
    """Variance preserving, the continuous DDPM (Song et al. 2021, eqs. 11 and 32-33): sigma^2 = 1 - alpha^2."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def log_alpha(self, t):
        return _linear_beta_log_alpha(t, self.beta_min, self.beta_max)

    def sigma(self, t):
        return _vp_sigma(self.log_alpha(t))

    def t_of_lam(self, lam):
        return _linear_beta_time(_vp_log_alpha(lam), self.beta_min, self.beta_max)

    def transition(self, t, n):
        """DDPM's step: a = sqrt(1 - beta_i), G = sqrt(beta_i), beta_i = beta(t_i) t_max / n, t_i = t_max i / (n - 1).

        Needs more steps than beta(t_max) t_max.
        """
        most = (self.beta_min + self.t_max * (self.beta_max - self.beta_min)) * self.t_max
        if n <= most:
            raise UserError(f"{n} stochastic steps: this SDE's need more than beta_max = {most:g}")
        xp = numpy_of(t)
        i = xp.floor(t / self.t_max * (n - 1))
        beta = (self.beta_min + i / (n - 1) * self.t_max * (self.beta_max - self.beta_min)) * self.t_max / n
        return xp.sqrt(1 - beta), xp.sqrt(beta)

    def ancestral_std(self, t, n):
        return self.transition(t, n)[1]


@dataclasses.dataclass(frozen=True)
class SubVP(SDE):
    """Sub-variance preserving (Song et al. 2021, eqs. 27-29): the drift of VP with sigma = 1 - alpha^2."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def log_alpha(self, t):
        return _linear_beta_log_alpha(t, self.beta_min, self.beta_max)

    def sigma(self, t):
        return -numpy_of(t).expm1(2 * self.log_alpha(t))

    def t_of_lam(self, lam):
        # exp(-lam) = (1 - alpha^2) / alpha = -2 sinh(log_alpha)
        xp = numpy_of(lam)
        return _linear_beta_time(-xp.arcsinh(xp.exp(-lam) / 2), self.beta_min, self.beta_max)

    def transition(self, t, n):
        """Euler's step of length t_max / n; no other discretization of this SDE is published."""
        dt = self.t_max / n
        return 1 + self.drift(t) * dt, self.diffusion(t) * np.sqrt(dt)

    def ancestral_std(self, t, n):
        raise UserError("sub-VP has no chain to sample ancestrally: use predictor reverse_diffusion or euler_maruyama")


@dataclasses.dataclass(frozen=True)
class VE(SDE):
    """Variance exploding, the continuous NCSN (Song et al. 2021, eqs. 9 and 30-31): alpha = 1, sigma geometric in t."""

    t_min: float = 1e-5
    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def log_alpha(self, t):
        return 0.0 * t

    def sigma(self, t):
        return self.sigma_min * numpy_of(t).exp(t * np.log(self.sigma_max / self.sigma_min))

    def t_of_lam(self, lam):
        return -(lam + np.log(self.sigma_min)) / np.log(self.sigma_max / self.sigma_min)

    def transition(self, t, n):
        """NCSN's step: a = 1, G^2 = sigma_i^2 - sigma_(i-1)^2, sigma_i = sigma(t_max i / (n - 1)), sigma_(-1) = 0."""
        xp = numpy_of(t)
        i = xp.floor(t / self.t_max * (n - 1))
        ratio = (self.sigma_min / self.sigma_max) ** (self.t_max / (n - 1))
        # the difference of squares, without cancellation
        noise = self.sigma(i / (n - 1) * self.t_max) * xp.where(i > 0, np.sqrt(1 - ratio**2), 1.0)
        return xp.ones_like(t), noise

    def ancestral_std(self, t, n):
        xp = numpy_of(t)
        first = t / self.t_max * (n - 1) < 1
        ratio = (self.sigma_min / self.sigma_max) ** (self.t_max / (n - 1))
        return self.transition(t, n)[1] * xp.where(first, 0.0, ratio)

    @property
    def prior_std(self):
        return self.sigma_max**self.t_max * self.sigma_min ** (1 - self.t_max)


@dataclasses.dataclass(frozen=True)
class DiscreteVP(SDE):
    """DDPM's chain of n steps as an SDE: log_alpha runs straight between the nodes of the published table.

    alpha_i^2 = prod_(j <= i) (1 - beta_j) (Ho et al. 2020), beta_i = linspace(beta_min, beta_max, n)_i / n, or with
    `scaled` the square of a linspace of roots (Stable Diffusion: beta_min 0.85, beta_max 12). The nodes stand at
    t_i = t_first + (1 - t_first) i / (n - 1): score_sde puts the first at 0, DPM-Solver at 1 / n.

    zero_terminal_snr: move and stretch alpha_i so that the last is 0 and the first stays (Lin et al. 2024, algorithm
        1). Time ends before it, see SDE.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    n: int = 1000
    scaled: bool = False
    t_first: float = 0.0
    zero_terminal_snr: bool = False

    def _betas(self):
        """(n,) float64, before they are rescaled."""
        if self.scaled:
            return np.linspace(np.sqrt(self.beta_min), np.sqrt(self.beta_max), self.n) ** 2 / self.n
        return np.linspace(self.beta_min, self.beta_max, self.n) / self.n

    def _log_alphas(self):
        """(n,) float64, summed in it; -inf where alpha is 0."""
        with np.errstate(divide="ignore"):
            log_alphas = 0.5 * np.cumsum(np.log1p(-self._betas()))
            if not self.zero_terminal_snr:
                return log_alphas
            alphas = np.exp(log_alphas)
            return np.log((alphas - alphas[-1]) * (alphas[0] / (alphas[0] - alphas[-1])))

    def _nodes(self, dtype):
        """Times and log_alpha of the nodes."""
        times, log_alphas = np.linspace(self.t_first, 1.0, self.n), self._log_alphas()
        return times.astype(dtype), np.maximum(log_alphas, 2 * np.log(ALPHA_MIN)).astype(dtype)

    def log_alpha(self, t):
        return numpy_of(t).interp(t, *self._nodes(t.dtype))

    def sigma(self, t):
        return _vp_sigma(self.log_alpha(t))

    def t_of_lam(self, lam):
        xp = numpy_of(lam)
        times, log_alphas = self._nodes(lam.dtype)
        return xp.interp(_vp_log_alpha(lam), log_alphas[::-1], times[::-1])

    def transition(self, t, n):
        """The chain's own step, a = sqrt(1 - beta_i), G = sqrt(beta_i), whose number of steps n must be the chain's.

        Where time ends before the chain, or it was rescaled, the exact step.
        """
        if self.zero_terminal_snr or self.t_max < 1:
            return super().transition(t, n)
        if n != self.n:
            raise UserError(
                f"this chain has {self.n} steps; stochastic sampling in {n} is not defined: use --steps={self.n}"
            )
        xp = numpy_of(t)
        i = xp.floor((t - self.t_first) / (1 - self.t_first) * (n - 1)).astype(int)
        beta = xp.asarray(self._betas().astype(t.dtype))[i]
        return xp.sqrt(1 - beta), xp.sqrt(beta)

    def ancestral_std(self, t, n):
        return self.transition(t, n)[1]


@dataclasses.dataclass(frozen=True)
class CosineVP(SDE):
    """Variance preserving with alpha a cosine (Nichol & Dhariwal 2021), cut at t_max where beta would diverge."""

    t_max: float = 0.9946
    s: float = 0.008

    def log_alpha(self, t):
        xp = numpy_of(t)
        angle = lambda t: (t + self.s) / (1 + self.s) * (np.pi / 2)
        return xp.log(xp.cos(angle(t))) - np.log(np.cos(angle(0.0)))

    def sigma(self, t):
        return _vp_sigma(self.log_alpha(t))

    def t_of_lam(self, lam):
        xp = numpy_of(lam)
        cosine = xp.exp(_vp_log_alpha(lam)) * np.cos(self.s / (1 + self.s) * np.pi / 2)
        return xp.arccos(cosine) * (2 * (1 + self.s) / np.pi) - self.s

    def ancestral_std(self, t, n):
        return self.transition(t, n)[1]


@dataclasses.dataclass(frozen=True)
class EDM(SDE):
    """Variance exploding with sigma = t (Karras et al. 2022)."""

    t_min: float = 0.002
    t_max: float = 80.0

    def log_alpha(self, t):
        return 0.0 * t

    def sigma(self, t):
        return 1.0 * t

    def t_of_lam(self, lam):
        return numpy_of(lam).exp(-lam)

    @property
    def prior_std(self):
        return self.t_max


@dataclasses.dataclass(frozen=True)
class Flow(SDE):
    """The straight path of flow matching (Lipman et al. 2023; Liu et al. 2023): alpha = 1 - t, sigma = t.

    Cut at t_max < 1, for alpha in float32 has a relative error of 6e-8 / (1 - t).
    """

    t_max: float = 0.999

    def log_alpha(self, t):
        return numpy_of(t).log1p(-t)

    def sigma(self, t):
        return 1.0 * t

    def t_of_lam(self, lam):
        return 1 / (1 + numpy_of(lam).exp(lam))


SDES = {
    "vp": VP,
    "subvp": SubVP,
    "ve": VE,
    "discrete_vp": DiscreteVP,
    "cosine_vp": CosineVP,
    "edm": EDM,
    "flow": Flow,
}
