"""One loss equals the three published ones, value and gradient, on injected draws (reference group C)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from score_sde import denoiser, losses
from score_sde import sde as sde_lib
from tests import reference
from tests.mixture import Mixture

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


@pytest.mark.parametrize("case", CASES)
def test_published_losses_and_gradients(case):
    info, stored = CASES[case], reference.arrays("C_losses")
    sde, t, label, output = setup(case)
    x0, z = (jnp.asarray(reference.nhwc(stored[k])) for k in ("inputs/batch", f"{case}/z"))

    def loss(params):
        network = lambda x, label: toy_network(params, x, label)
        noise = denoiser.noise_fn(network, sde, output=output, label=label, num_scales=info.get("N", 1000))
        if case.startswith("sde_vp_discretemodel"):  # trained on a chain: by whose sigma at the node below t it divides
            ratio = sde.sigma(t) / sde_lib.DiscreteVP().sigma(jnp.floor(t * 999) / 999)
            own, noise = noise, lambda x, t: own(x, t) * sde_lib.per_image(ratio, x)
        row = "likelihood" if info.get("likelihood_weighting", False) else "eps"
        weight = losses.WEIGHTS[row](sde, t, None)
        each = losses.denoising_score_matching(noise, sde, x0, t, z, weight=weight, reduce_mean=info["reduce_mean"])
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
    t = losses.TIMES["uniform"](key, (10_000,), sde_lib.VP(), 1e-5, 5, None)
    assert t.min() >= 1e-5
    assert t.max() <= 1.0
    np.testing.assert_allclose(t.mean(), 0.5, atol=0.02)
    nodes = losses.TIMES["chain"](key, (10_000,), sde_lib.VP(), 1e-5, 5, None)
    np.testing.assert_allclose(np.unique(nodes), np.linspace(0, 1, 5))


@pytest.mark.parametrize("sde", [sde_lib.VP(), sde_lib.SubVP(), sde_lib.VE(), sde_lib.Flow()])
def test_times_of_a_normal_lam(sde):
    """Far from the ends the drawn lam have the mean and deviation asked for; near them, no time lies beyond."""
    draw = lambda t_min, *lam: losses.TIMES["lam_normal"](jax.random.key(0), (20_000,), sde, t_min, 5, lam)
    t = draw(1e-5, 0.5, 0.8)
    lam = sde.lam(np.asarray(t, np.float64))
    np.testing.assert_allclose([lam.mean(), lam.std()], [0.5, 0.8], atol=0.02)
    wide = draw(1e-3, 0.0, 20.0)
    assert wide.min() >= np.float32(1e-3)
    assert wide.max() <= sde.t_max
    lam = np.sort(sde.lam(np.asarray(wide, np.float64)))
    first, last = sde.lam(np.array([sde.t_max, 1e-3]))
    np.testing.assert_allclose([lam[0], lam[-1]], [first, last], atol=0.02 * (last - first))


# ------------------------------------------------------------------------------------------------ tables

SDES = {
    "vp": sde_lib.VP(),
    "subvp": sde_lib.SubVP(),
    "ve": sde_lib.VE(),
    "flow": sde_lib.Flow(),
    "cosine": sde_lib.CosineVP(),
    "edm": sde_lib.EDM(),
    "discrete": sde_lib.DiscreteVP(),
}
SIGMA_DATA = 0.7
EXACT = Mixture(
    np.array([0.5, 0.3, 0.2]),
    np.array([[-0.8, 0.3, 0.1], [0.6, -0.5, 0.9], [0.2, 0.7, -0.6]]).reshape(3, 1, 1, 3),
    np.array([[0.3, 0.2, 0.4], [0.25, 0.35, 0.3], [0.2, 0.4, 0.25]]).reshape(3, 1, 1, 3),
)


def edm_target(x, eps, x0, alpha, sigma):
    """F of D(y) = c_skip y + c_out F(c_in y), with the functions of Karras et al. 2022, Table 1, at sigma / alpha."""
    y, r, d = x / alpha, sigma / alpha, SIGMA_DATA
    c_skip, c_out = d**2 / (r**2 + d**2), r * d / np.sqrt(d**2 + r**2)
    return (x0 - c_skip * y) / c_out


# What each row's network outputs, as its paper defines it: (x, eps, x0, alpha, sigma) -> F; or z for eps, in training.
TARGETS = {
    "eps": lambda x, eps, x0, alpha, sigma: eps,
    "score": lambda x, eps, x0, alpha, sigma: -eps / sigma,
    "scaled_score": lambda x, eps, x0, alpha, sigma: -eps,
    "x0": lambda x, eps, x0, alpha, sigma: x0,
    "v": lambda x, eps, x0, alpha, sigma: alpha * eps - sigma * x0,
    "edm": edm_target,
    "vp": lambda x, eps, x0, alpha, sigma: eps,
    "flow": lambda x, eps, x0, alpha, sigma: eps - x0,
}
# What it sees of x, where it is not x itself.
INPUTS = {
    "edm": lambda x, alpha, sigma: x / alpha / np.sqrt(SIGMA_DATA**2 + (sigma / alpha) ** 2),
    "vp": lambda x, alpha, sigma: x / np.sqrt(alpha**2 + sigma**2),
}


def coefficients_of(sde, x):
    """t, alpha and sigma of some times, one for each of x (B, H, W, C)."""
    t = jnp.linspace(0.01, 1.0, len(x)) * sde.t_max
    return t, *(sde_lib.per_image(c, x) for c in (sde.alpha(t), sde.sigma(t)))


def test_every_parameterization_has_its_target():
    assert TARGETS.keys() == denoiser.PARAMETERIZATIONS.keys()


@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize("output", TARGETS)
def test_every_output_gives_back_the_exact_eps(output, sde, x64):
    """The output made of a mixture's exact eps, with more channels than needed, is that eps again."""
    sde = SDES[sde]
    x = jax.random.normal(jax.random.key(0), (8, 1, 1, 3), jnp.float64)
    t, alpha, sigma = coefficients_of(sde, x)
    x = x * jnp.hypot(alpha, sigma)
    eps = EXACT.noise(x, alpha[:, 0, 0, 0], sigma[:, 0, 0, 0])
    seen = INPUTS.get(output, lambda x, alpha, sigma: x)(x, alpha, sigma)
    F = TARGETS[output](x, eps, (x - sigma * eps) / alpha, alpha, sigma)

    def network(u, label):
        np.testing.assert_allclose(u, seen, rtol=1e-12)
        np.testing.assert_allclose(label, sde.lam(t), rtol=1e-12)
        return jnp.concatenate([F, jnp.full_like(F, jnp.nan)], axis=-1)

    noise = denoiser.noise_fn(network, sde, output=output, label="lam", sigma_data=SIGMA_DATA)
    np.testing.assert_allclose(noise(x, t), eps, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize("output", TARGETS)
def test_weight_network_makes_the_loss_the_error_of_the_network(output, sde, x64):
    """|F - F*|^2 of any output off its target by any amount."""
    sde = SDES[sde]
    x0, z, off = jax.random.normal(jax.random.key(0), (3, 8, 2, 2, 1), jnp.float64)
    t, alpha, sigma = coefficients_of(sde, x0)
    F = TARGETS[output](alpha * x0 + sigma * z, z, x0, alpha, sigma) + off
    noise = denoiser.noise_fn(lambda u, label: F, sde, output=output, label="t", sigma_data=SIGMA_DATA)
    weight = losses.WEIGHTS["network"](sde, t, denoiser.coefficients(output, sde, t, SIGMA_DATA))
    loss = losses.denoising_score_matching(noise, sde, x0, t, z, weight=weight)
    np.testing.assert_allclose(loss, jnp.square(off).mean((1, 2, 3)), rtol=1e-6)


def test_weight_v_is_that_of_a_network_of_v(x64):
    """For VP, whatever the network outputs."""
    sde, t = sde_lib.VP(), jnp.linspace(0.01, 1.0, 64)
    weights = [losses.WEIGHTS[row](sde, t, denoiser.coefficients("v", sde, t)) for row in ("v", "network")]
    np.testing.assert_allclose(*weights, rtol=1e-12)


@pytest.mark.parametrize("sde", SDES)
def test_edm_sees_and_learns_unit_variance(sde, x64):
    """For data of deviation sigma_data at every noise level: by the coefficients alone, in closed form."""
    sde = SDES[sde]
    t = jnp.linspace(sde.t_min, sde.t_max, 9)
    alpha, sigma, d = sde.alpha(t), sde.sigma(t), SIGMA_DATA
    inp, skip, out = denoiser.coefficients("edm", sde, t, d)
    np.testing.assert_allclose(inp**2 * (alpha**2 * d**2 + sigma**2), 1, rtol=1e-12)
    # F = (z - skip (alpha x_0 + sigma z)) / out, with x_0 and z independent
    np.testing.assert_allclose(((1 - skip * sigma) ** 2 + (skip * alpha * d) ** 2) / out**2, 1, rtol=1e-9)


@pytest.mark.parametrize("low, high", [(-1.0, 1.0), (0.0, 1.0), (0.0, 255.0)])
def test_networks_see_data_of_any_range_in_one(low, high):
    seen = []
    noise = denoiser.noise_fn(
        lambda u, label: (seen.append(u), u)[1], sde_lib.VE(), output="eps", label="t", data_range=(low, high)
    )
    noise(jnp.linspace(low, high, 5).reshape(5, 1, 1, 1), jnp.float32(0.5))
    np.testing.assert_allclose(seen[0].ravel(), [-1.0, -0.5, 0.0, 0.5, 1.0], atol=1e-6)


@pytest.mark.parametrize("output, divided", [("scaled_score", True), ("score", False)])
def test_between_its_nodes_a_chain_has_the_score_of_the_nearest(output, divided):
    """As published: the network is told the nearest level, and what it outputs is divided by the sigma of that."""
    sde, n = sde_lib.VE(), 10
    F = jax.random.normal(jax.random.key(0), (5, 2, 2, 1))
    t = jnp.asarray([0.02, 0.31, 0.5, 0.87, 1.0])
    nearest = 1 - jnp.round((1 - t) * (n - 1)) / (n - 1)
    noise = denoiser.noise_fn(lambda x, label: F, sde, output=output, label="reversed_index", num_scales=n)
    score = denoiser.score_fn(noise, sde)(jnp.zeros_like(F), t)
    expected = F / sde_lib.per_image(sde.sigma(nearest), F) if divided else F
    np.testing.assert_allclose(score, expected, rtol=2e-6)
