"""The probability-flow ODE and its likelihood: the published figures, exact densities, one evaluation for both."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from score_sde import sde as sde_lib
from score_sde import sources
from score_sde.errors import UserError
from score_sde.space import pixels
from solvers import probability_flow as ode
from tests import reference
from tests.mixture import Mixture
from tests.programs import ROOT, TINY, environment, ok, program
from tests.test_predictor_corrector import sde_of

TIGHT = dict(rtol=1e-5, atol=1e-5)
LOOSE = dict(rtol=1e-3, atol=1e-3)
CASES = reference.cases("D_ode_likelihood")
SDES = [sde_lib.VP(), sde_lib.SubVP(), sde_lib.VE(), sde_lib.Flow()]
by_name = pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)


def rms(values):
    return float(np.sqrt(np.square(np.asarray(values, np.float64)).mean()))


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("ode")])
def test_published_end_points(case):
    """Both are as far from the exact solution as their tolerance says: their distance is of its order."""
    info, stored = CASES[case], reference.arrays("D_ode_likelihood")
    sde, n = sde_of(info)
    tolerances = {name: info[name] for name in ("rtol", "atol")}
    denoise = n if info["denoise"] else None
    solve = jax.jit(
        lambda z: ode.solve(Mixture.reference().noise_fn(sde), sde, z, t_end=info["eps"], denoise=denoise, **tolerances)
    )
    x, run = solve(jnp.asarray(reference.nhwc(stored[f"{case}/z"])))
    assert rms(x - reference.nhwc(stored[f"{case}/x"])) < 10 * info["rtol"]
    assert run.finished
    assert run.evaluations < 1.5 * info["nfe"]


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("lik")])
def test_published_likelihoods(case):
    """Equal with the published probe; and with the exact trace, equal to the density itself."""
    info, stored = CASES[case], reference.arrays("D_ode_likelihood")
    sde, _ = sde_of(info)
    x = jnp.asarray(reference.nhwc(stored[f"{case}/data"]))
    probe = jnp.asarray(reference.nhwc(stored[f"{case}/epsilon"]))[None]
    whole = jnp.repeat(ode.exact(None, 1, x.shape[1:])[:, None], len(x), axis=1)
    tolerances = {name: info[name] for name in ("rtol", "atol")}

    @jax.jit
    def bpd(probes):
        logp, z, _ = ode.log_likelihood(
            Mixture.reference().noise_fn(sde), sde, x, probes, t_min=info["eps"], **tolerances
        )
        return ode.bits_per_dim(logp, pixels(x.shape[1:])), z

    ours, z = bpd(probe)
    np.testing.assert_allclose(ours, stored[f"{case}/bpd"], atol=3e-4)
    theirs = reference.nhwc(stored[f"{case}/z"])
    np.testing.assert_allclose(z, theirs, atol=3e-4 * np.abs(theirs).max())
    np.testing.assert_allclose(bpd(whole)[0], stored[f"{case}/exact_bpd"], atol=1e-3)


@pytest.mark.parametrize(
    "sde", [*SDES, sde_lib.CosineVP(), sde_lib.EDM(), sde_lib.DiscreteVP()], ids=lambda sde: type(sde).__name__
)
def test_the_ode_is_the_published_one(sde, x64):
    """x = r u moves as the published drift in t says, at any time and for any noise."""
    x, eps = (jnp.asarray(reference.normal(name, (2, 4, 4, 1)), jnp.float64) for name in ("x", "eps"))
    radius = lambda t: jnp.hypot(sde.alpha(t), sde.sigma(t))
    angle = lambda t: jnp.arctan(jnp.sqrt(sde.sigma(t) / sde.alpha(t)))
    for share in (0.0123, 0.3217, 0.8571):
        t = jnp.float64(share * sde.t_max)
        (r, dr), (w, dw) = (jax.jvp(function, (t,), (jnp.ones_like(t),)) for function in (radius, angle))
        along = ode._velocity(lambda x, t: eps, sde, w, x / r)
        ours = dr * x / r + r * along * dw
        theirs = sde.reverse_drift(x, t, eps, probability_flow=True)
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9 * np.abs(theirs).max())


@by_name
def test_data_come_back_from_their_latents(sde):
    noise = Mixture.reference().noise_fn(sde)
    x = jnp.asarray(Mixture.reference().sample("round trip", 4))
    z, there = jax.jit(lambda x: ode.solve(noise, sde, x, t_start=sde.t_min, t_end=sde.t_max, **TIGHT))(x)
    back, _ = jax.jit(lambda z: ode.solve(noise, sde, z, **TIGHT))(z)
    assert there.finished
    np.testing.assert_allclose(there.t, sde.t_max, rtol=1e-5)
    assert 0.7 < rms(z) / sde.prior_std < 1.3
    assert rms(back - x) < 1e-4


@by_name
def test_likelihood_of_a_gaussian(sde):
    """For one Gaussian any trace of a single probe is exact where the Jacobian is a multiple of the identity."""
    variance = 0.3**2

    def noise(x, t):
        return sde.sigma(t) / (sde.alpha(t) ** 2 * variance + sde.sigma(t) ** 2) * x

    x = 0.3 * jnp.asarray(reference.normal("gaussian", (3, 4, 4, 1)))
    probes = ode.rademacher(jax.random.key(0), 1, x.shape)
    logp, _, _ = jax.jit(lambda x: ode.log_likelihood(noise, sde, x, probes, t_min=1e-5, **TIGHT))(x)
    total = sde.alpha(1e-5) ** 2 * variance + sde.sigma(1e-5) ** 2
    exact = -0.5 * ((np.asarray(x) ** 2).sum((1, 2, 3)) / total + 16 * np.log(2 * np.pi * total))
    np.testing.assert_allclose(logp / 16 / np.log(2), exact / 16 / np.log(2), atol=1e-3)


def counting(noise):
    """A NoiseFn, and the list that grows by one entry with each of its evaluations."""
    calls = []
    return (lambda x, t: (jax.debug.callback(calls.append, t), noise(x, t))[1]), calls


@pytest.mark.parametrize("tolerance", [1e-2, 1e-5])
def test_evaluations_are_counted_exactly(tolerance):
    """Rejected steps included; and drift and divergence of any number of probes come from the same evaluation."""
    sde = sde_lib.VP()
    noise, calls = counting(Mixture.reference().noise_fn(sde))
    x = jnp.asarray(Mixture.reference().sample("count", 2))
    probes = ode.gaussian(jax.random.key(0), 3, x.shape)
    tolerances = dict(rtol=tolerance, atol=tolerance)
    for solve in (
        lambda: ode.solve(noise, sde, x, t_start=1e-3, t_end=1.0, **tolerances)[1],
        lambda: ode.solve(noise, sde, x, denoise=1000, **tolerances)[1],
        lambda: ode.log_likelihood(noise, sde, x, probes, **tolerances)[2],
    ):
        calls.clear()
        run = jax.block_until_ready(solve())
        jax.effects_barrier()
        assert len(calls) == run.evaluations > 30


def test_probes_have_unit_covariance():
    shape = (2, 3, 1)
    flat = lambda name, n: np.asarray(ode.PROBES[name](jax.random.key(0), n, shape)).reshape(-1, 6)
    covariance = lambda v: v.T @ v / len(v)
    np.testing.assert_allclose(covariance(flat("exact", 1)), np.eye(6), atol=1e-6)
    for name in ("rademacher", "gaussian"):
        np.testing.assert_allclose(covariance(flat(name, 20_000)), np.eye(6), atol=0.05)
    with pytest.raises(UserError, match=r"3072.*rademacher"):
        ode.exact(None, 1, (32, 32, 3))


def test_more_probes_estimate_better():
    sde = sde_lib.VP()
    x = jnp.asarray(Mixture.reference().sample("probes", 1))
    run = jax.jit(lambda probes: ode.log_likelihood(Mixture.reference().noise_fn(sde), sde, x, probes, **LOOSE)[0][0])
    draw = lambda i, n: ode.gaussian(jax.random.key(i), n, x.shape)
    one, many = ([float(run(draw(i, n))) for i in range(24)] for n in (1, 16))
    assert 0.1 < np.std(many) / np.std(one) < 0.5


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("levels", [256, 32, 65536])
def test_the_uniform_density_takes_all_bits(centered, levels):
    """Over the data range, images of any depth take log2(levels) bits a dimension; the published offset is 7."""
    space = pixels((4, 4, 3), centered=centered)
    logp = -np.prod(space.shape) * np.log(space.high - space.low)
    np.testing.assert_allclose(ode.bits_per_dim(logp, space, levels=levels), np.log2(levels))
    np.testing.assert_allclose(ode.bits_per_dim(0.0, pixels(space.shape)), 7)
    with pytest.raises(UserError, match="latents"):
        ode.bits_per_dim(0.0, space._replace(low=-np.inf, high=np.inf))


def test_interpolation_follows_the_great_circle():
    z0, z1 = (reference.normal(name, (3, 4, 4, 2)) for name in ("one end", "other end"))
    between = lambda share: ode.interpolate(z0, z1, np.full(3, share, np.float32))
    np.testing.assert_allclose(between(0), z0, atol=1e-5)
    np.testing.assert_allclose(between(1), z1, atol=1e-5)
    z1 = z1 * np.sqrt((z0**2).sum((1, 2, 3), keepdims=True) / (z1**2).sum((1, 2, 3), keepdims=True))
    norm = lambda z: np.sqrt((z**2).sum((1, 2, 3)))
    np.testing.assert_allclose(norm(between(0.3)), norm(z0), rtol=1e-5)


@pytest.mark.parametrize("bad", [dict(rtol=1e-12, atol=1e-5), dict(rtol=1e-5, atol=0.0), dict(rtol=-1.0, atol=1.0)])
def test_tolerances_that_float32_cannot_give_are_refused(bad):
    with pytest.raises(UserError, match=r"float32 cannot tell errors below 1\.2e-06"):
        ode.solve(lambda x, t: x, sde_lib.VP(), jnp.ones((1, 2, 2, 1)), **bad)


def test_a_sample_that_is_not_finite_is_named_with_its_time():
    """The others do not stop it being found, and no number of steps is spent on it."""
    sde = sde_lib.VP()

    def noise(x, t):
        broken = (jnp.arange(4) == 2) & (t < 0.4)
        return jnp.where(broken[:, None, None, None], jnp.nan, sde.sigma(t) * x)

    x, run = jax.jit(lambda x: ode.solve(noise, sde, x, **TIGHT))(jnp.ones((4, 2, 2, 1)))
    run = jax.tree.map(np.atleast_1d, run)
    assert run.steps[0] < 50
    assert 0.1 < run.t[0] < 0.4
    with pytest.raises(UserError, match=r"sample 12 is not finite after \d+ steps of the ODE, at t = 0\.\d+: .*rtol"):
        ode.check(run, np.asarray(x), np.arange(10, 14))


def test_a_field_that_cannot_be_followed_ends(monkeypatch):
    monkeypatch.setattr(ode, "MAX_STEPS", 64)
    sde = sde_lib.VP()
    noise = lambda x, t: jnp.sin(1e6 * t) * 1e3 * x
    x, run = jax.jit(lambda x: ode.solve(noise, sde, x, **TIGHT))(jnp.ones((2, 2, 2, 1)))
    with pytest.raises(UserError, match="the end is not reached after 64 steps of the ODE, at t = "):
        ode.check(jax.tree.map(np.atleast_1d, run), np.asarray(x), np.arange(2))


DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from score_sde import parallel
from score_sde.space import pixels
from score_sde.sde import VP
from solvers import probability_flow as ode
assert jax.device_count() == 2
x = jax.random.normal(jax.random.key(0), (6, 4, 4, 1)) * jnp.array([1, 1, 1, 3, 3, 3.0]).reshape(6, 1, 1, 1)
probes = ode.rademacher(jax.random.key(1), 2, x.shape)
noise = lambda x, t: VP().sigma(t) * jnp.tanh(2 * x)  # the second device's images are harder
likelihood = lambda x, probes: ode.log_likelihood(noise, VP(), x, probes, rtol=1e-4, atol=1e-4)
alone = jax.jit(likelihood)(x, probes)
split = parallel.shard((np.asarray(x), np.asarray(probes).swapaxes(0, 1)))
shared = parallel.gather(parallel.pmap(lambda x, probes: likelihood(x, probes.swapaxes(0, 1)))(*split))
np.testing.assert_allclose(shared[0], alone[0], rtol=1e-5)
np.testing.assert_allclose(shared[1], alone[1], atol=1e-5)
assert (shared[2].evaluations == alone[2].evaluations).all(), (shared[2], alone[2])
broken = lambda x, t: noise(x, t) * jnp.where(x[:1, :1, :1, :1] > 1e9, jnp.nan, 1) + jnp.where(t < 0.4, jnp.inf, 0) * (
    jax.lax.axis_index(parallel.AXIS) == 1)
x, run = parallel.gather(parallel.pmap(lambda x: ode.solve(broken, VP(), x, rtol=1e-4, atol=1e-4))(split[0]))
assert (run.steps == run.steps[0]).all() and not run.finished.any()
assert list(np.isfinite(x).all((1, 2, 3))) == [True] * 3 + [False] * 3
"""


