"""From a network to a NoiseFn: the one function type that samplers, solvers, losses and EMS know.

    NoiseFn = (x, t) -> eps,  x and eps (B, H, W, C), t () or (B,)

eps is the prediction of z in x_t = alpha_t x_0 + sigma_t z; the score is -eps / sigma_t. Everything that bends a model
(guidance, thresholding, a latent space) is a function NoiseFn -> NoiseFn.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from score_sde.sde import SDE, DiscreteVP, per_image

NoiseFn = Callable[[jax.Array, jax.Array], jax.Array]

# What a network was trained to output, turned into eps: (out, x, alpha, sigma) -> eps.
OUTPUTS = {
    "eps": lambda out, x, alpha, sigma: out,
    "score": lambda out, x, alpha, sigma: -sigma * out,
    "x0": lambda out, x, alpha, sigma: (x - alpha * out) / sigma,
    "v": lambda out, x, alpha, sigma: alpha * out + sigma * x,
}

# What a network is told of the time: (sde, t, number of noise levels) -> label (B,).
LABELS = {
    "time": lambda sde, t, n: 999 * t,  # continuous VP and sub-VP
    "sigma": lambda sde, t, n: sde.sigma(t),  # continuous VE
    "t": lambda sde, t, n: t,  # t itself
    "index": lambda sde, t, n: t * (n - 1),  # n discrete steps of VP; not rounded, as published
    "node": lambda sde, t, n: t * n - 1,  # the same where the first node stands at 1 / n (DPM-Solver, Stable Diffusion)
    "lam": lambda sde, t, n: sde.lam(t),  # any SDE; smooth in what few-step solvers integrate over
    "reversed_index": lambda sde, t, n: jnp.round((1 - t) * (n - 1)),  # n discrete steps of VE, largest sigma first
}


def noise_fn(
    network: Callable, sde: SDE, *, output: str, label: str, num_scales: int = 1000, chain: DiscreteVP | None = None
) -> NoiseFn:
    """The NoiseFn of a network under an SDE.

    network: (x (B, H, W, C), label (B,)) -> (B, H, W, C), with its parameters bound.
    output: a key of OUTPUTS; label: a key of LABELS; num_scales: the number of noise levels of a discrete label.
    chain: for a network trained on a discrete chain and used under a continuous SDE as published: its score is
        -out / sigma of the chain at the node below t.
    """

    def noise(x, t):
        t = jnp.broadcast_to(t, x.shape[:1])
        out = network(x, LABELS[label](sde, t, num_scales))
        eps = OUTPUTS[output](out, x, per_image(sde.alpha(t), x), per_image(sde.sigma(t), x))
        if chain is None:
            return eps
        node = jnp.floor(t * (num_scales - 1)) / (num_scales - 1)
        return eps * per_image(sde.sigma(t) / chain.sigma(node), x)

    return noise


def score_fn(noise: NoiseFn, sde: SDE) -> Callable:
    """The score that stochastic samplers need."""
    return lambda x, t: -noise(x, t) / per_image(sde.sigma(t), x)
