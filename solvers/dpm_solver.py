"""DDIM, DPM-Solver and DPM-Solver++, singlestep, multistep and stochastic (Song et al. 2021, arXiv 2010.02502; Lu et
al. 2022, arXiv 2206.00927 and 2211.01095).

In the variables of tableau.Integrator, du = m drho with m = eps (DPM-Solver) or m = x0 (DPM-Solver++). Over a step of
size h = log rho_s - log rho_t (the step in lam, negative for x0), with m expanded in lam around s,

    u_t = u_s - rho_t h (phi_1(h) m + phi_2(h) h m' + phi_3(h) h^2 m'' + ...),    ' = d / d(-log rho),

the derivatives from evaluations inside the step (singlestep) or before it (multistep). `solver_type` dpmsolver stands
for the published shortcuts (at order 2, half of phi_1 for phi_2), taylor for the series as it is.

The multistep solvers of order 3 are kept as published: their last term carries half of the weight that the third order
asks for, so that they converge with order 2. DPM-Solver-v3 with `degenerate` and UniPC have the full order.
"""

import math
from collections.abc import Sequence

import numpy as np

from score_sde.errors import UserError
from score_sde.sde import SDE
from solvers import grids
from solvers.tableau import Integrator, Tableau, denoised, verify

ORDERS = (1, 2, 3)
METHODS = ("multistep", "singlestep", "singlestep_fixed")
SOLVER_TYPES = ("dpmsolver", "taylor")
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(32)


def phi(k: int, h):
    """phi_k(h) = int_0^1 exp((1 - s) h) s^(k-1) / (k-1)! ds, for h of any shape, without cancellation at small h."""
    s = (1 + _NODES) / 2
    return np.exp(np.multiply.outer(h, 1 - s)) @ (_WEIGHTS / 2 * s ** (k - 1)) / math.factorial(k - 1)


def check_options(name: str, steps: int, order: int, orders, **choices):
    """Refuse an order that does not exist or that `steps` evaluations do not allow, and values outside `choices`.

    choices: option = (value, allowed values).
    """
    if order not in tuple(orders) or not isinstance(order, int):
        raise UserError(f"{name} of order {order}: use one of {', '.join(map(str, orders))}")
    for option, (value, allowed) in choices.items():
        if value not in tuple(allowed):
            raise UserError(f"{name} with {option} {value!r}: use one of {', '.join(allowed)}")
    if steps < order:
        raise UserError(
            f"{steps} steps are fewer than the order {order}: use --steps={order} or more, or a lower order"
        )


@verify
def dpm_solver_pp(
    sde: SDE,
    steps: int,
    *,
    order: int = 2,
    method: str = "multistep",
    solver_type: str = "dpmsolver",
    grid: str | Sequence = "logsnr",
    lower_order_final: bool = True,
    denoise_to_zero: bool = False,
    t_end: float | None = None,
) -> Tableau:
    """DPM-Solver++ (data prediction) of order 1 (DDIM), 2 or 3 in `steps` evaluations.

    method: multistep (2M, 3M); singlestep (2S, 3S), whose last steps have lower order where `steps` is no multiple of
        the order; singlestep_fixed, for multiples of the order.
    solver_type: dpmsolver or taylor; grid: a key of grids.GRIDS, or the times.
    lower_order_final: drop a multistep solver to order 2, then 1, over the last steps.
    denoise_to_zero: spend the last evaluation on x0 at the end; t_end: where sampling ends, the SDE's t_min by default.
    """
    options = (order, method, solver_type, grid, lower_order_final, denoise_to_zero, t_end)
    return _build("DPM-Solver++", True, sde, steps, *options)


@verify
def dpm_solver(
    sde: SDE,
    steps: int,
    *,
    order: int = 3,
    method: str = "singlestep",
    solver_type: str = "dpmsolver",
    grid: str | Sequence = "logsnr",
    lower_order_final: bool = True,
    denoise_to_zero: bool = False,
    t_end: float | None = None,
) -> Tableau:
    """DPM-Solver (noise prediction), with the options of DPM-Solver++."""
    options = (order, method, solver_type, grid, lower_order_final, denoise_to_zero, t_end)
    return _build("DPM-Solver", False, sde, steps, *options)


def ddim(sde: SDE, steps: int, *, grid: str | Sequence = "logsnr", t_end: float | None = None) -> Tableau:
    """DDIM in `steps` evaluations: the first-order solver."""
    return dpm_solver_pp(sde, steps, order=1, grid=grid, t_end=t_end)


@verify
def sde_dpm_solver_pp(
    sde: SDE,
    steps: int,
    *,
    order: int = 2,
    grid: str | Sequence = "logsnr",
    lower_order_final: bool = True,
    denoise_to_zero: bool = False,
    t_end: float | None = None,
) -> Tableau:
    """SDE-DPM-Solver++ of order 1 or 2 (2M): the reverse SDE in `steps` evaluations (arXiv 2211.01095).

    With h the step in lam: x_t = sigma_t / sigma_s exp(-h) x_s + alpha_t (1 - exp(-2h)) (x0 + D / 2)
    + sigma_t sqrt(1 - exp(-2h)) z, D being h times the divided difference of x0. Order 1 is ancestral sampling.
    """
    check_options("SDE-DPM-Solver++", steps - denoise_to_zero, order, (1, 2))
    n = steps - denoise_to_zero
    t = grids.times(grid, sde, n, t_end=t_end)
    alpha, sigma, lam = sde.alpha(t), sde.sigma(t), sde.lam(t)
    h = np.diff(lam)
    table = Integrator.of(sde, t, order, data_prediction=True).tableau
    for i in range(n):
        weights = np.zeros(order)  # of x0_i, x0_(i-1)
        weights[0] = 1.0
        if min(i + 1, order, n - i if lower_order_final else order) == 2:
            weights += np.array([0.5, -0.5]) * h[i] / h[i - 1]
        table.predict[i, 0] = sigma[i + 1] / sigma[i] * np.exp(-h[i])
        table.predict[i, 1:-1] = (alpha[i + 1] * np.expm1(-2 * h[i]) * weights)[:, None, None, None]  # f = -x0
    noise = sigma[1:] * np.sqrt(-np.expm1(-2 * h))
    table = table._replace(noise=noise[:, None, None, None])
    return denoised(table, sde, t[-1]) if denoise_to_zero else table


