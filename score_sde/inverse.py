"""Inverse problems: a NoiseFn bent towards the images whose measurement is y = A x_0 + std z, for any solver.

    noise = pigdm(noise, sde, block_means((32, 32, 3), 4), y, data_std=0.5)

Each of METHODS takes a NoiseFn and returns one, at no further evaluation of the network. In all of them x_0 given x_t
is taken as normal around the data prediction, with the variance that normal data of standard deviation d have there,
r^2 = d^2 sigma^2 / (alpha^2 d^2 + sigma^2) (Song et al. 2023, "Pseudoinverse-guided diffusion models for inverse
problems", with d = 1).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from score_sde.denoiser import NoiseFn
from score_sde.errors import UserError, one_line
from score_sde.sde import SDE, per_image

LOST = 0.03  # a blur's singular values below this are taken as zero
CG_STEPS = 64
DERIVATIVE_BELOW = 2.0  # sigma / alpha in standard deviations of the data; see `_bent`


class Measurement(NamedTuple):
    """What is measured of an image: the operator A, and if it is linear its regularized inverse."""

    apply: Callable  # A: x (B, H, W, C) -> y (B, ...), each of its own image alone
    pull: Callable | None = None  # (residual (B, ...), c (B,)) -> A^T (A A^T + c)^-1 residual; None: not linear


# ------------------------------------------------------------------------------------------------ measurements


def inpainting(mask) -> Measurement:
    """The pixels under `mask` (1, H, W, 1 or C), zeros elsewhere."""
    known = jnp.asarray(mask, jnp.float32)
    return Measurement(lambda x: known * x, lambda residual, c: known * residual / (1 + per_image(c, residual)))


def gray(shape: tuple[int, int, int]) -> Measurement:
    """The mean over channels (B, H, W, 1), of images of `shape` (H, W, C)."""
    channels = shape[-1]
    pull = lambda residual, c: jnp.repeat(residual, channels, -1) / (1 + channels * per_image(c, residual))
    return Measurement(lambda x: x.mean(-1, keepdims=True), pull)


def block_means(shape: tuple[int, int, int], factor: int) -> Measurement:
    """The means of blocks of factor x factor pixels: an image of so much lower resolution."""
    height, width, channels = shape
    if factor < 2 or height % factor or width % factor:
        raise UserError(f"a factor of {factor} for images of {height}x{width}: expected one above 1 that divides both")

    def apply(x):
        return x.reshape(-1, height // factor, factor, width // factor, factor, channels).mean((2, 4))

    def pull(residual, c):
        residual = residual / (1 + factor**2 * per_image(c, residual))
        return jnp.repeat(jnp.repeat(residual, factor, 1), factor, 2)

    return Measurement(apply, pull)


def blur(shape: tuple[int, int, int], std: float) -> Measurement:
    """The image under a Gaussian of standard deviation `std` pixels, whose weights within the image have the sum 1."""
    if not 0 < std < max(shape[:2]):
        raise UserError(f"a blur of {std:g} pixels: expected a positive one below {max(shape[:2])}")

    def parts(n):
        kernel = np.exp(-0.5 * ((np.arange(n)[:, None] - np.arange(n)) / std) ** 2)
        kernel /= kernel.sum(1, keepdims=True)
        return [jnp.asarray(part, jnp.float32) for part in (kernel, *np.linalg.svd(kernel))]

    (down, u_down, s_down, v_down), (across, u_across, s_across, v_across) = (parts(n) for n in shape[:2])
    s = jnp.outer(s_down, s_across)[None, :, :, None]
    both = lambda left, right, x: jnp.einsum("ij,bjkc,lk->bilc", left, x, right)

    def pull(residual, c):
        weights = jnp.where(s > LOST, s / (s**2 + per_image(c, residual)), 0.0)
        return both(v_down.T, v_across.T, weights * both(u_down.T, u_across.T, residual))

    return Measurement(lambda x: both(down, across, x), pull)


def operator(apply: Callable, shape: tuple[int, int, int]) -> Measurement:
    """Anyone's A, x (B, H, W, C) -> y (B, ...), jittable; if it is linear, its inverse by conjugate gradients.

    UserError for one that does not take images of `shape`, mixes those of a batch, returns anything but float32 for
    each, or has no derivative.
    """
    one, two = np.random.default_rng(0).normal(size=(2, 2, *shape)).astype(np.float32)
    try:
        y = jax.eval_shape(apply, jax.ShapeDtypeStruct((2, *shape), jnp.float32))
        given = (one, two, 2 * one + two, one[:1], one[1:])
        of_one, of_two, of_both, *alone = (np.asarray(apply(jnp.asarray(x))) for x in given)
    except Exception as error:  # it is anyone's code
        raise UserError(f"the operator does not take images (B, {shape}): {one_line(error)}") from None
    if y.shape[:1] != (2,) or y.dtype != jnp.float32 or not of_one.size:
        raise UserError(f"the operator makes {y.dtype} {y.shape} of 2 images {shape}: expected float32 (2, ...)")
    if not np.isfinite(of_both).all():
        raise UserError("the operator makes what is not finite of normal images: expected finite values")
    if any(y.shape != of_one[:1].shape for y in alone) or not np.allclose(
        np.concatenate(alone), of_one, rtol=1e-3, atol=1e-4
    ):
        raise UserError("the operator mixes the images of a batch: expected y of each image alone")
    try:
        slope = jax.vjp(apply, jnp.asarray(one))[1](jnp.ones(of_one.shape, jnp.float32))[0]
    except Exception as error:
        raise UserError(f"the operator has no derivative: {one_line(error)}") from None
    if not np.asarray(slope).any():
        raise UserError("the operator does not change with the image: expected one that has a derivative")
    if not np.allclose(2 * of_one + of_two, of_both, rtol=1e-3, atol=1e-3 * max(np.abs(of_both).max(), 1e-6)):
        return Measurement(apply)

    def pull_one(residual, c):
        forward = lambda x: apply(x[None])[0]
        back = jax.linear_transpose(forward, jax.ShapeDtypeStruct(shape, residual.dtype))
        square = lambda v: forward(back(v)[0]) + c * v
        return back(jax.scipy.sparse.linalg.cg(square, residual, maxiter=CG_STEPS)[0])[0]

    return Measurement(apply, lambda residual, c: jax.vmap(pull_one)(residual, jnp.broadcast_to(c, len(residual))))


# ------------------------------------------------------------------------------------------------ methods


def ddnm(noise: NoiseFn, sde: SDE, measurement: Measurement, y, *, std: float = 0.0, data_std: float = 0.5) -> NoiseFn:
    """The data prediction put right: x0 + A^T (A A^T + std^2 / r^2)^-1 (y - A x0), without a derivative.

    With std = 0 the measurement holds exactly (Wang et al. 2022, 2212.00490, eq. 13); otherwise this is the mean of x_0
    given y where x_0 has mean x0 and variance r^2.
    """
    pulled = lambda x0, variance: _pulled(measurement, y, x0, variance, std)
    return _bent(noise, sde, data_std, pulled, derivative_below=0.0)


def pigdm(
    noise: NoiseFn,
    sde: SDE,
    measurement: Measurement,
    y,
    *,
    std: float = 0.0,
    data_std: float = 0.5,
    derivative_below: float = DERIVATIVE_BELOW,
) -> NoiseFn:
    """eps - sigma (d x0 / d x)^T A^T (r^2 A A^T + std^2)^-1 (y - A x0) (Song et al. 2023, eq. 7).

    Exact for normal data of one variance, whatever A is.
    """
    pulled = lambda x0, variance: _pulled(measurement, y, x0, variance, std)
    return _bent(noise, sde, data_std, pulled, derivative_below)


def dps(
    noise: NoiseFn,
    sde: SDE,
    measurement: Measurement,
    y,
    *,
    std: float = 0.0,
    data_std: float = 0.5,
    derivative_below: float = DERIVATIVE_BELOW,
) -> NoiseFn:
    """eps + sigma d/dx |y - A x0|^2 / (2 v), for any differentiable A (Chung et al. 2022, 2209.14687, eq. 11).

    The paper replaces 1 / v by a step size for each task; here v = std^2 + r^2 k, where k is the mean square by which A
    stretches one random direction at x0, so that nothing is to be tuned and no solver's step is presumed.
    """

    def descent(x0, variance):
        direction = jax.random.normal(jax.random.key(0), x0.shape[1:], x0.dtype)
        predicted, stretched = jax.jvp(measurement.apply, (x0,), (jnp.broadcast_to(direction, x0.shape),))
        _, back = jax.vjp(measurement.apply, x0)
        k = jnp.square(stretched).reshape(len(x0), -1).mean(1)
        return back((y - predicted) / per_image(std**2 + variance * k, predicted))[0]

    return _bent(noise, sde, data_std, descent, derivative_below)


METHODS = {"pigdm": pigdm, "dps": dps, "ddnm": ddnm}


def _pulled(measurement: Measurement, y, x0, variance, std: float):
    """d log p(y | x_0) / d x_0 at the mean x0 of that variance (B,): A^T (r^2 A A^T + std^2)^-1 (y - A x0)."""
    return measurement.pull(y - measurement.apply(x0), std**2 / variance) / per_image(variance, x0)


def _bent(noise: NoiseFn, sde: SDE, data_std: float, slope: Callable, derivative_below: float) -> NoiseFn:
    """The NoiseFn whose data prediction is x0 + (sigma^2 / alpha) (d x0 / d x)^T slope, or x0 + r^2 slope.

    slope: (x0, r^2 (B,)) -> (B, H, W, C), of log p(y | x_0). For normal data the two are the same. The first is taken
    where sigma / alpha is below so many standard deviations of the data: above, its factor makes much of a network's
    errors in a derivative that is next to nothing. Exact noise allows any bound, and 0 costs no derivative at all.
    """

    def bent(x, t):
        times = jnp.broadcast_to(t, x.shape[:1])
        alpha, sigma = sde.alpha(times), sde.sigma(times)
        variance = (data_std * sigma) ** 2 / ((alpha * data_std) ** 2 + sigma**2)

        def predict(x):
            eps = noise(x, t)
            return (x - per_image(sigma, x) * eps) / per_image(alpha, x), eps

        if derivative_below:
            x0, back, eps = jax.vjp(predict, x, has_aux=True)
        else:
            x0, eps = predict(x)
        towards = slope(x0, variance)
        shift = per_image(variance, x) * towards
        if derivative_below:
            exact = per_image(sigma**2 / alpha, x) * back(towards)[0]
            shift = jnp.where(per_image(sigma / alpha < derivative_below * data_std, x), exact, shift)
        return eps - per_image(alpha / sigma, x) * shift

    return bent


def check_method(method: str, measurement: Measurement):
    """Refuse a method that needs the inverse of an operator that has none."""
    if measurement.pull is None and method != "dps":
        raise UserError(f"the operator is not linear, as {method} needs it: --method=dps takes any")
