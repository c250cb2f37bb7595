"""SDEs whose alpha is 0 at the end: every solver starts there, with outputs that say something of the data there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from configs import digits
from ems import estimate
from ems.statistics import EMS
from experiments import build
from score_sde import denoiser
from score_sde.errors import UserError
from score_sde.sde import ALPHA_MIN, VE, VP, CosineVP, DiscreteVP, Flow, SubVP, per_image
from solvers import SOLVERS, grids, predictor_corrector, probability_flow, tableau

# The data: every pixel by itself one of two values, smeared. What the ODE makes of z is then known, pixel by pixel.
VALUES, WIDTH = np.array([-0.4, 0.8]), 0.15
MEAN, STD = VALUES.mean(), np.hypot(VALUES.std(), WIDTH)
SCHEDULES = {
    "vp": VP(beta_max=400.0),
    "subvp": SubVP(beta_max=400.0),
    "cosine": CosineVP(t_max=1.0),
    "flow": Flow(t_max=1.0),
    "a last beta of 1": DiscreteVP(beta_max=1000.0),
    "rescaled": DiscreteVP(zero_terminal_snr=True),
    "rescaled, Stable Diffusion's": DiscreteVP(0.001, 1.0, 0.85, 12.0, 1000, True, 1e-3, zero_terminal_snr=True),
}


def posterior_mean(x, alpha, sigma):
    """E[x_0 | x_t = x], without a division by alpha."""
    variance = (alpha * WIDTH) ** 2 + sigma**2
    share = jax.nn.sigmoid(alpha * (VALUES[1] - VALUES[0]) * (x - alpha * MEAN) / variance)
    value = VALUES[0] + share * (VALUES[1] - VALUES[0])
    return (value * sigma**2 + WIDTH**2 * alpha * x) / variance


def network(sde, output: str):
    """The NoiseFn of a network that gives the exact F of an output."""

    def F(x, t):
        alpha, sigma = (per_image(value, x) for value in (sde.alpha(t), sde.sigma(t)))
        x0 = posterior_mean(x, alpha, sigma)
        eps = (x - alpha * x0) / sigma
        return {"x0": x0, "v": alpha * eps - sigma * x0, "flow": eps - x0}[output]

    return denoiser.noise_fn(F, sde, output=output, label="t")


def exact(sde, z, t: float) -> np.ndarray:
    """What the ODE makes of z at time t: the same quantile (it cannot cross itself)."""
    alpha, sigma, x = sde.alpha(np.float64(t)), sde.sigma(np.float64(t)), np.linspace(-3, 3, 100_001)
    below = sum(scipy.special.ndtr((x - alpha * value) / np.hypot(alpha * WIDTH, sigma)) for value in VALUES) / 2
    return np.interp(scipy.special.ndtr(z), below, x)


@pytest.mark.parametrize("output", ["v", "x0", "flow"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_time_ends_where_the_network_still_tells_the_data(name, output):
    """In float32, of x_0 at the first evaluation no more is lost than alpha allows."""
    sde = SCHEDULES[name]
    alpha, sigma = sde.alpha(np.float64(sde.t_max)), sde.sigma(np.float64(sde.t_max))
    assert np.isclose(alpha, ALPHA_MIN, rtol=1e-5)
    t = jnp.float32(sde.t_max)
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    eps = np.float64(network(sde, output)(x, t))
    x0 = (np.float64(x) - np.float64(sde.sigma(t)) * eps) / np.float64(sde.alpha(t))
    assert np.abs(x0 - posterior_mean(np.float64(x), alpha, sigma)).max() < 1e-3


@pytest.mark.parametrize("name", ["vp", "flow"])
def test_every_solver_samples_from_there(name):
    """Without noise, each comes from z to what the ODE makes of it; with noise, to the data's mean and deviation."""
    sde, shape = SCHEDULES[name], (64, 2, 2, 1)
    noise = network(sde, "v" if name != "flow" else "flow")
    node = estimate.nodes(sde, 40)
    l = np.ones((41, *shape[1:]))
    statistics = EMS(node.t, node.lam, l, 0 * l, 0 * l, {})
    z = jax.random.normal(jax.random.key(1), shape)
    draw = lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(3), i), shape)
    solve = jax.jit(lambda table: tableau.solve(noise, table, z, draw))
    end = exact(sde, np.asarray(z), sde.t_min)
    for solver, build_table in SOLVERS.items():
        table = build_table(sde, 40, **({"ems": statistics} if solver == "dpmv3" else {}))
        x = np.asarray(solve(jax.tree.map(np.float32, tableau.uniform(table, max(4, table.history), shape[1:]))))
        assert np.isfinite(x).all(), solver
        if table.noise is not None:
            assert abs(x.mean() - MEAN) < 0.12 and abs(x.std() - STD) < 0.1, solver
        else:
            assert np.sqrt(np.square(x - end).mean()) < 0.08, solver
    x, run = jax.jit(lambda: probability_flow.solve(noise, sde, z, rtol=1e-5, atol=1e-5))()
    assert run.finished
    assert np.abs(x - end).max() < 0.005