def _build(
    name, data_prediction, sde, steps, order, method, solver_type, grid, lower_order_final, denoise_to_zero, t_end
) -> Tableau:
    n = steps - denoise_to_zero
    check_options(name, n, order, ORDERS, method=(method, METHODS), solver_type=(solver_type, SOLVER_TYPES))
    if method == "multistep":
        orders = [min(i + 1, order, n - i if lower_order_final else order) for i in range(n)]
        t = grids.times(grid, sde, n, t_end=t_end)
        integrator = Integrator.of(sde, t, order, data_prediction=data_prediction)
        for i, p in enumerate(orders):
            _multistep(integrator, i, p, solver_type)
    else:
        orders = _singlestep_orders(n, order, method)
        t = _singlestep_times(grid, sde, orders, method, t_end)
        integrator = Integrator.of(sde, t, order, data_prediction=data_prediction)
        for start, p in zip(np.cumsum(orders) - orders, orders, strict=True):
            _singlestep(integrator, start, p, solver_type)
    return denoised(integrator.tableau, sde, t[-1]) if denoise_to_zero else integrator.tableau


def _multistep(integrator: Integrator, i: int, p: int, solver_type: str):
    """A step of order p from evaluation i to i + 1, through the evaluations before i."""
    clock = -np.log(integrator.rho)
    h = clock[i + 1] - clock[i]
    r = (clock[i] - clock[i - np.arange(1, p)]) / h  # of the older evaluations
    m = np.eye(p)  # the evaluations m_i, m_(i-1), ..., of which everything is a combination
    total = phi(1, h) * m[0]
    if p == 2:
        slope = (m[0] - m[1]) / r[0]
        total = total + (phi(1, h) / 2 if solver_type == "dpmsolver" else phi(2, h)) * slope
    if p == 3:
        first, older = (m[0] - m[1]) / r[0], (m[1] - m[2]) / (r[1] - r[0])
        curvature = (first - older) / r[1]
        total = total + phi(2, h) * (first + r[0] * curvature) + phi(3, h) * curvature
    integrator.predict(i, i, -integrator.rho[i + 1] * h * total)


def _singlestep(integrator: Integrator, start: int, p: int, solver_type: str):
    """A step of order p from evaluation `start` to start + p, through the p - 1 evaluations inside it."""
    clock = -np.log(integrator.rho)
    for stage in range(p):  # the last stage takes the step
        i = start + stage
        h = clock[i + 1] - clock[start]
        r = (clock[start + 1 : i + 1] - clock[start]) / h  # of the evaluations inside
        m = np.eye(stage + 1)[::-1]  # m_start, m_(start+1), ..., in weights of m_i, m_(i-1), ...
        total = phi(1, h) * m[0]
        if stage == 1:
            shortcut = p == 2 and solver_type == "dpmsolver"
            total = total + (phi(1, h) / 2 if shortcut else phi(2, h)) * (m[1] - m[0]) / r[0]
        if stage == 2:
            near, far = (m[1] - m[0]) / r[0], (m[2] - m[0]) / r[1]
            if solver_type == "dpmsolver":
                total = total + phi(2, h) * far
            else:
                slope, curvature = (r[1] * near - r[0] * far) / (r[1] - r[0]), 2 * (far - near) / (r[1] - r[0])
                total = total + phi(2, h) * slope + phi(3, h) * curvature
        if stage:
            integrator.keep_base(i)
        integrator.predict(i, start, -integrator.rho[i + 1] * h * total)


def _singlestep_orders(n: int, order: int, method: str) -> list[int]:
    """The orders of the steps that n evaluations make."""
    if method == "singlestep_fixed":
        if n % order:
            raise UserError(
                f"{n} evaluations are no whole number of steps of order {order}: "
                f"use --steps={n // order * order} or method singlestep"
            )
        return [order] * (n // order)
    if order == 3 and n % 3 == 0:
        return [3] * (n // 3 - 1) + [2, 1]
    return [order] * (n // order) + ([n % order] if n % order else [])


def _singlestep_times(grid, sde: SDE, orders: list[int], method: str, t_end) -> np.ndarray:
    """The times of all evaluations and the end. On the logsnr grid steps of every order are equally long in lam."""
    if not isinstance(grid, str) or grid != "logsnr" or method == "singlestep_fixed":
        return grids.times(grid, sde, sum(orders), t_end=t_end)
    outer = grids.times(grid, sde, len(orders), t_end=t_end)
    position = np.concatenate([k + np.arange(p) / p for k, p in enumerate(orders)] + [[len(orders)]])
    t = sde.t_of_lam(np.interp(position, np.arange(len(outer)), sde.lam(outer)))
    t[0], t[-1] = outer[0], outer[-1]
    return t
