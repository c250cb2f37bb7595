"""DDIM and the multistep DPM-Solver++ (Song et al. 2021, arXiv 2010.02502; Lu et al. 2022, arXiv 2211.01095).

With x0 = (x - sigma eps) / alpha the ODE is d(x / sigma) / dlam = exp(lam) x0: its exact solution over a step of size h
in lam, with x0 replaced by a polynomial through the last evaluations, is the solver (arXiv 2211.01095, eqs. 8-12).

Order 3 is kept as published: its last term carries half of the weight that the third order asks for, so that it
converges with order 2. DPM-Solver-v3 with `degenerate` is the same parameterization at full order.
"""

import numpy as np

from score_sde.errors import UserError
from score_sde.sde import SDE
from solvers import grids
from solvers.tableau import Tableau, empty

ORDERS = (1, 2, 3)


def dpm_solver_pp(
    sde: SDE,
    steps: int,
    *,
    order: int = 2,
    grid: str = "logsnr",
    lower_order_final: bool = True,
    t_end: float | None = None,
) -> Tableau:
    """Multistep DPM-Solver++ of order 1 (DDIM), 2 (2M) or 3 (3M) in `steps` evaluations.

    grid: a key of grids.GRIDS; lower_order_final: drop to order 2, then 1, over the last steps; t_end: where sampling
    ends, the SDE's t_min by default.
    """
    if order not in ORDERS:
        raise UserError(f"DPM-Solver++ of order {order}: use 1, 2 or 3")
    if steps < order:
        raise UserError(
            f"{steps} steps are fewer than the order {order}: use --steps={order} or more, or a lower order"
        )
    t = grids.times(grid, sde, steps, t_end=t_end)
    alpha, sigma, lam = sde.alpha(t), sde.sigma(t), sde.lam(t)
    tableau = empty(sde, t, order, np.ones((steps, 1, 1, 1)))  # l = 1: f = -x0
    for i in range(steps):
        p = min(i + 1, order, steps - i if lower_order_final else order)
        h = lam[i + 1] - lam[i]
        phi_1 = -np.expm1(-h)
        weights = np.zeros(order)  # of x0_i, x0_(i-1), x0_(i-2)
        weights[0] = phi_1
        if p == 2:
            r = (lam[i] - lam[i - 1]) / h
            weights[:2] += np.array([1, -1]) * phi_1 / (2 * r)
        if p == 3:
            r0, r1 = (lam[i] - lam[i - 1]) / h, (lam[i - 1] - lam[i - 2]) / h
            first, older = np.array([1, -1, 0]) / r0, np.array([0, 1, -1]) / r1
            second = (first - older) / (r0 + r1)
            phi_2 = 1 - phi_1 / h
            weights += phi_2 * (first + r0 * second) + (0.5 - phi_2 / h) * second
        tableau.predict[i, 0] = sigma[i + 1] / sigma[i]
        tableau.predict[i, 1:-1] = -alpha[i + 1] * weights[:, None, None, None]
    return tableau


def ddim(sde: SDE, steps: int, *, grid: str = "logsnr", t_end: float | None = None) -> Tableau:
    """DDIM in `steps` evaluations: the first-order solver."""
    return dpm_solver_pp(sde, steps, order=1, grid=grid, t_end=t_end)
