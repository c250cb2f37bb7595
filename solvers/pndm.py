"""PNDM (Liu et al. 2022, arXiv 2202.09778) and iPNDM (Zhang & Chen 2023, arXiv 2204.13902).

Classical formulas for eps, as if time ran uniformly, then DDIM's transfer with the combined eps. In the variables
u = x / alpha and rho = sigma / alpha of du = eps drho: u_t = u_s + (rho_t - rho_s) sum_k w_k eps_k, w_k those of
Adams-Bashforth. The order is 2 at least, and that of w if the grid is uniform in rho.
"""

from collections.abc import Sequence

import numpy as np

from score_sde.errors import UserError
from score_sde.sde import SDE
from solvers import grids
from solvers.dpm_solver import check_options
from solvers.tableau import Integrator, Tableau, verify

ADAMS_BASHFORTH = {  # number of evaluations: weights, the newest first
    1: np.array([1.0]),
    2: np.array([3, -1]) / 2,
    3: np.array([23, -16, 5]) / 12,
    4: np.array([55, -59, 37, -9]) / 24,
}
# order: (steps, where in a step its evaluations are, their weights)
WARM_UP = {
    2: (1, np.array([0.0, 1.0]), np.array([1, 1]) / 2),
    4: (3, np.array([0.0, 0.5, 0.5, 1.0]), np.array([1, 2, 2, 1]) / 6),
}


@verify
def ipndm(
    sde: SDE, steps: int, *, order: int = 4, grid: str | Sequence = "time", t_end: float | None = None
) -> Tableau:
    """iPNDM: one evaluation per step from the start, the first steps with as many as there are. order: 1 to 4."""
    check_options("iPNDM", steps, order, ADAMS_BASHFORTH)
    t = grids.times(grid, sde, steps, t_end=t_end)
    integrator = Integrator.of(sde, t, order, data_prediction=False)
    for i in range(steps):
        h = integrator.rho[i + 1] - integrator.rho[i]
        integrator.predict(i, i, h * ADAMS_BASHFORTH[min(i + 1, order)])
    return integrator.tableau


@verify
def pndm(sde: SDE, steps: int, *, order: int = 4, grid: str | Sequence = "time", t_end: float | None = None) -> Tableau:
    """PNDM in `steps` evaluations, which are more than its time steps.

    order 4 (F-PNDM): three pseudo Runge-Kutta steps of four evaluations, then one each: steps - 9 time steps;
    order 2 (S-PNDM): one pseudo improved Euler step of two, then one each: steps - 1.
    """
    check_options("PNDM", steps, order, WARM_UP)
    warm_up, stages, average = WARM_UP[order]
    costly = warm_up * len(stages)  # evaluations of the warm-up
    if steps < costly:
        raise UserError(
            f"PNDM of order {order} warms up with {costly} evaluations, got {steps}: "
            f"use --steps={costly} or more, or --solver=ipndm"
        )
    t = grids.times(grid, sde, steps - costly + warm_up, t_end=t_end)
    inside = t[:warm_up, None] + np.diff(t)[:warm_up, None] * stages
    integrator = Integrator.of(sde, [*inside.ravel(), *t[warm_up:]], costly + 1, data_prediction=False)
    rho = integrator.rho
    starts = np.array([*range(0, costly, len(stages)), *range(costly, steps)])  # of steps, as evaluations
    for k, start in enumerate(starts):
        if k >= warm_up:
            weights = np.zeros(costly + 1)
            weights[start - starts[k - np.arange(order)]] = ADAMS_BASHFORTH[order]
            integrator.predict(start, start, (rho[start + 1] - rho[start]) * weights)
            continue
        for i in range(start, start + len(stages)):
            weights = average if i + 1 == start + len(stages) else np.ones(1)
            integrator.predict(i, start, (rho[i + 1] - rho[start]) * weights)
            if i > start:
                integrator.keep_base(i)
    return integrator.tableau
