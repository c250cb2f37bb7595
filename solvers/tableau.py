"""Every few-step solver is a table of coefficients; this is the one loop that runs them all.

At evaluation i the network is called once, at (x_i, t_i), and enters through

    f_i = (sigma_i eps_i - l_i x_i) / alpha_i,

where l, per node and pixel, is the parameterization: 0 is noise prediction, 1 is minus data prediction, EMS make it
DPM-Solver-v3 (Zheng et al. 2023, eq. 5). Every solver then does, with its own numbers,

    base_i  = correct[i, 0] base_(i-1) + correct[i, 1] x_i + sum_k correct[i, 2 + k] f_(i-k) + correct[i, -1]
    x_(i+1) = predict[i, 0] base_i                         + sum_k predict[i, 1 + k] f_(i-k) + predict[i, -1],

and a stochastic solver adds noise[i] z_i, z_i ~ N(0, I), to x_(i+1). One that adds noise before it first asks the
network begins with x_0 <- start[0] x_0 + start[1] z.

`base` is the state on the solution path; x is the point the network is asked at. Without a corrector base_i = x_i;
inside a singlestep solver's step base_i = base_(i-1). A corrector changes base and leaves f as it is.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from score_sde.denoiser import NoiseFn
from score_sde.errors import UserError
from score_sde.sde import SDE


class Tableau(NamedTuple):
    """A solver for n evaluations with a history of K values of f; built in float64 on the host, see `verify`.

    Trailing axes P are (1, 1, 1) for coefficients that all pixels share, (H, W, C) for coefficients per pixel.

    For example DPM-Solver++ 2M under VE, where alpha = 1, in two evaluations at sigma = 4 and 2, which end at sigma = 1
    without a lower order. Data prediction is l = 1, so f = -D with D the predicted x0. With h = log 2 between times,
    x_1 = x_0 / 2 + D_0 / 2, which is DDIM, and x_2 = x_1 / 2 + (3 D_1 - D_0) / 4:

        alpha = [1, 1]   sigma = [4, 2]   l = [1, 1]
        correct = [[0, 1, 0, 0, 0], [0, 1, 0, 0, 0]]                of base, x, f_i, f_(i-1), 1: there is no corrector
        predict = [[1/2, -1/2, 0, 0], [1/2, -3/4, 1/4, 0]]          of base, f_i, f_(i-1), 1

    Where D and eps do not change, x stays D + sigma eps: (D + 4 eps) / 2 + D / 2 = D + 2 eps, and so on.
    """

    t: np.ndarray  # (n,) where the network is evaluated
    alpha: np.ndarray  # (n,)
    sigma: np.ndarray  # (n,)
    l: np.ndarray  # (n, *P)
    correct: np.ndarray  # (n, K + 3, *P): of base, x, f_i, ..., f_(i-K+1), 1
    predict: np.ndarray  # (n, K + 2, *P): of base, f_i, ..., f_(i-K+1), 1
    noise: np.ndarray | None = None  # (n, *P): of z_i; None if deterministic
    start: np.ndarray | None = None  # (2, *P): of x and z before the first evaluation; None: x stays

    @property
    def history(self) -> int:
        return self.predict.shape[1] - 2


START = 2**31 - 1  # the number of the draw for `start`, which is that of no evaluation


def verify(builder: Callable | None = None, *, exact: bool = True) -> Callable:
    """The same function that builds tableaux, which are verified on the host before it hands them out.

    exact: whether rows are verified too, by `check_rows`; those of measured statistics have no such property.

    ValueError for a table that is built wrongly, UserError for times at which its numbers overflow.
    """
    if builder is None:
        return functools.partial(verify, exact=exact)

    @functools.wraps(builder)
    def build(*arguments, **options) -> Tableau:
        tableau = builder(*arguments, **options)
        check_shapes(tableau)
        if exact:
            check_rows(tableau)
        return tableau

    return build


def check_shapes(tableau: Tableau):
    """Refuse shapes other than `Tableau` says, rising times, weights of evaluations before the first, and overflow."""
    n, columns, *pixels = tableau.predict.shape
    shapes = dict.fromkeys(("t", "alpha", "sigma"), (n,)) | dict.fromkeys(("l", "noise"), (n, *pixels))
    for name, shape in (shapes | dict(correct=(n, columns + 1, *pixels), start=(2, *pixels))).items():
        value = getattr(tableau, name)
        if (value is not None and value.shape != shape) or len(pixels) != 3:
            raise ValueError(f"{name} of a tableau has shape {value.shape}, expected {shape}")
    if (np.diff(tableau.t) > 1e-12 * tableau.t[0]).any():  # rounding apart
        raise ValueError(f"the times of a tableau rise: {tableau.t}")
    for i in range(min(n, tableau.history)):
        if tableau.correct[i, 3 + i : -1].any() or tableau.predict[i, 2 + i : -1].any():
            raise ValueError(f"row {i} of a tableau uses evaluations before the first")
    if not all(np.isfinite(field).all() for field in tableau if field is not None):
        raise UserError("a solver's coefficients overflow at these times: choose another grid, or fewer steps")


def check_rows(tableau: Tableau, tolerance: float = 1e-8):
    """Refuse a row that leaves x = alpha x0 + sigma eps where x0 and eps do not change, l being 0 or 1 for all pixels.

    Every solver of the ODE stays there, whatever its order; a stochastic one in mean and variance. The last row is left
    out: where it leads, a tableau does not tell.
    """
    scalar = lambda table: table[..., 0, 0, 0]
    l, correct, predict = scalar(tableau.l), scalar(tableau.correct), scalar(tableau.predict)
    line = np.stack([tableau.alpha, tableau.sigma], axis=1)  # x as (share of x0, share of eps)
    f = np.stack([-l, (1 - l) * tableau.sigma / tableau.alpha], axis=1)
    base = x = line[0]
    for i in range(len(l) - 1):
        if tableau.noise is not None:
            base = x = line[i]  # with fresh noise: the share of eps is that of a normal variable
        past = f[max(0, i - tableau.history + 1) : i + 1][::-1]
        base = correct[i, 0] * base + correct[i, 1] * x + correct[i, 2 : 2 + len(past)] @ past
        x = predict[i, 0] * base + predict[i, 1 : 1 + len(past)] @ past
        arrived = x if tableau.noise is None else np.array([x[0], np.hypot(x[1], scalar(tableau.noise)[i])])
        if np.abs(arrived - line[i + 1]).max() > tolerance * line[i + 1].max():
            raise ValueError(f"row {i} of a tableau leads to {arrived}, not to (alpha, sigma) = {line[i + 1]}")


def empty(sde, times, history: int, l) -> Tableau:
    """A tableau for evaluations at times[:-1], without corrector and with predictors still zero.

    times: (n + 1,) float64, from the prior to the end of sampling; l: (n, *P).
    """
    t = np.asarray(times, np.float64)[:-1]
    correct = np.zeros((len(t), history + 3, *l.shape[1:]))
    correct[:, 1] = 1.0
    return Tableau(t, sde.alpha(t), sde.sigma(t), l, correct, np.zeros((len(t), history + 2, *l.shape[1:])))


class Integrator(NamedTuple):
    """Fills the tableau of a solver that integrates du = m drho, which is the ODE without approximation:

    u = x / alpha, rho = sigma / alpha, m = eps    in noise prediction (Lu et al. 2022, arXiv 2206.00927, eq. 3.4),
    u = x / sigma, rho = alpha / sigma, m = x0     in data prediction (arXiv 2211.01095, eq. 8).
    """

    tableau: Tableau
    scale: np.ndarray  # (n + 1,) alpha or sigma: x = scale u
    rho: np.ndarray  # (n + 1,)
    m_of_f: np.ndarray  # (n,)

    @classmethod
    def of(cls, sde: SDE, times, history: int, *, data_prediction: bool):
        """times: (n + 1,) float64, of the n evaluations in their order, then the end."""
        times = np.asarray(times, np.float64)
        alpha, sigma = sde.alpha(times), sde.sigma(times)
        tableau = empty(sde, times, history, np.full((len(times) - 1, 1, 1, 1), float(data_prediction)))
        if data_prediction:
            return cls(tableau, sigma, alpha / sigma, -np.ones(len(times) - 1))
        return cls(tableau, alpha, sigma / alpha, (alpha / sigma)[:-1])

    def _fill(self, row, first: int, start: int, end: int, now: int, weights: Sequence[float]):
        weights = np.asarray(weights)
        row[:] = 0.0
        row[0] = self.scale[end] / self.scale[start]
        m_of_f = self.m_of_f[now - np.arange(len(weights))]
        row[first : first + len(weights)] = (self.scale[end] * weights * m_of_f)[:, None, None, None]

    def predict(self, i: int, start: int, weights: Sequence[float]):
        """After evaluation i: u_(i+1) = u_start + sum_k weights[k] m_(i-k), u_start being the present base."""
        self._fill(self.tableau.predict[i], 1, start, i + 1, i, weights)

    def correct(self, i: int, start: int, weights: Sequence[float]):
        """After evaluation i, before its predictor: u_i = u_start + sum_k weights[k] m_(i-k)."""
        self._fill(self.tableau.correct[i], 2, start, i, i, weights)

    def keep_base(self, i: int):
        """Evaluation i is asked at an auxiliary point: the base stays."""
        self.tableau.correct[i] = 0.0
        self.tableau.correct[i, 0] = 1.0


def denoised(tableau: Tableau, sde: SDE, t_end: float) -> Tableau:
    """The solver that ends at t_end, followed by one evaluation there, whose x0 is the sample."""
    last = empty(sde, np.array([t_end, t_end]), tableau.history, np.ones((1, *tableau.l.shape[1:])))
    last.predict[0, 1] = -1.0
    if tableau.noise is not None:
        last = last._replace(noise=np.zeros_like(tableau.noise[:1]))
    rows = jax.tree.map(lambda rows, row: np.concatenate([rows, row]), tableau._replace(start=None), last)
    return rows._replace(start=tableau.start)


def lengthened(tableau: Tableau, rows: int) -> Tableau:
    """The same solver with rows of zeros after its own, for `solve` to leave out."""
    pad = lambda table: np.pad(table, [(0, rows - len(table)), *[(0, 0)] * (table.ndim - 1)])
    return jax.tree.map(pad, tableau._replace(start=None))._replace(start=tableau.start)


def uniform(tableau: Tableau, history: int, shape: tuple[int, ...]) -> Tableau:
    """The same solver with its history padded by zeros and its coefficients spread over images of `shape` (H, W, C).

    Tableaux made uniform, of equal length, share one compiled `solve`; `lengthened` makes them of equal length.
    """
    padding = np.zeros((len(tableau.t), history - tableau.history, *tableau.l.shape[1:]))
    pad = lambda table: np.concatenate([table[:, :-1], padding, table[:, -1:]], axis=1)
    spread = lambda table: np.broadcast_to(table, table.shape[: table.ndim - 3] + tuple(shape))
    return tableau._replace(
        l=spread(tableau.l),
        correct=spread(pad(tableau.correct)),
        predict=spread(pad(tableau.predict)),
        noise=None if tableau.noise is None else spread(tableau.noise),
        start=None if tableau.start is None else spread(tableau.start),
    )


def solve(
    noise: NoiseFn,
    tableau: Tableau,
    x,
    draw: Callable | None = None,
    evaluations=None,
    *,
    unrolled: bool = False,
    trajectory: bool = False,
):
    """Integrate from x (B, H, W, C) at the tableau's first time to its end: (B, H, W, C) after len(t) evaluations.

    draw: i -> (B, H, W, C), the i-th standard normal draw, START's included; a tableau without noise makes none.
    evaluations: () how many rows are carried out, all of them if None; solvers of any length then share a program,
        which has no derivative in reverse mode.
    unrolled: compile each evaluation by itself, which makes derivatives by the table many times as fast on a CPU, and
        keep none of its inner values for reverse mode.
    trajectory: return what each evaluation leads to, (len(t), B, H, W, C), in place of the end; not with `evaluations`.
    Pure and jittable, with the tableau as an argument: another solver of the same shape does not recompile.
    """
    tableau = jax.tree.map(lambda table: jnp.asarray(table, x.dtype), tableau)
    combine = lambda weights, values: sum(w[None] * v for w, v in zip(weights, values, strict=True))

    def step(carry, row):
        base, x, past = carry
        i, node = row
        f = (node.sigma * noise(x, node.t) - node.l[None] * x) / node.alpha
        past = (f, *past[:-1])
        one = jnp.ones((1, 1, 1, 1), x.dtype)
        base = combine(node.correct, (base, x, *past, one))
        x = combine(node.predict, (base, *past, one))
        if node.noise is not None:
            x = x + node.noise[None] * draw(i)
        return (base, x, past), x if trajectory else None

    if tableau.start is not None:
        x = combine(tableau.start, (x, draw(START)))
        tableau = tableau._replace(start=None)
    past = (jnp.zeros_like(x),) * tableau.history
    rows = jnp.arange(len(tableau.t)), tableau
    if evaluations is None:
        step = jax.checkpoint(step) if unrolled else step
        (_, end, _), path = jax.lax.scan(step, (x, x, past), rows, unroll=unrolled)
        return path if trajectory else end
    row = lambda i: jax.tree.map(lambda table: table[i], rows)
    return jax.lax.fori_loop(0, evaluations, lambda i, carry: step(carry, row(i))[0], (x, x, past))[1]
