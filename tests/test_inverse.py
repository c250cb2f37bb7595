"""Inverse problems: exact for normal data, near the known posterior of a mixture, and true to what was measured."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import solvers
from score_sde import inverse
from score_sde import sde as sde_lib
from score_sde.errors import UserError
from score_sde.inverse import METHODS
from score_sde.mixture import Mixture
from solvers import tableau

SDE, SHAPE, V = sde_lib.VP(), (4, 4, 2), 0.2
MEANS, WEIGHTS = np.random.default_rng(0).uniform(-1, 1, (3, *SHAPE)), np.array([0.5, 0.3, 0.2])
MASK = (np.arange(4) < 2)[None, :, None, None]
MEASUREMENTS = {
    "inpainting": lambda: inverse.inpainting(MASK),
    "gray": lambda: inverse.gray(SHAPE),
    "block means": lambda: inverse.block_means(SHAPE, 2),
    "blur": lambda: inverse.blur(SHAPE, 0.5),
    "custom": lambda: inverse.operator(lambda x: x[:, ::2, 1:, 0] - 0.5 * x[:, 1::2, :-1, 1], SHAPE),
}


def matrix(measurement) -> np.ndarray:
    """A as (m, d), by its columns."""
    size = int(np.prod(SHAPE))
    return np.asarray(measurement.apply(jnp.eye(size).reshape(size, *SHAPE)), np.float64).reshape(size, -1).T


def posteriors(A, y, std):
    """Weight, mean and covariance of each component of the mixture given y = A x + std z."""
    found = []
    for weight, mean in zip(WEIGHTS, MEANS, strict=True):
        covariance = V * A @ A.T + std**2 * np.eye(len(A))
        missing, gain = y - A @ mean.ravel(), V * A.T @ np.linalg.inv(covariance)
        log_weight = np.log(weight) - 0.5 * missing @ np.linalg.solve(covariance, missing)
        found.append((log_weight, mean.ravel() + gain @ missing, V * (np.eye(A.shape[1]) - gain @ A)))
    log_weights, means, covariances = (np.array(column) for column in zip(*found, strict=True))
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum(), means, covariances


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_pigdm_is_exact_for_normal_data(name):
    """The noise of x_t given y: sigma (alpha^2 C + sigma^2)^-1 (x - alpha m), with m and C of x_0 given y.

    At a time where the network is differentiated, and at one where it is not.
    """
    measurement, std = MEASUREMENTS[name](), 0.3
    A, rng = matrix(measurement), np.random.default_rng(1)
    y = A @ MEANS[0].ravel() + rng.normal(size=len(A))
    normal = Mixture(np.ones(1), MEANS[:1], np.full((1, *SHAPE), V)).noise_fn(SDE)
    x = rng.normal(size=(3, *SHAPE)).astype(np.float32)
    shape = measurement.apply(jnp.asarray(x)).shape
    given = np.broadcast_to(np.float32(y), (3, len(y))).reshape(shape)
    bent = jax.jit(METHODS["pigdm"](normal, SDE, measurement, given, std=std, data_std=V**0.5))
    _, (mean, *_), (covariance, *_) = posteriors(A, y, std)
    for t in (jnp.float32(0.15), jnp.float32(0.5)):
        alpha, sigma = float(SDE.alpha(t)), float(SDE.sigma(t))
        offset = x.reshape(3, -1) - alpha * mean
        expected = sigma * np.linalg.solve(alpha**2 * covariance + sigma**2 * np.eye(len(mean)), offset.T).T
        np.testing.assert_allclose(np.asarray(bent(x, t)).reshape(3, -1), expected, atol=2e-4)


@functools.cache
def restored(method: str, std: float):
    """(samples (B, d) of the mixture given the means of blocks of one of its images, A, y)."""
    mixture, measurement, batch = Mixture(WEIGHTS, MEANS, np.full(MEANS.shape, V)), MEASUREMENTS["block means"](), 1000
    rng = np.random.default_rng(2)
    y = measurement.apply(mixture.draw(jax.random.key(5), 1)) + std * rng.normal(size=(1, 2, 2, 2)).astype(np.float32)
    exact = {} if method == "ddnm" else dict(derivative_below=30.0)
    y_of_all = jnp.repeat(y, batch, 0)
    bent = METHODS[method](mixture.noise_fn(SDE), SDE, measurement, y_of_all, std=std, data_std=V**0.5, **exact)
    x = jax.random.normal(jax.random.key(0), (batch, *SHAPE))
    table = jax.tree.map(jnp.float32, solvers.SOLVERS["dpmpp"](SDE, 20))
    x = jax.jit(lambda x: tableau.solve(bent, table, x))(x)
    return np.asarray(x).reshape(batch, -1), matrix(measurement), np.asarray(y).ravel()


@pytest.mark.parametrize("method", ["pigdm", "dps"])
def test_moments_of_the_posterior_of_a_mixture(method):
    """In 20 evaluations: near the known mean and covariance, from which those of the data are far."""
    x, A, y = restored(method, 0.1)
    weights, means, covariances = posteriors(A, y, 0.1)
    mean = weights @ means
    covariance = sum(
        w * (c + np.outer(m - mean, m - mean)) for w, m, c in zip(weights, means, covariances, strict=True)
    )
    far = np.abs(mean - np.tensordot(WEIGHTS, MEANS, 1).ravel()).max()
    assert np.abs(x.mean(0) - mean).max() < 0.25 * far
    assert np.abs(np.cov(x.T) - covariance).max() < 0.15


@pytest.mark.parametrize("method", METHODS)
def test_what_was_measured_without_noise_is_kept(method):
    x, A, y = restored(method, 0.0)
    assert np.sqrt(np.square(x @ A.T - y).mean()) < 0.03


def test_the_inverse_of_a_blur_and_of_a_custom_operator():
    """A^T (A A^T + c)^-1 by its definition."""
    for name in ("blur", "custom"):
        measurement = MEASUREMENTS[name]()
        A, c = matrix(measurement), 0.1
        x = jnp.asarray(np.random.default_rng(3).normal(size=(2, *SHAPE)), jnp.float32)
        residual = measurement.apply(x)
        ours = measurement.pull(residual, jnp.full(2, c)).reshape(2, -1)
        flat = np.asarray(residual).reshape(2, -1).T
        np.testing.assert_allclose(ours, (A.T @ np.linalg.solve(A @ A.T + c * np.eye(len(A)), flat)).T, atol=1e-4)


@pytest.mark.parametrize(
    ("apply", "words"),
    [
        (lambda x: x[:, :, :, :5] @ jnp.ones((7, 7)), "does not take images"),
        (lambda x: x.reshape(2, -1), "does not take images|mixes the images"),
        (lambda x: x.mean(), "expected float32"),
        (lambda x: x > 0, "expected float32"),
        (lambda x: x.astype(jnp.float16), "expected float32"),
        (lambda x: x[:, :0], "expected float32"),
        (lambda x: x / 0, "not finite"),
        (lambda x: x - x.mean(0, keepdims=True), "mixes the images"),
        (lambda x: jnp.abs(x) / jnp.abs(x).max(), "mixes the images"),
        (lambda x: jnp.where(x > 0, 1.0, -1.0), "does not change"),
        (lambda x: 0 * x, "does not change"),
    ],
)
def test_operators_that_do_not_fit(apply, words):
    with pytest.raises(UserError, match=words) as error:
        inverse.operator(apply, SHAPE)
    assert "\n" not in str(error.value)


def test_what_is_not_linear_is_for_dps_alone():
    measurement = inverse.operator(jnp.tanh, SHAPE)
    inverse.check_method("dps", measurement)
    with pytest.raises(UserError, match="--method=dps"):
        inverse.check_method("pigdm", measurement)


def test_factors_and_blurs_that_do_not_fit():
    for build, number in ((inverse.block_means, 3), (inverse.block_means, 1), (inverse.blur, 0.0), (inverse.blur, 9.0)):
        with pytest.raises(UserError, match="expected"):
            build(SHAPE, number)
