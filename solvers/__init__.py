"""Solvers and samplers: from noise to images with a NoiseFn."""

from solvers import dpm_solver, dpm_solver_v3

# Few-step solvers: name -> function (sde, steps, **options) -> Tableau.
SOLVERS = {"ddim": dpm_solver.ddim, "dpmpp": dpm_solver.dpm_solver_pp, "dpmv3": dpm_solver_v3.dpm_solver_v3}
