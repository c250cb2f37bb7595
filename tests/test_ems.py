"""EMS: equal to the published statistics from the same draws, exact for a Gaussian, additive, robust in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ems import estimate, moments, statistics
from score_sde import files
from score_sde import sde as sde_lib
from score_sde.errors import UserError
from tests import reference
from tests.mixture import Mixture
from tests.test_solvers import SCHEDULES, guided


def published_draws(name: str, node: int, batch: int):
    """(noise for l, noise for f, signs) of the published two-pass procedure, channels last."""
    shape = (32, 3, 8, 8)
    signs = reference.rng(f"E/ems_{name}/v/{node}/{batch}").integers(0, 2, size=shape) * 2.0 - 1
    zl, zf = (reference.normal(f"E/ems_{name}/{z}/{node}/{batch}", shape) for z in ("zl", "zf"))
    return (reference.nhwc(values).astype(np.float64) for values in (zl, zf, signs))


@pytest.mark.parametrize("name", ["vp", "cosine", "discrete", "edm", "cfg"])
def test_published_statistics(name, x64):
    """Our one pass, fed the draws of the published two, gives their l, s, b in float64."""
    info = reference.cases(f"E_ems_{name}")["ems"]
    sde = SCHEDULES[reference.description(f"E_v3_{name}")["schedule"]][0]
    stored = reference.arrays(f"E_ems_{name}")
    noise = guided(sde) if name == "cfg" else Mixture.reference().noise_fn(sde)
    nodes = estimate.nodes_at(sde, stored["ems/timesteps_f64"], stored["ems/lambdas_f64"])
    if name in ("discrete", "cfg"):  # the published derivative of the table is that of the piecewise-linear log alpha
        np.testing.assert_array_less(0, -nodes.dt)
    run = jax.jit(functools.partial(estimate.batch_moments, noise))
    total = None
    for batch in range(info["n_batch"]):
        x0 = Mixture.reference().sample(f"E/ems_{name}/x0/{batch}", 32).astype(np.float64)
        rows = []
        for j in range(len(nodes.t)):
            zl, zf, v = published_draws(name, j, batch)
            node = jax.tree.map(lambda values: values[j], nodes)
            of_l, of_f = run(node, x0, zl, v), run(node, x0, zf, v)
            rows.append(of_f._replace(w=of_l.w))
        stacked = moments.Moments(*(np.stack(parts) for parts in zip(*rows, strict=True)))
        total = stacked if total is None else moments.merge(total, stacked)
    ems = estimate.statistics(nodes, total, {})
    for key in "lsb":
        theirs = reference.nhwc(stored[f"ems/{key}_f64"])
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(getattr(ems, key) / scale, theirs / scale, atol=1e-7, err_msg=key)


VARIANCE = np.array([0.04, 0.25, 4.0]).reshape(1, 1, 3)
MEAN = np.array([0.5, -0.2, 0.1]).reshape(1, 1, 3)


def gaussian_noise(sde):
    """The ideal noise of independent Gaussian pixels N(MEAN, VARIANCE)."""

    def noise(x, t):
        alpha, sigma = (jnp.broadcast_to(c, x.shape[:1])[:, None, None, None] for c in (sde.alpha(t), sde.sigma(t)))
        mean, variance = (jnp.asarray(c, x.dtype)[None] for c in (MEAN, VARIANCE))
        return sigma * (x - alpha * mean) / (alpha**2 * variance + sigma**2)

    return noise


def gaussian_statistics(sde, t, lam):
    """In closed form: eps is affine in x, so f with the exact l is a function of lam alone (s = 0, b = f')."""
    alpha, sigma = (c[:, None, None, None] for c in (sde.alpha(t), sde.sigma(t)))
    l = sigma**2 / (alpha**2 * VARIANCE[None] + sigma**2)
    # f = -l MEAN and dl/dlam = -2 l (1 - l)
    return l, 2 * l * (1 - l) * MEAN[None]


@pytest.mark.parametrize(
    "sde",
    [sde_lib.VP(), sde_lib.SubVP(), sde_lib.VE(), sde_lib.EDM(), sde_lib.Flow()],
    ids=lambda s: type(s).__name__,
)
def test_statistics_of_a_gaussian(sde, x64):
    """l exactly, b up to the differences that give l', whatever the SDE; f is constant, so s = 0, counted."""
    nodes = estimate.nodes(sde, 1200)
    x0 = MEAN + np.sqrt(VARIANCE) * np.random.default_rng(0).normal(size=(16, 2, 2, 3))
    measured = jax.jit(functools.partial(estimate.measure, gaussian_noise(sde)))(
        nodes, np.arange(1201), jax.random.key(0), x0, np.arange(16)
    )
    measured = moments.merge(measured, moments.Moments.zeros((1201,), (2, 2, 3)))
    ems = estimate.statistics(nodes, measured, {"seed": 0}, smoothing=1)
    l, df = gaussian_statistics(sde, nodes.t, nodes.lam)
    np.testing.assert_allclose(ems.l, np.broadcast_to(l, ems.l.shape), rtol=1e-9)
    assert (ems.s == 0).all()
    assert ems.origin == {"seed": 0, "constant_f": ems.s.size}
    inner = slice(10, -10)
    np.testing.assert_allclose(ems.b[inner], np.broadcast_to(df, ems.b.shape)[inner], atol=2e-4)


def test_one_pass_survives_float32(x64):
    """float32 moments of a float32 noise give the float64 statistics; without the reference l, f is lost in rounding.

    At the largest noise eps and x agree to 1e-5, so the last digit of eps is 1 % of f there and nothing can be better.
    """
    sde, mixture = sde_lib.VP(), Mixture.reference()
    referred = estimate.nodes(sde, 24)
    plain = referred._replace(c=0 * referred.c, dc=0 * referred.dc)
    x0 = mixture.sample("float32", 64)

    def measured(nodes, dtype):
        ideal, rng, rows = mixture.noise_fn(sde), np.random.default_rng(0), []
        noise = lambda x, t: ideal(x.astype(np.float64), t.astype(np.float64)).astype(dtype)
        run = jax.jit(functools.partial(estimate.batch_moments, noise))
        for j in range(25):
            z, v = rng.normal(size=x0.shape), rng.integers(0, 2, x0.shape) * 2.0 - 1
            node = jax.tree.map(lambda values: jnp.asarray(values[j], dtype), nodes)
            rows.append(run(node, *(jnp.asarray(a, dtype) for a in (x0, z, v))))
        stacked = moments.Moments(*(np.stack(parts).astype(np.float64) for parts in zip(*rows, strict=True)))
        return estimate.statistics(nodes, stacked, {})

    double = measured(referred, np.float64)
    single, careless = (measured(nodes, np.float32) for nodes in (referred, plain))

    def errors(ems, key):
        ours, exact = getattr(ems, key), getattr(double, key)
        return np.sqrt(np.square(ours - exact).mean((1, 2, 3)) / np.square(exact).mean((1, 2, 3)))

    for key in "lsb":
        assert np.median(errors(single, key)) < 5e-5
        assert errors(single, key).max() < 0.05
    assert single.origin["constant_f"] == double.origin["constant_f"] == 0
    assert careless.origin["constant_f"] > 500
    assert errors(careless, "s").max() > 0.9


def test_moments_are_additive():
    """Any split of the samples merges to the moments of the whole."""
    sde, mixture = sde_lib.VP(), Mixture.reference()
    nodes = estimate.nodes(sde, 3)
    x0 = mixture.sample("additive", 24)
    measure = jax.jit(functools.partial(estimate.measure, mixture.noise_fn(sde)))
    run = lambda part: measure(nodes, np.arange(4), jax.random.key(1), jnp.asarray(x0[part]), np.arange(24)[part])
    whole = moments.merge(run(slice(None)), moments.Moments.zeros((4,), x0.shape[1:]))
    parts = moments.merge(moments.merge(run(slice(0, 8)), run(slice(8, 16))), run(slice(16, 24)))
    assert (parts.n == 24).all()
    for ours, theirs in zip(parts, whole, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4 * np.abs(theirs).max())


def test_merge_against_numpy(x64):
    rng = np.random.default_rng(0)
    w, triple = rng.normal(size=(30, 2, 2, 1)), 5 + rng.normal(size=(30, 3, 2, 2, 1))

    def of(part):
        a, b = w[part], triple[part] - triple[part].mean(0)
        second = np.einsum("bi...,bj...->ij...", b, b)
        return moments.Moments(np.float64(len(a)), a.mean(0), triple[part].mean(0), second)

    merged = moments.merge(of(slice(0, 11)), of(slice(11, 30)))
    for ours, theirs in zip(merged, of(slice(None)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_one_network_evaluation_per_node_and_image():
    calls = []
    sde = sde_lib.VP()
    noise = lambda x, t: (calls.append(1), Mixture.reference().noise_fn(sde)(x, t))[1]
    x = jnp.ones((4, 8, 8, 3))
    node = jax.tree.map(lambda values: jnp.float32(values[1]), estimate.nodes(sde, 3))
    jax.eval_shape(functools.partial(estimate.batch_moments, noise), node, x, x, x)
    assert len(calls) == 1


def accumulator(n: int, images: range, *, batch_size: int, asked: list | None = None, **options):
    """accumulate() of the mixture over the images of a range, at n + 1 nodes; `asked` collects the units of work."""
    sde, mixture = sde_lib.VP(), Mixture.reference()
    x0 = mixture.sample("accumulator", 48)
    run = jax.jit(functools.partial(estimate.measure, mixture.noise_fn(sde)))

    def measure(node, node_index, index, x0):
        if asked is not None:
            asked.append((tuple(node_index), tuple(index)))
        node = jax.tree.map(np.float32, node)
        return jax.tree.map(lambda part: part[None], run(node, node_index, jax.random.key(0), x0, index))  # one device

    return functools.partial(
        estimate.accumulate,
        measure,
        estimate.nodes(sde, n),
        lambda index: (x0[index],),
        images,
        x0.shape[1:],
        batch_size=batch_size,
        **options,
    )


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_stopped_estimate_goes_on_to_the_same_moments(stop, tmp_path):
    """Stopped after any unit of work, the estimate resumes from its file and gives the bits of the undisturbed one."""
    asked = []
    options = dict(batch_size=4, chunk=3, asked=asked, identity="model", save_every=0.0)
    accumulate = accumulator(6, range(12), **options)
    whole = accumulate()
    units = len(asked)
    assert units == 9
    assert whole.n.sum(0).tolist() == [12] * 7

    def interrupt(done, total):
        if done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        accumulate(partial=tmp_path / "partial.npz", progress=interrupt)
    asked.clear()
    resumed = accumulate(partial=tmp_path / "partial.npz")
    assert len(asked) == units - stop
    for ours, theirs in zip(resumed, whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not list(tmp_path.iterdir())


def test_a_partial_file_of_another_model_is_not_continued(tmp_path):
    path = tmp_path / "partial.npz"
    files.save_npz(path, moments.Moments.zeros((2,), (1, 1, 1))._asdict() | dict(done=3, identity="this"))
    assert estimate._read_partial(path, "this")[1] == 3
    assert estimate._read_partial(path, "that") is None
    path.write_bytes(path.read_bytes()[:100])
    assert estimate._read_partial(path, "this") is None


def test_file_round_trip(tmp_path):
    sde = sde_lib.VP()
    nodes = estimate.nodes(sde, 5)
    values = np.random.default_rng(0).normal(size=(3, 6, 2, 2, 1))
    ems = statistics.EMS(nodes.t, nodes.lam, *values, {"sde": statistics.describe_sde(sde), "num_data": 7})
    statistics.save(tmp_path / "ems.npz", ems)
    loaded = statistics.load(tmp_path / "ems.npz")
    assert loaded.origin == ems.origin
    assert loaded.errors is None  # as in files from before there were any
    for ours, theirs in zip(loaded[:5], ems[:5], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    statistics.save(tmp_path / "ems.npz", ems._replace(errors=values[:, :, 0, 0, 0]))
    np.testing.assert_array_equal(statistics.load(tmp_path / "ems.npz").errors, values[:, :, 0, 0, 0])
    assert statistics.load_origin(tmp_path / "ems.npz") == ems.origin
    assert [p.name for p in tmp_path.iterdir()] == ["ems.npz"]


def test_damaged_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="python -m ems"):
        statistics.load(tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(UserError, match="not an EMS file"):
        statistics.load(tmp_path / "text.npz")
    np.savez(tmp_path / "nan.npz", t=[1.0, 0.5], lam=[0, 1.0], l=[np.nan, 1], s=[0, 0], b=[0, 0], origin="{}")
    with pytest.raises(UserError, match="l is damaged"):
        statistics.load(tmp_path / "nan.npz")


def test_smoothing_shrinks_at_the_ends():
    values = np.arange(30.0).reshape(30, 1, 1, 1) ** 2
    smoothed = estimate.smooth(values, 11)[:, 0, 0, 0]
    for j in (0, 3, 15, 29):
        np.testing.assert_allclose(smoothed[j], values[max(0, j - 5) : j + 6].mean())
