"""Few-step solvers without statistics: equal to the published implementations, and of their theoretical order."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from score_sde import sde as sde_lib
from score_sde.errors import UserError
from solvers import SOLVERS, deis, dpm_solver, dpm_solver_v3, grids, heun, pndm, predictor_corrector, tableau, unipc
from tests import reference
from tests.mixture import Mixture
from tests.test_network_to_samples import tame_noise
from tests.test_solvers import GRIDS, SCHEDULES, end_points, fake_ems, problem, worst

# ------------------------------------------------------------------------------------ published end points


def published(row: dict, sde, t_end: float) -> tableau.Tableau:
    """The tableau of a row of the published tables."""
    grid = GRIDS[row["skip_type"]]
    if row["solver"] == "heun":
        return heun.heun(sde, row["steps"], grid=grid, t_end=t_end)
    last = row["denoise_to_zero"]
    options = dict(
        order=row["order"], grid=grid, lower_order_final=row["lower_order_final"], denoise_to_zero=last, t_end=t_end
    )
    if row["solver"] == "uni_pc":
        options |= dict(variant=row["variant"], prediction=row["algorithm_type"].removesuffix("_prediction"))
        return unipc.uni_pc(sde, row["steps"] + last, **options)
    # singlestep_fixed leaves out what is no whole step
    steps = row["steps"] - (row["steps"] % row["order"] if row["method"] == "singlestep_fixed" else 0)
    build = {"dpmsolver": dpm_solver.dpm_solver, "dpmsolver++": dpm_solver.dpm_solver_pp}[row["algorithm_type"]]
    return build(sde, steps + last, method=row["method"], solver_type=row["solver_type"], **options)


def errors_of_rows(name: str, sde, noise, dtype) -> np.ndarray:
    """Relative error of every row of a published table of baselines."""
    stored = reference.arrays(f"E_base_{name}")
    t_end = SCHEDULES[reference.description(f"E_base_{name}")["schedule"]][2]
    tables = [published(row, sde, t_end) for row in reference.rows(f"E_base_{name}")]
    x = jnp.asarray(reference.nhwc(stored["x_T"]), dtype)
    theirs = reference.nhwc(stored["x0_f64"])
    return np.array([worst(ours, x0) for ours, x0 in zip(end_points(noise, tables, x), theirs, strict=True)])


MIXTURES = ["vp", "cosine", "discrete", "edm", "cfg"]


@pytest.mark.parametrize("name", MIXTURES)
def test_published_solvers(name, x64):
    """DPM-Solver and DPM-Solver++ in all their forms, UniPC and Heun, against the published float64 end points."""
    sde, noise, _ = problem(name)
    assert errors_of_rows(name, sde, noise, jnp.float64).max() < 1e-9


@pytest.mark.parametrize("name", MIXTURES)
def test_published_solvers_in_float32(name, x64):
    """1e-5 in float32, or what a float32 network alone makes unavoidable, by the rule of DPM-Solver-v3's test.

    That is a matter of luck too, so the largest of three is taken, whose inputs differ by less than their rounding.
    """
    single, double = jnp.float32, jnp.float64
    sde, ideal, _ = problem(name)
    rounded = lambda x, t: ideal(x.astype(single).astype(double), t.astype(double)).astype(single)
    errors = errors_of_rows(name, sde, rounded, single)
    unavoidable = np.max(
        [
            errors_of_rows(name, sde, lambda x, t, shift=shift: rounded(x * (1 + shift), t).astype(double), double)
            for shift in (0.0, -2e-8, 2e-8)
        ],
        axis=0,
    )
    assert (errors < np.maximum(1e-5, 10 * unavoidable)).all()
    assert np.median(errors) < 3e-6


@pytest.mark.slow
def test_published_solvers_on_a_network(x64):
    assert errors_of_rows("net", sde_lib.VP(), tame_noise(), jnp.float64).max() < 1e-9


@pytest.mark.parametrize("name", reference.cases("E_schedules"))
def test_published_grids_and_singlestep_times(name):
    stored, info = reference.arrays("E_schedules"), reference.cases("E_schedules")[name]
    sde, _, t_end = SCHEDULES[name]
    for kind in GRIDS:
        if f"steps10_{kind}_f64" not in info["arrays"]:
            continue
        ours = grids.times(GRIDS[kind], sde, 10, t_end=t_end)
        np.testing.assert_allclose(ours, stored[f"{name}/steps10_{kind}_f64"], rtol=1e-9)
    for key in info["arrays"]:
        if not (key.startswith("singlestep") and key.endswith("_times_f64")):
            continue
        kind, order, steps = key.removeprefix("singlestep_").removesuffix("_times_f64").rsplit("_", 2)
        order, steps = int(order.removeprefix("order")), int(steps.removeprefix("steps"))
        orders = stored[f"{name}/{key.replace('times', 'orders')}"]
        table = dpm_solver.dpm_solver(sde, steps, order=order, grid=GRIDS[kind], t_end=t_end)
        starts = np.cumsum(orders) - orders
        np.testing.assert_allclose(table.t[starts], stored[f"{name}/{key}"][:-1], rtol=1e-9, err_msg=key)


# ------------------------------------------------------------------------------------ order of convergence

MIXTURE = Mixture(
    np.array([0.5, 0.3, 0.2]),
    np.array([[-0.8, 0.3, 0.1], [0.6, -0.5, 0.9], [0.2, 0.7, -0.6]]).reshape(3, 1, 1, 3),
    np.array([[0.3, 0.2, 0.4], [0.25, 0.35, 0.3], [0.2, 0.4, 0.25]]).reshape(3, 1, 1, 3),
)
LAM = (-1.5, 1.0)  # where this mixture's ODE is curved most


def within_lam(sde):
    start, end = (float(sde.t_of_lam(np.float64(lam))) for lam in LAM)
    return dataclasses.replace(sde, t_min=end, t_max=start)


SDES = {
    "vp": sde_lib.VP(),
    "cosine": sde_lib.CosineVP(),
    "ddpm": sde_lib.DiscreteVP(),
    "stable_diffusion": sde_lib.DiscreteVP(beta_min=0.85, beta_max=12.0, scaled=True),
    "subvp": sde_lib.SubVP(),
    "ve": sde_lib.VE(),
    "edm": sde_lib.EDM(),
    "flow": sde_lib.Flow(),
}
SDES = {name: within_lam(sde) for name, sde in SDES.items()}


def started_finely(n: int, order: int) -> np.ndarray:
    """n steps from 0 to 1, equal but for the first: step k = 1, 2, ... as long as h^(order / (k + 1)), h = 1 / n.

    A multistep solver starts with steps of order 1, 2, ..., whose errors would otherwise hide its own order: so long,
    the error of step k is of the size h^order.
    """
    lengths = np.ones(n) / n
    k = np.arange(1, order)
    lengths[: order - 1] = n ** (-order / (k + 1))
    return np.concatenate([[0.0], np.cumsum(lengths)]) / lengths.sum()


def lam_grid(sde, n: int, order: int) -> np.ndarray:
    t = sde.t_of_lam(LAM[0] + started_finely(n, order) * (LAM[1] - LAM[0]))
    t[0] = sde.t_max
    return t


def rho_grid(sde, n: int) -> np.ndarray:
    """Uniform in sigma / alpha."""
    t = sde.t_of_lam(-np.log(np.linspace(np.exp(-LAM[0]), np.exp(-LAM[1]), n + 1)))
    t[0] = sde.t_max
    return t


def multistep(build, order: int, convergence: int, **options):
    return convergence, lambda sde, n: build(sde, n, order=order, grid=lam_grid(sde, n, convergence), **options)


def singlestep(build, order: int, **options):
    return order, lambda sde, n: build(sde, n, order=order, method="singlestep_fixed", **options)


def v3(order: int, **options):
    def build(sde, n):
        ems = fake_ems(sde, 5760, (1, 1, 3))
        indices = np.round(5760 * started_finely(n, order)).astype(int)
        return dpm_solver_v3.dpm_solver_v3(sde, n, ems=ems, order=order, indices=indices, **unended, **options)

    return order, build


dpm, dpmpp, unended = dpm_solver.dpm_solver, dpm_solver.dpm_solver_pp, dict(lower_order_final=False)
# name: (order of convergence, (sde, evaluations) -> Tableau)
BUILDERS = {
    "ddim": (1, lambda sde, n: dpm_solver.ddim(sde, n)),
    **{
        f"{name}{p}{kind}_{solver_type}": (multistep if kind == "M" else singlestep)(
            build, p, *([2 if p == 3 else p] if kind == "M" else []), solver_type=solver_type, **method
        )
        for name, build in (("dpm", dpm), ("dpmpp", dpmpp))
        for p in (2, 3)
        for kind, method in (("M", dict(method="multistep", **unended)), ("S", {}))
        for solver_type in dpm_solver.SOLVER_TYPES
    },
    # the last of these steps is of order 2, so of error h^3
    "dpm3S_remainder": (3, lambda sde, n: dpm(sde, n - 1, order=3)),
    "dpmpp3S_time": (3, lambda sde, n: dpmpp(sde, n, order=3, method="singlestep_fixed", grid="time")),
    **{
        f"unipc{p}_{variant}_{prediction}": multistep(
            unipc.uni_pc, p, p + 1, variant=variant, prediction=prediction, **unended
        )
        for p in (1, 2, 3)
        for variant in ("bh1", "bh2")
        for prediction in unipc.PREDICTIONS
    },
    "unipc4_bh1_data": multistep(unipc.uni_pc, 4, 5, variant="bh1", **unended),
    "unipc1_vary_coeff": multistep(unipc.uni_pc, 1, 2, variant="vary_coeff", **unended),
    "unipc2_vary_coeff": multistep(unipc.uni_pc, 2, 1, variant="vary_coeff", **unended),
    "unipc3_vary_coeff": multistep(unipc.uni_pc, 3, 1, variant="vary_coeff", **unended),
    **{f"deis{p}": multistep(deis.deis, p, p) for p in deis.ORDERS},
    **{f"ipndm{p}": multistep(pndm.ipndm, p, min(p, 2)) for p in (1, 2)},
    **{f"ipndm{p}": (2, lambda sde, n, p=p: pndm.ipndm(sde, n, order=p, grid="logsnr")) for p in (3, 4)},
    "pndm2": (2, lambda sde, n: pndm.pndm(sde, n + 1, order=2, grid="logsnr")),
    "pndm4": (2, lambda sde, n: pndm.pndm(sde, n + 9, order=4, grid="logsnr")),
    "heun": (2, lambda sde, n: heun.heun(sde, n)),
    "dpmv3_order1": v3(1, corrector="off"),
    "dpmv3_order2": v3(2, corrector="off"),
    "dpmv3_order3": v3(3, corrector="off"),
    "dpmv3_corrected": v3(3),
    "dpmv3_degenerate": v3(3, corrector="off", degenerate=True),
}


@functools.cache
def exact_path():
    """x / alpha at both ends of LAM, which for one mixture is the same for every SDE; by an eighth-order method."""
    u = np.random.default_rng(0).normal(size=(4, 1, 1, 3)) * np.exp(-LAM[0])
    one = jnp.ones((), jnp.float64)
    slope = jax.jit(lambda lam, u: -jnp.exp(-lam) * MIXTURE.noise(u.reshape(4, 1, 1, 3), one, jnp.exp(-lam)).ravel())
    path = scipy.integrate.solve_ivp(slope, LAM, u.ravel(), method="DOP853", rtol=1e-12, atol=1e-13)
    return u, path.y[:, -1].reshape(u.shape)


@functools.cache
def run(name: str):
    return jax.jit(functools.partial(tableau.solve, MIXTURE.noise_fn(SDES[name])))


def error(name: str, table) -> float:
    """RMS distance of x / alpha to the exact path's end."""
    sde, (start, end) = SDES[name], exact_path()
    table = tableau.uniform(table, 13, (1, 1, 3))
    x = run(name)(table, jnp.asarray(sde.alpha(np.float64(sde.t_max)) * start))
    return float(np.sqrt(np.square(np.asarray(x) / sde.alpha(np.float64(sde.t_min)) - end).mean()))


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("solver", BUILDERS)
def test_order_of_convergence(solver, name, x64):
    """Halving the step divides the error by 2^order, on the exact noise of a mixture, for every SDE.

    Lower than their names are, as published: DPM-Solver and ++ 3M (half of the third-order term is missing) and UniPC
    with vary_coeff (terms of the corrector are missing). UniPC's corrector adds one. PNDM and iPNDM have order 2 on
    grids not uniform in sigma / alpha. v3: more nodes than here are needed to see more steps.
    """
    order, build = BUILDERS[solver]
    counts = (24, 48) if solver.startswith("dpmv3") else (48, 96)
    errors = [error(name, build(SDES[name], n)) for n in counts]
    assert abs(np.log2(errors[0] / errors[1]) - order) < 0.25, errors


