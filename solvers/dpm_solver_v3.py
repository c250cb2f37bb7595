"""DPM-Solver-v3 (Zheng et al. 2023, arXiv 2310.13268): the parameterization f is measured on the model.

With f = (sigma eps - l x) / alpha, chosen by EMS such that along the ODE f' is as near to s f + b as it can be, the
exact solution from s to t (their eq. 10) is, in cumulative integrals over lam of the statistics (from the prior on)

    L = int l,  S = int s,  I = int exp(L + S),  B = int exp(-S) b,  C = int exp(L + S) B,
    g(lam) = exp(S_s - S) f - exp(S_s) (B - B_s),    w(lam) = exp(L + S - L_s - S_s),

    x_t = alpha_t / alpha_s exp(L_s - L_t) x_s - alpha_t exp(-L_t) (C_t - C_s - B_s (I_t - I_s))
          - alpha_t exp(L_s - L_t) int_s^t w(lam) g(lam) dlam.

g is replaced by its Taylor polynomial at s, whose derivatives come from evaluations at n nodes (their eqs. 13-14);
every g is affine in its f, so each step is affine in past f and the solver is a tableau with coefficients per pixel.
"""

import math
from collections.abc import Sequence

import numpy as np

from ems.statistics import EMS, check_sde
from score_sde.errors import UserError
from score_sde.sde import SDE
from solvers import grids
from solvers.tableau import Tableau, empty, verify

ORDERS = (1, 2, 3)
CORRECTOR = {"on": lambda t: True, "off": lambda t: False, "half": lambda t: t > 0.5}


def _options(order, pseudo, corrector, corrector_pseudo, lower_order_final, grid) -> dict:
    return dict(
        order=order,
        pseudo=pseudo,
        corrector=corrector,
        corrector_pseudo=corrector_pseudo,
        lower_order_final=lower_order_final,
        grid=grid,
    )


# What was found best, by kind of model and, up to so many evaluations, by their number: the published sampling scripts.
PUBLISHED = {
    "pixel": {  # ScoreSDE, VP
        5: _options(3, True, "on", False, False, "logsnr"),
        8: _options(3, False, "on", False, True, "logsnr"),
        10: _options(3, False, "off", False, True, "logsnr"),
        math.inf: _options(3, False, "on", False, True, "logsnr"),
    },
    "exploding": {  # EDM, alpha = 1
        5: _options(3, True, "on", False, True, "logsnr"),
        6: _options(3, False, "on", False, True, "logsnr"),
        math.inf: _options(3, False, "off", False, True, "logsnr"),
    },
    "latent": {math.inf: _options(3, False, "on", True, True, "time")},  # LSUN
    "guided": {math.inf: _options(2, False, "on", True, True, "time")},  # Stable Diffusion below 5; ADM-G at 2
    "strongly guided": {math.inf: _options(2, False, "off", True, True, "time")},
}


def published_options(
    steps: int, sde: SDE, *, latent: bool = False, guidance_scale: float | None = None, beside: bool = False
) -> dict:
    """What was found best for this number of evaluations and kind of model, as options of `dpm_solver_v3`.

    t_end: the SDE's t_min; for pixels under a variance-preserving SDE, a tenth of it above 10 evaluations (published:
        1e-3 and 1e-4).
    guidance_scale: None is a model without guidance, 1 too unless something beside the model guides it (`beside`), such
        as a classifier.
    """
    if guidance_scale not in ((None,) if beside else (None, 1)):
        kind = "guided" if guidance_scale < 5 else "strongly guided"
    elif latent:
        kind = "latent"
    else:
        kind = "pixel" if sde.prior_std == 1 else "exploding"
    options = next(options for most, options in PUBLISHED[kind].items() if steps <= most)
    t_end = sde.t_min / 10 if kind == "pixel" and steps > 10 else sde.t_min
    return options | dict(order=min(options["order"], steps), t_end=t_end)


