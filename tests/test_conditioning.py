"""Controllable generation: equal to the published runs draw by draw, and to exact conditional distributions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from score_sde import guidance, losses
from score_sde import sde as sde_lib
from score_sde.denoiser import score_fn
from score_sde.errors import UserError
from score_sde.models.classifier import WideResnet, logits_fn
from solvers import conditioning
from solvers import predictor_corrector as pc
from tests import reference
from tests.mixture import Mixture
from tests.optimized import optimized_jit
from tests.test_predictor_corrector import CORRECTORS, PREDICTORS, options_of, sde_of
from tests.test_published_models import classifier_case

GRAY = np.full((1, 1, 1, 3), 3**-0.5)  # the first axis of the published orthogonal transform


def worst(ours, theirs) -> float:
    """Largest error, relative to the largest value."""
    return float(np.abs(np.asarray(ours) - theirs).max() / max(np.abs(theirs).max(), 1e-30))


# -- Inpainting and colorization as published --


def known_part(x, values, mask):
    """x with its known part from `values`: pixels under the mask, or the gray axis if there is no mask."""
    if mask is None:
        return x + GRAY * ((values - x) * GRAY).sum(-1, keepdims=True)
    return np.where(mask > 0, values, x)


@pytest.mark.parametrize("case", reference.cases("D_controllable"))
def test_published_inpainting_and_colorization(case, x64):
    """With the published end: what is unknown keeps the last step's noise, what is known is its mean if denoised."""
    info, stored = reference.cases("D_controllable")[case], reference.arrays("D_controllable")
    array = lambda key: reference.nhwc(stored[f"{case}/{key}"]).astype(np.float64)
    sde, _ = sde_of(info)
    draws = jnp.asarray(array("noise"))
    prior = np.asarray(draws[0]) * sde.prior_std
    if case.startswith("inpaint"):
        known, mask = array("data"), array("mask")
        condition, start = conditioning.inpainting(sde, known, mask), known_part(prior, known, mask)
    else:
        known, mask = array("gray"), None
        # the published start: a prior whose first channel is zero, and the gray image on top
        condition, start = conditioning.colorization(sde, known), known + prior * [0.0, 1.0, 1.0]
    out = jax.jit(
        lambda draws, x: pc.sample(
            Mixture.reference().noise_fn(sde),
            sde,
            x,
            lambda i: draws[1 + i],
            **options_of(info),
            condition=condition,
            denoise=False,
        )
    )(draws, start)
    if info["denoise"]:
        out = known_part(np.asarray(out), sde.alpha(np.float64(info["eps"])) * known, mask)
    # of VE the stored float32 runs lose 4e-5 in sigma_i^2 - sigma_(i-1)^2
    assert worst(out, array("x")) < (5e-5 if "_ve_" in case else 1e-5)


# -- Exact conditional distributions --


def gaussian(shape, seed: int):
    """Mean and covariance of Gaussian images whose pixels and channels depend on each other, flattened."""
    size = int(np.prod(shape))
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(size, size)) / np.sqrt(size)
    covariance = 0.1 * (factor @ factor.T + 0.5 * np.eye(size))
    return 0.3 * rng.normal(size=size).astype(np.float32), covariance.astype(np.float32)


def noise_of_gaussian(sde, mean, covariance):
    """The exact NoiseFn of Gaussian images."""
    values, vectors = (jnp.asarray(part) for part in np.linalg.eigh(covariance))

    def noise(x, t):
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        offset = (x.reshape(len(x), -1) - alpha * mean[None]) @ vectors
        return (sigma * (offset / (alpha**2 * values + sigma**2)[None]) @ vectors.T).reshape(x.shape)

    return noise


def conditional(mean, covariance, matrix, y, variance=0.0):
    """Mean and covariance of x given y = matrix x + noise of that variance."""
    gain = covariance @ matrix.T @ np.linalg.inv(matrix @ covariance @ matrix.T + variance * np.eye(len(matrix)))
    return mean + gain @ (y - matrix @ mean), covariance - gain @ matrix @ covariance


B = 1000


def drawn(sde, shape, gaussian_data, condition, **options):
    """B samples under a condition, flattened."""
    keys = jax.random.split(jax.random.key(0), B)
    x = sde.prior_std * jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 10**6), shape))(keys)
    draw, noise = pc.noise_of_keys(keys, shape), noise_of_gaussian(sde, *gaussian_data)
    run = optimized_jit(lambda x: pc.sample(noise, sde, x, draw, condition=condition, **options))
    return np.asarray(run(x)).reshape(B, -1)


# Putting known pixels back is exact where noise is small, not at large noise: samples must not stay as they came from
# there, so corrector steps are many and large, with known pixels put back after each.
THOROUGH = dict(n=3000, corrector="ald", snr=0.4)
VE = sde_lib.VE(sigma_min=0.05, sigma_max=5.0)


