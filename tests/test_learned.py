"""Learned tables: zeros change nothing, and learning brings held-out samples nearer, for tables of every kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ems
import solvers
from score_sde import sde as sde_lib
from solvers import learned, tableau
from tests.mixture import Mixture

SDE, MIXTURE, STEPS = sde_lib.VP(), Mixture.reference(), 5
NOISE = MIXTURE.noise_fn(SDE)


@pytest.fixture(scope="module")
def pairs():
    starts = jax.random.normal(jax.random.key(0), (96, *MIXTURE.means.shape[1:]))
    fine = jax.tree.map(jnp.float32, solvers.SOLVERS["dpmpp"](SDE, 200))
    return np.asarray(starts), np.asarray(jax.jit(lambda x: tableau.solve(NOISE, fine, x))(starts))


@pytest.fixture(scope="module")
def tables():
    statistics = ems.measure(NOISE, SDE, MIXTURE.draw(jax.random.key(1), 64), nodes=40)
    return {
        "ddim": solvers.SOLVERS["ddim"](SDE, STEPS),
        "unipc": solvers.SOLVERS["unipc"](SDE, STEPS),
        "dpm singlestep": solvers.SOLVERS["dpm"](SDE, STEPS, order=2, method="singlestep"),
        "dpmv3": solvers.SOLVERS["dpmv3"](SDE, STEPS, ems=statistics),
    }


@pytest.mark.parametrize("name", ["ddim", "unipc", "dpm singlestep", "dpmv3"])
def test_learning_brings_samples_nearer(name, pairs, tables):
    starts, ends = pairs
    table = tables[name]
    plain = jax.jit(lambda table, x: tableau.solve(NOISE, jax.tree.map(jnp.float32, table), x))
    rms = lambda table: np.sqrt(np.square(np.asarray(plain(table, starts[64:])) - ends[64:]).mean())
    result = learned.learn(lambda params, rows: NOISE, {}, SDE, table, starts, ends, held_out=32, iterations=6)
    np.testing.assert_allclose(result.held_out[0], rms(table), rtol=1e-4)
    better = learned.corrected(learned.with_history(table), SDE, result.corrections)
    np.testing.assert_allclose(min(result.held_out), rms(better), rtol=1e-3)
    assert min(result.held_out) < 0.5 * result.held_out[0]


def test_a_network_that_fails_leaves_the_table_as_it_was(pairs, tables):
    broken = lambda x, t: NOISE(x, t) * jnp.where(t == jnp.float32(SDE.t_max), 1.0, jnp.nan)
    result = learned.learn(lambda params, rows: broken, {}, SDE, tables["ddim"], *pairs, held_out=32, iterations=2)
    assert not any(values.any() for values in result.corrections)
    assert len(result.held_out) == 1


@pytest.mark.parametrize("name", ["unipc", "dpmv3"])
def test_unrolled_solving_is_the_loop(name, pairs, tables, x64):
    x = jnp.asarray(pairs[0][:4], jnp.float64)
    one, two = (tableau.solve(NOISE, tables[name], x, unrolled=unrolled) for unrolled in (False, True))
    np.testing.assert_allclose(one, two, rtol=1e-10, atol=1e-10)


def test_a_trajectory_is_what_shorter_tables_lead_to(pairs, tables, x64):
    x, table = jnp.asarray(pairs[0][:2], jnp.float64), tables["dpm singlestep"]
    path = tableau.solve(NOISE, table, x, trajectory=True)
    for k in range(1, STEPS + 1):
        shorter = jax.tree.map(lambda rows, k=k: rows[:k], table)
        np.testing.assert_allclose(path[k - 1], tableau.solve(NOISE, shorter, x), rtol=1e-10, atol=1e-10)
