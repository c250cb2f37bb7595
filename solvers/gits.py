"""Times for few steps, chosen along the model's own trajectories (GITS, Chen et al. 2024, arXiv 2405.11326).

Trajectories of one model have nearly the same shape. From a fine one the cost of every jump between two of its points
is known, and the cheapest way through in so many jumps is a shortest path, found by dynamic programming in seconds.
"""

import jax
import jax.numpy as jnp
import numpy as np

from score_sde.denoiser import NoiseFn
from score_sde.errors import UserError
from score_sde.sde import SDE
from solvers import grids

FINE = 64  # steps of the fine trajectory
LATER = 1.15  # weight of what a jump leads to, from step to step; the paper's gamma


def times(
    noise: NoiseFn, sde: SDE, x, steps: int, *, fine: int = FINE, t_end: float | None = None, later: float = LATER
) -> np.ndarray:
    """The (steps + 1,) falling times of the cheapest jumps from the prior's draws x (B, H, W, C) to t_end, float64.

    noise: a jittable NoiseFn. fine: evaluations of the fine trajectory, over uniform lam; the times are among its own.
    t_end: the SDE's t_min by default. Costs `fine` evaluations of each noise and holds 2 fine arrays of x's size.
    """
    if not 1 <= steps <= fine:
        raise UserError(f"{steps} steps through a trajectory of {fine}: expected between 1 and {fine}")
    t = grids.times("logsnr", sde, fine, t_end=t_end)
    u, eps = _trajectory(noise, sde, t, x)
    return t[cheapest(jump_costs(u, eps, np.exp(-sde.lam(t))), steps, later)]


def _trajectory(noise: NoiseFn, sde: SDE, t: np.ndarray, x) -> tuple[np.ndarray, np.ndarray]:
    """u = x / alpha (n + 1, B, ...) along the ODE du = eps dr, r = sigma / alpha; eps (n, B, ...) at all but the last.

    By Adams and Bashforth's second order, whose error is far below that of the jumps to be judged.
    """
    r = np.exp(-sde.lam(t))
    step = np.diff(r)
    before = np.concatenate([[1.0], step[:-1]])
    slope = np.where(np.arange(len(step)) > 0, step / (2 * before), 0.0)  # weight of the change of eps

    def advance(carry, row):
        u, last = carry
        eps = noise(row["alpha"] * u, row["t"])
        return (u + row["step"] * (eps + row["slope"] * (eps - last)), eps), (u, eps)

    rows = dict(t=t[:-1], alpha=sde.alpha(t[:-1]), step=step, slope=slope)
    rows = jax.tree.map(lambda values: jnp.asarray(values, x.dtype), rows)
    u = x / jnp.asarray(sde.alpha(t[0]), x.dtype)
    (last, _), (us, epses) = jax.jit(lambda u: jax.lax.scan(advance, (u, jnp.zeros_like(u)), rows))(u)
    return np.concatenate([us, last[None]]), np.asarray(epses)


def jump_costs(u: np.ndarray, eps: np.ndarray, r: np.ndarray) -> np.ndarray:
    """(n + 1, n + 1): how far Euler's jump from point i ends from point j, mean over trajectories; infinite for j <= i.

    u: (n + 1, B, ...); eps: (n, B, ...); r: (n + 1,) sigma / alpha.
    """
    u, eps = u.reshape(*u.shape[:2], -1), eps.reshape(*eps.shape[:2], -1)
    costs = np.full((len(u), len(u)), np.inf)
    for i in range(len(eps)):
        errors = u[i] + (r[i + 1 :] - r[i])[:, None, None] * eps[i] - u[i + 1 :]
        costs[i, i + 1 :] = np.linalg.norm(errors, axis=-1).mean(-1)
    return costs


def cheapest(costs: np.ndarray, steps: int, later: float) -> np.ndarray:
    """The (steps + 1,) points from first to last for which the sum of later^k times the k-th jump's cost is least."""
    ahead, choices = np.where(np.arange(len(costs)) == len(costs) - 1, 0.0, np.inf), []
    for _ in range(steps):
        through = costs + later * ahead[None, :]
        choices.append(through.argmin(1))
        ahead = through.min(1)
    points = [0]
    for choice in reversed(choices):
        points.append(choice[points[-1]])
    return np.array(points)