@pytest.mark.parametrize(
    "sde", [sde_lib.VP(t_min=0.015), sde_lib.SubVP(t_min=0.06), VE], ids=lambda sde: type(sde).__name__
)
def test_completions_have_the_conditional_distribution(sde):
    """Inpainting Gaussian images: the mean and covariance of the unknown pixels given the known ones."""
    shape = (2, 2, 1)
    data = gaussian(shape, seed=0)
    known = np.float32([0.7, 0.0, 0.0, -0.9])
    mask = np.float32([1, 0, 0, 1]).reshape(1, *shape)
    condition = conditioning.inpainting(sde, jnp.broadcast_to(known.reshape(1, *shape), (B, *shape)), mask)
    x = drawn(sde, shape, data, condition, **THOROUGH)
    mean, covariance = conditional(*data, np.eye(4)[[0, 3]], known[[0, 3]])
    np.testing.assert_allclose(x[:, [0, 3]], np.tile(known[[0, 3]], (B, 1)) * sde.alpha(sde.t_min), atol=1e-5)
    np.testing.assert_allclose(x.mean(0), mean, atol=0.05)
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=0.03)
    assert np.abs(mean - data[0])[[1, 2]].max() > 0.15  # the known pixels do tell of the others


def test_colours_have_the_conditional_distribution_and_the_gray_of_the_image():
    sde, shape = VE, (1, 2, 3)
    data = gaussian(shape, seed=1)
    gray = np.float32([[0.5] * 3, [-0.3] * 3]).reshape(1, *shape)
    condition = conditioning.colorization(sde, jnp.broadcast_to(gray, (B, *shape)))
    x = drawn(sde, shape, data, condition, **THOROUGH)
    matrix = np.kron(np.eye(2), np.full((1, 3), 1 / 3))
    mean, covariance = conditional(*data, matrix, np.array([0.5, -0.3]))
    np.testing.assert_allclose(x @ matrix.T, np.tile([0.5, -0.3], (B, 1)), atol=1e-5)
    np.testing.assert_allclose(x.mean(0), mean, atol=0.05)
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=0.03)


def test_unknown_pixels_end_without_the_noise_of_the_last_step():
    """VE in few steps leaves much noise: the smallest sigma times the square root of two shows in the published."""
    sde, shape = sde_lib.VE(sigma_min=0.3, sigma_max=10.0), (2, 2, 1)
    data = (np.zeros(4, np.float32), np.float32(1e-4) * np.eye(4, dtype=np.float32))
    known = jnp.zeros((B, *shape))
    mask = np.float32([1, 0, 0, 1]).reshape(1, *shape)
    condition = conditioning.inpainting(sde, known, mask)
    spread = {d: drawn(sde, shape, data, condition, n=100, corrector="none", denoise=d)[:, 1].std() for d in (0, 1)}
    assert spread[0] > 0.25
    assert spread[1] < 0.05


def test_an_inverse_problem_has_its_posterior():
    """y = A x + noise for Gaussian images: samples have the posterior's mean and covariance."""
    sde, shape, variance = VE, (2, 2, 1), 0.05
    data = gaussian(shape, seed=2)
    matrix = np.float32([[0.5, 0.5, 0.0, 0.0], [0.0, 1.0, -1.0, 0.5]])
    y = np.float32([0.8, -0.5])
    measure = lambda x: x.reshape(len(x), -1) @ matrix.T

    def measured_at(t, z):
        return sde.alpha(t) * y[None] + sde.sigma(t) * measure(z)

    def log_likelihood(y_t, x, t):
        return -0.5 * jnp.square(y_t - measure(x)).sum(1) / (variance + 2 * sde.sigma(t) ** 2)

    condition = conditioning.inverse_problem(measured_at, log_likelihood)
    x = drawn(sde, shape, data, condition, **THOROUGH)
    mean, covariance = conditional(*data, matrix.astype(np.float64), y, variance)
    np.testing.assert_allclose(x.mean(0), mean, atol=0.05)
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=0.03)
    assert np.abs(mean - data[0]).max() > 0.15


def test_masks_and_images_that_do_not_fit():
    sde, gray = sde_lib.VP(), jnp.zeros((2, 8, 8, 1))
    with pytest.raises(UserError, match=r"\(8, 9, 1\) does not fit .*\(8, 8, 1\)"):
        conditioning.inpainting(sde, gray, np.ones((1, 8, 9, 1)))
    with pytest.raises(UserError, match="does not fit"):
        conditioning.inpainting(sde, gray, np.ones((1, 8, 8, 3)))
    with pytest.raises(UserError, match="colour"):
        conditioning.colorization(sde, gray)


# -- Class-conditional sampling as published --


