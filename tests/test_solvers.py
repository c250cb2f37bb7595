"""DPM-Solver-v3 equals the published implementation; what all tableaux share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ems import statistics
from ems.statistics import EMS
from score_sde import sde as sde_lib
from score_sde.errors import UserError
from solvers import dpm_solver, dpm_solver_v3, grids, tableau
from tests import reference
from tests.mixture import Mixture
from tests.optimized import optimized_jit

SCHEDULES = {
    "vp": (sde_lib.VP(), 1.0, 1e-3),
    "cosine": (sde_lib.CosineVP(), 0.9946, 1e-3),
    "discrete": (sde_lib.DiscreteVP(beta_min=0.85, beta_max=12.0, scaled=True, t_first=1e-3), 1.0, 1e-3),
    "edm": (sde_lib.EDM(), 80.0, 0.002),
}
GRIDS = {"logSNR": "logsnr", "time_uniform": "time", "time_quadratic": "quadratic", "edm": "edm"}


@functools.cache
def problem(name: str):
    """(SDE, NoiseFn, published statistics) of a group of the reference tables; all in float64."""
    info = reference.description(f"E_v3_{name}")
    sde, t_start, t_end = SCHEDULES[info["schedule"]]
    noise = guided(sde) if name == "cfg" else Mixture.reference().noise_fn(sde)
    stored = reference.arrays(f"E_ems_{name}")
    ems = statistics.from_published(
        *(stored[f"ems/{key}_f64"] for key in "lsb"), sde, t_start=t_start, t_end=t_end, origin={"sde": "published"}
    )
    np.testing.assert_allclose(ems.lam, stored["ems/lambdas_f64"], rtol=1e-6, atol=1e-6)
    return sde, noise, ems._replace(t=stored["ems/timesteps_f64"], lam=stored["ems/lambdas_f64"])


def guided(sde, scale=2.0):
    """Classifier-free guidance of the mixture: eps = uncond + scale (cond - uncond)."""
    free, conditional = (Mixture.reference().noise_fn(sde, c) for c in (None, (4.0, 0.0, 0.0)))
    return lambda x, t: free(x, t) + scale * (conditional(x, t) - free(x, t))


def solve(noise, table, x):
    return jax.jit(functools.partial(tableau.solve, noise))(table, x)


def worst(ours, theirs):
    return np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max()


def end_points(noise, tables, x):
    """What each tableau makes of x (B, H, W, C), by one compilation."""
    length, history = max(len(table.t) for table in tables), max(table.history for table in tables)
    shape = np.broadcast_shapes(*(table.l.shape[1:] for table in tables))
    run = optimized_jit(functools.partial(tableau.solve, noise))
    alike = [tableau.lengthened(tableau.uniform(table, history, shape), length) for table in tables]
    return [run(table, x, evaluations=np.int32(len(own.t))) for table, own in zip(alike, tables, strict=True)]


def published_v3(sde, ems, row: dict, indices) -> tableau.Tableau:
    """DPM-Solver-v3 as a row of a published table says."""
    return dpm_solver_v3.dpm_solver_v3(
        sde,
        row["steps"],
        ems=ems,
        order=row["order"],
        pseudo=row["p_pseudo"],
        corrector="on" if row["use_corrector"] else "off",
        corrector_pseudo=row["c_pseudo"],
        lower_order_final=row["lower_order_final"],
        degenerate=row["degenerated"],
        indices=indices[: row["steps"] + 1],
    )


def run_v3_rows(name: str, dtype, noise) -> np.ndarray:
    """Relative error of every row of a published table, from its own statistics and step indices."""
    sde, _, ems = problem(name)
    stored = reference.arrays(f"E_v3_{name}")
    x = jnp.asarray(reference.nhwc(stored["x_T"]), dtype)
    rows = zip(reference.rows(f"E_v3_{name}"), stored["indexes_f64"], strict=True)
    tables = [published_v3(sde, ems, row, indices) for row, indices in rows]
    theirs = reference.nhwc(stored["x0_f64"])
    return np.array([worst(ours, x0) for ours, x0 in zip(end_points(noise, tables, x), theirs, strict=True)])


TABLES = ["vp", "cosine", "discrete", "edm", "cfg"]


@pytest.mark.parametrize("name", TABLES)
def test_published_dpm_solver_v3(name, x64):
    """Every option of the published solver, against its float64 end points."""
    assert run_v3_rows(name, jnp.float64, problem(name)[1]).max() < 1e-9


@pytest.mark.parametrize("name", TABLES)
def test_published_dpm_solver_v3_in_float32(name, x64):
    """1e-5 in float32; where the problem amplifies more, of the size that a float32 network alone makes unavoidable.

    The ideal noise is computed in float64 and rounded, so that the solver alone is measured. A few rows (5 or 6 steps
    of order 3) amplify the rounding of the network's input and output beyond 1e-5 even with a float64 solver.
    """
    single, double = jnp.float32, jnp.float64
    ideal = problem(name)[1]
    rounded = lambda x, t: ideal(x.astype(single).astype(double), t.astype(double)).astype(single)
    errors = run_v3_rows(name, single, rounded)
    unavoidable = run_v3_rows(name, double, lambda x, t: rounded(x, t).astype(double))
    assert (errors < np.maximum(1e-5, 10 * unavoidable)).all()
    assert np.median(errors) < 2e-6


@pytest.mark.parametrize("name", ["vp", "edm"])
def test_published_step_nodes(name):
    """The nearest nodes of every grid are the published ones, but for ties that rounding decides."""
    sde, _, ems = problem(name)
    stored = reference.arrays(f"E_v3_{name}")
    for i, row in enumerate(reference.rows(f"E_v3_{name}")):
        t = grids.times(GRIDS[row["skip_type"]], sde, row["steps"], t_start=ems.t[0], t_end=ems.t[-1])
        theirs = stored["indexes_f64"][i][: row["steps"] + 1]
        ours = dpm_solver_v3.nearest_nodes(ems, sde.lam(t))
        exact = (sde.lam(t) - ems.lam[0]) / (ems.lam[1] - ems.lam[0])
        tied = np.abs(exact - np.floor(exact) - 0.5) < 1e-3
        assert (np.abs(ours - theirs) <= tied).all(), (row, ours, theirs)


def fake_ems(sde, n: int, shape=(8, 8, 3), l=0.6, s=-0.2, b=0.1) -> EMS:
    """Smooth made-up statistics: a solver's order must not depend on what they are."""
    lam = np.linspace(sde.lam(np.float64(sde.t_max)), sde.lam(np.float64(sde.t_min)), n + 1)
    wave = lambda mean: mean * (1 + 0.3 * np.sin(lam))[:, None, None, None] * np.ones((1, *shape))
    return EMS(sde.t_of_lam(lam), lam, wave(l), wave(s), wave(b), {})


