"""A published network, measured and sampled: EMS, DPM-Solver-v3, DPM-Solver++ and predictor-corrector runs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ems import estimate, statistics
from score_sde import denoiser
from score_sde import sde as sde_lib
from score_sde.models.published import from_torch
from score_sde.sde import per_image
from solvers import predictor_corrector
from tests import reference
from tests.optimized import optimized_jit
from tests.test_models import build, case
from tests.test_predictor_corrector import options_of, sde_of
from tests.test_solvers import end_points, published_v3, worst

SDE = sde_lib.VP()


def network(name: str, dtype: str):
    """(config, apply: (x, label) -> out) of a reduced published network, in float32 or float64."""
    module, state, x = case("A_reduced", name)
    params = jax.tree.map(lambda w: jnp.asarray(w, dtype), from_torch(state, module, x.shape[1:]))
    config = reference.cases("A_reduced")[name]["config"]
    module = build(config, dtype=dtype)
    return config, lambda x, label: module.apply({"params": params}, x, label)


def tame_noise():
    """The NoiseFn of group `net` of the figures: eps = sigma x + 0.1 network(x, 10 t), in float64."""
    _, apply = network("vp_ddpmpp", "float64")

    def noise(x, t):
        t = jnp.broadcast_to(t, x.shape[:1])
        return per_image(SDE.sigma(t), x) * x + 0.1 * apply(x, 10 * t)

    return noise


@pytest.mark.slow
def test_published_statistics_of_a_network(x64):
    stored = reference.arrays("E_ems_net")
    nodes = estimate.nodes_at(SDE, stored["ems/timesteps_f64"], stored["ems/lambdas_f64"])
    shape = (16, 3, 16, 16)
    x0 = reference.nhwc(np.tanh(reference.normal("E/net/x0/0", shape))).astype(np.float64)
    run, rows = optimized_jit(functools.partial(estimate.batch_moments, tame_noise())), []
    for j in range(len(nodes.t)):
        v = reference.nhwc(reference.rng(f"E/net/v/{j}/0").integers(0, 2, size=shape) * 2.0 - 1)
        zl, zf = (reference.nhwc(reference.normal(f"E/net/{z}/{j}/0", shape)).astype(np.float64) for z in ("zl", "zf"))
        node = jax.tree.map(lambda values: values[j], nodes)
        of_l, of_f = run(node, x0, zl, v), run(node, x0, zf, v)
        rows.append(of_f._replace(w=of_l.w))
    moments = estimate.Moments(*(np.stack(parts) for parts in zip(*rows, strict=True)))
    ems = estimate.statistics(nodes, moments, {})
    for key in "lsb":
        theirs = reference.nhwc(stored[f"ems/{key}_f64"])
        np.testing.assert_allclose(getattr(ems, key), theirs, atol=1e-6 * np.abs(theirs).max(), err_msg=key)


@pytest.mark.slow
def test_published_few_step_samples_of_a_network(x64):
    """DPM-Solver-v3 with the network's published statistics, in float64."""
    ems_file, v3 = (reference.arrays(name) for name in ("E_ems_net", "E_v3_net"))
    ems = statistics.from_published(
        *(ems_file[f"ems/{key}_f64"] for key in "lsb"), SDE, t_start=1.0, t_end=1e-3, origin={}
    )
    ems = ems._replace(t=ems_file["ems/timesteps_f64"], lam=ems_file["ems/lambdas_f64"])
    x = jnp.asarray(reference.nhwc(v3["x_T"]), jnp.float64)
    rows = zip(reference.rows("E_v3_net"), v3["indexes_f64"], strict=True)
    tables = [published_v3(SDE, ems, row, indices) for row, indices in rows]
    for ours, theirs in zip(end_points(tame_noise(), tables, x), reference.nhwc(v3["x0_f64"]), strict=True):
        assert worst(ours, theirs) < 1e-9


@pytest.mark.parametrize("name", [c for c in reference.cases("D_pc") if c.startswith("net_")])
def test_published_predictor_corrector_runs_of_a_network(name):
    info, stored = reference.cases("D_pc")[name], reference.arrays("D_pc")
    ve = info["sde"][0] == "VESDE"
    _, apply = network(re.match("net_(.*)_[a-z]+_[a-z]+$", name)[1], "float32")
    sde, _ = sde_of(info)
    told = dict(output="scaled_score", label="sigma", data_range=(0.0, 1.0)) if ve else dict(output="eps", label="time")
    noise = denoiser.noise_fn(apply, sde, **told)
    draws = jnp.asarray(reference.nhwc(stored[f"{name}/noise"]))
    out = jax.jit(
        lambda draws: predictor_corrector.sample(
            noise,
            sde,
            draws[0] * sde.prior_std,
            lambda i: draws[1 + i],
            **options_of(info),
        )
    )(draws)
    theirs = reference.nhwc(stored[f"{name}/x_mean_final"])
    assert worst(out, theirs) < 2e-4  # float32 through n network evaluations
