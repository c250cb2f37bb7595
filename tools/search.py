"""Find the times and options that a few-step solver does best with on a model.

    python -m tools.search --steps=5 [--solver=dpmv3] [--workdir=runs/digits] [--option order=2]
    python sample.py --tableau=runs/digits/solvers/step3000-dpmv3-5.json

What is minimised is the RMS distance to the fine solution of the ODE over some noises: first over the solver's options
and the named grids, then over the times between t_max and the end, one at a time. (Optimised grids: GITS, Chen et al.
2024; LD3, Tong et al. 2024; here together with measured statistics.) What is reported was measured on other noises. The
result, a solver's name and options, is a small file that sample.py takes.
"""

import functools
import itertools
import json
import sys
import time

import numpy as np
from absl import flags

from experiments import measuring, program, runs, samplers
from experiments.config import shown
from score_sde import VERSION, files, parallel
from score_sde.errors import UserError
from solvers.dpm_solver import dpm_solver_pp
from solvers.grids import GRIDS
from solvers.search import CHOICES, descend

WORKDIR = flags.DEFINE_string("workdir", None, "The run folder; the newest under runs/ if absent.")
CHECKPOINT = flags.DEFINE_integer("checkpoint", None, "Step of the checkpoint; the last if absent.")
SOLVER = flags.DEFINE_enum("solver", "dpmv3", list(CHOICES), "The solver.")
STEPS = flags.DEFINE_integer("steps", 5, "Network evaluations.", lower_bound=2)
OPTION = flags.DEFINE_multi_string("option", [], "An option of the solver to hold fixed, name=value; may be repeated.")
EMS = flags.DEFINE_string("ems", None, "EMS file for dpmv3; the run's own if absent.")
NOISES = flags.DEFINE_integer("noises", 128, "Noises to search on, and as many others to judge by.", lower_bound=2)
MINUTES = flags.DEFINE_float("minutes", 10.0, "The search stops here at the latest.", lower_bound=0.1)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the noises to judge by, as in evaluate.py; the search uses the next.")


def main():
    # ------------------------------------------------------------------------------ what to search
    model = runs.open_model(WORKDIR.value, CHECKPOINT.value)
    solver, steps, given = SOLVER.value, STEPS.value, samplers.parse_options(OPTION.value)
    ems = measuring.ems_of(model, EMS.value) if solver == "dpmv3" else None
    build = functools.partial(samplers.build_tableau, model, solver, steps, ems)
    published, _ = build(**given)
    search, judge = (distance_to_fine(model, seed) for seed in (SEED.value + 1, SEED.value))
    deadline = time.monotonic() + 60 * MINUTES.value

    def distance(options: dict) -> float:
        try:
            return search(build(**options)[0])
        except UserError:  # options that do not go together, or times that fall on one node
            return np.inf

    # ------------------------------------------------------------------------------ options, then times
    choices = {name: values for name, values in CHOICES[solver].items() if name not in given}
    combinations = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    grids = [given["grid"]] if "grid" in given else list(GRIDS)
    tried = []
    for grid, combination in itertools.product(grids, combinations):
        options = given | combination | {"grid": grid}
        tried.append((distance(options), options))
        if time.monotonic() > deadline - 30 * MINUTES.value:  # half of the time is for the times
            break
    value, options = min(tried, key=lambda pair: pair[0])
    named = options
    print(f"{len(tried)} combinations of options and grids; the best, {shown(options)}: {value:.4f}")
    sde, t = model.experiment.sde, build(**options)[0].t
    end = sde.t_min if ems is None else ems.t[-1]
    times = np.array([*t, options.get("t_end") or end])
    with_times = lambda lam: options | {"grid": sde.t_of_lam(lam).clip(times[-1], times[0]).tolist()}
    lam, value = descend(lambda lam: distance(with_times(lam)), sde.lam(times), deadline)
    options = with_times(lam)

    # ------------------------------------------------------------------------------ judge, write
    rows = {"published": published, "best named grid": build(**named)[0], "searched": build(**options)[0]}
    held_out = {name: judge(table) for name, table in rows.items()}
    print(f"\nRMS distance to the fine solution over {NOISES.value} other noises, {solver} in {steps} evaluations:")
    for name, found in held_out.items():
        print(f"  {name:16s} {found:.4f}  {100 * (found / held_out['published'] - 1):+.0f} %")
    record = dict(
        solver=solver,
        steps=steps,
        options=options,
        checkpoint=model.identity,
        held_out_rms=held_out,
        searched_rms=value,
        noises=NOISES.value,
        seed=SEED.value,
        command=" ".join(sys.argv),
        score_sde=VERSION,
    )
    path = model.results / "solvers" / f"step{model.step}-{solver}-{steps}.json"
    files.write(path, json.dumps(record, indent=2) + "\n")
    print(f"wrote {path}; use it by python sample.py --tableau={path}")


def distance_to_fine(model, seed: int):
    """tableau -> RMS distance, over pixels and noises, of its end points to those of the fine solution."""
    experiment = model.experiment
    index = np.arange(parallel.round_up(NOISES.value))
    sample = samplers.sampler(model, lambda params, *_: experiment.noise_of(params), seed)
    solve = lambda table: sample(table, index)
    fine = solve(dpm_solver_pp(experiment.sde, experiment.config.eval.fine_steps, order=2))
    return lambda table: samplers.rms(solve(table) - fine)


if __name__ == "__main__":
    program.run(main)