def test_with_data_prediction_dpm_solver_v3_is_dpm_solver_pp():
    """l = 1, s = b = 0 give the steps of DPM-Solver++, up to the quadrature of the integrals."""
    sde = sde_lib.VP()
    ours = dpm_solver_v3.dpm_solver_v3(sde, 10, ems=fake_ems(sde, 5000), order=1, degenerate=True)
    plain = tableau.uniform(dpm_solver.ddim(sde, 10), 2, (8, 8, 3))
    np.testing.assert_allclose(ours.predict, plain.predict, atol=1e-6)


def test_each_step_is_one_evaluation():
    calls = []
    noise = lambda x, t: (jax.debug.callback(calls.append, t), x)[1]
    jax.block_until_ready(
        solve(
            noise, dpm_solver_v3.dpm_solver_v3(sde_lib.VP(), 7, ems=fake_ems(sde_lib.VP(), 60)), jnp.ones((1, 8, 8, 3))
        )
    )
    jax.effects_barrier()
    assert len(calls) == 7


@pytest.mark.parametrize("pseudo", [False, True])
def test_derivative_weights(pseudo, x64):
    """The Vandermonde weights differentiate polynomials exactly; divided differences give k! f[lam_0 .. lam_k]."""
    lam = np.array([0.3, -0.4, 1.1, 2.0])
    weights = dpm_solver_v3.derivative_weights(lam, pseudo)
    cubic = np.polynomial.Polynomial([0.5, -1.0, 2.0, 3.0], domain=[-1, 1], window=[-1, 1])
    derivatives = [cubic.deriv(k)(lam[0]) if k else cubic(lam[0]) for k in range(4)]
    if not pseudo:
        np.testing.assert_allclose(weights @ cubic(lam), derivatives, rtol=1e-10)
    np.testing.assert_allclose((weights @ cubic(lam))[[0, 3]], [derivatives[0], 18.0], rtol=1e-10)
    np.testing.assert_allclose(weights.sum(1), [1, 0, 0, 0], atol=1e-12)


