"""The published way to the likelihood against ours, at equal accuracy: evaluations, their cost, and the host.

    python -m benchmarks.likelihood [--workdir=runs/digits] [--batch_size=16] [--tolerance=1e-5] [--repeats=3]

Published (Song et al. 2021): the drift in t, integrated on the host by SciPy's RK45, with one call for the drift and
one for its divergence by a vjp. Ours: solvers/probability_flow.py at the loosest tolerance whose error is no larger.
Errors are of bits/dim, RMS over images with the same probes, against a solution in float64.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from scipy import integrate

from benchmarks import timed
from experiments import build, program, runs, samplers
from solvers import probability_flow

WORKDIR = program.path_flag("workdir", None, "The run folder; the newest under runs/ if absent.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Test images.", lower_bound=2)
TOLERANCE = flags.DEFINE_float("tolerance", 1e-5, "rtol and atol of the published scheme.", lower_bound=1e-6)
REPEATS = flags.DEFINE_integer("repeats", 3, "Calls timed of each.", lower_bound=1)
LADDER = (2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3)  # tolerances tried for ours
FINE = 1e-8  # of the solution in float64


def main():
    # ------------------------------------------------------------------------------ images and what to compare
    model = runs.open_model(WORKDIR.value)
    diffusion, config, n = model.diffusion, model.config, BATCH_SIZE.value
    sde, t_min = diffusion.sde, config.eval.likelihood.t_min
    batch = build.images_of(config, "test").take(np.arange(n))
    pixels = build.pixels_of(config, dequantize=True)
    x = jax.vmap(pixels.encode)(samplers.sample_keys(0, np.arange(n)), jnp.asarray(batch["image"]))
    probe = probability_flow.rademacher(jax.random.key(1), 1, x.shape)
    noise_of = lambda params: diffusion.noise_of(params, batch.get("label"))
    bits = lambda logp: np.asarray(probability_flow.bits_per_dim(np.asarray(logp, np.float64), pixels))

    @functools.partial(jax.jit, static_argnums=3)
    def ours(params, x, probe, tolerance):
        tolerances = dict(rtol=tolerance, atol=tolerance, t_min=t_min)
        logp, _, run = probability_flow.log_likelihood(noise_of(params), sde, x, probe, **tolerances)
        return logp, run.evaluations

    with jax.enable_x64(True):
        doubled = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (model.params, x, probe))
        fine = bits(ours(*doubled, FINE)[0])
    error_of = lambda logp: float(np.sqrt(np.square(bits(logp) - fine).mean()))

    # ------------------------------------------------------------------------------ run
    published = Published(noise_of, sde, model.params, x, probe[0])
    logp, calls = published.solve(TOLERANCE.value, t_min)
    error = error_of(logp)
    good = itertools.takewhile(lambda k: error_of(ours(model.params, x, probe, k)[0]) <= error, LADDER)
    tolerance = max(good, default=LADDER[0])
    our_logp, our_calls = ours(model.params, x, probe, tolerance)
    seconds = functools.partial(timed.seconds, repeats=REPEATS.value)
    total = seconds(lambda: published.solve(TOLERANCE.value, t_min))
    our_total = seconds(lambda: ours(model.params, x, probe, tolerance))
    forward = seconds(lambda: published.drift(x, jnp.float32(0.5)))
    device = forward + seconds(lambda: published.divergence(x, jnp.float32(0.5)))

    # ------------------------------------------------------------------------------ say
    print(f"{n} images {pixels.shape}, {jax.default_backend()}; one forward {forward:.4f} s")
    print(f"{'':12s} tolerance  error bits/dim  evaluations  forwards each  seconds")
    for name, k, e, number, each, whole in (
        ("published", TOLERANCE.value, error, calls, device, total),
        ("ours", tolerance, error_of(our_logp), int(our_calls), our_total / int(our_calls), our_total),
    ):
        print(f"{name:12s} {k:9.0e} {e:15.1e} {number:12d} {each / forward:14.2f} {whole:8.2f}")
    factors = {
        "fewer evaluations": calls / int(our_calls),
        "cheaper evaluations": device / (our_total / int(our_calls)),
        "no host between them": total / (calls * device),
    }
    for name, factor in factors.items():
        print(f"{name:22s} x {factor:.2f}")
    print(f"{'together':22s} x {total / our_total:.2f}")


class Published:
    """log p by a forward and a vjp for each evaluation, called from the host."""

    def __init__(self, noise_of, sde, params, x, probe):
        self.sde, self.x = sde, x

        def drift(params, x, t):
            return sde.reverse_drift(x, t, noise_of(params)(x, t), probability_flow=True)

        def divergence(params, x, t):
            gradient = jax.grad(lambda x: (drift(params, x, t) * probe).sum())(x)
            return (gradient * probe).sum((1, 2, 3))

        self.drift, self.divergence = (functools.partial(jax.jit(function), params) for function in (drift, divergence))

    def solve(self, tolerance: float, t_min: float):
        """(log p (B,), evaluations)."""
        shape, size = self.x.shape, self.x.size

        def field(t, state):
            x, t = jnp.asarray(state[:size].reshape(shape), jnp.float32), jnp.float32(t)
            return np.concatenate([np.asarray(self.drift(x, t)).ravel(), np.asarray(self.divergence(x, t))])

        start = np.concatenate([np.asarray(self.x).ravel(), np.zeros(len(self.x))])
        solution = integrate.solve_ivp(field, (t_min, self.sde.t_max), start, rtol=tolerance, atol=tolerance)
        z, growth = solution.y[:size, -1].reshape(shape), solution.y[size:, -1]
        return np.asarray(self.sde.prior_logp(z)) + growth, solution.nfev


if __name__ == "__main__":
    program.run(main)
