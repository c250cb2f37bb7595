"""DPM-Solver-v3 between the nodes of the statistics, and the options that were published."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import solvers
from ems.statistics import EMS
from score_sde import sde as sde_lib
from score_sde.errors import UserError
from solvers import tableau
from solvers.dpm_solver_v3 import dpm_solver_v3, published_options, with_nodes_at
from tests.mixture import Mixture
from tests.test_solvers import fake_ems

SDE = sde_lib.VP()


@pytest.mark.parametrize("options", [{}, {"pseudo": True, "corrector_pseudo": True}, {"corrector": "half"}])
def test_times_that_are_nodes_need_no_snapping(options):
    """On a grid of nodes the coefficients are those of the published, snapping solver."""
    ems = fake_ems(SDE, 120, (1, 1, 1))
    ours, theirs = (dpm_solver_v3(SDE, 10, ems=ems, snap=snap, **options) for snap in (False, True))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_statistics_between_nodes_are_linear():
    lam = np.linspace(SDE.lam(1.0), SDE.lam(1e-3), 9)
    line = lambda a, b: (a + b * lam).reshape(-1, 1, 1, 1)
    ems = EMS(SDE.t_of_lam(lam), lam, line(1, 2), line(-1, 0.5), line(0, 3), {})
    t = SDE.t_of_lam(np.array([lam[0], -3.9, -3.8, lam[4], 0.2, lam[-1]]))
    more = with_nodes_at(ems, t, SDE.lam(t))
    assert len(more.t) == 12
    assert (np.diff(more.lam) > 0).all()
    np.testing.assert_allclose(SDE.lam(more.t), more.lam, atol=1e-9)
    np.testing.assert_allclose(more.l[:, 0, 0, 0], 1 + 2 * more.lam)
    np.testing.assert_allclose(more.b[:, 0, 0, 0], 3 * more.lam)


@pytest.mark.parametrize("grid", ["time", "edm", "quadratic"])
def test_off_the_nodes_the_step_is_of_the_times_asked_for(grid):
    """Coefficients converge with the square of the nodes' distance; those of the nearest nodes are other steps."""
    build = functools.partial(dpm_solver_v3, SDE, 7, grid=grid)
    fine = build(ems=fake_ems(SDE, 15_360, (1, 1, 1)))
    far = lambda n, snap: max(
        np.abs(getattr(build(ems=fake_ems(SDE, n, (1, 1, 1)), snap=snap), name) - getattr(fine, name)).max()
        for name in ("correct", "predict")
    )
    assert far(480, False) < 1e-3
    assert np.log2(far(240, False) / far(480, False)) > 1.7
    assert far(240, True) > 20 * far(240, False)


def test_an_inner_end_time(x64):
    """Statistics down to 1e-4 serve a range to 1e-3, to the same samples as statistics that end there."""
    long, short = (fake_ems(sde_lib.VP(t_min=t_min), 4000) for t_min in (1e-4, 1e-3))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)))
    run = jax.jit(functools.partial(tableau.solve, Mixture.reference().noise_fn(SDE)))
    ours, theirs = (run(dpm_solver_v3(SDE, 6, ems=ems, t_end=1e-3), x) for ems in (long, short))
    np.testing.assert_allclose(ours, theirs, atol=2e-4)
    assert dpm_solver_v3(SDE, 6, ems=long).alpha[-1] != dpm_solver_v3(SDE, 6, ems=short).alpha[-1]


def test_an_end_beyond_the_statistics_is_refused():
    ems = fake_ems(SDE, 60)
    for options in (dict(t_end=1e-4), dict(grid=[ems.t[0], 0.5, 1e-4])):
        with pytest.raises(UserError, match=r"t=0\.001|t_end=0\.001") as error:
            dpm_solver_v3(SDE, 2, ems=ems, order=2, **options)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("steps", "pseudo", "corrector", "lower_order_final", "t_end"),
    [
        (5, True, "on", False, 1e-3),
        (6, False, "on", True, 1e-3),
        (8, False, "on", True, 1e-3),
        (10, False, "off", True, 1e-3),
        (12, False, "on", True, 1e-4),
        (25, False, "on", True, 1e-4),
    ],
)
def test_published_options_of_pixel_models(steps, pseudo, corrector, lower_order_final, t_end):
    """Zheng et al. 2023, the settings of ScoreSDE's model on CIFAR-10."""
    found = published_options(steps, SDE)
    assert found == dict(
        order=3,
        pseudo=pseudo,
        corrector=corrector,
        corrector_pseudo=False,
        lower_order_final=lower_order_final,
        grid="logsnr",
        t_end=pytest.approx(t_end),
    )


def test_published_options_of_other_models():
    chosen = lambda *names, steps=8, sde=SDE, **kind: tuple(published_options(steps, sde, **kind)[n] for n in names)
    assert chosen("order", "grid", "corrector", "corrector_pseudo", latent=True) == (3, "time", "on", True)
    for latent in (False, True):
        guided = functools.partial(chosen, "order", "grid", "corrector", "corrector_pseudo", latent=latent)
        assert guided(guidance_scale=2.0) == (2, "time", "on", True)
        assert guided(guidance_scale=7.5) == (2, "time", "off", True)
    assert chosen("order", guidance_scale=1) == (3,)
    edm = functools.partial(chosen, "pseudo", "corrector", "lower_order_final", "t_end", sde=sde_lib.EDM())
    assert [edm(steps=n) for n in (5, 6, 8)] == [
        (True, "on", True, 0.002),
        (False, "on", True, 0.002),
        (False, "off", True, 0.002),
    ]
    assert chosen("order", steps=2) == (2,)


@pytest.mark.parametrize("sde", [SDE, sde_lib.VE(), sde_lib.EDM(), sde_lib.Flow()], ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize("kind", [{}, {"latent": True}, {"guidance_scale": 2.0}, {"guidance_scale": 9.0}])
def test_published_options_are_options(sde, kind):
    ems = fake_ems(sde, 60, (1, 1, 1))
    for steps in (1, 2, 5, 7, 10):
        table = dpm_solver_v3(sde, steps, ems=ems, **published_options(steps, sde, **kind))
        assert len(table.t) == steps
        assert all(np.isfinite(values).all() for values in jax.tree.leaves(table))


def test_the_library_call_ends_where_the_statistics_end():
    """Above ten steps the published end is nearer to the data than most statistics are; a call without any is told."""
    sde, key = sde_lib.VP(t_min=1e-3), jax.random.key(0)
    noise = lambda x, t: 0.5 * x
    samples = solvers.sample(noise, sde, key, (2, 1, 1, 1), steps=20, solver="dpmv3", ems=fake_ems(sde, 40, (1, 1, 1)))
    assert np.isfinite(samples).all()
    with pytest.raises(UserError, match=r"ems\.measure"):
        solvers.sample(noise, sde, key, (2, 1, 1, 1), steps=5, solver="dpmv3")