@pytest.mark.parametrize("name", ["vp", "edm"])
def test_pndm_has_order_4_where_time_is_sigma_over_alpha(name, x64):
    errors = [error(name, pndm.pndm(SDES[name], n + 9, grid=rho_grid(SDES[name], n))) for n in (192, 384)]
    assert abs(np.log2(errors[0] / errors[1]) - 4) < 0.25, errors


# ------------------------------------------------------------------------------------ formulas of the papers


def eps_of(sde):
    return lambda x, t: np.asarray(MIXTURE.noise_fn(sde)(jnp.asarray(x), jnp.asarray(t)))


def transfer(sde, x, eps, s, t):
    """DDIM's step with a given noise, which Liu et al. 2022 call the transfer part."""
    return sde.alpha(t) / sde.alpha(s) * x + (sde.sigma(t) - sde.alpha(t) * sde.sigma(s) / sde.alpha(s)) * eps


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("solver", ["pndm2", "pndm4", "ipndm4"])
def test_pndm_by_its_own_algorithm(solver, name, x64):
    """F-PNDM and S-PNDM (Liu et al. 2022) and iPNDM, step by step."""
    sde = SDES[name]
    eps, n, past = eps_of(sde), 7, []
    t = np.linspace(sde.t_max, sde.t_min, n + 1)
    first = np.random.default_rng(1).normal(size=(2, 1, 1, 3)) * sde.sigma(t[0])
    x = first
    for s, e in itertools.pairwise(t):
        step = functools.partial(transfer, sde, x)
        past = [eps(x, s), *past]
        if solver == "pndm4" and len(past) < 4:
            middle = (s + e) / 2
            second = eps(step(past[0], s, middle), middle)
            third = eps(step(second, s, middle), middle)
            fourth = eps(step(third, s, e), e)
            combined = (past[0] + 2 * second + 2 * third + fourth) / 6
        elif solver == "pndm2" and len(past) < 2:
            combined = (past[0] + eps(step(past[0], s, e), e)) / 2
        else:
            p = min(len(past), int(solver[-1]))
            weights = {
                1: [1],
                2: [3 / 2, -1 / 2],
                3: [23 / 12, -16 / 12, 5 / 12],
                4: [55 / 24, -59 / 24, 37 / 24, -9 / 24],
            }
            combined = sum(w * value for w, value in zip(weights[p], past, strict=False))
        x = step(combined, s, e)
    table = {
        "pndm2": lambda: pndm.pndm(sde, n + 1, order=2),
        "pndm4": lambda: pndm.pndm(sde, n + 9),
        "ipndm4": lambda: pndm.ipndm(sde, n),
    }[solver]()
    ours = run(name)(tableau.uniform(table, 13, (1, 1, 3)), jnp.asarray(first))
    np.testing.assert_allclose(ours, x, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["vp", "cosine", "subvp", "ve", "edm"])
