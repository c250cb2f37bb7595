"""Every deterministic few-step solver is a table of coefficients; this is the one loop that runs them all.

At evaluation i the network is called once, at (x_i, t_i), and enters through

    f_i = (sigma_i eps_i - l_i x_i) / alpha_i,

where l, per node and pixel, is the parameterization: 0 is noise prediction, 1 is minus data prediction, EMS make it
DPM-Solver-v3 (Zheng et al. 2023, eq. 5). Every solver then does, with its own numbers,

    base_i  = correct[i, 0] base_(i-1) + correct[i, 1] x_i + sum_k correct[i, 2 + k] f_(i-k) + correct[i, -1]
    x_(i+1) = predict[i, 0] base_i                         + sum_k predict[i, 1 + k] f_(i-k) + predict[i, -1].

`base` is the state on the solution path; x is the point the network is asked at. Without a corrector base_i = x_i;
inside a singlestep solver's step base_i = base_(i-1). A corrector changes base and leaves f as it is.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from score_sde.denoiser import NoiseFn


class Tableau(NamedTuple):
    """A solver for n evaluations with a history of K values of f; built in float64 on the host.

    Trailing axes P are (1, 1, 1) for coefficients that all pixels share, (H, W, C) for coefficients per pixel.
    """

    t: np.ndarray  # (n,) where the network is evaluated
    alpha: np.ndarray  # (n,)
    sigma: np.ndarray  # (n,)
    l: np.ndarray  # (n, *P)
    correct: np.ndarray  # (n, K + 3, *P): of base, x, f_i, ..., f_(i-K+1), 1
    predict: np.ndarray  # (n, K + 2, *P): of base, f_i, ..., f_(i-K+1), 1

    @property
    def history(self) -> int:
        return self.predict.shape[1] - 2


def empty(sde, times, history: int, l) -> Tableau:
    """A tableau for evaluations at times[:-1], without corrector and with predictors still zero.

    times: (n + 1,) float64, from the prior to the end of sampling; l: (n, *P).
    """
    t = np.asarray(times, np.float64)[:-1]
    correct = np.zeros((len(t), history + 3, *l.shape[1:]))
    correct[:, 1] = 1.0
    return Tableau(t, sde.alpha(t), sde.sigma(t), l, correct, np.zeros((len(t), history + 2, *l.shape[1:])))


def uniform(tableau: Tableau, history: int, shape: tuple[int, ...]) -> Tableau:
    """The same solver with its history padded by zeros and its coefficients spread over images of `shape` (H, W, C).

    Tableaux made uniform, of equal length, share one compiled `solve`.
    """
    padding = np.zeros((len(tableau.t), history - tableau.history, *tableau.l.shape[1:]))
    pad = lambda table: np.concatenate([table[:, :-1], padding, table[:, -1:]], axis=1)
    spread = lambda table: np.broadcast_to(table, table.shape[: table.ndim - 3] + tuple(shape))
    return tableau._replace(
        l=spread(tableau.l), correct=spread(pad(tableau.correct)), predict=spread(pad(tableau.predict))
    )


def solve(noise: NoiseFn, tableau: Tableau, x):
    """Integrate from x (B, H, W, C) at the tableau's first time to its end: (B, H, W, C) after len(t) evaluations.

    Pure and jittable, with the tableau as an argument: another solver of the same shape does not recompile.
    """
    tableau = jax.tree.map(lambda table: jnp.asarray(table, x.dtype), tableau)
    combine = lambda weights, values: sum(w[None] * v for w, v in zip(weights, values, strict=True))

    def step(carry, node):
        base, x, past = carry
        f = (node.sigma * noise(x, node.t) - node.l[None] * x) / node.alpha
        past = (f, *past[:-1])
        one = jnp.ones((1, 1, 1, 1), x.dtype)
        base = combine(node.correct, (base, x, *past, one))
        return (base, combine(node.predict, (base, *past, one)), past), None

    past = (jnp.zeros_like(x),) * tableau.history
    (_, x, _), _ = jax.lax.scan(step, (x, x, past), tableau)
    return x
