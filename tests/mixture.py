"""A Gaussian mixture in image space: its score, noise and density are known exactly at every (alpha, sigma)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from score_sde.sde import per_image
from tests import reference


@dataclasses.dataclass(frozen=True)
class Mixture:
    """weights (K,), means and variances (K, H, W, C), float64."""

    weights: np.ndarray
    means: np.ndarray
    variances: np.ndarray

    @classmethod
    def reference(cls):
        """The mixture that the published implementations' figures were made with, channels last."""
        shape = (3, 8, 8)
        means = [0.5 * reference.normal(f"gmm/mu/{k}", shape) for k in range(3)]
        logvars = [0.5 * reference.normal(f"gmm/logvar/{k}", shape).astype(np.float64) for k in range(3)]
        variances = [c * np.exp(v) for c, v in zip((0.04, 0.09, 0.0625), logvars, strict=True)]
        return cls(
            np.array([0.5, 0.3, 0.2]),
            np.stack([reference.nhwc(m) for m in means]).astype(np.float64),
            np.stack([reference.nhwc(v) for v in variances]),
        )

    def _logits(self, x, alpha, sigma, condition):
        """log of weight times density of each component at x (B, H, W, C): (B, K); and the scores' parts."""
        as_x = lambda values: jnp.asarray(values, x.dtype)
        alpha, sigma = (per_image(jnp.broadcast_to(c, x.shape[:1]), x)[:, None] for c in (alpha, sigma))
        variance = alpha**2 * as_x(self.variances)[None] + sigma**2
        offset = x[:, None] - alpha * as_x(self.means)[None]
        log_weights = np.log(self.weights) if condition is None else np.log(self.weights) + np.asarray(condition)
        log_weights = as_x(log_weights - np.log(np.exp(log_weights).sum()))
        log_density = -0.5 * (offset**2 / variance + jnp.log(variance) + np.log(2 * np.pi)).sum((2, 3, 4))
        return log_weights[None] + log_density, offset / variance

    def log_density(self, x, alpha, sigma, condition=None):
        return jax.nn.logsumexp(self._logits(x, alpha, sigma, condition)[0], axis=1)

    def noise(self, x, alpha, sigma, condition=None):
        """The ideal noise prediction -sigma * score."""
        logits, pull = self._logits(x, alpha, sigma, condition)
        mixed = (per_image(jax.nn.softmax(logits), pull) * pull).sum(1)
        return per_image(jnp.broadcast_to(sigma, x.shape[:1]), x) * mixed

    def noise_fn(self, sde, condition=None):
        """The NoiseFn of the mixture under `sde`."""
        return lambda x, t: self.noise(x, sde.alpha(t), sde.sigma(t), condition)

    def sample(self, name: str, n: int) -> np.ndarray:
        """n images (n, H, W, C) float32, by the reference recipe."""
        k = reference.rng(name + "/k").choice(len(self.weights), size=n, p=self.weights)
        chw = np.moveaxis(self.means, -1, 1).shape[1:]
        z = reference.nhwc(reference.normal(name + "/z", (n, *chw)))
        return (self.means[k] + np.sqrt(self.variances[k]) * z).astype(np.float32)