def test_grids():
    sde = sde_lib.VP()
    for kind in grids.GRIDS:
        t = grids.times(kind, sde, 12)
        assert t[0] == 1.0
        assert t[-1] == 1e-3
        assert (np.diff(t) < 0).all()
    np.testing.assert_allclose(np.diff(sde.lam(grids.times("logsnr", sde, 12)), 2), 0, atol=1e-8)
    np.testing.assert_allclose(np.diff(grids.times("time", sde, 12), 2), 0, atol=1e-12)
    np.testing.assert_allclose(np.diff(np.sqrt(grids.times("quadratic", sde, 12)), 2), 0, atol=1e-12)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda sde: dpm_solver.ddim(sde, 9, grid="log"), "unknown grid 'log'"),
        (lambda sde: dpm_solver.ddim(sde, 9, t_end=2.0), "0 < end < start"),
        (lambda sde: dpm_solver.ddim(sde, 0), "fewer than the order"),
        (lambda sde: dpm_solver_v3.dpm_solver_v3(sde, 2, ems=fake_ems(sde, 60)), "fewer than the order"),
        (lambda sde: dpm_solver_v3.dpm_solver_v3(sde, 9, ems=fake_ems(sde, 60), order=0), "order 0"),
        (lambda sde: dpm_solver_v3.dpm_solver_v3(sde, 9, ems=fake_ems(sde, 60), corrector="yes"), "corrector"),
        (lambda sde: dpm_solver_v3.dpm_solver_v3(sde, 30, ems=fake_ems(sde, 20), snap=True), "different nodes"),
        (lambda sde: dpm_solver_v3.dpm_solver_v3(sde, 9, ems=fake_ems(sde_lib.VE(), 60)), "another SDE"),
        (lambda sde: sde_lib.DiscreteVP().transition(np.float64(0.5), 10), "1000 steps"),
    ],
)
def test_bad_options_are_refused_in_one_line(build, words):
    with pytest.raises(UserError, match=words) as error:
        build(sde_lib.VP())
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ a table checks itself


def two_evaluations() -> tableau.Tableau:
    """The example of `Tableau`'s docstring."""
    ve = sde_lib.VE(sigma_min=0.5, sigma_max=4.0)
    return dpm_solver.dpm_solver_pp(ve, 2, grid=[1.0, 2 / 3, 1 / 3], lower_order_final=False)


def test_the_worked_example():
    table = two_evaluations()
    np.testing.assert_allclose((table.alpha, table.sigma), ([1, 1], [4, 2]), rtol=1e-12)
    np.testing.assert_array_equal(table.l.ravel(), [1, 1])
    np.testing.assert_array_equal(table.correct[..., 0, 0, 0], [[0, 1, 0, 0, 0]] * 2)
    predict = [[1 / 2, -1 / 2, 0, 0], [1 / 2, -3 / 4, 1 / 4, 0]]
    np.testing.assert_allclose(table.predict[..., 0, 0, 0], predict, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (dict(alpha=np.ones(3)), ValueError, r"alpha of a tableau has shape \(3,\), expected \(2,\)"),
        (dict(correct=np.zeros((2, 4, 1, 1, 1))), ValueError, "correct of a tableau"),
        (dict(noise=np.zeros((1, 1, 1, 1))), ValueError, "noise of a tableau"),
        (dict(t=np.array([0.5, 1.0])), ValueError, "times of a tableau rise"),
        (dict(predict=np.ones((2, 4, 1, 1, 1))), ValueError, "row 0 of a tableau uses evaluations before the first"),
        (dict(l=np.full((2, 1, 1, 1), np.nan)), UserError, "overflow"),
        (dict(sigma=np.array([4.0, 2.1])), ValueError, r"row 0 of a tableau leads to .*, not to \(alpha, sigma\)"),
        (dict(noise=np.ones((2, 1, 1, 1))), ValueError, "row 0 of a tableau leads to"),
    ],
)
def test_a_wrong_table_is_refused(changes, error, words):
    with pytest.raises(error, match=words):
        tableau.verify(lambda: two_evaluations()._replace(**changes))()
