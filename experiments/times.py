"""Times that suit a model: those of GITS, along its own trajectories."""

import numpy as np

from ems.statistics import EMS
from experiments import samplers
from experiments.runs import Model
from score_sde import parallel
from score_sde.errors import UserError
from solvers import gits
from solvers.search import CHOICES

GITS = "gits"  # as the value of the option grid
NOISES = 32


def with_times(model: Model, solver: str, steps: int, options: dict, ems: EMS | None = None, *, seed: int = 0) -> dict:
    """The options with the times of GITS in the place of grid=gits; as they are where they ask for nothing of it.

    model: as sampled, guided or not. The times are those of NOISES draws of `seed`, and end where the solver would.
    UserError for a solver that has more than one evaluation per step.
    """
    if options.get("grid") != GITS:
        return options
    if solver not in CHOICES:
        raise UserError(f"grid=gits is for one evaluation per step, {solver} has others: use {', '.join(CHOICES)}")
    diffusion = model.diffusion
    without = {name: value for name, value in options.items() if name != "grid"}
    _, built = samplers.build_tableau(diffusion.sde, solver, steps, ems, **without)
    index = np.arange(NOISES)
    x = samplers.prior(diffusion, samplers.sample_keys(seed, index))
    noise = diffusion.noise_of(model.params, diffusion.conditions(index))
    times = gits.times(noise, diffusion.sde, x, steps, t_end=built.get("t_end"))
    if parallel.writes():
        print(f"times of GITS, of {NOISES} noises: {', '.join(f'{t:.4g}' for t in times)}")
    return without | dict(grid=times.tolist())
