"""Where in time a few-step solver evaluates the network: n + 1 times from t_start to t_end, float64."""

from collections.abc import Sequence

import numpy as np

from score_sde.errors import UserError
from score_sde.sde import SDE


def _power(start, end, u, exponent: float):
    """From start to end, uniform in the root of that exponent; u in [0, 1]."""
    return (start ** (1 / exponent) + u * (end ** (1 / exponent) - start ** (1 / exponent))) ** exponent


def _karras(sde: SDE, u, start, end):
    """Uniform in (sigma / alpha)^(1/7) (Karras et al. 2022, eq. 5)."""
    noise_to_signal = lambda t: np.exp(-sde.lam(t))
    return sde.t_of_lam(-np.log(_power(noise_to_signal(start), noise_to_signal(end), u, 7)))


# name: (sde, u in [0, 1], t_start, t_end) -> t
GRIDS = {
    "logsnr": lambda sde, u, start, end: sde.t_of_lam(sde.lam(start) + u * (sde.lam(end) - sde.lam(start))),
    "time": lambda sde, u, start, end: _power(start, end, u, 1),
    "quadratic": lambda sde, u, start, end: _power(start, end, u, 2),
    "edm": _karras,
}


def times(
    grid: str | Sequence, sde: SDE, n: int, *, t_start: float | None = None, t_end: float | None = None
) -> np.ndarray:
    """The (n + 1,) times of a grid: a key of GRIDS, or the falling times themselves.

    t_start and t_end default to the SDE's time range.
    """
    if not isinstance(grid, str):
        highest = sde.t_max if t_start is None else t_start
        try:
            t = np.array(grid, np.float64)
            valid = t.shape == (n + 1,) and (np.diff(t) < 0).all() and t[-1] > 0 and t[0] <= highest
        except (ValueError, TypeError):
            valid = False
        if not valid:
            raise UserError(f"a grid of {n} steps is {n + 1} falling times in (0, {highest:g}]; got {grid}")
        if t_end is not None and t[-1] < t_end:
            raise UserError(
                f"the grid goes down to t={t[-1]:g}, below t_end={t_end:g}: leave t_end out or raise the grid"
            )
        return t
    if grid not in GRIDS:
        raise UserError(f"unknown grid {grid!r}: use one of {', '.join(GRIDS)}")
    start, end = sde.t_max if t_start is None else t_start, sde.t_min if t_end is None else t_end
    if isinstance(end, str) or not 0 < end < start <= sde.t_max:
        raise UserError(f"sampling from t={start} to t={end}: expected 0 < end < start <= {sde.t_max:g}")
    start, end = np.float64(start), np.float64(end)
    t = GRIDS[grid](sde, np.linspace(0.0, 1.0, n + 1), start, end)
    t[0], t[-1] = start, end  # exactly
    return t
