"""Predictor-corrector sampling: equal to the published runs, draw by draw, and right in distribution."""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.build import construct
from score_sde import sde as sde_lib
from score_sde.denoiser import score_fn
from score_sde.errors import UserError
from solvers import predictor_corrector as pc
from tests import reference
from tests.mixture import Mixture

ROOT = pathlib.Path(__file__).resolve().parents[1]
PREDICTORS = {"em": "euler_maruyama", "rd": "reverse_diffusion", "as": "ancestral_sampling", "none": "none"}
CORRECTORS = {"langevin": "langevin", "ald": "ald", "none": "none"}


def sde_of(info):
    """(SDE, number of steps) of a published case."""
    kind, args = info["sde"]
    if kind == "VESDE":
        return sde_lib.VE(sigma_min=args[0], sigma_max=args[1]), args[2]
    return {"VPSDE": sde_lib.VP, "subVPSDE": sde_lib.SubVP}[kind](beta_min=args[0], beta_max=args[1]), args[2]


def options_of(info) -> dict:
    """The options of `sample` and `stepper` for a published run."""
    return dict(
        n=info["sde"][1][2],
        predictor=PREDICTORS[info["predictor"]],
        corrector=CORRECTORS[info["corrector"]],
        snr=info["snr"],
        corrector_steps=info["n_steps"],
        probability_flow=info.get("probability_flow", False),
        t_end=info["eps"],
    )


def close(ours, theirs, tolerance):
    theirs = reference.nhwc(theirs)
    np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max(), rtol=0)


@pytest.mark.parametrize("case", reference.cases("D_updates"))
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
            update = pc.CORRECTORS[CORRECTORS[info["corrector"]]](sde, score, update.x, t, z, n=n, snr=info["snr"])
    close(update.x, stored[f"{case}/x_new"], 1e-5)
    close(update.mean, stored[f"{case}/x_mean"], 1e-5)


@pytest.mark.parametrize("case", [c for c in reference.cases("D_pc") if not c.startswith("net")])
def test_published_runs(case, x64):
    """In float64, to what the stored float32 runs are good for: their sigma_i^2 - sigma_(i-1)^2 of VE loses 4e-5."""
    info, stored = reference.cases("D_pc")[case], reference.arrays("D_pc")
    sde, _ = sde_of(info)
    draws = jnp.asarray(reference.nhwc(stored[f"{case}/noise"]), jnp.float64)
    tolerance = 5e-5 if case.startswith("ve") else 1e-5
    run = jax.jit(
        lambda draws, denoise: pc.sample(
            Mixture.reference().noise_fn(sde),
            sde,
            draws[0] * sde.prior_std,
            lambda i: draws[1 + i],
            **options_of(info),
            denoise=denoise,
        ),
        static_argnums=1,
    )
    close(run(draws, True), stored[f"{case}/x_mean_final"], tolerance)
    close(run(draws, False), stored[f"{case}/x_final"], tolerance)


