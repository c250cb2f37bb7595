"""Solvers and samplers: from noise to images with a NoiseFn."""

from solvers import deis, dpm_solver, dpm_solver_v3, heun, pndm, unipc

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
}