@pytest.mark.parametrize("name", ["vp", "rescaled"])
def test_the_predictor_samples_from_there(name):
    sde, n, shape = SCHEDULES[name], 400, (16, 8, 8, 1)
    noise = network(sde, "v" if name != "flow" else "flow")
    draws = lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(3), i), shape)
    options = dict(predictor="reverse_diffusion", corrector="none", corrector_steps=1, snr=0.1, probability_flow=False)
    step = predictor_corrector.stepper(noise, sde, draws, n=n, condition=None, **options)
    x = jax.random.normal(jax.random.key(4), shape)
    x = np.asarray(jax.jit(lambda x: jax.lax.fori_loop(0, n, step, predictor_corrector.Update(x, x)).mean)(x))
    assert abs(x.mean() - MEAN) < 0.03 and abs(x.std() - STD) < 0.06


def test_rescaled_betas_are_the_published_ones():
    """alpha_0 stays, alpha_(n-1) is 0, and between them alpha is moved and stretched (Lin et al. 2024, algorithm 1)."""
    plain = DiscreteVP(beta_min=0.85, beta_max=12.0, scaled=True)
    rescaled = DiscreteVP(beta_min=0.85, beta_max=12.0, scaled=True, zero_terminal_snr=True)
    before, after = np.exp(plain._log_alphas()), np.exp(rescaled._log_alphas())
    assert after[-1] == 0 and after[0] == before[0]
    np.testing.assert_allclose(after, before[0] * (before - before[-1]) / (before[0] - before[-1]), atol=1e-15)
    assert 0.996 < rescaled.t_max < 1


def test_other_ends_are_those_of_the_chain():
    """A VE or VP that ends early has the prior and the steps of its own end."""
    early = VE(t_max=0.5)
    np.testing.assert_allclose(early.prior_std, early.sigma(np.float64(0.5)))
    vp, n = VP(t_max=0.5), 1000
    a, G = vp.transition(np.float64(0.5), n)
    np.testing.assert_allclose(a**2 + G**2, 1)
    np.testing.assert_allclose(
        a, np.exp(vp.log_alpha(np.float64(0.5)) - vp.log_alpha(np.float64(0.5 - 0.5 / n))), rtol=1e-4
    )
    constant = VP(beta_min=5.0, beta_max=5.0)
    times = grids.times("logsnr", constant, 8)
    np.testing.assert_allclose(constant.t_of_lam(constant.lam(times)), times, rtol=1e-12)


def config(output: str, **sde):
    config = digits.get_config()
    with config.unlocked():
        config.sde.update(**sde)
        config.denoiser.output = output
        config.model.update(nf=8, ch_mult=(1,), attn_resolutions=())
    return config


LOST = {
    "beta_max": dict(beta_max=400.0),
    "cosine": dict(name="cosine_vp", t_max=1.0, beta_min=None, beta_max=None),
    "flow": dict(name="flow", t_max=1.0, beta_min=None, beta_max=None),
    "rescaled": dict(name="discrete_vp", zero_terminal_snr=True),
}


def changed(output: str, **sde):
    """A config of that SDE; arguments that are None are left out."""
    whole = config(output, **{name: value for name, value in sde.items() if value is not None})
    with whole.unlocked():
        for name in [name for name, value in sde.items() if value is None]:
            del whole.sde[name]
    return whole


@pytest.mark.parametrize("name", LOST)
@pytest.mark.parametrize("output", ["eps", "score", "v", "x0"])
def test_outputs_that_lose_the_data_are_refused_before_training(output, name):
    """By one line, whose advice works when it is followed."""
    if output in ("v", "x0"):
        assert np.isclose(build.sde_of(changed(output, **LOST[name])).alpha(np.float64(1e-3)), 1, atol=0.1)
        build._valid_sde(changed(output, **LOST[name]))
        return
    with pytest.raises(UserError, match="says nothing of the data where alpha is 0") as refusal:
        build._valid_sde(changed(output, **LOST[name]))
    advice = str(refusal.value).rpartition("or ")[2]
    followed = LOST[name] | dict(
        [("zero_terminal_snr", False)] if "leave" in advice else [("t_max", float(advice.rpartition("=")[2]))]
    )
    build._valid_sde(changed(output, **followed))
