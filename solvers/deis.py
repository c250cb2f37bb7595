"""DEIS, the tAB variant (Zhang & Chen 2023, arXiv 2204.13902).

With u = x / alpha and rho = sigma / alpha the ODE is du = eps drho. eps is replaced by the polynomial in t through the
last evaluations, u_t = u_s + sum_k eps_k int_s^t L_k(t) drho, L_k their Lagrange polynomials.
"""

from collections.abc import Sequence

import numpy as np

from score_sde.sde import SDE
from solvers import grids
from solvers.dpm_solver import check_options
from solvers.tableau import Integrator, Tableau, verify

ORDERS = (1, 2, 3, 4)
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
_PANELS = 32


@verify
def deis(
    sde: SDE, steps: int, *, order: int = 4, grid: str | Sequence = "quadratic", t_end: float | None = None
) -> Tableau:
    """DEIS in `steps` evaluations. Order p is the paper's tAB(p - 1): 1 is DDIM, 4 is tAB3."""
    check_options("DEIS", steps, order, ORDERS)
    t = grids.times(grid, sde, steps, t_end=t_end)
    integrator = Integrator.of(sde, t, order, data_prediction=False)
    for i in range(steps):
        nodes = i - np.arange(min(i + 1, order))
        integrator.predict(i, i, _lagrange_integrals(sde, t[nodes], t[i], t[i + 1]))
    return integrator.tableau


def _lagrange_integrals(sde: SDE, nodes, start: float, end: float) -> list[float]:
    """int_start^end L_k(t) drho for each node, by Gauss-Legendre panels in lam, where drho = -exp(-lam) dlam."""
    edges = np.linspace(sde.lam(start), sde.lam(end), _PANELS + 1)
    half = np.diff(edges)[:, None] / 2
    lam = (edges[:-1, None] + half * (1 + _NODES)).ravel()
    drho = -np.exp(-lam) * (half * _WEIGHTS).ravel()
    t = sde.t_of_lam(lam)
    others = [np.delete(nodes, k) for k in range(len(nodes))]
    basis = [np.prod([(t - o) / (nodes[k] - o) for o in others[k]], axis=0) for k in range(len(nodes))]
    return [(polynomial * drho).sum() for polynomial in basis]