def test_deis_coefficients(name, x64):
    """C_k = int Psi(t, tau) g^2 / (2 sigma) L_k(tau) dtau (Zhang & Chen 2023), by adaptive quadrature in time."""
    sde, n = SDES[name], 5
    table = deis.deis(sde, n, order=4)
    t = grids.times("quadratic", sde, n)
    for i in (0, 1, 4):
        nodes = t[max(0, i - 3) : i + 1][::-1]
        for k, node in enumerate(nodes):
            others = np.delete(nodes, k)

            def integrand(tau, node=node, others=others, end=t[i + 1]):
                tau = np.float64(tau)
                transition = sde.alpha(end) / sde.alpha(tau)
                return (
                    transition
                    * sde.diffusion(tau) ** 2
                    / (2 * sde.sigma(tau))
                    * np.prod((tau - others) / (node - others))
                )

            theirs = scipy.integrate.quad(integrand, t[i], t[i + 1], epsrel=1e-10)[0]
            ours = table.predict[i, 1 + k, 0, 0, 0] * sde.sigma(node) / sde.alpha(node)
            np.testing.assert_allclose(ours, theirs, rtol=1e-8)


def test_heun_by_karras_algorithm(x64):
    """Karras et al. 2022, algorithm 1 with sigma = t and D = x - sigma eps; its last Euler step goes to 0."""
    sde = SDES["edm"]
    t = [*grids.times("edm", sde, 4), 0.0]
    first = np.random.default_rng(2).normal(size=(2, 1, 1, 3)) * t[0]
    x, eps = first, eps_of(sde)
    for s, e in itertools.pairwise(t):
        d = eps(x, s)
        euler = x + (e - s) * d
        x = euler if e == 0 else x + (e - s) * (d + eps(euler, e)) / 2
    ours = run("edm")(tableau.uniform(heun.heun(sde, 9), 13, (1, 1, 3)), jnp.asarray(first))
    np.testing.assert_allclose(ours, x, rtol=1e-12)


