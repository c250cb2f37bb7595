"""UniPC (Zhao et al. 2023, arXiv 2302.04867): a multistep predictor and a corrector that costs no evaluation.

In the variables of tableau.Integrator, over a step of size h = log rho_s - log rho_t, with D_k = (m_k - m_s) / r_k from
the evaluations at s + r_k h (r < 0 the older ones; r = 1, the new one, in the corrector alone),

    u_t = u_s - rho_t h (phi_1(h) m_s + sum_k a_k D_k),    sum_k a_k r_k^(j-1) / j! = phi_(j+1)(h),  j = 1, 2, ...

(their sec. 3; B(h) cancels). A single a_1 is not solved for but set to B(h) / 2h: B = h is bh1, B = exp(h) - 1 bh2.

`vary_coeff` is kept as in the authors' code, whose corrector leaves terms out where it uses older evaluations (of the
new one's a, all but one; of the last derivative, the old ones'): it then converges with order 1 alone.
"""

import math
from collections.abc import Sequence

import numpy as np

from score_sde.sde import SDE
from solvers import grids
from solvers.dpm_solver import check_options, phi
from solvers.tableau import Integrator, Tableau, denoised, verify

ORDERS = range(1, 7)
# the a_1 of a single D_1
VARIANTS = {"bh1": lambda h: 0.5, "bh2": lambda h: phi(1, h) / 2, "vary_coeff": lambda h: phi(2, h)}
PREDICTIONS = ("noise", "data")


@verify
def uni_pc(
    sde: SDE,
    steps: int,
    *,
    order: int = 3,
    variant: str = "bh2",
    prediction: str = "data",
    grid: str | Sequence = "logsnr",
    lower_order_final: bool = True,
    denoise_to_zero: bool = False,
    t_end: float | None = None,
) -> Tableau:
    """UniPC in `steps` evaluations: predictor of the given order, corrector one order higher; the last step has none.

    order: 1 to 6; variant: bh1, bh2 or vary_coeff; prediction: data or noise.
    grid, lower_order_final, denoise_to_zero, t_end: as in DPM-Solver++.
    """
    n = steps - denoise_to_zero
    choices = dict(variant=(variant, VARIANTS), prediction=(prediction, PREDICTIONS))
    check_options("UniPC", n, order, ORDERS, **choices)
    t = grids.times(grid, sde, n, t_end=t_end)
    integrator = Integrator.of(sde, t, order + 1, data_prediction=prediction == "data")
    clock = -np.log(integrator.rho)
    for i in range(n):
        p = min(i + 1, order, n - i if lower_order_final else order)
        h = clock[i + 1] - clock[i]
        older = (clock[i - np.arange(1, p)] - clock[i]) / h
        integrator.predict(i, i, -integrator.rho[i + 1] * h * _weights(h, older, variant, corrector=False))
        if i + 1 < n:
            weights = _weights(h, np.array([*older, 1.0]), variant, corrector=True)
            integrator.correct(i + 1, i, -integrator.rho[i + 1] * h * np.roll(weights, 1))
    return denoised(integrator.tableau, sde, t[-1]) if denoise_to_zero else integrator.tableau


def _weights(h: float, r: np.ndarray, variant: str, *, corrector: bool) -> np.ndarray:
    """Weights of m_s and of m at each s + r_k h; for the corrector r ends with 1."""
    k = range(len(r))
    phis = np.array([phi(j + 2, h) for j in k])
    derivatives = np.linalg.inv(np.array([r**j / math.factorial(j + 1) for j in k]).T) if len(r) else np.zeros((0, 0))
    if len(r) == 1:
        a = np.array([VARIANTS[variant](h)])
    elif corrector and variant == "vary_coeff":
        a = np.array([*(phis[:-1] @ derivatives[:-1, :-1]), phis[-1] * derivatives[-2, -1]])
    else:
        a = phis @ derivatives
    return np.array([phi(1, h) - (a / r).sum(), *(a / r)])