@functools.cache
def classifier_params():
    """The synthetic weights of the published reduced classifier; its parameters do not depend on the image size."""
    return classifier_case("reduced")[1]


@functools.cache
def guided(kind: str, sde):
    """Jitted functions of (x, t, labels): the logits of a published classifier, and the mixture's guided noise."""
    mixture = Mixture.reference()

    def logits(x, t, labels):
        if kind == "analytic":
            return mixture._components(x, sde.alpha(t), sde.sigma(t), None)[0]
        classifier = WideResnet(1, 2, 10, dtype=x.dtype.name)
        return logits_fn(lambda x, sigma: classifier.apply({"params": classifier_params()}, x, sigma), sde)(x, t)

    def noise(x, t, labels):
        log_probability = losses.log_probability(lambda x, t: logits(x, t, labels), labels)
        return guidance.classifier_guidance(mixture.noise_fn(sde), sde, log_probability)(x, t)

    jit = optimized_jit if kind == "analytic" else jax.jit
    return jit(logits), jit(noise)


def conditional_case(case: str, dtype):
    info, stored = reference.cases("W_cond")[case], reference.arrays("W_cond")
    suffix = "_f64" if dtype == jnp.float64 else ""
    raw = lambda key: stored[f"{case}/{key}"]
    return info, raw, lambda key: raw(key + suffix)


TOLERANCES = {"analytic": {jnp.float64: 1e-11, jnp.float32: 2e-5}, "wrn": {jnp.float64: 1e-8, jnp.float32: 2e-5}}


def conditional_cases(prefix):
    return [case for case in reference.cases("W_cond") if case.startswith(prefix)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", conditional_cases("in_"))
def test_published_guided_scores(case, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        info, raw, expected = conditional_case(case, dtype)
        sde, _ = sde_of(info)
        x, t, labels = jnp.asarray(raw("x"), dtype), jnp.asarray(raw("t"), dtype), jnp.asarray(raw("labels"))
        logits, noise = guided(info["classifier"], sde)
        single = dtype == jnp.float32
        total = score_fn(lambda x, t: noise(x, t, labels), sde)(x, t)
        gradient = total - score_fn(Mixture.reference().noise_fn(sde), sde)(x, t)
        assert worst(logits(x, t, labels), expected("logits")) < (5e-5 if single else 1e-10)
        assert worst(jax.nn.log_softmax(logits(x, t, labels)), expected("logp")) < (1e-4 if single else 1e-10)
        assert worst(gradient, expected("classifier_grad")) < (2e-2 if single else 1e-9)
        assert worst(total, expected("total")) < TOLERANCES[info["classifier"]][dtype]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", conditional_cases("upd_"))
def test_published_guided_updates(case, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        info, raw, expected = conditional_case(case, dtype)
        inputs = reference.arrays("W_cond")
        x, t = (jnp.asarray(inputs[f"{info['inputs']}/{key}"], dtype) for key in ("x", "t"))
        labels = inputs[f"{info['inputs']}/labels"]
        sde, n = sde_of(info)
        _, noise = guided(info["classifier"], sde)
        score = score_fn(lambda x, t: noise(x, t, jnp.asarray(labels)), sde)
        draws = jnp.asarray(raw("noise"), dtype) if "noise" in info["arrays"] else jnp.zeros((1, *x.shape), dtype)
        if info["kind"] == "predictor":
            predict = pc.PREDICTORS[PREDICTORS[info["predictor"]]]
            update = predict(sde, score, x, t, draws[0], n=n, probability_flow=info["probability_flow"])
        else:
            update = pc.Update(x, x)
            for z in draws:
                update = pc.CORRECTORS[CORRECTORS[info["corrector"]]](sde, score, update.x, t, z, n=n, snr=info["snr"])
        tolerance = TOLERANCES[info["classifier"]][dtype]
        assert worst(update.x, expected("x_new")) < tolerance
        assert worst(update.mean, expected("x_mean")) < tolerance


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", conditional_cases("pc_"))
def test_published_guided_runs(case, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        info, raw, expected = conditional_case(case, dtype)
        sde, n = sde_of(info)
        draws = jnp.asarray(raw("noise"), dtype)
        _, noise = guided(info["classifier"], sde)
        labels = jnp.asarray(raw("labels"))
        step = pc.stepper(
            lambda x, t: noise(x, t, labels),
            sde,
            lambda i: draws[1 + i],
            **options_of(info),
        )
        update = pc.Update(draws[0] * sde.prior_std, draws[0])
        for k in range(n):  # on the host: what was compiled serves every case
            update = step(k, update)
        tolerance = (
            2e-3 if info["classifier"] == "wrn" and dtype == jnp.float32 else TOLERANCES[info["classifier"]][dtype]
        )
        assert worst(update.x, expected("x_final")) < tolerance
        assert worst(update.mean, expected("x_mean_final")) < tolerance