@pytest.mark.parametrize(
    "sde",
    [sde_lib.VP(), sde_lib.SubVP(), sde_lib.VE(sigma_max=10.0), sde_lib.Flow()],
    ids=lambda s: type(s).__name__,
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


@pytest.mark.parametrize("corrector", pc.CORRECTORS)
@pytest.mark.parametrize("predictor", pc.PREDICTORS)
@pytest.mark.parametrize("conditioned", [False, True])
def test_evaluations_and_draws_are_counted_exactly(predictor, corrector, conditioned):
    calls, draws = [], []
    counted = lambda into, value, result: (jax.debug.callback(lambda v: into.append(int(v)), value), result)[1]
    x = jnp.ones((2, 4, 4, 1))
    options = dict(predictor=predictor, corrector=corrector, corrector_steps=2)
    jax.block_until_ready(
        pc.sample(
            lambda x, t: counted(calls, 0, x),
            sde_lib.VP(),
            x,
            lambda i: counted(draws, i, x),
            n=25,
            condition=(lambda update, score, x, t, z: update(score, x + 0 * z)) if conditioned else None,
            **options,
        )
    )
    jax.effects_barrier()
    assert len(calls) == pc.evaluations(25, **options) == 25 * ((predictor != "none") + 2 * (corrector != "none"))
    assert sorted(draws) == list(range(len(calls) + 50 * conditioned))  # each draw once, none left out


def test_ancestral_noise_is_the_posteriors_or_for_vp_the_transitions():
    """sigma_(i-1) sqrt(sigma_i^2 - a^2 sigma_(i-1)^2) / sigma_i, none in the last step; VP: sqrt(beta_i)."""
    n = 200
    for sde, spacing in ((sde_lib.VE(), 1 / (n - 1)), (sde_lib.EDM(), 80 / n), (sde_lib.Flow(), 0.999 / n)):
        t = spacing * (np.arange(1, n) + 1e-9)
        now, before, a = sde.sigma(t), sde.sigma(t - spacing), sde.alpha(t) / sde.alpha(t - spacing)
        expected = before * np.sqrt(now**2 - (a * before) ** 2) / now
        np.testing.assert_allclose(sde.ancestral_std(t, n), expected, rtol=1e-6, atol=1e-6 * now[0])
        assert sde.ancestral_std(np.array([1e-5]), n) == 0
    for sde in (sde_lib.VP(), sde_lib.CosineVP(), sde_lib.DiscreteVP(n=n)):
        t = np.array([0.2, 0.7])
        np.testing.assert_array_equal(sde.ancestral_std(t, n), sde.transition(t, n)[1])


def test_a_chunk_of_steps_is_a_part_of_the_run():
    """Steps from the host, by one compiled function for chunks of any length, come to the bits of the whole run."""
    sde, shape = sde_lib.VE(), (4, 4, 1)
    keys = jax.random.split(jax.random.key(0), 3)
    draw, noise = pc.noise_of_keys(keys, shape), lambda x, t: x / jnp.sqrt(1 + sde.sigma(t) ** 2)
    x = 50 * jax.random.normal(jax.random.key(1), (3, *shape))
    whole = jax.jit(lambda x: pc.sample(noise, sde, x, draw, n=20))(x)
    step = pc.stepper(noise, sde, draw, n=20)
    chunk = jax.jit(lambda start, stop, update: jax.lax.fori_loop(start, stop, step, update))
    update = pc.Update(x, x)
    for start, stop in ((0, 7), (7, 14), (14, 20)):
        update = chunk(start, stop, update)
    assert chunk._cache_size() == 1
    np.testing.assert_allclose(update.mean, whole, rtol=1e-6)


REFUSED = {
    "unknown predictor": (sde_lib.VP(), dict(predictor="euler"), r"'euler'.*reverse_diffusion"),
    "unknown corrector": (sde_lib.VP(), dict(corrector="mala"), r"'mala'.*langevin"),
    "ancestral ODE": (sde_lib.VP(), dict(predictor="ancestral_sampling", probability_flow=True), "no probability flow"),
    "ancestral sub-VP": (sde_lib.SubVP(), dict(predictor="ancestral_sampling"), "sub-VP has no chain"),
    "few steps": (sde_lib.VP(), dict(n=20), "beta_max"),
    "another chain": (sde_lib.DiscreteVP(), dict(n=100), "1000 steps"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_has_no_meaning_is_refused_in_one_line(mistake):
    sde, options, words = REFUSED[mistake]
    x = jnp.ones((1, 2, 2, 1))
    with pytest.raises(UserError, match=words) as error:
        pc.sample(lambda x, t: x, sde, x, lambda i: x, **(dict(n=25) | options))
    assert "\n" not in str(error.value)


def sampling_of(path: pathlib.Path):
    """SDE, number of steps, and options of `stepper` that an official config says."""
    config = importlib.import_module(".".join(path.with_suffix("").parts)).get_config()
    names = ("predictor", "corrector", "corrector_steps", "snr", "probability_flow")
    options = {name: config.sampling[name] for name in names}
    return construct(sde_lib.SDES, config.sde, "SDE"), dict(n=config.sampling.pc_steps, **options)


OFFICIAL = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").glob("*v[ep]/**/*.py") if path.stem[0] != "_")
DISTINCT = {str(sampling_of(path)): path for path in OFFICIAL}  # what several have in common is tried once


@pytest.mark.parametrize("path", DISTINCT.values(), ids=str)
def test_every_official_config_samples_as_it_says(path):
    """Its predictor and corrector exist for its SDE and number of steps."""
    sde, options = sampling_of(path)
    x = jnp.zeros((2, 4, 4, 3))
    step = pc.stepper(lambda x, t: 0.5 * x, sde, lambda i: x, **options)
    update = jax.jit(lambda i, x: step(i, pc.Update(x, x)))
    for i in (0, options["n"] - 1):
        x = update(i, x + 1.0).mean
    assert jnp.isfinite(x).all()
