"""One loss equals the three published ones, value and gradient, on injected draws (reference group C)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from score_sde import denoiser, losses
from score_sde import sde as sde_lib
from tests import reference

CASES = {c: d for c, d in reference.cases("C_losses").items() if c != "inputs"}


def toy_network(params, x, label):
    return params[0] * jnp.tanh(x) + params[1] * jnp.sin(label / 100)[:, None, None, None]


def setup(case):
    """(SDE, times, label family, output family) of a published loss."""
    info, stored = CASES[case], reference.arrays("C_losses")
    ve = info["sde"].startswith("ve")
    if info["loss"] == "get_sde_loss_fn":
        sde = {"vp": sde_lib.VP(), "subvp": sde_lib.SubVP(), "ve": sde_lib.VE()}[info["sde"]]
        labels = ("time", "sigma") if info["continuous"] else ("index", "reversed_index")
        return sde, jnp.asarray(stored[f"{case}/t"]), labels[ve], "score" if ve else "eps"
    n, labels = info["N"], stored[f"{case}/labels"]
    if ve:  # labels index the descending table
        sde = sde_lib.VE(sigma_min=info["sigma_min"], sigma_max=info["sigma_max"])
        return sde, jnp.asarray(1 - labels / (n - 1), jnp.float32), "reversed_index", "score"
    return sde_lib.DiscreteVP(n=n), jnp.asarray(labels / (n - 1), jnp.float32), "index", "eps"


@reference.needs_reference
@pytest.mark.parametrize("case", CASES)
def test_published_losses_and_gradients(case):
    info, stored = CASES[case], reference.arrays("C_losses")
    sde, t, label, output = setup(case)
    x0, z = (jnp.asarray(reference.nhwc(stored[k])) for k in ("inputs/batch", f"{case}/z"))

    def loss(params):
        network = lambda x, label: toy_network(params, x, label)
        # the SDE loss of a network trained on a chain: perturbed by the SDE, divided by the chain's sigma
        chain = sde_lib.DiscreteVP() if case.startswith("sde_vp_discretemodel") else None
        num_scales = info.get("N", 1000)
        noise = denoiser.noise_fn(network, sde, output=output, label=label, num_scales=num_scales, chain=chain)
        weighting = info.get("likelihood_weighting", False)
        each = losses.denoising_score_matching(
            noise, sde, x0, t, z, likelihood_weighting=weighting, reduce_mean=info["reduce_mean"]
        )
        return each.mean()

    value, gradient = jax.value_and_grad(loss)(jnp.array([0.5, 0.3]))
    np.testing.assert_allclose(value, stored[f"{case}/loss"], rtol=2e-5)
    theirs = np.stack([stored[f"{case}/grad_a"], stored[f"{case}/grad_b"]])
    np.testing.assert_allclose(gradient, theirs, rtol=1e-4, atol=2e-5 * np.abs(theirs).max())


def test_loss_of_the_ideal_noise_is_its_conditional_variance():
    """No other prediction is better: shifting the ideal eps by delta adds exactly delta^2 in expectation."""
    sde = sde_lib.VP()
    x0, z = jax.random.normal(jax.random.key(0), (2, 4096, 2, 2, 1))
    t = jnp.full((4096,), 0.5)
    ideal = lambda x, t: x * sde.sigma(t)[:, None, None, None]  # data is standard normal, alpha^2 + sigma^2 = 1
    loss = lambda noise: losses.denoising_score_matching(noise, sde, x0, t, z).mean()
    np.testing.assert_allclose(loss(ideal), sde.alpha(t[:1])[0] ** 2, rtol=0.03)
    np.testing.assert_allclose(loss(lambda x, t: ideal(x, t) + 0.3) - loss(ideal), 0.09, atol=0.01)


def test_drawn_times():
    key = jax.random.key(0)
    t = losses.draw_time(key, (10_000,), t_min=1e-5, t_max=1.0)
    assert t.min() >= 1e-5
    assert t.max() <= 1.0
    np.testing.assert_allclose(t.mean(), 0.5, atol=0.02)
    nodes = losses.draw_time(key, (10_000,), t_min=1e-5, t_max=1.0, num_scales=5)
    np.testing.assert_allclose(np.unique(nodes), np.linspace(0, 1, 5))


@pytest.mark.parametrize("sde", [sde_lib.VP(), sde_lib.SubVP(), sde_lib.VE()])
def test_times_of_a_normal_lam(sde):
    """Far from the ends the drawn lam have the mean and deviation asked for; near them, no time lies beyond."""
    t = losses.draw_time_of_lam(jax.random.key(0), (20_000,), sde, t_min=1e-5, mean=0.5, std=0.8)
    lam = sde.lam(np.asarray(t, np.float64))
    np.testing.assert_allclose([lam.mean(), lam.std()], [0.5, 0.8], atol=0.02)
    wide = losses.draw_time_of_lam(jax.random.key(0), (20_000,), sde, t_min=1e-3, mean=0.0, std=20.0)
    assert wide.min() >= np.float32(1e-3)
    assert wide.max() <= 1.0
    lam = np.sort(sde.lam(np.asarray(wide, np.float64)))
    first, last = sde.lam(np.array([1.0, 1e-3]))
    np.testing.assert_allclose([lam[0], lam[-1]], [first, last], atol=0.02 * (last - first))


def test_v_weighting_is_the_error_of_v():
    """For VP the weighted loss of any prediction is |v - v_true|^2, v = alpha z - sigma x_0."""
    sde = sde_lib.VP()
    x0, z, off = jax.random.normal(jax.random.key(0), (3, 64, 2, 2, 1))
    t = jnp.linspace(0.01, 1.0, 64)
    alpha, sigma = (c[:, None, None, None] for c in (sde.alpha(t), sde.sigma(t)))
    predicted = alpha * z - sigma * x0 + off
    noise = denoiser.noise_fn(lambda x, label: predicted, sde, output="v", label="time")
    loss = losses.denoising_score_matching(noise, sde, x0, t, z, v_weighting=True)
    np.testing.assert_allclose(loss, jnp.square(off).mean((1, 2, 3)), rtol=1e-3)


@pytest.mark.parametrize("output", denoiser.OUTPUTS)
def test_every_network_output_gives_the_same_noise(output, x64):
    """A perfect network in any of the four parameterizations is the same NoiseFn."""
    sde = sde_lib.SubVP()
    x0, z = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 1))
    t = jnp.array([0.1, 0.5, 0.9])
    alpha, sigma = (c[:, None, None, None] for c in (sde.alpha(t), sde.sigma(t)))
    target = {"eps": z, "score": -z / sigma, "x0": x0, "v": (z - sigma * (alpha * x0 + sigma * z)) / alpha}[output]
    noise = denoiser.noise_fn(lambda x, label: jnp.asarray(target), sde, output=output, label="time")
    np.testing.assert_allclose(noise(sde.perturb(jnp.asarray(x0), t, z), t), z, rtol=1e-9, atol=1e-12)
