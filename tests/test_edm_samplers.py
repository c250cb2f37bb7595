"""EDM's samplers as tables: equal to the published ones on EDM's networks, from the same draws, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from score_sde.denoiser import iddpm_sigmas, noise_fn
from score_sde.models.published_unets import from_edm
from score_sde.sde import EDM, VP
from solvers import heun, tableau
from tests import reference
from tests.test_preconditioning import ROWS
from tests.test_unet import compared, edm, figures_of, quick_jit, state_of

OFFICIAL = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve", "iDDPMPrecond": "iddpm"}
SAMPLERS = [
    name
    for name, case in reference.cases("X_edm").items()
    if case["kind"] == "sampler" and case["function"] == "edm_sampler"
]


def network_of(case: dict):
    """(network, params) of a sampler's case, wholly in float64."""
    network, shape = edm(case["precond"], case["kwargs"], dtype="float64")
    described = next(
        name
        for name, other in reference.cases("X_edm").items()
        if other["kind"] == "forward" and all(other[key] == case[key] for key in ("precond", "kwargs"))
    )
    return network, {"params": from_edm(state_of("X_edm", described), network, shape)}


def steps_of(case: dict) -> tuple[EDM, int, np.ndarray]:
    """The SDE, the evaluations and the times of a case's options; a network of iDDPM rounds them to its own."""
    given = {"num_steps": 18, "sigma_min": 0.002, "sigma_max": 80.0} | case["options"]
    low, high = {
        "EDMPrecond": (0, np.inf),
        "VPPrecond": tuple(np.sqrt(np.exp(-2 * VP().log_alpha(np.array([1e-5, 1.0]))) - 1)),  # with its cancellation
        "VEPrecond": (0.02, 100),
        "iDDPMPrecond": tuple(iddpm_sigmas(1000)[[999, 0]]),
    }[case["precond"]]
    low, high = max(given["sigma_min"], low), min(given["sigma_max"], high)
    u = np.linspace(0, 1, given["num_steps"])
    times = (high ** (1 / 7) + u * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    if case["precond"] == "iDDPMPrecond":
        table = iddpm_sigmas(1000)
        times = table[np.abs(times[:, None] - table).argmin(1)]
    return EDM(t_max=1e6), 2 * given["num_steps"] - 1, times


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_equal_published(name, x64):
    case, figures = reference.cases("X_edm")[name], figures_of("X_edm", name)
    network, params = network_of(case)
    sde, steps, times = steps_of(case)
    options = {key.lower(): float(value) for key, value in case["options"].items() if key.startswith("S_")}
    options["churn"] = options.pop("s_churn", 0.0)
    table = heun.stochastic_heun(sde, steps, grid=list(times), **options)
    np.testing.assert_allclose(table.t, figures["eval_sigma_f64"], rtol=1e-12)

    y = figures["class_labels"].astype(np.float64) if "class_labels" in figures else None
    output, label = ROWS[OFFICIAL[case["precond"]]]
    apply = lambda params: lambda u, told: network.apply(params, u, told, y)
    shape = figures["latents"].shape
    draws = [reference.normal(f"X/edm/{name}/draw{i}", shape) for i in range(case["n_draws"])]
    draws = jnp.asarray(reference.nhwc(np.stack(draws)), jnp.float64)

    def draw(i):
        """The step that follows evaluation i is number (i + 1) / 2; START comes before the first."""
        return draws[0] if i is tableau.START else draws[jnp.minimum((i + 1) // 2, len(draws) - 1)]

    @quick_jit
    def sample(params, table, x):
        noise = noise_fn(apply(params), sde, output=output, label=label)
        return tableau.solve(noise, table, x, draw)

    x = times[0] * reference.nhwc(figures["latents"]).astype(np.float64)
    compared(sample(params, table, jnp.asarray(x)), reference.nhwc(figures["x_final_f64"]), 1e-9, name)


def test_without_churn_it_is_the_deterministic_solver():
    for steps in (12, 13):
        stochastic, plain = heun.stochastic_heun(VP(), steps, churn=0.0), heun.heun(VP(), steps)
        assert jax.tree.all(jax.tree.map(np.array_equal, stochastic, plain))
        assert plain.noise is None and plain.start is None


def test_fresh_noise_keeps_the_marginals():
    """With s_noise = 1 and data that are 0: x before an evaluation has standard deviation sigma there, for any SDE."""
    for sde in (VP(), EDM()):
        table = heun.stochastic_heun(sde, 13, churn=4.0, s_max=np.inf, s_noise=1.0)
        assert table.start is not None
        x = table.start[:, 0, 0, 0] * [sde.sigma(np.float64(sde.t_max)), 1.0]
        variance = (x**2).sum()
        for i in range(len(table.t) - 1):
            np.testing.assert_allclose(variance, table.sigma[i] ** 2, rtol=1e-9)
            # eps = x / sigma exactly, so that the step scales x by the ratio of rho, and of alpha
            if i % 2 == 0:
                mean = table.sigma[i + 1] / table.sigma[i]
                variance = (mean**2) * variance
            else:
                before = table.alpha[i + 1] * table.sigma[i] / table.alpha[i]
                variance = before**2 + table.noise[i, 0, 0, 0] ** 2
