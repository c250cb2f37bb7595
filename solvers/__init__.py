"""Solvers and samplers: from noise to images with a NoiseFn."""

from solvers.dpm_solver import ddim, dpm_solver_pp
from solvers.dpm_solver_v3 import dpm_solver_v3

# Few-step solvers: name -> function (sde, steps, **options) -> Tableau.
SOLVERS = {"ddim": ddim, "dpmpp": dpm_solver_pp, "dpmv3": dpm_solver_v3}