def test_phi():
    """phi_1 = (e^h - 1) / h and phi_(k+1) = (phi_k - 1 / k!) / h; no cancellation near 0."""
    for h in (-6.0, -0.5, 0.7, 10.0):
        expected = np.expm1(h) / h
        for k, factorial in ((1, 1), (2, 2), (3, 6), (4, 24)):
            np.testing.assert_allclose(dpm_solver.phi(k, h), expected, rtol=1e-11)
            expected = (expected - 1 / factorial) / h
    np.testing.assert_allclose([dpm_solver.phi(k, 0.0) for k in (1, 2, 3, 4)], [1, 1 / 2, 1 / 6, 1 / 24], rtol=1e-14)


# ------------------------------------------------------------------------------------ stochastic


def linear_response(sde, table, mean: float, variance: float):
    """(offset, factor of the start, factors of the noises) of a solver on data N(mean, variance), which is affine."""
    n = len(table.t)

    def eps(x, t):
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        return sigma * (x - alpha * mean) / (alpha**2 * variance + sigma**2)

    row = jnp.arange(n + 2)
    one_hot = lambda i: (row == i).astype(jnp.float64).reshape(-1, 1, 1, 1)
    x = np.asarray(tableau.solve(eps, table, one_hot(1), lambda i: one_hot(i + 2))).ravel()
    return x[0], x[1] - x[0], x[2:] - x[0]


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("order", [1, 2])
def test_weak_order_of_the_stochastic_solver(order, name, x64):
    """On Gaussian data the sample from a given x_T is Gaussian, its variance correct to this order, its mean exactly.

    (Exactly, because the expected prediction of x0 does not change along the reverse SDE.)
    """
    sde, mean, variance = SDES[name], 0.7, 0.4
    end, start = np.float64(sde.t_min), np.float64(sde.t_max)
    marginal = lambda t: sde.alpha(t) ** 2 * variance + sde.sigma(t) ** 2
    factor = sde.alpha(start) / sde.alpha(end) * marginal(end) / marginal(start)  # cov(x_t, x_T) / var(x_T)
    errors = []
    for n in (24, 48):
        table = dpm_solver.sde_dpm_solver_pp(sde, n, order=order, lower_order_final=False)
        offset, slope, noises = linear_response(sde, table, mean, variance)
        np.testing.assert_allclose(slope, factor, rtol=1e-11)
        np.testing.assert_allclose(offset, mean * (sde.alpha(end) - factor * sde.alpha(start)), rtol=1e-11)
        errors.append((noises**2).sum() - marginal(end) + factor**2 * marginal(start))
    assert abs(np.log2(errors[0] / errors[1]) - order) < 0.25, errors


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("order", [1, 2])
def test_stochastic_solver_is_exact_on_a_point(order, name, x64):
    """Where all data are one point x0 the prediction never changes: any number of steps gives q(x_t | x_T, x0)."""
    sde = SDES[name]
    end, start = np.float64(sde.t_min), np.float64(sde.t_max)
    offset, slope, noises = linear_response(sde, dpm_solver.sde_dpm_solver_pp(sde, 3, order=order), 0.7, 0.0)
    ratio = sde.sigma(end) ** 2 * sde.alpha(start) / sde.alpha(end) / sde.sigma(start) ** 2
    np.testing.assert_allclose(slope, ratio, rtol=1e-12)
    np.testing.assert_allclose(offset, 0.7 * (sde.alpha(end) - ratio * sde.alpha(start)), rtol=1e-12)
    np.testing.assert_allclose((noises**2).sum(), sde.sigma(end) ** 2 - (ratio * sde.sigma(start)) ** 2, rtol=1e-12)


