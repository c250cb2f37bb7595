"""What figures are made of is multiplied in full precision, whatever a device takes for float32 if not told."""

import re

import jax
import numpy as np
import pytest

from ems import estimate
from score_sde import parallel
from score_sde import sde as sde_lib
from score_sde.metrics import features
from solvers import probability_flow

SDE = sde_lib.VP()
NODES = estimate.nodes(SDE, 2)
WEIGHT = np.eye(3, dtype=np.float32) / 2
X = np.zeros((2, 4, 4, 3), np.float32)
HIGHEST = "(Precision.HIGHEST, Precision.HIGHEST)"
TOLERANCES = dict(rtol=1e-3, atol=1e-3)


def noise(x, t):
    return x @ WEIGHT


def precisions(function, x) -> set[str]:
    """The precision of all products in the program, where the default is that of a TPU."""
    with jax.default_matmul_precision("bfloat16"):
        return set(re.findall(r"\bprecision=(.*)", str(jax.make_jaxpr(function)(x))))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: probability_flow.solve(noise, SDE, x, denoise=1000, **TOLERANCES),
        lambda x: probability_flow.log_likelihood(noise, SDE, x, x[None], **TOLERANCES),
        lambda x: estimate.measure(noise, NODES, np.arange(3), jax.random.key(0), x, np.arange(2)),
    ],
    ids=["ode", "likelihood", "ems"],
)
def test_all_products(function):
    """The derivatives' and the integrator's own, too."""
    assert precisions(function, X) == {HIGHEST}


def test_a_network_alone_keeps_the_default():
    assert precisions(lambda x: noise(x, 1.0), X) == {"(Precision.DEFAULT, Precision.DEFAULT)"}
    assert precisions(lambda x: parallel.full_precision(noise)(x, t=1.0), X) == {HIGHEST}


def test_features():
    seen = []

    def apply(params, images):
        seen.append(jax.config.jax_default_matmul_precision)
        return images.reshape(len(images), -1).astype(np.float32), images[:, 0, 0].astype(np.float32)

    network = features.FeatureNetwork("toy", "FD-toy", "0", "none", 3, 48, {}, apply)
    with jax.default_matmul_precision("bfloat16"):
        for _ in range(2):
            next(features.extract(network, [X.astype(np.uint8)]))
    assert seen == ["highest"]  # traced once, however often its features are asked for