@verify(exact=False)
def dpm_solver_v3(
    sde: SDE,
    steps: int,
    *,
    ems: EMS,
    order: int = 3,
    pseudo: bool = False,
    corrector: str = "on",
    corrector_pseudo: bool = False,
    lower_order_final: bool = True,
    degenerate: bool = False,
    grid: str | Sequence = "logsnr",
    t_end: float | None = None,
    snap: bool = False,
    indices: Sequence[int] | None = None,
) -> Tableau:
    """The tableau of DPM-Solver-v3 in `steps` evaluations.

    ems: the model's statistics; sampling starts at their first node.
    order: 1 to 3; pseudo: derivatives by nested divided differences instead of a Vandermonde solve (sec. 3.4).
    corrector: "on", "off", or "half" for steps to t > 0.5 alone; of the order of the step it corrects, + 1 and by
        divided differences with `corrector_pseudo`. It costs no evaluation; the last step has none.
    lower_order_final: drop to order 2, then 1, over the last steps.
    degenerate: l = 1, s = b = 0 in place of the measured statistics: DPM-Solver++ with this corrector (sec. 3.3).
    grid: a key of grids.GRIDS, or the times; t_end: where sampling ends, at the last node by default.
    snap: move the times to the nearest nodes, as the published code does; otherwise the statistics are interpolated in
        lam. indices: the (steps + 1) nodes themselves, instead of a grid.
    """
    if order not in ORDERS:
        raise UserError(f"DPM-Solver-v3 of order {order}: use 1, 2 or 3")
    if corrector not in CORRECTOR:
        raise UserError(f"unknown corrector setting {corrector!r}: use one of {', '.join(CORRECTOR)}")
    if steps < order:
        raise UserError(
            f"{steps} steps are fewer than the order {order}: use --steps={order} or more, or a lower order"
        )
    check_sde(ems, sde)
    if degenerate:
        ems = ems._replace(l=np.ones_like(ems.l), s=np.zeros_like(ems.s), b=np.zeros_like(ems.b))
    reach = ems.t[-1] if t_end is None else t_end
    if reach < ems.t[-1] * (1 - 1e-9):
        raise UserError(
            f"sampling down to t={reach:g}, but these EMS end at t={ems.t[-1]:g}: "
            f"measure them further, python -m ems --t_end={reach:g}, or leave the end time out"
        )
    if indices is None:
        t = grids.times(grid, sde, steps, t_start=ems.t[0], t_end=max(reach, ems.t[-1]))
        if not snap:
            ems = with_nodes_at(ems, t, sde.lam(t))
        indices = nearest_nodes(ems, sde.lam(t))
    nodes = np.asarray(indices, int)
    if len(nodes) != steps + 1 or (np.diff(nodes) <= 0).any():
        raise UserError(
            f"{steps} steps need {steps + 1} different nodes of the EMS in order, the grid gives {nodes.tolist()}: "
            f"measure EMS at more than {len(ems.t) - 1} intervals (python -m ems --nodes=...) or take fewer steps"
        )
    update = _Update(sde, ems)
    tableau = empty(sde, ems.t[nodes], order + 1, ems.l[nodes[:-1]])
    for i in range(steps):
        p = min(i + 1, order, steps - i if lower_order_final else order)
        evaluations = [i - k for k in range(p)]  # the base first
        _set_row(tableau.predict[i], 1, i, evaluations, update(nodes[i + 1], nodes[evaluations], pseudo))
        q = p + corrector_pseudo
        if q > 1 and i + 1 < steps and CORRECTOR[corrector](tableau.t[i + 1]):
            evaluations = [i, i + 1, *(i - k for k in range(1, q - 1))]
            _set_row(
                tableau.correct[i + 1],
                2,
                i + 1,
                evaluations,
                update(nodes[i + 1], nodes[evaluations], corrector_pseudo),
            )
    return tableau


def _set_row(row, first: int, now: int, evaluations: Sequence[int], coefficients):
    """Write (of x, of the f of each evaluation, constant) into a tableau row whose column `first` is f of `now`."""
    of_x, of_f, constant = coefficients
    row[:] = 0.0
    row[0], row[-1] = of_x, constant
    for evaluation, weight in zip(evaluations, of_f, strict=True):
        row[first + now - evaluation] = weight


def nearest_nodes(ems: EMS, lam) -> np.ndarray:
    """Indices of the nodes nearest to each lam."""
    return np.abs(ems.lam[None, :] - lam[:, None]).argmin(1)


