"""A classifier guides a conditional network (ADM-G) with DPM-Solver-v3: equal to its published code, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ems.statistics import EMS
from score_sde.denoiser import noise_fn
from score_sde.guidance import classifier_guidance
from score_sde.models.classifier import labelled_logits_fn
from score_sde.models.published_unets import from_edm, from_guided_diffusion
from score_sde.sde import EDM, DiscreteVP, per_image
from solvers import dpm_solver, dpm_solver_v3, tableau
from tests import reference
from tests.test_unet import adm, compared, edm, figures_of, quick_jit, state_of

CHAIN = DiscreteVP(t_min=1e-3, t_first=1e-3)


def kind(group: str, wanted: str) -> list[str]:
    return [name for name, case in reference.cases(group).items() if case["kind"] == wanted]


def test_the_chain_equals_published():
    figures = figures_of("X_adm", "v3_schedule")
    t = figures["t_f64"]
    for name, ours in (("log_alpha", CHAIN.log_alpha(t)), ("sigma", CHAIN.sigma(t)), ("lambda", CHAIN.lam(t))):
        np.testing.assert_allclose(ours, figures[f"{name}_f64"], rtol=1e-11)


def network_of(name: str, kwargs: dict):
    """(network, params), wholly in float64."""
    case = reference.cases("X_adm")[name]
    network, shape = adm(case["network"], kwargs, dtype="float64")
    order = "new" if kwargs.get("use_new_attention_order") else "legacy"
    return network, {"params": from_guided_diffusion(state_of("X_adm", name), network, shape, order)}


def unguided(case: dict, y):
    """The NoiseFn of a case's network, told y if it knows classes."""
    network, params = network_of(case["unet"], case["unet_kwargs"])
    apply = lambda u, told: network.apply(params, u, told, y if network.num_classes else None)
    return noise_fn(apply, CHAIN, output="eps", label="node")


def guided(case: dict, y, noise):
    """`noise`, guided towards y by the case's classifier."""
    if not case["classifier"]:
        return noise
    classifier, params = network_of(case["classifier"], case["classifier_kwargs"])
    logits = labelled_logits_fn(lambda x, told: classifier.apply(params, x, told), CHAIN, "node", 1000)
    towards = lambda x, t: (jax.nn.log_softmax(logits(x, t)) * jax.nn.one_hot(y, 10, dtype=x.dtype)).sum(1)
    return classifier_guidance(noise, CHAIN, towards, case["scale"])


@pytest.mark.parametrize("name", kind("X_adm", "v3_wrapper"))
def test_guided_noise_equals_published(name, x64):
    case, figures = reference.cases("X_adm")[name], figures_of("X_adm", name)
    x, t = jnp.asarray(reference.nhwc(figures["x"]), jnp.float64), jnp.asarray(figures["t_f64"])
    y = figures["y"].astype(np.int32)
    noise = unguided(case, y)
    with_guidance, without = quick_jit(lambda x, t: (guided(case, y, noise)(x, t), noise(x, t)))(x, t)
    compared(without, reference.nhwc(figures["eps_unguided_f64"]), 1e-9, f"{name} unguided")
    compared(with_guidance, reference.nhwc(figures["eps_f64"]), 1e-9, f"{name} guided")
    if case["classifier"]:
        change = reference.nhwc(figures["eps_f64"] - figures["eps_unguided_f64"])
        compared(with_guidance - without, change, 1e-9, f"{name} guidance")


def statistics(name: str, n: int) -> EMS:
    """Reference README_X 2: made-up EMS at n + 1 nodes."""
    lam = np.linspace(CHAIN.lam(np.float64(1)), CHAIN.lam(np.float64(1e-3)), n + 1)
    r = np.linspace(-1, 1, n + 1)[:, None, None, None]
    values = []
    for k, base, amplitude in (("l", 0.9, 0.1), ("s", 0, 0.2), ("b", 0, 0.1)):
        p, q = (reference.normal(f"X/adm/ems/{name}/{k}{i}", (3, 16, 16)).astype(np.float64) for i in (0, 1))
        value = base + amplitude * (p * np.cos(2 * r) + q * r)
        values.append(reference.nhwc(value.astype(np.float32)).astype(np.float64))
    return EMS(CHAIN.t_of_lam(lam), lam, *values, {})


@pytest.mark.parametrize("name", kind("X_adm", "v3_sampling"))
def test_guided_samples_equal_published(name, x64):
    case, figures = reference.cases("X_adm")[name], figures_of("X_adm", name)
    y = figures["y"].astype(np.int32)
    bare = unguided(case, y)
    tame = lambda x, t: per_image(CHAIN.sigma(t), x) * x + 0.1 * bare(x, t)
    solve = quick_jit(lambda table, x: tableau.solve(guided(case, y, tame), table, x))
    x = jnp.asarray(reference.nhwc(figures["xT"]), jnp.float64)
    ems = statistics(name, case["n_stat"])
    for i, run in enumerate(case["runs"]):
        if run["solver"] == "dpmsolver_v3":
            options = dict(corrector="on", corrector_pseudo=True, indices=figures[f"indexes{i}_f64"])
            table = dpm_solver_v3.dpm_solver_v3(CHAIN, run["steps"], ems=ems, order=run["order"], **options)
        else:
            table = dpm_solver.dpm_solver_pp(CHAIN, run["steps"], order=run["order"], grid="time")
        compared(solve(table, x), reference.nhwc(figures[f"x{i}_f64"]), 1e-9, f"{name} {run['solver']} {run['steps']}")


@pytest.mark.parametrize("name", kind("X_edm", "v3_edm_wrapper"))
def test_noise_of_edm_equals_published(name, x64):
    case, figures = reference.cases("X_edm")[name], figures_of("X_edm", name)
    network, shape = edm(case["precond"], case["kwargs"], dtype="float64")
    params = {"params": from_edm(state_of("X_edm", case["same_weights_as"]), network, shape)}
    y = figures["class_labels"].astype(np.float64) if "class_labels" in figures else None
    noise = noise_fn(lambda u, told: network.apply(params, u, told, y), EDM(), output="edm", label="edm")
    eps = quick_jit(noise)(jnp.asarray(reference.nhwc(figures["x"])), jnp.asarray(figures["t"]))
    compared(eps, reference.nhwc(figures["eps_f64"]), 1e-9, name)
