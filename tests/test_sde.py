"""An SDE is its (log_alpha, sigma): everything derived from them equals the published closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from score_sde import sde as sde_lib
from tests import reference
from tests.mixture import Mixture

SDES = {
    "vp": sde_lib.VP(),
    "subvp": sde_lib.SubVP(),
    "ve": sde_lib.VE(),
    "discrete_vp": sde_lib.DiscreteVP(),
    "stable_diffusion": sde_lib.DiscreteVP(beta_min=0.85, beta_max=12.0, scaled=True, t_first=1 / 1000),
    "cosine_vp": sde_lib.CosineVP(),
    "edm": sde_lib.EDM(),
    "flow": sde_lib.Flow(),
}
TIMES = np.linspace(0.01, 0.99, 23)


def of_case(case: str):
    """The SDE and number of steps that a reference case names by class and arguments."""
    kind, args = reference.cases("B_sde")[case]["sde"], reference.cases("B_sde")[case]["args"]
    if kind == "VESDE":
        return sde_lib.VE(sigma_min=args[0], sigma_max=args[1]), args[2]
    return {"VPSDE": sde_lib.VP, "subVPSDE": sde_lib.SubVP}[kind](beta_min=args[0], beta_max=args[1]), args[2]


@pytest.mark.parametrize("name", SDES)
def test_time_and_half_log_snr_are_inverse(name):
    sde = SDES[name]
    lam = sde.lam(TIMES)
    assert (np.diff(lam) < 0).all()
    np.testing.assert_allclose(sde.t_of_lam(lam), TIMES, rtol=1e-11)


@pytest.mark.parametrize("name", SDES)
def test_numpy_and_jax_agree(name):
    sde, t = SDES[name], TIMES.astype(np.float32)
    for function in (sde.log_alpha, sde.sigma, sde.lam):
        np.testing.assert_allclose(jax.jit(function)(jnp.asarray(t)), function(t), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["vp", "subvp", "ve", "flow"])
def test_drift_and_diffusion_match_closed_forms(name):
    """Derived by differentiation, equal to the papers' expressions to 1e-12."""
    sde = SDES[name]
    beta = 0.1 + TIMES * 19.9
    alpha2 = np.exp(-0.5 * TIMES**2 * 19.9 - 0.1 * TIMES)
    expected = {
        "vp": (-0.5 * beta, np.sqrt(beta)),
        "subvp": (-0.5 * beta, np.sqrt(beta * (1 - alpha2**2))),
        "ve": (0 * TIMES, 0.01 * 5000**TIMES * np.sqrt(2 * np.log(5000))),
        "flow": (-1 / (1 - TIMES), np.sqrt(2 * TIMES / (1 - TIMES))),
    }[name]
    np.testing.assert_allclose(sde.drift(TIMES), expected[0], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(sde.diffusion(TIMES), expected[1], rtol=1e-12)


def test_marginals_solve_the_forward_sde():
    """Euler's moments of dx = f x dt + g dw arrive at alpha and sigma: f and g belong to the marginals."""
    for name, end in (("vp", 1.0), ("subvp", 1.0), ("ve", 1.0), ("flow", 0.9)):
        sde, t = SDES[name], np.linspace(1e-6, end, 200_001)
        f, g = sde.drift(t), sde.diffusion(t)
        dt = np.diff(t)
        middle = lambda values: 0.5 * (values[1:] + values[:-1])
        log_alpha = (middle(f) * dt).sum() + sde.log_alpha(t[0])
        # sigma^2(1) = alpha(1)^2 (sigma^2(0) / alpha(0)^2 + integral of g^2 / alpha^2)
        weighted = (middle(g**2 / sde.alpha(t) ** 2) * dt).sum() + (sde.sigma(t[0]) / sde.alpha(t[0])) ** 2
        np.testing.assert_allclose(log_alpha, sde.log_alpha(t[-1]), atol=1e-8)
        np.testing.assert_allclose(sde.alpha(t[-1]) * np.sqrt(weighted), sde.sigma(t[-1]), rtol=1e-6)


def test_discrete_vp_holds_the_table_at_its_nodes():
    sde = SDES["discrete_vp"]
    alphas_cumprod = np.cumprod(1 - np.linspace(0.1, 20, 1000) / 1000)
    np.testing.assert_allclose(sde.alpha(np.linspace(0, 1, 1000)) ** 2, alphas_cumprod, rtol=1e-12)


@pytest.mark.parametrize("case", [c for c in reference.cases("B_sde") if c != "inputs"])
def test_published_sde_functions(case, x64):
    """Reference group B in float64: drift, diffusion, marginal, prior, discretization, reverse of both kinds."""
    sde, n = of_case(case)
    stored = reference.arrays("B_sde")
    ref = lambda key: (
        reference.nhwc(stored[f"{case}/{key}"]) if stored[f"{case}/{key}"].ndim == 4 else stored[f"{case}/{key}"]
    )
    inputs = {k: stored[f"inputs/{k}"].astype(np.float64) for k in ("t", "x", "z")}
    t, x, z = (
        jnp.asarray(inputs["t"]),
        jnp.asarray(reference.nhwc(inputs["x"])),
        jnp.asarray(reference.nhwc(inputs["z"])),
    )
    per_image = sde_lib.per_image

    def check(ours, key, rtol=1e-11):
        theirs = ref(key + "_f64")
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol * np.abs(theirs).max(), err_msg=key)

    check(per_image(sde.drift(t), x) * x, "sde_drift")
    check(sde.diffusion(t), "sde_diffusion")
    check(per_image(sde.alpha(t), x) * x, "marginal_mean")
    check(sde.sigma(t), "marginal_std")
    check(sde.prior_logp(z * sde.prior_std), "prior_logp")

    a, noise = sde.transition(t, n)
    check(per_image(a - 1, x) * x, "discretize_f", 1e-9)
    check(noise, "discretize_G", 1e-9)

    mixture = Mixture.reference()
    eps = mixture.noise(x, sde.alpha(t), sde.sigma(t))
    score = -eps / per_image(sde.sigma(t), x)
    check(score, "score", 1e-9)
    for flow in (0, 1):
        check(sde.reverse_drift(x, t, eps, probability_flow=bool(flow)), f"reverse_pf{flow}_drift", 1e-9)
        step = per_image(a - 1, x) * x - per_image(noise**2, x) * score * (0.5 if flow else 1.0)
        check(step, f"reverse_pf{flow}_disc_f", 1e-9)


@pytest.mark.parametrize("case", [c for c in reference.cases("B_sde") if c != "inputs"])
def test_published_sde_functions_in_float32(case):
    sde, _ = of_case(case)
    stored = reference.arrays("B_sde")
    t = jnp.asarray(stored["inputs/t"])
    for ours, key in ((sde.sigma, "marginal_std"), (sde.diffusion, "sde_diffusion")):
        theirs = stored[f"{case}/{key}_f64"]
        np.testing.assert_allclose(ours(t), theirs, rtol=2e-5, err_msg=key)
