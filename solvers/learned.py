"""A solver's table, learned: corrections that start at zero, such that few evaluations end where many do.

The table enters `tableau.solve` as an argument, so that the distance to the fine solution has a derivative by every
number in it. Kept are the solver's own coefficients, DPM-Solver-v3's per pixel among them; learned are, for each
evaluation i,

    predict[i], correct[i]   additive corrections of the weights of base and of all f so far, shared by all pixels
    t[i]                     the time that the network is told, apart from alpha and sigma

(bespoke solvers, Shaul et al. 2023, 2310.19075; S4S, Frankel et al. 2025, 2502.17423; GS, 2510.17699, which keeps a
theory's term as here.)
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from score_sde import parallel
from score_sde.errors import UserError
from score_sde.sde import SDE
from solvers import tableau as tableaux
from solvers.tableau import Tableau

FIRST_DAMPING, TRIALS = 1e-2, 8


class Corrections(NamedTuple):
    """What is added to a table of n evaluations and history n, in the units of `corrected`; zeros change nothing."""

    predict: np.ndarray  # (n, n + 1): of base and of f_i, f_(i-1), ...
    correct: np.ndarray  # (n, n + 2): of base, x and of f_i, f_(i-1), ...
    lam: np.ndarray  # (n,): of lam at the time the network is told


class Learned(NamedTuple):
    """The corrections, and the distances on held-out noises along the way, the first without any."""

    corrections: Corrections
    held_out: list[float]


def with_history(table: Tableau) -> Tableau:
    """The same solver with a history as long as its run."""
    n = len(table.t)
    return tableaux.uniform(table, max(n, table.history), table.l.shape[1:])


def corrected(table: Tableau, sde: SDE, corrections: Corrections) -> Tableau:
    """The table, made by `with_history`, with its corrections.

    Their units are the weight's own for base and x, the weight of the newest f for each f, as root mean squares over
    pixels; the step in lam before it for a time. Evaluation i knows no f before the first, whose corrections have no
    effect.
    """
    root_mean_square = lambda values: jnp.sqrt(jnp.square(values).mean((-3, -2, -1)))
    n = len(table.t)

    def add(rows, given, states):
        """rows (n, states + K + 1, ...): the weights of so many states, of K values of f, a constant."""
        newest = root_mean_square(table.predict[:, 1])[:, None]
        units = jnp.concatenate([root_mean_square(rows[:, :states]), jnp.repeat(newest, given.shape[1] - states, 1)], 1)
        change = jnp.pad(units * given, ((0, 0), (0, rows.shape[1] - given.shape[1])))
        return rows + change[:, :, None, None, None]

    lam = sde.lam(table.t)
    step = jnp.diff(lam, prepend=2 * lam[:1] - lam[1:2]) if n > 1 else jnp.ones_like(lam)
    return table._replace(
        t=jnp.clip(sde.t_of_lam(lam + step * corrections.lam), sde.t_min, sde.t_max),
        predict=add(table.predict, corrections.predict, 1),
        correct=add(table.correct, corrections.correct, 2),
    )


def learn(
    noise_of: Callable,
    params,
    sde: SDE,
    table: Tableau,
    starts: np.ndarray,
    ends: np.ndarray,
    conditions=None,
    *,
    held_out: int,
    iterations: int = 12,
    batch_size: int = 32,
    features: Callable = lambda x: x,
    deadline: float = np.inf,
    progress: Callable[[int, int, float], None] = lambda done, total, best: None,
) -> Learned:
    """Learn the corrections of a deterministic table by Levenberg and Marquardt's method, over all devices.

    noise_of: (params, condition of B samples or None) -> NoiseFn, as that of `Diffusion`.
    starts, ends: (N, H, W, C) draws of the prior and the fine solutions from them; the last `held_out` judge alone.
    conditions: of these samples, a tree of (N, ...).
    batch_size: what divides over the devices; the noises to learn from and those to judge by are whole batches.
    features: x (B, H, W, C) -> arrays (B, ...) whose squared differences are to be small; pixels by default.
    deadline: in time.monotonic(), after which no further iteration is begun.
    progress: called after each iteration with their number so far, in all, and the best held-out root mean square.

    The numbers are few and the squares many, so that each iteration solves the linearized problem as a whole, at the
    cost of about one run for each number and noise. A step that brings the noises to learn from no nearer is not taken.
    """
    if held_out % batch_size or (len(starts) - held_out) % batch_size or not 0 < held_out < len(starts):
        raise UserError(f"{len(starts)} noises, {held_out} of them held out: expected whole batches of {batch_size}")
    table = jax.tree.map(np.float32, with_history(table))
    n, history = len(table.t), table.history
    zeros = Corrections(np.zeros((n, history + 1)), np.zeros((n, history + 2)), np.zeros(n))
    flat, unravel = ravel_pytree(jax.tree.map(jnp.float32, zeros))
    flat = np.asarray(flat)
    basis = np.eye(len(flat), dtype=np.float32)[_effective(n, history)]

    def differences(params, corrections, x, end, condition):
        better = corrected(table, sde, unravel(corrections))
        solved = tableaux.solve(noise_of(params, condition), better, x, unrolled=True)
        return ravel_pytree(jax.tree.map(jnp.subtract, features(solved), features(end)))[0]

    def normal_equations(params, corrections, *batch):
        value, tangent = jax.linearize(lambda corrections: differences(params, corrections, *batch), corrections)
        jacobian = jax.lax.map(tangent, basis)
        return (jacobian @ jacobian.T)[None], (jacobian @ value)[None]

    def squares(params, corrections, *batch):
        difference = differences(params, corrections, *batch)
        return (difference @ difference)[None], jnp.full((1,), difference.size)

    axes = (0, None, 0, 0, 0)
    normal_equations, squares = (parallel.pmap(f, in_axes=axes) for f in (normal_equations, squares))
    params = parallel.replicate(params)

    def total(function, corrections, first, last):
        """The sum over these noises, batch by batch, of what `function` gives on each device."""
        parts = []
        for i in range(first, last, batch_size):
            batch = jax.tree.map(lambda values, i=i: values[i : i + batch_size], (starts, ends, conditions))
            parts.append(parallel.gather(function(params, corrections, *parallel.shard(batch))))
        return [np.concatenate(column).astype(np.float64).sum(0) for column in zip(*parts, strict=True)]

    train = len(starts) - held_out
    rms = lambda corrections, *noises: float(np.sqrt(np.divide(*total(squares, corrections, *noises))))
    kept = best = flat
    error, damping, distances = rms(flat, 0, train), FIRST_DAMPING, [rms(flat, train, len(starts))]
    for done in range(1, iterations + 1):
        if time.monotonic() > deadline:
            break
        matrix, slope = total(normal_equations, best, 0, train)
        diagonal = np.diag(matrix) + 1e-9 * np.diag(matrix).max()
        for _ in range(TRIALS):
            step = np.linalg.solve(matrix + damping * np.diag(diagonal), slope)
            trial = best - np.float32(step) @ basis
            if (value := rms(trial, 0, train)) < error:  # not if it is not finite
                best, error, damping = trial, value, damping / 4
                break
            damping *= 4
        else:
            break
        distances.append(rms(best, train, len(starts)))
        kept = best if distances[-1] <= min(distances) else kept
        progress(done, iterations, min(distances))
    return Learned(jax.tree.map(np.asarray, unravel(kept)), distances)


def _effective(n: int, history: int) -> np.ndarray:
    """Which numbers of flat `Corrections` can change anything: evaluation i knows i + 1 values of f.

    The first has no base but x.
    """
    i, k = np.arange(n)[:, None], np.arange(history)[None, :]
    known, always = k <= i, np.ones((n, 1), bool)
    of_predict = np.concatenate([always, known], 1)
    of_correct = np.concatenate([always, always, known], 1) & (i > 0)
    return np.concatenate([of_predict.ravel(), of_correct.ravel(), np.ones(n, bool)])
