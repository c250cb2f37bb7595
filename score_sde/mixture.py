"""A Gaussian mixture of images: a model whose noise, score and density are known exactly, to play with and to test by.

    mixture = Mixture(weights, means, variances)
    noise = mixture.noise_fn(sde)

The last is a NoiseFn like a network's, without its error.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from score_sde.denoiser import NoiseFn
from score_sde.sde import SDE, per_image


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Data that are component k with probability weights[k], and then normal with independent pixels.

    weights: (K,), of sum 1. means, variances: (K, H, W, C).
    """

    weights: np.ndarray
    means: np.ndarray
    variances: np.ndarray

    def _components(self, x, alpha, sigma, condition):
        """Log of weight times density of each component at x (B, H, W, C): (B, K); the pull towards each of them."""
        as_x = lambda values: jnp.asarray(values, x.dtype)
        alpha, sigma = (per_image(jnp.broadcast_to(c, x.shape[:1]), x)[:, None] for c in (alpha, sigma))
        variance = alpha**2 * as_x(self.variances)[None] + sigma**2
        offset = x[:, None] - alpha * as_x(self.means)[None]
        log_weights = np.log(self.weights) if condition is None else np.log(self.weights) + np.asarray(condition)
        log_weights = as_x(log_weights - np.log(np.exp(log_weights).sum()))
        log_density = -0.5 * (offset**2 / variance + jnp.log(variance) + np.log(2 * np.pi)).sum((2, 3, 4))
        return log_weights[None] + log_density, offset / variance

    def log_density(self, x, alpha, sigma, condition=None):
        """Log density in nats (B,) of x = alpha x_0 + sigma z, (B, H, W, C).

        condition: (K,) added to the log weights, as the log likelihood of a class given each component is.
        """
        return jax.nn.logsumexp(self._components(x, alpha, sigma, condition)[0], axis=1)

    def noise(self, x, alpha, sigma, condition=None):
        """The ideal noise prediction -sigma times the score, (B, H, W, C); arguments as of `log_density`."""
        logits, pull = self._components(x, alpha, sigma, condition)
        mixed = (per_image(jax.nn.softmax(logits), pull) * pull).sum(1)
        return per_image(jnp.broadcast_to(sigma, x.shape[:1]), x) * mixed

    def noise_fn(self, sde: SDE, condition=None) -> NoiseFn:
        """The NoiseFn of the mixture under an SDE."""
        return lambda x, t: self.noise(x, sde.alpha(t), sde.sigma(t), condition)

    def draw(self, key, n: int):
        """Images (n, H, W, C), float32."""
        component_key, noise_key = jax.random.split(key)
        k = jax.random.choice(component_key, len(self.weights), (n,), p=jnp.asarray(self.weights, jnp.float32))
        z = jax.random.normal(noise_key, (n, *self.means.shape[1:]))
        return jnp.float32(self.means)[k] + jnp.float32(self.variances)[k] ** 0.5 * z
