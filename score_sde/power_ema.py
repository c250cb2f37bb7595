"""Power-function averages of parameters, of any width after training (Karras et al. 2024, arXiv 2312.02696, sec. 3).

After T steps the average is sum_k w_k params_k with w_k proportional to (k / T)^gamma, in the limit of small steps:

    p(tau) = (gamma + 1) tau^gamma / T^(gamma + 1),    0 <= tau <= T.

Its width is the standard deviation of p over T. Any such profile is a combination of others, nearly: kept are the
averages of two widths at many steps, and of these `combination` makes the others, by least squares.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from score_sde.errors import UserError


class Profile(NamedTuple):
    """A power-function average: its exponent, and the number of steps it has seen."""

    gamma: float
    steps: float


def gamma_of(width: float) -> float:
    """The exponent of a relative width, (gamma + 1)^(1/2) (gamma + 2)^-1 (gamma + 3)^-(1/2).

    UserError unless 0 < width < 1 / sqrt(12), which is that of the plain mean of all steps.
    """
    if not 0 < width < 12**-0.5:
        raise UserError(
            f"a relative width of {width}: expected one between 0 and {12**-0.5:.3f}, the mean of all steps"
        )
    # width^2 (gamma + 2)^2 (gamma + 3) = gamma + 1, in g = gamma + 2: g^3 + g^2 - g / width^2 + 1 / width^2 = 0
    roots = np.roots([1.0, 1.0, -(width**-2), width**-2])
    return float(roots[np.abs(roots.imag) < 1e-9].real.max()) - 2.0


def update(average, params, step, gamma: float):
    """The average after `step` steps, () from 1 on, from that of the step before and the new parameters."""
    share = -jnp.expm1((gamma + 1.0) * jnp.log1p(-1.0 / step))  # 1 - (1 - 1 / step)^(gamma + 1), in float32 too
    return jax.tree.map(lambda old, new: old + share.astype(old.dtype) * (new - old), average, params)


def combination(profiles: Sequence[Profile], target: Profile) -> tuple[np.ndarray, float]:
    """The weights (N,) of these averages whose sum comes nearest to the target, and how far it stays, relatively.

    The distance is that of L2 between the profiles, over the norm of the target's; all inner products are known.
    """
    gram = _inner(profiles, profiles)
    right = _inner(profiles, [target])[:, 0]
    scale = np.sqrt(np.diag(gram))  # for the sake of conditioning
    weights = np.linalg.lstsq(gram / np.outer(scale, scale), right / scale, rcond=1e-14)[0] / scale
    norm = _inner([target], [target])[0, 0]
    missing = max(0.0, norm - 2 * weights @ right + weights @ gram @ weights)
    return weights, float(np.sqrt(missing / norm))


def _inner(one: Sequence[Profile], other: Sequence[Profile]) -> np.ndarray:
    """(len(one), len(other)): the integrals of products of profiles."""
    gamma, steps = (np.array(values)[:, None] for values in zip(*one, strict=True))
    gammas, steps_other = (np.array(values)[None, :] for values in zip(*other, strict=True))
    shorter = np.minimum(steps, steps_other)
    powers = (shorter / steps) ** gamma * (shorter / steps_other) ** gammas
    return (gamma + 1) * (gammas + 1) / (gamma + gammas + 1) * shorter / (steps * steps_other) * powers