def test_two_devices_equal_one_and_stop_together():
    subprocess.run([sys.executable, "-c", DEVICES], env=environment(2), check=True, cwd=ROOT, timeout=200)


@pytest.mark.slow
def test_the_programs(tmp_path):
    """Samples colder than the prior, images between images, bits/dim and encoding; on two devices; and a refusal."""
    tolerances = [f"--config.eval.likelihood.{name}=1e-3" for name in ("rtol", "atol")]
    few = ["--config.eval.likelihood.num_data=5", "--config.eval.likelihood.repeats=2", "--config.training.n_iters=4"]
    workdir = f"--workdir={tmp_path}"
    ok(program("train", *TINY, *tolerances, *few, workdir))
    options = ["--option", "rtol=1e-3", "--option", "atol=1e-3"]
    common = [workdir, "--num_samples=16", *options]
    cold = ["--option", "temperature=1e-6", "--option", "denoise=False"]
    ok(program("sample", *common, *cold, "--solver=ode", "--name=cold"))
    ok(program("sample", *common, "--task=interpolate", "--name=between", devices=2))
    images, records = {}, {}
    for name in ("cold", "between"):
        with np.load(tmp_path / "samples" / name / "samples.npz") as file:
            images[name] = file["samples"].astype(float)
        records[name] = json.loads((tmp_path / "samples" / name / "run.json").read_text())
    # the first and last of a row are test images, brought back
    test = sources.load("digits", "test", image_size=8, num_channels=1).take(np.arange(4))["image"]
    assert np.abs(images["between"][[0, 7, 8, 15]] - test).mean() < 3
    assert np.abs(images["between"][4] - test[0]).mean() > 10
    assert np.ptp(images["cold"], axis=0).max() <= 1  # all from the middle of the prior
    assert np.ptp(images["between"], axis=0).max() > 50
    assert 20 < records["cold"]["nfe"] < records["between"]["nfe"]

    out = ok(program("evaluate", workdir, "--metrics=bpd,encoding", devices=2))
    report = json.loads((tmp_path / "eval" / "report.json").read_text())
    assert "Bits/dim" in out
    assert "dequantized here" in out
    assert 0 < report["bpd"]["mean"] < 16
    assert report["bpd"]["standard_error"] > 0
    assert report["bpd"]["num_data"] == 5
    assert report["encoding"]["rms"] < 0.05

    refused = program("sample", workdir, "--solver=ode", "--option", "rtol=1e-12")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: rtol=1e-12")
    assert refused.stderr.count("\n") == 1
