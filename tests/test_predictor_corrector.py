"""Predictor-corrector sampling: equal to the published runs, draw by draw, and right in distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from score_sde import sde as sde_lib
from score_sde.denoiser import score_fn
from score_sde.errors import UserError
from solvers import predictor_corrector as pc
from tests import reference
from tests.mixture import Mixture

PREDICTORS = {"em": "euler_maruyama", "rd": "reverse_diffusion", "none": "none"}
CORRECTORS = {"langevin": "langevin", "ald": "ald", "none": "none"}


def sde_of(info):
    """(SDE, number of steps) of a published case."""
    kind, args = info["sde"]
    if kind == "VESDE":
        return sde_lib.VE(sigma_min=args[0], sigma_max=args[1]), args[2]
    return {"VPSDE": sde_lib.VP, "subVPSDE": sde_lib.SubVP}[kind](beta_min=args[0], beta_max=args[1]), args[2]


def known(info):
    return (
        info.get("predictor", "rd") in PREDICTORS and info.get("corrector", "langevin") in CORRECTORS and "sde" in info
    )


def close(ours, theirs, tolerance):
    theirs = reference.nhwc(theirs)
    np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max(), rtol=0)


@reference.needs_reference
@pytest.mark.parametrize("case", [c for c, d in reference.cases("D_updates").items() if known(d)])
def test_published_updates(case):
    info, stored = reference.cases("D_updates")[case], reference.arrays("D_updates")
    sde, n = sde_of(info)
    x, t = jnp.asarray(reference.nhwc(stored[f"{case}/x"])), jnp.asarray(stored[f"{case}/t"])
    draws = reference.nhwc(stored[f"{case}/noise"]) if f"{case}/noise" in stored.files else []
    score = score_fn(Mixture.reference().noise_fn(sde), sde)
    if "predictor" in info:
        predict = pc.PREDICTORS[PREDICTORS[info["predictor"]]]
        z = draws[0] if len(draws) else None
        update = predict(sde, score, x, t, z, n=n, probability_flow=info["probability_flow"])
    else:
        update = pc.Update(x, x)
        for z in draws:
            update = pc.CORRECTORS[info["corrector"]](sde, score, update.x, t, z, n=n, snr=info["snr"])
    close(update.x, stored[f"{case}/x_new"], 1e-5)
    close(update.mean, stored[f"{case}/x_mean"], 1e-5)


@reference.needs_reference
@pytest.mark.parametrize("case", [c for c, d in reference.cases("D_pc").items() if known(d) and "net" not in c])
def test_published_runs(case, x64):
    """In float64, to what the stored float32 runs are good for: their sigma_i^2 - sigma_(i-1)^2 of VE loses 4e-5."""
    info, stored = reference.cases("D_pc")[case], reference.arrays("D_pc")
    sde, n = sde_of(info)
    draws = jnp.asarray(reference.nhwc(stored[f"{case}/noise"]), jnp.float64)
    tolerance = 5e-5 if case.startswith("ve") else 1e-5
    run = jax.jit(
        lambda draws, denoise: pc.sample(
            Mixture.reference().noise_fn(sde),
            sde,
            draws[0] * sde.prior_std,
            lambda i: draws[1 + i],
            n=n,
            predictor=PREDICTORS[info["predictor"]],
            corrector=CORRECTORS[info["corrector"]],
            snr=info["snr"],
            corrector_steps=info["n_steps"],
            probability_flow=info["probability_flow"],
            denoise=denoise,
            t_end=info["eps"],
        ),
        static_argnums=1,
    )
    close(run(draws, True), stored[f"{case}/x_mean_final"], tolerance)
    close(run(draws, False), stored[f"{case}/x_final"], tolerance)


@pytest.mark.parametrize(
    "sde", [sde_lib.VP(), sde_lib.SubVP(), sde_lib.VE(sigma_max=10.0)], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("corrector", ["langevin", "none"])
def test_samples_have_the_mean_and_variance_of_the_data(sde, corrector):
    """On Gaussian data with its exact noise, the sampler returns Gaussian data."""

    def noise(x, t):
        alpha, sigma = (c[:, None, None, None] for c in (sde.alpha(t), sde.sigma(t)))
        return sigma * (x - alpha * 0.4) / (alpha**2 * 0.25 + sigma**2)

    keys = jax.random.split(jax.random.key(0), 400)
    shape = (4, 4, 1)
    x = sde.prior_std * jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
    lifted = lambda x, t: noise(x, jnp.broadcast_to(t, x.shape[:1]))
    draw = pc.noise_of_keys(keys, shape)
    out = jax.jit(lambda x: pc.sample(lifted, sde, x, draw, n=300, corrector=corrector, snr=0.1))(x)
    np.testing.assert_allclose(out.mean(), 0.4, atol=0.03)
    np.testing.assert_allclose(out.std(), 0.5, atol=0.03)


def test_evaluations_are_counted_exactly():
    calls = []
    sde = sde_lib.VP()
    noise = lambda x, t: (jax.debug.callback(calls.append, jnp.zeros(())), x)[1]
    options = dict(predictor="reverse_diffusion", corrector="langevin", corrector_steps=2)
    x = jnp.ones((2, 4, 4, 1))
    draw = pc.noise_of_keys(jax.random.split(jax.random.key(0), 2), x.shape[1:])
    jax.block_until_ready(pc.sample(noise, sde, x, draw, n=25, **options))
    jax.effects_barrier()
    assert len(calls) == pc.evaluations(25, **options) == 75
    assert pc.evaluations(25, predictor="none", corrector="langevin", corrector_steps=1) == 25


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match=r"'euler'.*reverse_diffusion"):
        pc.sample(lambda x, t: x, sde_lib.VP(), jnp.ones((1, 2, 2, 1)), lambda i: 0, n=5, predictor="euler")