def test_first_order_stochastic_step_is_ddpm_ancestral(x64):
    """With one step per node of the chain: Ho et al. 2020, algorithm 2, with the posterior's variance."""
    sde = sde_lib.DiscreteVP(t_min=500 / 999, t_max=504 / 999)
    t = np.arange(504, 499, -1) / 999
    table = dpm_solver.sde_dpm_solver_pp(sde, 4, order=1, grid=t)
    x, eps, z = np.random.default_rng(3).normal(size=(3, 1, 1, 1, 1))
    for i in range(4):
        node = 504 - i
        beta, kept, kept_next = sde._betas()[node], sde.alpha(t[i]) ** 2, sde.alpha(t[i + 1]) ** 2
        mean = (x - beta / np.sqrt(1 - kept) * eps) / np.sqrt(1 - beta)
        theirs = mean + np.sqrt((1 - kept_next) / (1 - kept) * beta) * z
        f = (table.sigma[i] * eps - x) / table.alpha[i]
        ours = table.predict[i, 0] * x + table.predict[i, 1] * f + table.noise[i] * z
        np.testing.assert_allclose(ours, theirs, rtol=1e-11)


def test_stochastic_samples_depend_on_their_own_key_alone():
    """A sample is the same in any batch; another key gives another sample."""
    sde = sde_lib.VP()
    table = jax.tree.map(np.float32, dpm_solver.sde_dpm_solver_pp(sde, 5))

    @jax.jit
    def sample(index):
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(index)
        draw = predictor_corrector.noise_of_keys(keys, (1, 1, 3))
        return tableau.solve(MIXTURE.noise_fn(sde), table, jnp.ones((len(index), 1, 1, 3)), draw)

    together, alone = sample(np.arange(4)), sample(np.arange(2, 3))
    np.testing.assert_allclose(together[2:3], alone, rtol=1e-5, atol=1e-6)
    assert np.abs(np.diff(together, axis=0)).min() > 1e-4


