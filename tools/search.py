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
import pathlib
import sys
import time
from collections.abc import Callable

import numpy as np
from absl import flags

from experiments import measuring, program, runs, samplers
from experiments.config import shown
from score_sde import VERSION, files, parallel
from score_sde.errors import UserError
from score_sde.guidance import Guidance
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


GUIDANCE = flags.DEFINE_float("guidance", None, "Search for the model guided with this scale.")


def main():
    path, held_out = search(
        runs.open_model(WORKDIR.value, CHECKPOINT.value, dataset=program.dataset_at()),
        SOLVER.value,
        STEPS.value,
        samplers.parse_options(OPTION.value),
        ems_path=EMS.value,
        noises=NOISES.value,
        minutes=MINUTES.value,
        seed=SEED.value,
        guidance=Guidance(GUIDANCE.value),
    )
    how = f"over {NOISES.value} other noises, {SOLVER.value} in {STEPS.value} evaluations"
    print(f"\nRMS distance to the fine solution {how}:")
    for name, distance in held_out.items():
        print(f"  {name:16s} {distance:.4f}  {100 * (distance / held_out['published'] - 1):+.0f} %")
    print(f"wrote {path}; use it by python sample.py --tableau={path}")


def search(
    model: runs.Model,
    solver: str,
    steps: int,
    given: dict,
    *,
    ems_path: str | None = None,
    noises: int = 128,
    minutes: float = 10.0,
    seed: int = 0,
    guidance: Guidance = measuring.NONE,
) -> tuple[pathlib.Path, dict[str, float]]:
    """(the file written, the distance on other noises of the published table, the best named grid, the searched one).

    given: options to hold fixed; guidance: of the model that is searched for; without, it is the model alone.
    """
    # ------------------------------------------------------------------------------ what to search
    ems = measuring.ems_of(model, ems_path, guidance) if solver == "dpmv3" else None
    diffusion = runs.with_guidance(model, guidance).diffusion
    if guidance.scale is None:
        diffusion = diffusion._replace(conditions=lambda index: None)
    sde = diffusion.sde
    build = functools.partial(samplers.build_tableau, sde, solver, steps, ems, guidance.scale)
    published, _ = build(**given)
    fine = dpm_solver_pp(sde, model.config.eval.fine_steps, order=2)
    tried_on, judge = (
        distance_to(fine, samplers.sampler(diffusion, model.params, each), noises) for each in (seed + 1, seed)
    )
    deadline = time.monotonic() + 60 * minutes

    def distance(options: dict) -> float:
        try:
            return tried_on(build(**options)[0])
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
        if time.monotonic() > deadline - 30 * minutes:  # half of the time is for the times
            break
    value, named = min(tried, key=lambda pair: pair[0])
    print(f"{len(tried)} combinations of options and grids; the best, {shown(named)}: {value:.4f}")
    end = sde.t_min if ems is None else ems.t[-1]
    times = np.array([*build(**named)[0].t, named.get("t_end") or end])
    with_times = lambda lam: named | {"grid": sde.t_of_lam(lam).clip(times[-1], times[0]).tolist()}
    lam, value = descend(lambda lam: distance(with_times(lam)), sde.lam(times), deadline)
    options = with_times(lam)

    # ------------------------------------------------------------------------------ judge, write
    rows = {"published": published, "best named grid": build(**named)[0], "searched": build(**options)[0]}
    held_out = {name: judge(table) for name, table in rows.items()}
    record = dict(
        solver=solver,
        steps=steps,
        options=options,
        checkpoint=model.identity,
        held_out_rms=held_out,
        searched_rms=value,
        noises=noises,
        seed=seed,
        command=" ".join(sys.argv),
        score_sde=VERSION,
    )
    guided = "" if guidance.scale is None else f"-guidance{guidance.scale:g}"
    path = model.results / "solvers" / f"step{model.step}-{solver}-{steps}{guided}.json"
    files.write(path, json.dumps(record, indent=2) + "\n")
    return path, held_out


def distance_to(fine, sample: Callable, noises: int) -> Callable:
    """tableau -> RMS distance, over pixels and noises, of its end points to those of the tableau `fine`."""
    solve = lambda table: sample(table, np.arange(parallel.round_up(noises)))
    ends = solve(fine)
    return lambda table: samplers.rms(solve(table) - ends)


if __name__ == "__main__":
    program.run(main)
