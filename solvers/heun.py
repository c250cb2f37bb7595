"""Heun's second-order solver and its stochastic form (Karras et al. 2022, arXiv 2206.00364, algorithms 1 and 2).

For every SDE: with u = x / alpha and rho = sigma / alpha the ODE is du = eps drho; an Euler step is followed by the
trapezoid of both slopes. The paper's settings of N steps are 2 N - 1 evaluations, the last of them the Euler step to
rho = 0: 35 for CIFAR-10, 79 for 64 x 64 faces, and for ImageNet 511, stochastic.
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
    return _table(sde, steps, grids.times(grid, sde, _heun_steps(steps), t_end=t_end), np.zeros(steps), 1.0)


def stochastic_heun(
    sde: SDE,
    steps: int,
    *,
    churn: float = 40.0,
    s_min: float = 0.05,
    s_max: float = 50.0,
    s_noise: float = 1.003,
    grid: str | Sequence = "edm",
    t_end: float | None = None,
) -> Tableau:
    """The same steps, each from a noise level that fresh noise has raised before (algorithm 2).

    churn: over all steps, whose number N counts the Euler step: where s_min <= rho <= s_max, rho is raised by the share
        min(churn / N, sqrt(2) - 1); s_noise: standard deviation of the fresh noise. The defaults are those published
        for ImageNet (appendix E.2, Table 5).
    """
    t = grids.times(grid, sde, _heun_steps(steps), t_end=t_end)
    rho = sde.sigma(t) / sde.alpha(t)
    share = min(churn / ((steps + 1) // 2), np.sqrt(2) - 1)
    return _table(sde, steps, t, np.where((s_min <= rho) & (rho <= s_max), share, 0.0), s_noise)


def _heun_steps(steps: int) -> int:
    """How many Heun steps so many evaluations make."""
    if steps < 2:
        raise UserError(f"Heun's steps take two evaluations each, got {steps}: use --steps=2 or more")
    return steps // 2


def _table(sde: SDE, steps: int, t, share, s_noise: float) -> Tableau:
    """Steps between times t (n + 1,), each from a rho that is larger by `share` (n + 1,) of it."""
    n = steps // 2
    share = share[: n + 1] * np.append(np.ones(n), steps % 2)  # the end is no start of a step, but of the one to 0
    rho = sde.sigma(t) / sde.alpha(t)
    t_hat = np.where(share > 0, sde.t_of_lam(-np.log(rho * (1 + share))), t)
    integrator = Integrator.of(
        sde, np.stack([t_hat, np.roll(t, -1)], axis=1).ravel()[: 2 * n + 1], 2, data_prediction=False
    )
    for i in range(0, 2 * n, 2):
        h = integrator.rho[i + 1] - integrator.rho[i]
        integrator.predict(i, i, [h])
        integrator.keep_base(i + 1)
        integrator.predict(i + 1, i, [h / 2, h / 2])
    table = integrator.tableau
    if share.any():
        noise_std = sde.alpha(t_hat) * rho * np.sqrt((1 + share) ** 2 - 1) * s_noise
        noise = np.zeros((2 * n, 1, 1, 1))
        noise[1::2, 0, 0, 0] = noise_std[1:]
        start = np.array([sde.alpha(t_hat[0]) / sde.alpha(t[0]), noise_std[0]]).reshape(2, 1, 1, 1)
        table = table._replace(noise=noise, start=start if noise_std[0] else None)
    return denoised(table, sde, t_hat[-1]) if steps % 2 else table
