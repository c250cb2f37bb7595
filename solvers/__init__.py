"""Solvers and samplers: from noise to images with a NoiseFn."""

import functools

import jax

from score_sde.denoiser import NoiseFn
from score_sde.errors import UserError
from score_sde.sde import SDE
from solvers import deis, dpm_solver, dpm_solver_v3, heun, pndm, tableau, unipc

# Few-step solvers: name -> function (sde, steps, **options) -> Tableau; steps are network evaluations.
SOLVERS = {
    "ddim": dpm_solver.ddim,
    "dpm": dpm_solver.dpm_solver,
    "dpmpp": dpm_solver.dpm_solver_pp,
    "sde_dpmpp": dpm_solver.sde_dpm_solver_pp,
    "dpmv3": dpm_solver_v3.dpm_solver_v3,
    "unipc": unipc.uni_pc,
    "deis": deis.deis,
    "pndm": pndm.pndm,
    "ipndm": pndm.ipndm,
    "heun": heun.heun,
    "stochastic_heun": heun.stochastic_heun,
}


def sample(noise: NoiseFn, sde: SDE, key, shape: tuple[int, ...], steps: int, *, solver: str = "dpmpp", **options):
    """Draw images of `shape` (B, H, W, C) with any NoiseFn by a few-step solver, on the default device.

    steps: network evaluations. options: those of the solver's function, such as ems=... for dpmv3, whose other options
        are the published ones for this number of evaluations if none is given; it ends where the EMS end.
    UserError for an unknown solver, and for dpmv3 without EMS. It compiles once for each NoiseFn and shape of table.
    What the NoiseFn closes over becomes a part of the program: for a network of gigabytes, call this within a function
    of its parameters that is jitted.
    """
    if solver not in SOLVERS:
        raise UserError(f"unknown solver {solver!r}: use one of {', '.join(SOLVERS)}")
    if solver == "dpmv3" and "ems" not in options:
        raise UserError("dpmv3 needs the statistics of this NoiseFn: ems=ems.measure(noise, sde, images)")
    if solver == "dpmv3" and options.keys() == {"ems"}:
        published = dpm_solver_v3.published_options(steps, sde)
        options |= published | dict(t_end=max(published["t_end"], float(options["ems"].t[-1])))
    table = SOLVERS[solver](sde, steps, **options)
    prior_key, key = jax.random.split(key)
    return _solve(noise, table, sde.prior_std * jax.random.normal(prior_key, shape), key)


@functools.partial(jax.jit, static_argnums=0)
def _solve(noise: NoiseFn, table: tableau.Tableau, x, key):
    return tableau.solve(noise, table, x, lambda i: jax.random.normal(jax.random.fold_in(key, i), x.shape))