# ------------------------------------------------------------------------------------ all of them

WITHOUT_EMS = {name: build for name, build in SOLVERS.items() if name != "dpmv3"}


@pytest.mark.parametrize("solver", WITHOUT_EMS)
def test_steps_are_network_evaluations(solver):
    for steps in (12, 13):
        table = WITHOUT_EMS[solver](sde_lib.VP(), steps)
        assert len(table.t) == steps
        assert table.l.shape[1:] == (1, 1, 1)  # no coefficients per pixel, whose cost a network would notice


@pytest.mark.parametrize("solver", ["dpm", "dpmpp", "sde_dpmpp", "unipc"])
def test_denoise_to_zero_is_the_last_evaluation(solver, x64):
    """x0 at the end is the sample; it costs one of the evaluations."""
    sde = SDES["vp"]
    last, before = WITHOUT_EMS[solver](sde, 9, denoise_to_zero=True), WITHOUT_EMS[solver](sde, 8)
    assert len(last.t) == 9
    noise, draw = MIXTURE.noise_fn(sde), lambda i: jnp.full((2, 1, 1, 3), 0.3)
    x = jnp.asarray(np.random.default_rng(4).normal(size=(2, 1, 1, 3)))
    end, t = tableau.solve(noise, before, x, draw), jnp.asarray(sde.t_min)
    expected = (end - sde.sigma(t) * noise(end, t)) / sde.alpha(t)
    np.testing.assert_allclose(tableau.solve(noise, last, x, draw), expected, rtol=1e-12)


def test_all_deterministic_solvers_share_one_compilation():
    sde = sde_lib.VP()
    noise = MIXTURE.noise_fn(sde)
    shared = jax.jit(functools.partial(tableau.solve, noise))
    x = jax.random.normal(jax.random.key(0), (2, 1, 1, 3))
    builders = WITHOUT_EMS | {
        "dpmv3": functools.partial(dpm_solver_v3.dpm_solver_v3, ems=fake_ems(sde, 600, (1, 1, 3)))
    }
    deterministic = [name for name, build in builders.items() if build(sde, 13).noise is None]
    assert sorted({*SOLVERS} - {*deterministic}) == ["sde_dpmpp", "stochastic_heun"]
    for name in deterministic:
        table = builders[name](sde, 13)
        padded = shared(tableau.uniform(table, 13, (1, 1, 3)), x)
        if name in ("ddim", "unipc", "dpmv3"):
            np.testing.assert_allclose(padded, tableau.solve(noise, table, x), rtol=1e-4, atol=1e-5)
    assert shared._cache_size() == 1