def with_nodes_at(ems: EMS, t: np.ndarray, lam: np.ndarray) -> EMS:
    """The same statistics with nodes at the falling times t too, l, s and b being linear in lam between nodes.

    A time that is a node, up to rounding, adds none, so that a grid of nodes gives the figures of `snap`.
    """
    near = np.abs(ems.lam[nearest_nodes(ems, lam)] - lam) < 1e-9 * np.ptp(ems.lam)
    new = ~near & (ems.lam[0] < lam) & (lam < ems.lam[-1])  # the ends may differ by the rounding of a file
    t, lam = t[new], lam[new]
    after = np.searchsorted(ems.lam, lam)
    share = ((lam - ems.lam[after - 1]) / (ems.lam[after] - ems.lam[after - 1])).reshape(-1, 1, 1, 1)
    between = lambda values: np.insert(values, after, (1 - share) * values[after - 1] + share * values[after], axis=0)
    statistics = {name: between(getattr(ems, name)) for name in ("l", "s", "b")}
    return ems._replace(t=np.insert(ems.t, after, t), lam=np.insert(ems.lam, after, lam), **statistics)


class _Update:
    """The coefficients of one step, from the statistics' integrals (trapezoids over all nodes)."""

    def __init__(self, sde: SDE, ems: EMS):
        self.alpha, self.lam = sde.alpha(ems.t), ems.lam
        integral = lambda values: np.concatenate(
            [np.zeros_like(values[:1]), np.cumsum((values[1:] + values[:-1]) / 2 * self._widths(values), axis=0)]
        )
        self.L, self.S = integral(ems.l), integral(ems.s)
        growth = np.exp(self.L + self.S)
        self.I, self.B = integral(growth), integral(np.exp(-self.S) * ems.b)
        self.C = integral(growth * self.B)

    def _widths(self, values):
        return np.diff(self.lam).reshape(-1, *(1,) * (values.ndim - 1))

    def _moment(self, s: int, t: int, k: int):
        """int_s^t w(lam) (lam - lam_s)^k / k! dlam, per pixel."""
        L, S, lam = self.L[s : t + 1], self.S[s : t + 1], self.lam[s : t + 1]
        distance = (lam - lam[0]).reshape(-1, 1, 1, 1) ** k / math.factorial(k)
        return np.trapezoid(np.exp(L + S - L[0] - S[0]) * distance, lam, axis=0)

    def __call__(self, t: int, evaluations: np.ndarray, pseudo: bool):
        """Coefficients (of x, of each f, constant) of the step to node t from the first of the nodes `evaluations`."""
        s = evaluations[0]
        L, S, B, I, C = self.L, self.S, self.B, self.I, self.C
        scale = self.alpha[t] * np.exp(L[s] - L[t])
        moments = [-scale * self._moment(s, t, k) for k in range(len(evaluations))]
        derivatives = derivative_weights(self.lam[evaluations], pseudo)
        of_f, constant = [], -self.alpha[t] * np.exp(-L[t]) * (C[t] - C[s] - B[s] * (I[t] - I[s]))
        for j, node in enumerate(evaluations):
            of_g = sum(weights[j] * moment for weights, moment in zip(derivatives, moments, strict=True))
            of_f.append(of_g * np.exp(S[s] - S[node]))
            constant = constant - of_g * np.exp(S[s]) * (B[node] - B[s])
        return scale / self.alpha[s], of_f, constant


def derivative_weights(lam: np.ndarray, pseudo: bool) -> np.ndarray:
    """(n, n): row k holds the weights by which n values at lam give the k-th derivative at lam[0].

    By the Vandermonde system of the Taylor polynomial, or with `pseudo` by nested divided differences, which equal the
    derivative only to first order but damp better (Zheng et al. 2023, sec. 3.4).
    """
    n = len(lam)
    if not pseudo:
        powers = np.arange(n)
        return np.linalg.inv((lam[:, None] - lam[0]) ** powers) * np.array([[math.factorial(k)] for k in powers])
    differences, rows = np.eye(n), []
    for k in range(n):
        rows.append(math.factorial(k) * differences[0])
        distance = lam[: n - k - 1] - lam[k + 1 :]
        differences = (differences[:-1] - differences[1:]) / distance[:, None]
    return np.array(rows)
