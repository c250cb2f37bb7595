"""GITS: the cheapest way through is found, and its times make few steps nearer to the exact solution."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import solvers
from experiments import runs, times
from score_sde import sde as sde_lib
from score_sde.denoiser import Diffusion
from score_sde.errors import UserError
from score_sde.space import pixels
from solvers import gits, tableau
from tests.mixture import Mixture

SDES = {"VP": sde_lib.VP(), "sub-VP": sde_lib.SubVP(), "EDM": sde_lib.EDM()}


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_no_way_is_cheaper(steps):
    costs = np.where(np.triu(np.ones((8, 8)), 1) > 0, np.random.default_rng(steps).random((8, 8)), np.inf)
    cost = lambda way: sum(1.3**k * costs[i, j] for k, (i, j) in enumerate(itertools.pairwise(way)))
    ways = [(0, *inner, 7) for inner in itertools.combinations(range(1, 7), steps - 1)]
    assert tuple(gits.cheapest(costs, steps, 1.3)) == min(ways, key=cost)


@pytest.mark.parametrize("name", SDES)
def test_times_of_a_mixture_halve_the_error_of_ddim(name):
    sde, mixture = SDES[name], Mixture.reference()
    noise = mixture.noise_fn(sde)
    x = sde.prior_std * jax.random.normal(jax.random.key(0), (24, *mixture.means.shape[1:]))
    solve = jax.jit(lambda table, x: tableau.solve(noise, table, x))
    exact = solve(jax.tree.map(jnp.float32, solvers.SOLVERS["dpmpp"](sde, 300)), x[16:])
    grid = gits.times(noise, sde, x[:16], 6)
    assert grid[0] == sde.t_max and np.isclose(grid[-1], sde.t_min) and (np.diff(grid) < 0).all()
    error = lambda grid: np.square(
        solve(jax.tree.map(jnp.float32, solvers.SOLVERS["ddim"](sde, 6, grid=grid)), x[16:]) - exact
    ).mean()
    assert error(grid) < 0.25 * error("logsnr")  # of squares


def test_more_steps_than_points_are_refused():
    with pytest.raises(UserError, match="65 steps"):
        gits.times(None, sde_lib.VP(), None, 65)


def test_times_of_a_model_take_the_place_of_grid_gits(tmp_path):
    """They begin and end where the solver does; a solver of two evaluations per step is refused."""
    mixture, sde = Mixture.reference(), sde_lib.VP()
    diffusion = Diffusion(sde, pixels((8, 8, 3)), None, lambda params, y=None, keys=None: mixture.noise_fn(sde))
    model = runs.Model(tmp_path, None, diffusion, {}, 8, "c0ffee")
    options = times.with_times(model, "deis", 4, dict(order=2, grid="gits"))
    assert options["order"] == 2
    assert (len(options["grid"]), options["grid"][0]) == (5, sde.t_max)
    np.testing.assert_allclose(options["grid"][-1], sde.t_min, rtol=1e-6)
    assert times.with_times(model, "heun", 4, dict(grid="time")) == dict(grid="time")
    with pytest.raises(UserError, match="grid=gits is for one evaluation per step, heun"):
        times.with_times(model, "heun", 4, dict(grid="gits"))