def test_solvers_of_any_length_share_one_compilation():
    sde = sde_lib.VP()
    noise = MIXTURE.noise_fn(sde)
    shared = jax.jit(functools.partial(tableau.solve, noise))
    x = jax.random.normal(jax.random.key(0), (2, 1, 1, 3))
    for name, steps in (("ddim", 5), ("unipc", 8), ("deis", 12)):
        table = WITHOUT_EMS[name](sde, steps)
        alike = tableau.lengthened(tableau.uniform(table, 4, (1, 1, 3)), 12)
        ours = shared(alike, x, evaluations=np.int32(steps))
        np.testing.assert_allclose(ours, tableau.solve(noise, table, x), rtol=1e-4, atol=1e-5)
    assert shared._cache_size() == 1


def test_grid_given_by_the_user():
    """The grid's own times, for multistep and singlestep alike."""
    t = [1.0, 0.7, 0.5, 0.3, 0.1, 0.05, 0.01]
    for method in dpm_solver.METHODS:
        table = dpm_solver.dpm_solver(sde_lib.VP(), 6, method=method, grid=t)
        np.testing.assert_array_equal(table.t, t[:-1])
    np.testing.assert_array_equal(heun.heun(sde_lib.VP(), 12, grid=t).t, np.repeat(t, 2)[1:-1])


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda sde: dpmpp(sde, 2, order=3), "fewer than the order"),
        (lambda sde: dpmpp(sde, 3, order=3, denoise_to_zero=True), "fewer than the order"),
        (lambda sde: dpmpp(sde, 9, order=4), "order 4: use one of 1, 2, 3"),
        (lambda sde: dpmpp(sde, 9, order=2.0), "order 2.0"),
        (lambda sde: dpmpp(sde, 9, t_end="end"), "to t=end"),
        (lambda sde: dpmpp(sde, 9, method="adaptive"), "method 'adaptive': use one of multistep"),
        (lambda sde: dpmpp(sde, 9, solver_type="midpoint"), "solver_type 'midpoint'"),
        (lambda sde: dpm(sde, 8, method="singlestep_fixed"), "use --steps=6"),
        (lambda sde: dpm_solver.sde_dpm_solver_pp(sde, 9, order=3), "order 3"),
        (lambda sde: unipc.uni_pc(sde, 9, order=7), "order 7"),
        (lambda sde: unipc.uni_pc(sde, 4, order=5), "fewer than the order"),
        (lambda sde: unipc.uni_pc(sde, 9, variant="bh3"), "variant 'bh3'"),
        (lambda sde: unipc.uni_pc(sde, 9, prediction="v"), "prediction 'v'"),
        (lambda sde: deis.deis(sde, 9, order=5), "order 5"),
        (lambda sde: deis.deis(sde, 3), "fewer than the order 4"),
        (lambda sde: pndm.ipndm(sde, 9, order=5), "order 5"),
        (lambda sde: pndm.pndm(sde, 11), "warms up with 12 evaluations, got 11"),
        (lambda sde: pndm.pndm(sde, 20, order=3), "order 3: use one of 2, 4"),
        (lambda sde: heun.heun(sde, 1), "two evaluations each, got 1"),
        (lambda sde: dpmpp(sde, 3, grid=[1.0, 0.5, 0.7, 0.1]), "4 falling times"),
        (lambda sde: dpmpp(sde, 3, grid=[1.0, 0.5, 0.5, 0.1]), "4 falling times"),
        (lambda sde: dpmpp(sde, 3, grid=[1.0, 0.5, float("nan"), 0.1]), "4 falling times"),
        (lambda sde: dpmpp(sde, 3, grid=[1.2, 0.5, 0.3, 0.1]), r"in \(0, 1\]"),
        (lambda sde: dpmpp(sde, 3, grid=[1.0, 0.5, 0.3, 0.0]), r"in \(0, 1\]"),
        (lambda sde: dpmpp(sde, 3, grid=[1.0, 0.5, 0.1]), "4 falling times"),
        (lambda sde: dpmpp(sde, 3, grid=["a", "b"]), "4 falling times"),
        (lambda sde: dpmpp(sde, 3, grid=7), "4 falling times"),
        (lambda sde: dpmpp(sde, 3, grid=[1.0, 0.5, 0.3, 0.1], t_end=0.2), "below t_end=0.2"),
    ],
)
def test_bad_options_are_refused_in_one_line(build, words):
    with pytest.raises(UserError, match=words) as refusal:
        build(sde_lib.VP())
    assert "\n" not in str(refusal.value)
