"""Heun's second-order solver (Karras et al. 2022, arXiv 2206.00364, algorithm 1), for every SDE.

With u = x / alpha and rho = sigma / alpha the ODE is du = eps drho: an Euler step, then the trapezoid of both slopes.
"""

from collections.abc import Sequence

import numpy as np

from score_sde.errors import UserError
from score_sde.sde import SDE
from solvers import grids
from solvers.tableau import Integrator, Tableau, denoised, verify


@verify
def heun(sde: SDE, steps: int, *, grid: str | Sequence = "edm", t_end: float | None = None) -> Tableau:
    """steps // 2 Heun steps of two evaluations each, and for odd `steps` the Euler step from t_end to sigma = 0."""
    if steps < 2:
        raise UserError(f"Heun's steps take two evaluations each, got {steps}: use --steps=2 or more")
    t = grids.times(grid, sde, steps // 2, t_end=t_end)
    integrator = Integrator.of(sde, np.repeat(t, 2)[1:], 2, data_prediction=False)
    for i in range(0, 2 * (steps // 2), 2):
        h = integrator.rho[i + 1] - integrator.rho[i]
        integrator.predict(i, i, [h])
        integrator.keep_base(i + 1)
        integrator.predict(i + 1, i, [h / 2, h / 2])
    return denoised(integrator.tableau, sde, t[-1]) if steps % 2 else integrator.tableau
